"""The page in a real browser: a forecaster's way from a window to probabilities, by mouse and by keyboard."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from matplotlib.colors import to_hex
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from pipelines import maps

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
SIZE, ASKED = 48, 16
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def seen() -> SimpleNamespace:
    """What the page did: requests to other hosts, errors, answers that were refusals."""
    return SimpleNamespace(abroad=[], errors=[], refusals=[])


@pytest.fixture
def page(browser, served, seen) -> Iterator[Page]:
    # Without motion the context rests on its last frame.
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page, home = context.new_page(), urlsplit(served.url).netloc

    def asked(request) -> None:
        if urlsplit(request.url).netloc not in (home, ""):
            seen.abroad.append(request.url)

    def said(message) -> None:
        # That an answer was refused is in `refusals`.
        if message.type == "error" and "Failed to load resource" not in message.text:
            seen.errors.append(message.text)

    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("response", lambda answer: answer.status >= 400 and seen.refusals.append(answer.url))
    yield page
    context.close()
    assert not seen.abroad
    assert not seen.errors


@pytest.fixture
def drawn(served, http) -> dict[str, object]:
    """Status of a forecast that is there already."""
    answer = http.post("/v1/forecasts", params={"wait": "true"}, json=served.request(guidance={}))
    assert answer.status_code == 200, answer.text
    return answer.json()


def pixels(page: Page, canvas: str) -> str:
    return page.evaluate(f"document.getElementById('{canvas}').toDataURL()")


def colour(page: Page, canvas: str, row: int, column: int) -> str:
    """Of a pixel of the grid, whose row 0 lies in the south."""
    where = [canvas, (column + 0.5) / SIZE, 1 - (row + 0.5) / SIZE]
    rgba = page.evaluate(
        """([id, x, y]) => {
            const canvas = document.getElementById(id);
            return [...canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
        }""",
        where,
    )
    return to_hex(np.array(rgba[:3]) / 255)


def numbers(cell: str) -> list[float]:
    return [float(found) / 100 for found in re.findall(r"\d+\.\d", cell)]


def table(page: Page) -> np.ndarray:
    """Probability and both ends of its interval at each lead time, as the page tells them."""
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#point-table tbody tr").all()]
    return np.array([numbers(probability) + numbers(interval) for _, probability, interval in rows])


def slide(slider: Locator, to: int) -> None:
    """By keyboard: the same for all browsers."""
    slider.press("Home")
    for _ in range(to):
        slider.press("ArrowRight")


def counted(http, number: str, threshold: float, radius: float) -> np.ndarray:
    """Share of members (T, H, W) as the API has it."""
    path, params = f"/v1/forecasts/{number}/exceedance", {"threshold": threshold, "radius": radius}
    found = http.get(path, params=params).json()
    counts, known = (np.frombuffer(base64.b64decode(found[name]), "<u2") for name in ("counts", "known"))
    return (counts / known).reshape(found["shape"])


def test_from_a_window_to_the_probability_at_a_point(served, http, page, seen):
    page.add_init_script(
        """window.progressed = [];
        addEventListener("DOMContentLoaded", () => new MutationObserver(() => progressed.push(
            document.getElementById("progress").value)).observe(
            document.getElementById("progress-said"), { childList: true }));"""
    )
    page.goto(served.url)

    # The window, and what was observed: frames are stepped through, in the report's colours.
    listed = http.get("/v1/archives/storms/events").json()["windows"]
    window = next(each for each in listed if each["event"] != listed[0]["event"])
    observed = http.post("/v1/context", json={"archive": "storms", **window}).json()
    start = observed["times"][2][:16].replace("T", " ")
    page.select_option("#event", window["event"])
    expect(page.locator("#context-time")).to_contain_text(f"{start} UTC, frame 3 of 3")
    frame = np.frombuffer(base64.b64decode(observed["data"]), np.uint8).reshape(observed["shape"])[-1]
    row, column = (int(n) for n in np.unravel_index(frame.argmax(), frame.shape))
    level = np.searchsorted(maps.VIL_LEVELS, frame[row, column], side="right") - 1
    assert colour(page, "context-map", row, column) == maps.VIL_COLOURS[level]
    last = pixels(page, "context-map")
    page.click("#context-back")
    expect(page.locator("#context-time")).to_contain_text("frame 2 of 3")
    assert pixels(page, "context-map") != last

    # The forecast, as members come.
    page.fill("#members", str(ASKED))
    page.fill("#steps", "2")
    page.click("#draw")
    expect(page.locator("#progress-said")).to_contain_text(f"{ASKED} of {ASKED} members drawn. Complete.")
    expect(page.locator("#map-when")).to_contain_text(f", {ASKED} members")
    expect(page.locator("#resolvable")).to_contain_text("16 members can tell no less than 6.3 %")
    progressed = page.evaluate("progressed")
    assert progressed == sorted(progressed)
    assert progressed[-1] == ASKED
    assert len(set(progressed)) > 1

    # The map is of the counts; another threshold is another map.
    number = urlsplit(page.url).fragment
    status = http.get(f"/v1/forecasts/{number}").json()
    thresholds, radii = status["levels"]["thresholds"], status["levels"]["radii_km"]
    before = pixels(page, "map")
    slide(page.locator("#threshold"), 0)
    expect(page.locator("#map-title")).to_contain_text(f"≥ {thresholds[0]:g}")
    assert pixels(page, "map") != before
    slide(page.locator("#lead"), 1)
    expect(page.locator("#map-when")).to_contain_text("(+20 min)")
    share = counted(http, number, thresholds[0], 0)[1]
    row, column = (int(n) for n in np.unravel_index(np.abs(share - 0.5).argmin(), share.shape))
    palette = maps.probabilities()
    assert colour(page, "map", row, column) == to_hex(palette.cmap(palette.norm(share[row, column])))

    # A point: what is shown is what the API says, and within a radius it is no less likely.
    box = page.locator("#map").bounding_box()
    assert box is not None
    x, y = (column + 0.5) / SIZE * box["width"], (1 - (row + 0.5) / SIZE) * box["height"]
    page.locator("#map").click(position={"x": x, "y": y})
    expect(page.locator("#readout")).to_contain_text(
        f"Row {row}, column {column}: {100 * share[row, column]:.1f}"[:-1]
    )
    expect(page.locator("#point-said")).to_contain_text(f"Row {row}, column {column}: probability of VIL")
    said = http.get(f"/v1/forecasts/{number}/point", params={"row": row, "column": column}).json()
    smaller = np.zeros(2)
    for r, radius in enumerate(radii):
        slide(page.locator("#radius"), r)
        expect(page.locator("#map-title")).to_contain_text(f"within {radius:g} km" if radius else "VIL")
        expected = [said[name][r][0] for name in ("probability", "ci_low", "ci_high")]
        np.testing.assert_allclose(table(page), np.transpose(expected), atol=0.00051)
        assert (table(page)[:, 0] >= smaller).all()
        smaller = table(page)[:, 0]

    with page.expect_download() as download:
        page.get_by_text("Result, NetCDF").click()
    assert download.value.path().read_bytes().startswith(b"\x89HDF")
    assert not seen.refusals


def test_beside_the_guided_forecast_lies_the_one_at_its_expected_intensity(served, page, seen):
    page.goto(served.url)
    page.fill("#members", "4")
    page.fill("#steps", "2")
    page.check("#guided")
    page.fill("#deviations", "2")
    page.check("#compare")
    page.click("#draw")
    expect(page.locator("#map-beside-when")).to_contain_text(", 4 members")
    expect(page.locator("#map-title")).to_contain_text("μ + 2 σ")
    expect(page.locator("#map-beside-title")).to_contain_text("μ: probability of VIL ≥ ")
    expect(page.locator("#draw")).to_be_enabled()
    requested = [
        float(re.search(r"requested ([\d.e-]+), achieved [\d.e-]+", page.inner_text(f"#{name}"))[1])
        for name in ("map-functional", "map-beside-functional")
    ]
    assert requested[0] > requested[1]
    left, right = (page.locator(name).bounding_box() for name in ("#map", "#map-beside"))
    assert left["y"] == pytest.approx(right["y"], abs=1)
    assert left["width"] == pytest.approx(right["width"], abs=1)
    assert page.locator("#event-table tbody tr").count() == 2
    assert not seen.refusals


def test_on_a_telephone_and_by_keyboard_alone(served, page, seen, drawn):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"{served.url}/#{drawn['id']}")
    expect(page.locator("#map-when")).to_contain_text(f", {ASKED} members")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "map":
            break
    else:
        pytest.fail("the map cannot be reached by Tab")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    middle = SIZE // 2
    expect(page.locator("#readout")).to_contain_text(f"Row {middle + 1}, column {middle + 10}: ")
    page.keyboard.press("Enter")
    expect(page.locator("#point-table")).to_be_visible()
    assert len(table(page)) == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((field) => !field.labels.length && !field.ariaLabel).map((field) => field.id)"
    )
    assert not unlabelled
    assert not seen.refusals


def test_what_is_wrong_is_said_in_words_and_names_are_no_markup(served, page, seen):
    page.goto(served.url)
    expect(page.locator("#context-empty")).to_be_hidden()
    page.fill("#events", '[{"name": "rain", "treshold": 3}]')
    page.click("#check")
    expect(page.locator("#events-said")).to_contain_text("'treshold' is unknown")
    page.fill("#events", "[")
    page.click("#draw")
    expect(page.locator("#events-said")).to_contain_text("Events are not JSON")
    name = "<img src=x onerror=alert(1)>"
    page.fill("#events", json.dumps([{"name": name, "variable": "vil", "threshold": 60, "units": "1"}]))
    page.fill("#members", "100000")
    page.click("#draw")
    expect(page.locator("#errors")).to_contain_text("Members: needed a whole number from 2 to 256")
    page.fill("#members", "4")
    page.fill("#steps", "2")
    page.click("#draw")
    expect(page.locator("#progress-said")).to_contain_text("Complete.")
    expect(page.locator("#errors")).to_be_empty()
    expect(page.locator("#event-table tbody th")).to_have_text(name)
    assert page.locator("img").count() == 0


def test_with_a_token_it_is_asked_for_once_and_sent_with_downloads(served, page, drawn):
    def door(route) -> None:
        if route.request.headers.get("authorization") == "Bearer a-token-of-this-test":
            route.continue_()
        else:
            detail = [{"loc": ["header", "Authorization"], "msg": "needed Authorization: Bearer TOKEN"}]
            route.fulfill(status=401, json={"detail": detail})

    page.route("**/v1/**", door)
    page.goto(f"{served.url}/#{drawn['id']}")
    page.fill("#token", "another")
    page.keyboard.press("Enter")
    expect(page.locator("#token-said")).to_have_text("This token was not accepted.")
    page.fill("#token", "a-token-of-this-test")
    page.keyboard.press("Enter")
    expect(page.locator("#map-when")).to_contain_text(f", {ASKED} members")
    expect(page.locator("#token-form")).to_be_hidden()
    with page.expect_download() as download:
        page.get_by_text("Result, NetCDF").click()
    assert download.value.path().read_bytes().startswith(b"\x89HDF")
