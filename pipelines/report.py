"""One self-contained HTML page: score tables, skill against lead time, and forecast frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import jinja2
import numpy as np

from earthformer.ensemble_scores import surviving
from earthformer.scores import NINO34_LAT, NINO34_LON
from pipelines import maps, plots, verification, windows
from pipelines.archives.records import config_hash
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError
from pipelines.maps import Row
from pipelines.plots import image
from pipelines.score import ScoreCard, Source, check_comparable, open_forecast, scored
from pipelines.sheets import error_units, labels, sheets
from pipelines.tasks import Task
from pipelines.version import code_version

TEMPLATE = Path(__file__).with_name("report.html.j2")
CANDIDATES = 96
"""Cases are chosen among so many windows, evenly spaced: reading all of SEVIR's takes an hour."""
COLUMNS = {"enso": 4}
"""Frames shown of each context, truth and forecast; 6 where nothing is said."""
STAMPS = 8
"""Postage stamps in each of two rows: the truth and members."""
EVENTS = 4
"""Events of which maps are shown."""


class Page(NamedTuple):
    """What `report` did."""

    cards: Sequence[ScoreCard]
    """The scores on the page."""
    written: bool
    """By this call."""


@dataclass(frozen=True)
class Case:
    """A window that is shown."""

    title: str
    why: str
    images: tuple[tuple[str, str], ...]
    """What each says, and the image."""


def report(
    forecasts: Sequence[str],
    archive: str,
    out: str,
    *,
    cards: Sequence[ScoreCard] | None = None,
    cases: int = 3,
) -> Page:
    """Write the page at `out`; it holds its images and asks nothing of the network.

    Where the page of the same forecasts, by the same code, is there, it is left as it is.

    Args:
        forecasts: URLs of finished forecasts of the same windows; the first is drawn as the baseline.
        archive: URL of the archive they were made from.
        out: URL of the HTML file.
        cards: what `score` returned for these forecasts; without them the saved ones are read, or the
            forecasts are scored.
        cases: how many windows are shown.

    Raises:
        InputError: a forecast is absent, unfinished or of another archive, or they are not comparable; the
            cards are of other forecasts.
    """
    opened = open_archive(archive)
    if cards is None:
        cards = scored(forecasts, archive)
    check_comparable(cards)
    sources = [open_forecast(url, opened) for url in forecasts]
    hashes = [source.store.config_hash for source in sources]
    if [card.forecast_hash for card in cards] != hashes:
        raise InputError(f"{len(cards)} score cards are not of the forecasts {', '.join(forecasts)}")
    commands = _commands(sources, archive, out)
    made_of = config_hash([hashes, opened.config_hash, commands, cases, code_version()])
    fs, path = fsspec.core.url_to_fs(out)
    if _is_made_of(fs, path, made_of):
        return Page(cards, written=False)
    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True, undefined=jinja2.StrictUndefined).render(
        title=f"{cards[0].task.name.upper()}: {', '.join(labels(cards))}",
        headline=headline(cards),
        sample=_sample(cards[0]),
        sheets=sheets(cards),
        curves=plots.curves(cards),
        diagrams=plots.diagrams(cards, _side(sources[0])),
        cases=[
            _case(sources, cards, opened, index, why) for index, why in _choose(sources[0], opened, cases)
        ],
        reading=_reading(cards[0].task, not maps.metric(sources[0])),
        sources=[_provenance(source, card) for source, card in zip(sources, cards, strict=True)],
        archive={"url": archive, "hash": opened.config_hash, "kind": opened.kind},
        commands=commands,
        version=code_version(),
        made_of=made_of,
    )
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, page.encode())
    return Page(cards, written=True)


def _is_made_of(fs: fsspec.AbstractFileSystem, path: str, made_of: str) -> bool:
    """Whether a page is there that was made of the same, and is whole."""
    try:
        page = fs.cat_file(path)
    except FileNotFoundError:
        return False
    return f'content="{made_of}"'.encode() in page[:1000] and page.rstrip().endswith(b"</html>")


# -------------------------------------------------------------------------------------------- sentences


def headline(cards: Sequence[ScoreCard]) -> str:
    """Who wins on what, from the numbers alone."""
    measures = _measures(cards)
    names = labels(cards)
    if len(cards) == 1:
        numbers = ", ".join(f"{name} {shown[0]}" for name, shown, _ in measures)
        return f"{_capital(names[0])}: {numbers}. There is no other forecast to compare it with."
    wins: dict[str, list[str]] = {}
    ties = []
    for measure, shown, values in measures:
        order = sorted(range(len(cards)), key=lambda i: (np.isnan(values[i]), -values[i]))
        first, second = order[:2]
        if shown[first] == shown[second] or np.isnan(values[second]):
            ties.append(measure)
        else:
            gap = f"{measure} ({shown[first]} against {shown[second]})"
            wins.setdefault(names[first], []).append(
                gap if len(cards) == 2 else f"{gap[:-1]} of {names[second]})"
            )
    said = [f"{name} is better on {_listed(what)}" for name, what in wins.items()]
    if ties:
        said.append(f"none is better on {_listed(ties)}")
    return _capital("; ".join(said)) + "." + _threshold_sentence(cards, names)


def _measures(cards: Sequence[ScoreCard]) -> list[tuple[str, list[str], list[float]]]:
    """Name, numbers as shown, and numbers of which the highest is best."""
    (mse, factor), _ = error_units(cards[0].task)
    mse = mse.partition(" (")[0]
    found = []
    if cards[0].counts:
        values = [card.counts[0].result()["CSI-M"] for card in cards]
        found.append(("CSI-M", [f"{v:.4f}" for v in values], values))
    nino = [card.nino.result()["C-Nino3.4-M"] for card in cards if card.nino is not None]
    if nino:
        found.append(("C-Nino3.4-M", [f"{v:.4f}" for v in nino], nino))
    errors = [card.errors.result()["MSE"] for card in cards]
    found.append((mse, [f"{v * factor:.4g}" for v in errors], [-v for v in errors]))
    return found


def _threshold_sentence(cards: Sequence[ScoreCard], names: list[str]) -> str:
    if not cards[0].counts:
        return ""
    thresholds = cards[0].task.thresholds
    scores = np.stack([card.counts[0].per_threshold()["CSI"].numpy() for card in cards])
    best: dict[str, list[str]] = {}
    for values, threshold in zip(scores.T, thresholds, strict=True):
        if (values == values.max()).sum() == 1:
            best.setdefault(names[int(values.argmax())], []).append(f"{threshold:g}")
    if len(best) == 1 and len(next(iter(best.values()))) == len(thresholds):
        return f" {_capital(next(iter(best)))} has the higher CSI at every threshold."
    each = [f"{name} at {_listed(at)}" for name, at in best.items()]
    return f" The highest CSI: {'; '.join(each)}." if each else ""


def _sample(card: ScoreCard) -> str:
    unit = "months" if card.task.archive == "enso" else "minutes"
    lead = f"{card.lead_times[0]:g} to {card.lead_times[-1]:g} {unit}"
    series = {"enso": "source", "radar": "sequence"}.get(card.task.archive, "event")
    return (
        f"Task {card.task.name}, {card.split} split: {card.windows:,} windows of {card.series:,} "
        f"{series}{'s' if card.series > 1 else ''}, {len(card.lead_times)} lead times of {lead}. "
        f"Windows of one {series} are not independent, and no test of significance was made."
    )


def _reading(task: Task, degrees: bool) -> str:
    colours = {
        "vil": "Colours are the levels of vertically integrated liquid in SEVIR's encoding, 0 to 254; below "
        "16 is blank",
        "rate": "Colours are rain rates in mm/h; below 0.1 is blank",
        "sst": "Colours are anomalies of sea surface temperature in K; land is grey",
    }[task.variable]
    axes = "Axes are in degrees" if degrees else "Axes are in km from the lower left corner"
    times = "" if task.archive == "enso" else " Times are UTC."
    return f"{colours}. What is missing is grey.{times} North is up. {axes}."


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


# ------------------------------------------------------------------------------------------------ cases


def _choose(source: Source, archive: Archive, cases: int) -> Iterator[tuple[int, str]]:
    """Indices of the windows to show, and the rule by which each was chosen: never the forecasts."""
    total = len(source.keys)
    candidates = np.unique(np.linspace(0, total - 1, min(total, CANDIDATES)).round().astype(int))
    strength = np.array([_strength(source.task, archive, source, int(i)) for i in candidates])
    order = candidates[np.argsort(strength, kind="stable")]
    among = "all" if len(candidates) == total else f"{len(candidates)} evenly spaced windows of"
    most = "warmest" if source.task.archive == "enso" else "wettest"
    what = {"vil": "VIL", "rate": "rain rate", "sst": "Niño3.4"}[source.task.variable]
    rules = [
        (int(order[-1]), f"The {most} of {among} {total}: the highest observed mean {what}."),
        (int(order[(len(order) - 1) // 2]), f"The median of {among} {total} by observed mean {what}."),
    ]
    rest = [int(i) for i in np.random.default_rng(0).permutation(total)]
    rules += [(i, "Drawn at random, with seed 0.") for i in rest]
    shown: set[int] = set()
    for index, why in rules:
        if index not in shown and len(shown) < cases:
            shown.add(index)
            yield index, why


def _strength(task: Task, archive: Archive, source: Source, index: int) -> float:
    truth = _masked(windows.read(task, archive, [source.keys[index]])["target"][0, ..., 0])
    if task.archive == "enso":
        truth = truth[:, NINO34_LAT, NINO34_LON]
    return float(np.mean(truth)) if np.any(~np.ma.getmaskarray(truth)) else -np.inf


def _case(
    sources: Sequence[Source], cards: Sequence[ScoreCard], archive: Archive, index: int, why: str
) -> Case:
    source, task = sources[0], sources[0].task
    key = source.keys[index]
    pixels = windows.read(task, archive, [key])
    times = windows.frame_times(task, archive, [key])[0]
    truth = _masked(pixels["target"][0, ..., 0])
    context = _masked(pixels["context"][0, ..., 0])
    columns = COLUMNS.get(task.archive, 6)
    back, ahead = _spread(task.context, columns), _spread(task.target, columns)
    titles = [_frame_title(task, times, task.context + i) for i in ahead]
    rows = [
        Row("context", [context[i] for i in back], [_frame_title(task, times, i) for i in back]),
        Row("truth", [truth[i] for i in ahead], titles),
    ]
    for other, label in zip(sources, labels(cards), strict=True):
        values = _masked(other.read(index, index + 1)[0, ..., 0])
        rows.append(Row(label, [values[i] for i in ahead]))
    # Land has no anomaly, whatever a forecast says of it.
    land: Any = np.ma.getdata(context == 0).all(0) if task.archive == "enso" else None
    if land is not None:
        rows = [replace(row, fields=[np.ma.masked_where(land, f) for f in row.fields]) for row in rows]
    start = times[task.context - 1]
    when = f"month {key.start + task.context}" if task.archive == "enso" else f"{_clock(start, True)} UTC"
    where = key.series + (f", tile at row {key.tile[0]}, column {key.tile[1]}" if key.tile else "")
    guided = [_guided(*each, index) for each in zip(sources, labels(cards, members=True), strict=True)]
    said = " ".join(["Context, truth and forecasts.", *filter(None, guided)])
    images = [(said, image(maps.draw(maps.view(source, index), rows, maps.palette(task)), "png"))]
    for other, label in zip(sources, labels(cards, members=True), strict=True):
        if other.members > 1:
            images.append(_stamps(other, label, index, truth, titles[-1], land))
            if task.thresholds:
                images.append(_probabilities(other, label, index, truth, ahead, titles))
        if "probability" in other.store.root:
            images.append(_events(other, label, index))
    return Case(f"{where}, from {when}", why, tuple(images))


def _guided(source: Source, label: str, index: int) -> str:
    """What knowledge alignment asked of a forecast, and what its members made of it; "" without any."""
    root = source.store.root
    if "functional_requested" not in root:
        return ""
    asked, came = (root[f"functional_{what}"].isel(window=index).values for what in ("requested", "achieved"))
    known = came[np.isfinite(came)]
    have = f"members have {known.min():.4g} to {known.max():.4g}" if known.size else "no member has one"
    return f"{_capital(label)}: of the functional {asked:.4g} was requested, {have}."


def _stamps(
    source: Source, label: str, index: int, truth: np.ma.MaskedArray, title: str, land: np.ndarray | None
) -> tuple[str, str]:
    """The truth and members at the last lead time."""
    shown = min(source.members, 2 * STAMPS - 1)
    last = source.read_members(index, index + 1, slice(shown))[0, :, -1, ..., 0].numpy()
    fields = [truth[-1], *map(_masked, last)]
    if land is not None:
        fields = [np.ma.masked_where(land, field) for field in fields]
    names = ["truth", *(f"member {m + 1}" for m in range(shown))]
    rows = [
        Row("", fields[first : first + STAMPS], names[first : first + STAMPS])
        for first in range(0, len(fields), STAMPS)
    ]
    said = f"{_capital(label)}: the truth and the first {shown} members, {title}."
    return said, image(maps.draw(maps.view(source, index), rows, maps.palette(source.task)), "png")


def _probabilities(
    source: Source,
    label: str,
    index: int,
    truth: np.ma.MaskedArray,
    ahead: list[int],
    titles: list[str],
) -> tuple[str, str]:
    """Fraction of members at or above thresholds, with the outline of the truth."""
    happened = [t for t in source.task.thresholds if (truth[ahead] >= t).any()] or [source.task.thresholds[0]]
    chosen = sorted({happened[0], happened[len(happened) // 2], happened[-1]})
    count, alive = np.zeros((len(chosen), *truth.shape)), 0
    missing = np.zeros(truth.shape, dtype=bool)
    read = partial(source.read_members, index, index + 1)
    for part in verification.groups(read, source.members):
        for member in part[0, surviving(part)[0], ..., 0].numpy():
            alive += 1
            missing |= np.isnan(member)
            count += member >= np.reshape(chosen, (-1, 1, 1, 1))
    share = np.ma.masked_where(np.broadcast_to(missing | (alive == 0), count.shape), count / max(1, alive))
    unit = " mm/h" if source.task.variable == "rate" else ""
    rows = [
        Row(
            f"≥ {threshold:g}{unit}",
            [share[n, i] for i in ahead],
            titles if n == 0 else (),
            [np.ma.filled(truth[i] >= threshold, False) for i in ahead],
        )
        for n, threshold in enumerate(chosen)
    ]
    said = f"{_capital(label)}: probability of reaching a threshold; the line is where the truth did."
    return said, image(maps.draw(maps.view(source, index), rows, maps.probabilities()), "png")


def _events(source: Source, label: str, index: int) -> tuple[str, str]:
    """Probabilities of the events that the forecast was asked for, with their confidence intervals."""
    root = source.store.root
    names = [str(name) for name in root["event"].values]
    kinds = {"ci_low": "low end of interval", "probability": "probability", "ci_high": "high end of interval"}
    shown = {name: title for name, title in kinds.items() if name in root}
    fields = {name: root[name].isel(window=index).values for name in shown}
    rows = [
        Row(
            name,
            [np.ma.masked_invalid(fields[kind][e]) for kind in shown],
            [*shown.values()] if e == 0 else (),
        )
        for e, name in enumerate(names[:EVENTS])
    ]
    said = f"{_capital(label)}: probability of {_listed([f'“{name}”' for name in names[:EVENTS]])}."
    return said, image(maps.draw(maps.view(source, index), rows, maps.probabilities()), "png")


def _side(source: Source) -> tuple[float, str]:
    """Length and unit of the longer side of the windows."""
    west, east, south, north = maps.view(source, 0).extent
    return max(abs(east - west), abs(north - south)), "km" if maps.metric(source) else "°"


def _spread(count: int, columns: int) -> list[int]:
    """Up to `columns` indices of `count` frames, evenly spaced back from the last."""
    return list(range(count - 1, -1, -max(1, count // columns)))[:columns][::-1]


def _frame_title(task: Task, times: np.ndarray, frame: int) -> str:
    ahead = frame - task.context + 1
    if task.archive == "enso":
        return _signed(ahead, "months")
    minutes = round((times[frame] - times[task.context - 1]) / np.timedelta64(1, "m"))
    return f"{_signed(minutes, 'min')}, {_clock(times[frame])}"


def _signed(steps: int, unit: str) -> str:
    return f"{steps:+d} {unit}".replace("-", "−") if steps else "now"


def _clock(time: np.datetime64, date: bool = False) -> str:
    day, _, clock = str(time.astype("datetime64[m]")).partition("T")
    return f"{day} {clock}" if date else clock


def _masked(field: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_equal(field, 255) if field.dtype == np.uint8 else np.ma.masked_invalid(field)


# ------------------------------------------------------------------------------------------- provenance


def _provenance(source: Source, card: ScoreCard) -> dict[str, Any]:
    return {
        "label": card.label,
        "url": card.forecast,
        "run": source.store.root.attrs.get("run", card.forecaster),
        "run_hash": card.run_hash,
        "forecast_hash": card.forecast_hash,
        "seed": source.config.get("seed", "–"),
        "members": card.members,
    }


def _commands(sources: Sequence[Source], archive: str, out: str) -> list[str]:
    made = [f"{source.store.root.attrs['history']} --out {source.store.url}" for source in sources]
    compared = " ".join(f"--forecast {s.store.url}" for s in sources)
    return [
        *made,
        f"earthformer score {compared} --archive {archive}",
        f"earthformer report {compared} --archive {archive} --out {out}",
    ]
