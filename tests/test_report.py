"""The page: complete in itself, says what the numbers say, and draws north where it belongs."""

import base64
import dataclasses
import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny_forecast import persist, write_forecast
from tiny_scored import calibrated, sevir, write_reduced

from pipelines import maps, windows
from pipelines import report as stage
from pipelines.archives import store, synthetic
from pipelines.errors import InputError
from pipelines.events import Event
from pipelines.prepare import prepare
from pipelines.report import headline, report
from pipelines.score import open_forecast, score
from pipelines.series import Window
from pipelines.tasks import TASKS, Tiles

TASK = TASKS["sevir"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory, ray_cluster):
    return sevir(tmp_path_factory.mktemp("report"), events=4, seed=5)


@pytest.fixture(scope="module")
def keys(archive):
    return [Window(str(e), start) for e in archive.root["event"].values[:2] for start in (0, 12)]


@pytest.fixture(scope="module")
def forecasts(tmp_path_factory, archive, keys):
    folder = tmp_path_factory.mktemp("forecasts")
    last = persist(TASK, archive, keys)
    truth = windows.read(TASK, archive, keys)["target"][:, None, ..., 0].astype(np.float32)
    half = (last + truth) / 2
    half[0, 0, :, :9, :9] = np.nan
    return [
        write_forecast(str(folder / "p.zarr"), TASK, archive, keys, last),
        write_forecast(str(folder / "e.zarr"), TASK, archive, keys, half, forecaster="<earthformer>"),
    ]


@pytest.fixture(scope="module")
def cards(forecasts, archive):
    return score(forecasts, archive.url, progress=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory, forecasts, archive, cards):
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(forecasts, archive.url, str(out), cases=2)
    return out.read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_the_network(page):
    assert not re.search(r"https?://|//cdn|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,40})', page)
    # Lead time: CSI-M, MSE, CRPS and six thresholds; reliability, ROC and spectrum; then two cases.
    assert len(sources) == 9 + 3 + 2
    assert all(
        source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in sources
    )
    assert len(page) < 4_000_000


def test_the_page_says_what_it_is_of(page, cards, archive):
    assert page.count("<table>") == 5
    for text in (
        "protocol “pooled”",
        "protocol “frame-averaged”",
        "MSE ×10⁻³ (0–1 scale)",
        "wettest of all 4",
    ):
        assert text in page
    for identity in (archive.config_hash, *(c.forecast_hash for c in cards), *(c.run_hash for c in cards)):
        assert identity in page
    assert f"{cards[0].counts[0].result()['CSI-M']:.4f}" in page
    assert "4 windows of 2 events, 12 lead times of 5 to 60 minutes" in page
    assert f"earthformer score --forecast {cards[0].forecast}" in page
    assert "<earthformer>" not in page
    assert "&lt;earthformer&gt;" in page


def test_frames_are_drawn_in_the_vil_colours(page):
    encoded = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert encoded is not None
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded.group(1)))).convert("RGB"))
    found = {tuple(colour) for colour in image.reshape(-1, 3)[::7].tolist()}
    for colour in (maps.VIL_COLOURS[1], maps.VIL_COLOURS[3]):
        assert tuple(bytes.fromhex(colour[1:])) in found
    assert image.shape[1] > 1200


def test_the_same_page_twice(tmp_path, page, forecasts, archive, cards):
    out = tmp_path / "again.html"
    made = partial(report, forecasts, archive.url, str(out), cards=cards)
    assert made(cases=2).written
    again = out.read_text(encoding="utf-8")
    shown, again_shown = (text.split("<style>")[1].split("<pre>")[0] for text in (page, again))
    assert shown == again_shown
    # It is not made a third time, unless it is another, or was cut off.
    assert not made(cases=2).written
    assert made(cases=1).written
    out.write_text(again[:-100])
    assert made(cases=2).written
    assert out.read_text(encoding="utf-8") == again


def test_cards_of_other_forecasts_are_refused(tmp_path, forecasts, archive, cards):
    with pytest.raises(InputError, match="score cards are not of the forecasts"):
        report(forecasts, archive.url, str(tmp_path / "r.html"), cards=cards[::-1])
    assert not (tmp_path / "r.html").exists()


def test_row_0_is_south_for_sevir_and_north_for_radar(tmp_path, forecasts, archive, ray_cluster):
    view = maps.view(open_forecast(forecasts[0], archive), 0)
    assert view.origin == "lower"
    np.testing.assert_allclose(view.extent, (0, 384, 0, 384), atol=1e-6)

    synthetic.write_radar(tmp_path / "raw", sequences=1, seed=0)
    prepare("radar", str(tmp_path / "raw"), str(tmp_path / "radar.zarr"), progress=False)
    radar = store.open_archive(str(tmp_path / "radar.zarr"))
    task = dataclasses.replace(TASKS["radar"], tiles=Tiles(size=32), context=2, target=2)
    chosen = [Window(str(radar.root["sequence"].values[0]), start, (16, 32)) for start in (0, 4)]
    url = write_forecast(str(tmp_path / "f.zarr"), task, radar, chosen, persist(task, radar, chosen))
    view = maps.view(open_forecast(url, radar), 0)
    assert view.origin == "upper"
    np.testing.assert_allclose(view.extent, (0, 32, 0, 32), atol=1e-6)
    report([url], radar.url, str(tmp_path / "radar.html"))
    page = (tmp_path / "radar.html").read_text(encoding="utf-8")
    assert "tile at row 16, column 32" in page
    assert "There is no other forecast" in page
    assert "MSE (mm/h)²" in page


def test_cases_follow_from_the_truth_alone(forecasts, archive, keys):
    chosen = [dict(stage._choose(open_forecast(url, archive), archive, 3)) for url in forecasts]
    assert chosen[0] == chosen[1]
    means = windows.read(TASK, archive, keys)["target"].astype(float).mean((1, 2, 3, 4))
    indices = list(chosen[0])
    assert indices[0] == int(np.argmax(means))
    assert indices[1] == int(np.argsort(means, kind="stable")[1])
    assert len(set(indices)) == 3
    assert "at random, with seed 0" in chosen[0][indices[2]]


# -------------------------------------------------------------------------------------------- ensembles


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, archive, keys):
    """An ensemble of 20 with two events; its fourth member has failed in every window."""
    folder = tmp_path_factory.mktemp("ensemble")
    truth = windows.read(TASK, archive, keys)["target"][..., 0].astype(np.float32)
    members = calibrated(truth, 20).clip(0, 254)
    members[:, 3] = np.nan
    near = Event("strong <nearby>", "vil", 74, "1", radius=10.0)
    soon = Event("very strong soon", "vil", 160, "1", lead_time=(5, 20))
    return write_reduced(
        str(folder / "m.zarr"), TASK, archive, keys, members, events=(near, soon), keep_members=True
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory, forecasts, ensemble, archive):
    out = tmp_path_factory.mktemp("both") / "report.html"
    report([forecasts[0], ensemble], archive.url, str(out), cases=1)
    return out.read_text(encoding="utf-8")


def test_the_page_of_an_ensemble_shows_its_members_and_probabilities(both):
    # Also spread over error and ranks; the case has members, probabilities and events.
    assert len(re.findall(r'src="', both)) == 10 + 4 + 4
    assert both.count("<table>") == 7
    for text in (
        "Reliability",
        "Relative operating characteristic",
        "Rank histogram",
        "Power spectrum",
        "Prediff (20 members): the truth and the first 15 members",
        "probability of reaching a threshold",
        "probability of “strong &lt;nearby&gt;” and “very strong soon”",
        "each member by itself",
        "hold no value",
        "--members 20 --events EVENTS.yaml",
        "--keep-members",
        "--forecaster persistence --task sevir",
    ):
        assert text in both, text
    assert not re.search(r"https?://|<script|<link|@import|url\(", both)
    assert len(both) < 4_000_000


def test_members_and_probabilities_are_drawn_as_they_are(monkeypatch, ensemble, archive):
    drawn = []
    monkeypatch.setattr(maps, "draw", lambda view, rows, colours: drawn.append(rows) or Figure())
    source = open_forecast(ensemble, archive)
    stage.report([ensemble], archive.url, "memory://drawn/report.html", cases=1)
    frames, stamps, shares, asked = drawn
    (index, _), *_ = stage._choose(source, archive, 1)
    members = source.read_members(index, index + 1)[0, ..., 0].numpy()
    np.testing.assert_array_equal(stamps[0].fields[1], members[0, -1])
    np.testing.assert_array_equal(stamps[1].fields[-1], members[14, -1])
    assert np.ma.getmaskarray(stamps[0].fields[4]).all()
    np.testing.assert_allclose(frames[-1].fields[-1], np.nanmean(members, axis=0)[-1], rtol=1e-5)
    threshold = float(shares[-1].name.removeprefix("≥ "))
    of_known = (members[:, -1] >= threshold).sum(0) / 19
    np.testing.assert_allclose(shares[-1].fields[-1], of_known, atol=1e-6)
    np.testing.assert_array_equal(
        shares[-1].outlines[-1], np.ma.filled(frames[1].fields[-1] >= threshold, False)
    )
    stored = source.store.root["probability"].isel(window=index).values
    assert [row.name for row in asked] == ["strong <nearby>", "very strong soon"]
    np.testing.assert_array_equal(asked[1].fields[1], stored[1])
    assert asked[0].titles == ["low end of interval", "probability", "high end of interval"]


def test_events_are_shown_where_no_members_were_kept(tmp_path, archive, keys):
    truth = windows.read(TASK, archive, keys)["target"][..., 0].astype(np.float32)
    event = Event("wet", "vil", 16, "1")
    url = write_reduced(str(tmp_path / "f.zarr"), TASK, archive, keys, calibrated(truth, 3), events=[event])
    report([url], archive.url, str(tmp_path / "r.html"), cases=1)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Prediff (mean of 3): probability of “wet”" in page
    assert "the first" not in page


# -------------------------------------------------------------------------------------------- sentences


def beating(card, hits: float, errors: float):
    """The card with more hits, and with its squared errors times a factor."""
    better = []
    for counts in card.counts:
        gain = (counts.misses * hits).to(torch.int64)
        better.append(dataclasses.replace(counts, hits=counts.hits + gain, misses=counts.misses - gain))
    return dataclasses.replace(
        card,
        forecaster="model",
        counts=tuple(better),
        errors=dataclasses.replace(card.errors, squared=card.errors.squared * errors),
    )


def test_headline_names_the_winner_of_each_score(cards):
    base = cards[0]
    everywhere = headline([base, beating(base, 0.9, 0.5)])
    assert re.match(r"Model is better on CSI-M \(0\.\d+ against 0\.\d+\) and MSE ×10⁻³ \(", everywhere)
    assert "Model has the higher CSI at every threshold." in everywhere
    split = headline([base, beating(base, 0.9, 2.0)])
    assert "Model is better on CSI-M" in split
    assert "; persistence is better on MSE" in split
    same = headline([base, dataclasses.replace(base, forecaster="model")])
    assert same.startswith("None is better on CSI-M and MSE ×10⁻³.")
    alone = headline([base])
    assert alone.startswith("Persistence: CSI-M 0.")
    three = headline([base, beating(base, 0.9, 0.5), dataclasses.replace(base, forecaster="other")])
    assert re.search(r"against 0\.\d+ of (persistence|other)\)", three)
