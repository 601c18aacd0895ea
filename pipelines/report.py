"""One self-contained HTML page: score tables, skill against lead time, and forecast frames."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import fsspec
import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from earthformer.scores import NINO34_LAT, NINO34_LON
from pipelines import windows
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError
from pipelines.score import (
    ScoreCard,
    Source,
    check_comparable,
    error_units,
    labels,
    open_forecast,
    saved,
    score,
    sheets,
)
from pipelines.tasks import Task

TEMPLATE = Path(__file__).with_name("report.html.j2")
CANDIDATES = 96
"""Cases are chosen among so many windows, evenly spaced: reading all of SEVIR's takes an hour."""
COLUMNS = {"enso": 4}
"""Frames shown of each context, truth and forecast; 6 where nothing is said."""
MISSING = "#b9bec5"
INK, PAPER = "#1c2733", "#ffffff"
LINES = ("#8a94a0", "#1f6fb2", "#d1495b", "#3a8f5c", "#8e5ea2", "#c98a1b")
"""The first forecast, most often the baseline, is grey."""

VIL_LEVELS = (0, 16, 31, 59, 74, 100, 133, 160, 181, 219, 255)
VIL_COLOURS = (
    "#ffffff",  # Below 16 there is nothing to see: left as blank as the page.
    "#28be28",
    "#199619",
    "#0a690a",
    "#0a4b0a",
    "#f5f500",
    "#edac00",
    "#f06e00",
    "#a00000",
    "#e700ff",
)
RAIN_LEVELS = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 100)
RAIN_COLOURS = (
    "#ffffff",
    "#d3e6f5",
    "#9fcbe8",
    "#5a9fd4",
    "#2b6cb0",
    "#2ca25f",
    "#a6d854",
    "#ffd92f",
    "#f5892a",
    "#d7191c",
)
SST_RANGE = 3.0
"""K either side of no anomaly."""


@dataclass(frozen=True)
class Case:
    """A window that is shown: context, truth and forecasts as one image."""

    title: str
    why: str
    image: str


def report(
    forecasts: Sequence[str],
    archive: str,
    out: str,
    *,
    cards: Sequence[ScoreCard] | None = None,
    cases: int = 3,
) -> None:
    """Write the page at `out`; it holds its images and asks nothing of the network.

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
        found = [saved(url, archive) for url in forecasts]
        known = [card for card in found if card is not None]
        cards = known if len(known) == len(found) else score(forecasts, archive)
    check_comparable(cards)
    sources = [open_forecast(url, opened) for url in forecasts]
    if [card.forecast_hash for card in cards] != [source.store.config_hash for source in sources]:
        raise InputError(f"{len(cards)} score cards are not of the forecasts {', '.join(forecasts)}")
    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True, undefined=jinja2.StrictUndefined).render(
        title=f"{cards[0].task.name.upper()}: {', '.join(labels(cards))}",
        headline=headline(cards),
        sample=_sample(cards[0]),
        sheets=sheets(cards),
        curves=curves(cards),
        cases=[
            _case(sources, cards, opened, index, why) for index, why in _choose(sources[0], opened, cases)
        ],
        reading=_reading(cards[0].task, not _metric(sources[0])),
        sources=[_provenance(source, card) for source, card in zip(sources, cards, strict=True)],
        archive={"url": archive, "hash": opened.config_hash, "kind": opened.kind},
        commands=_commands(sources, archive, out),
        version=version("earthformer-ray"),
    )
    fs, path = fsspec.core.url_to_fs(out)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, page.encode())


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


# ----------------------------------------------------------------------------------------------- curves


def curves(cards: Sequence[ScoreCard]) -> list[tuple[str, str]]:
    """(title, image) of each score against lead time."""
    (mse, factor), _ = error_units(cards[0].task)
    plots: list[tuple[str, str, list[np.ndarray]]] = []
    if cards[0].counts:
        csi = [card.counts[0].per_lead_time()["CSI"].numpy() for card in cards]
        plots.append(("CSI-M, mean over thresholds", "CSI-M", [each.mean(0) for each in csi]))
    nino = [card.nino.per_lead_time() for card in cards if card.nino is not None]
    for name, title in (("C-Nino3.4", "Correlation of Niño3.4"), ("RMSE", "RMSE of Niño3.4 in K")):
        if nino:
            plots.append((title, name, [each[name].numpy() for each in nino]))
    errors = [card.errors.per_lead_time()["MSE"].numpy() * factor for card in cards]
    plots.append((mse, mse, errors))
    if cards[0].counts:
        unit = " mm/h" if cards[0].task.variable == "rate" else ""
        for i, threshold in enumerate(cards[0].task.thresholds):
            plots.append((f"CSI at ≥ {threshold:g}{unit}", "CSI", [each[i] for each in csi]))
    return [(title, _curve(cards, name, lines)) for title, name, lines in plots]


def _curve(cards: Sequence[ScoreCard], name: str, lines: list[np.ndarray]) -> str:
    unit = "months" if cards[0].task.archive == "enso" else "min"
    with _style():
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.subplots()
        for i, (label, line) in enumerate(zip(labels(cards), lines, strict=True)):
            # Niño3.4 has two leads fewer: a lead is the mean of three months.
            lead = cards[0].lead_times[: len(line)]
            axes.plot(lead, line, "o-", color=LINES[i % len(LINES)], label=label, lw=1.8, ms=3.5)
        axes.set_xlabel(f"lead time ({unit})")
        axes.set_ylim(bottom=min(0.0, *(np.nanmin(line, initial=0.0) for line in lines)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color="#e4e8ec", lw=0.8)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri("svg+xml", buffer)


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
    rows = [("context", [context[i] for i in back], [_frame_title(task, times, i) for i in back])]
    titles = [_frame_title(task, times, task.context + i) for i in ahead]
    rows.append(("truth", [truth[i] for i in ahead], titles))
    for other, label in zip(sources, labels(cards), strict=True):
        values = _masked(other.read(index, index + 1)[0, ..., 0])
        rows.append((label, [values[i] for i in ahead], titles))
    if task.archive == "enso":
        land = np.ma.getdata(context == 0).all(0)
        rows = [(n, [np.ma.masked_where(land, f) for f in frames], t) for n, frames, t in rows]
    start = times[task.context - 1]
    when = f"month {key.start + task.context}" if task.archive == "enso" else f"{_clock(start, True)} UTC"
    where = key.series + (f", tile at row {key.tile[0]}, column {key.tile[1]}" if key.tile else "")
    return Case(f"{where}, from {when}", why, _frames(source, index, rows))


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


def _palette(task: Task) -> tuple[Colormap, Normalize, dict[str, Any], str]:
    """Colours, their levels, arguments of the colour bar, and its label."""
    if task.variable == "sst":
        cmap = mpl.colormaps["RdBu_r"].with_extremes(bad=MISSING)
        return cmap, Normalize(-SST_RANGE, SST_RANGE), {"extend": "both"}, "SST anomaly (K)"
    vil = task.variable == "vil"
    levels, colours = (VIL_LEVELS, VIL_COLOURS) if vil else (RAIN_LEVELS, RAIN_COLOURS)
    cmap = ListedColormap(list(colours)).with_extremes(bad=MISSING, under=colours[0], over=colours[-1])
    label = "vertically integrated liquid (encoded)" if vil else "rain rate (mm/h)"
    return cmap, BoundaryNorm(levels, cmap.N), {"ticks": levels, "format": "%g"}, label


def _frames(source: Source, index: int, rows: list[tuple[str, list[np.ma.MaskedArray], list[str]]]) -> str:
    extent, origin = _view(source, index)
    cmap, norm, extra, label = _palette(source.task)
    columns = max(len(frames) for _, frames, _ in rows)
    width = 12 / columns
    height = width * (extent[3] - extent[2]) / (extent[1] - extent[0])
    with _style():
        size = (width * columns + 0.7, (height + 0.05) * len(rows) + 1.1)
        figure = Figure(
            size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        )
        grid: np.ndarray = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
        for r, (name, frames, above) in enumerate(rows):
            for c, axes in enumerate(grid[r]):
                if c >= len(frames):
                    axes.set_visible(False)
                    continue
                image = axes.imshow(
                    frames[c],
                    cmap=cmap,
                    norm=norm,
                    origin=origin,
                    extent=extent,
                    interpolation="nearest",
                )
                _plain(axes)
                if r < 2:
                    axes.set_title(above[c], fontsize=8.5, pad=3)
            grid[r, 0].set_ylabel(name.replace(" (", "\n("), fontsize=9, fontweight="bold")
        bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=45, pad=0.02, **extra)
        bar.set_label(label, fontsize=8.5)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set(edgecolor="#9aa4ae", linewidth=0.7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, pil_kwargs={"optimize": True})
    return _data_uri("png", buffer)


def _view(source: Source, index: int) -> tuple[tuple[float, float, float, float], Literal["upper", "lower"]]:
    """West, east, south and north edges, and whether row 0 is the north or the south edge."""
    root, metric = source.store.root, _metric(source)
    y, x = (root[name].values for name in root[source.task.variable].dims[-2:])
    if not metric and "x_origin" in root.coords:
        y, x = y + root["y_origin"].values[index], x + root["x_origin"].values[index]
    return (*_span(x, metric), *_span(y, metric)), "upper" if y[0] > y[-1] else "lower"


def _metric(source: Source) -> bool:
    root = source.store.root
    return root[root[source.task.variable].dims[-1]].attrs.get("units") == "m"


def _span(centres: np.ndarray, metric: bool) -> tuple[float, float]:
    """Outer edges of an axis: in km from its lower end where it is in metres, else as it is."""
    low, high = float(centres.min()), float(centres.max())
    half = (high - low) / max(1, len(centres) - 1) / 2
    return (0.0, (high - low + 2 * half) / 1000) if metric else (low - half, high + half)


def _plain(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(labelsize=7.5, length=2, color="#9aa4ae")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#c9d0d6")
        spine.set_linewidth(0.7)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#9aa4ae",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "figure.facecolor": PAPER,
            "svg.hashsalt": "earthformer",
        }
    ):
        yield


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
    made = [
        f"earthformer forecast --run {s.store.root.attrs.get('run', s.config['forecaster'])} "
        f"--archive {archive} --split {s.config['split']} --out {s.store.url}"
        + (f" --task {s.task.name}" if s.config["forecaster"] == "persistence" else "")
        for s in sources
    ]
    compared = " ".join(f"--forecast {s.store.url}" for s in sources)
    return [
        *made,
        f"earthformer score {compared} --archive {archive}",
        f"earthformer report {compared} --archive {archive} --out {out}",
    ]
