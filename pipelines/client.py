"""A client of the service: a forecast on demand, from Python and from the terminal."""

import base64
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import xarray as xr
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.errors import InputError
from pipelines.events import Event

URL = "http://127.0.0.1:8000"


def request(
    url: str = URL,
    *,
    event: str | None = None,
    start: int = 0,
    tile: tuple[int, int] | None = None,
    archive: str | None = None,
    context: xr.Dataset | None = None,
    members: int | None = None,
    until_ci: float | None = None,
    events: Sequence[Event] = (),
    quantiles: Sequence[float] = (),
    keep_members: bool = False,
    sampler: str = "dpm++",
    steps: int = 20,
    deviations: float | None = None,
    strength: float | None = None,
    seed: int = 0,
    deadline: float | None = None,
    token: str | None = None,
    progress: bool = False,
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Ask a service for an ensemble forecast, and wait for it; to be interrupted cancels it.

    Args:
        url: of the service.
        event: series of the archive (SEVIR event, radar sequence, ENSO source).
        start: index of the context's first frame in it.
        tile: radar: first row and column of the tile.
        archive: name that the service has for it; default: its only one.
        context: instead of these, one variable (time, y, x) with CF attributes: units, times, `grid_mapping`.
        members: of the ensemble, 32 unless said; with `until_ci` at most.
        until_ci: draw until no event's interval has a larger half-width.
        events: whose probabilities are wanted.
        quantiles: from 0 to 1.
        keep_members: have every member in the result.
        sampler: `ddpm`, `ddim`, `dpm++` or `unipc`.
        steps: calls of the denoiser a member.
        deviations: n of the functional's mu + n sigma, to guide the forecast.
        strength: scale of the guidance; default: the alignment network's own.
        seed: members follow from it.
        deadline: in seconds; what there is by then is returned, `status` being partial.
        token: bearer token.
        progress: show a progress bar.

    Returns:
        The forecast (member, lead_time, y, x) with its probabilities, and the service's own words on it.

    Raises:
        InputError: no service answers, or it refuses, in its words; the forecast failed or was cancelled.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(60, read=None)) as http:
            asked = {
                "context": _packed(context)
                if context is not None
                else _named(http, archive, event, start, tile),
                "members": members,
                "until_ci": until_ci,
                "events": [asdict(each) for each in events],
                "quantiles": list(quantiles),
                "keep_members": keep_members,
                "sampler": sampler,
                "steps": steps,
                "guidance": None if deviations is None else {"deviations": deviations, "strength": strength},
                "seed": seed,
                "deadline": deadline,
            }
            status = _followed(http, asked, progress)
            if status["status"] not in ("complete", "partial"):
                raise InputError(f"the forecast has {status['status']}: {status['error']}")
            answer = http.get(f"/v1/forecasts/{status['id']}/result")
            _check(answer)
            found = xr.open_dataset(io.BytesIO(answer.content), engine="h5netcdf").load()
            return found, status
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"{url}: {error or type(error).__name__}; needed a running `earthformer serve`"
        ) from error


def _named(
    http: httpx.Client, archive: str | None, event: str | None, start: int, tile: tuple[int, int] | None
) -> dict[str, Any]:
    """The reference to a context; what is not said is looked up where there is no choice."""
    if archive is None:
        known = _check(http.get("/v1/models")).json()["models"][0]["archives"]
        if len(known) != 1:
            raise InputError(
                f"the service has the archives {', '.join(known) or '(none)'}: needed one of them"
            )
        archive = known[0]
    if event is None:
        found = _check(http.get(f"/v1/archives/{archive}/events")).json()["windows"]
        names = list(dict.fromkeys(window["event"] for window in found))
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise InputError(f"no event is given: needed one of archive {archive}, such as {some}")
    return {"archive": archive, "event": event, "start": start, "tile": tile}


def _packed(context: xr.Dataset) -> dict[str, Any]:
    """A context as a zipped Zarr."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "context.zarr")
        context.drop_encoding().to_zarr(path, zarr_format=3, consolidated=False)
        packed = shutil.make_archive(str(path), "zip", path)
        return {"zarr_zip": base64.b64encode(Path(packed).read_bytes()).decode()}


def _followed(http: httpx.Client, asked: dict[str, Any], progress: bool) -> dict[str, Any]:
    """The last status of a forecast that lives as long as this connection."""
    status: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = progress and sys.stdout.isatty()
    with Progress(*columns, transient=True, disable=not shown) as bar:
        task = bar.add_task("members", total=None)
        for status in _statuses(http, asked):
            count = status["members"]
            bar.update(task, completed=count["drawn"] + count["failed"], total=count["asked"])
    if not status:
        raise InputError("the service closed the connection: needed it to be running")
    return status


def _statuses(http: httpx.Client, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    accept = {"Accept": "application/x-ndjson"}
    with http.stream("POST", "/v1/forecasts", json=asked, headers=accept) as answer:
        if answer.is_error:
            answer.read()
        _check(answer)
        for line in answer.iter_lines():
            yield json.loads(line)


def _check(answer: httpx.Response) -> httpx.Response:
    """
    Raises:
        InputError: it is an error, in the service's words.
    """
    if not answer.is_error:
        return answer
    try:
        first = answer.json()["detail"][0]
        said = f"{'.'.join(map(str, first['loc'][1:]))} {first['msg']}".strip()
    except (ValueError, LookupError, TypeError):
        said = answer.text[:200] or answer.reason_phrase
    wait = answer.headers.get("Retry-After")
    raise InputError(f"the service answers {answer.status_code}: {said}" + (f" ({wait} s)" if wait else ""))


def table(status: dict[str, Any]) -> Table:
    """The probabilities of a forecast's events with their intervals, for the terminal."""
    found = Table(title="probabilities; of a field the highest, and where", title_justify="left")
    found.add_column("event", overflow="fold")
    for name in ("probability", f"{status['interval']:.0%} interval", "where", "field mean"):
        found.add_column(name, justify="right")
    for event in status["events"]:
        high = event if event["kind"] == "region" else event["highest"] or {}
        where = "in its region" if event["kind"] == "region" else _where(high)
        ends = [_percent(high.get(end)) for end in ("ci_low", "ci_high")]
        cells = (escape(event["name"]), _percent(high.get("probability")), "–".join(ends), where)
        found.add_row(*cells, _percent(event.get("mean")))
    return found


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _where(place: dict[str, Any]) -> str:
    if place.get("lon") is None:
        return f"row {place['row']}, column {place['column']}" if place else "–"
    return f"{place['lat']:.2f}°, {place['lon']:.2f}°"


def summary(status: dict[str, Any]) -> str:
    """What a forecast is made of, in a line."""
    members, sampler, timings = status["members"], status["sampler"], status["timings"]
    failed = f", {members['failed']} more failed and are left out" if members["failed"] else ""
    least = f" (they can tell no less than {1 / members['drawn']:.1%})" if members["drawn"] else ""
    why = f" ({status['error']})" if status["error"] else ""
    guided = ""
    if status["guidance"] is not None:
        asked, came = (status["guidance"][name] for name in ("requested", "achieved"))
        guided = f"; of the functional {asked:.4g} was requested and {came:.4g} achieved"
    seconds = timings["ended"] - timings["created"]
    return (
        f"{status['id']}: {status['status']}{why}, {members['drawn']} members{least}{failed} from "
        f"{status['context']['init_time']} in {seconds:.1f} s; seed {status['seed']}, {sampler['name']} in "
        f"{sampler['steps']} steps, run {status['run_hash']}{guided}"
    )
