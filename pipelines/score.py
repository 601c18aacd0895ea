"""Scores of forecasts against their archive: a state for each shard, reduced with `+`, ratios at the end."""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from importlib.metadata import version
from typing import Any

import numpy as np
import ray.data
import torch
from pydantic import TypeAdapter
from rich import box
from rich.table import Table
from rich.text import Text

from earthformer.forecasters import present
from earthformer.scores import PROTOCOLS, Contingency, Errors, Nino, Protocol
from pipelines import engine, windows
from pipelines.archives.store import Archive, open_archive, read_json, write_json
from pipelines.errors import InputError
from pipelines.tasks import Task
from pipelines.windows import Window

POOLS = (1, 4, 16)
"""Sides in pixels of the squares whose maxima are scored, as in PreDiff: 1 is every pixel."""
BATCH = 4
"""Windows held in memory at once: 4 of SEVIR, their truth and errors take 300 MB."""
RECORD = "records/scores.json"

_HOW = {
    "pooled": "Counts of all lead times are added, then the ratios are taken",
    "frame-averaged": "Ratios are taken for each lead time, then their mean",
}
_SAME = (
    "archive",
    "variable",
    "context",
    "target",
    "step_minutes",
    "thresholds",
    "error_scale",
    "tiles",
    "units",
)


@dataclass(frozen=True)
class ScoreCard:
    """The score states of one forecast, and what they are of."""

    forecast: str
    """URL."""
    forecaster: str
    forecast_hash: str
    run_hash: str
    archive_hash: str
    split: str
    task: Task
    windows: int
    series: int
    """Events, sources or sequences that the windows are of: those of one series are not independent."""
    windows_hash: str
    members: int
    """More than one: the mean of the ensemble is scored."""
    lead_times: tuple[float, ...]
    """In minutes, or for ENSO in months."""
    counts: tuple[Contingency, ...]
    """For each of `POOLS` that fits the grid; none for ENSO."""
    errors: Errors
    nino: Nino | None = None

    @property
    def label(self) -> str:
        """The forecaster's name in tables and plots."""
        return self.forecaster if self.members == 1 else f"{self.forecaster} (mean of {self.members})"

    def result(self) -> dict[str, dict[str, float]]:
        """All scores by protocol: `pooled`, `pooled, 4x4 maxima`, …, `errors`, `Nino3.4`."""
        named = {
            protocol + (f", {c.pool}x{c.pool} maxima" if c.pool > 1 else ""): c.under(protocol).result()
            for protocol in PROTOCOLS
            for c in self.counts
        }
        named["errors"] = self.errors.result()
        if self.nino is not None:
            named["Nino3.4"] = self.nino.result()
        return named

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the states, and for human eyes the scores."""
        plain = {
            name: value for name, value in vars(self).items() if name not in ("counts", "errors", "nino")
        }
        return {
            **plain,
            "task": asdict(self.task),
            "counts": [counts.to_dict() for counts in self.counts],
            "errors": self.errors.to_dict(),
            "nino": self.nino.to_dict() if self.nino else None,
            "scores": {
                name: {score: value if math.isfinite(value) else None for score, value in values.items()}
                for name, values in self.result().items()
            },
            "code_version": version("earthformer-ray"),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScoreCard":
        """The inverse of `to_dict`."""
        fields = {name: value for name, value in values.items() if name not in ("scores", "code_version")}
        return cls(
            **{
                **fields,
                "task": TypeAdapter(Task).validate_python(fields["task"]),
                "lead_times": tuple(fields["lead_times"]),
                "counts": tuple(map(Contingency.from_dict, fields["counts"])),
                "errors": Errors.from_dict(fields["errors"]),
                "nino": Nino.from_dict(fields["nino"]) if fields["nino"] else None,
            }
        )


@dataclass(frozen=True)
class Source:
    """A finished forecast and the windows it is of."""

    store: Archive
    task: Task
    keys: tuple[Window, ...]
    config: dict[str, Any]

    @property
    def values(self) -> Any:
        """The forecast as stored, (window, member, lead_time, y, x)."""
        return self.store.array("", self.task.variable)

    def read(self, first: int, last: int) -> np.ndarray:
        """Forecasts of windows first … last - 1, the mean over members, float32 (B, T, H, W, 1).

        Raises:
            InputError: a chunk is damaged.
        """
        try:
            members = np.asarray(self.values[first:last])
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.store.url}, windows {first} to {last - 1}, cannot be read: "
                f"{' '.join(str(error).split())}; `earthformer validate` lists what is damaged"
            ) from error
        return (members[:, 0] if members.shape[1] == 1 else members.mean(1))[..., None]


def open_forecast(url: str, archive: Archive) -> Source:
    """Open a finished forecast that was made from `archive`.

    Raises:
        InputError: there is no forecast at `url`, it is unfinished, or it was made from another archive (both
            hashes are named).
    """
    store = Archive(url)
    record = read_json(url, "records/config.json")
    config = record["config"] if record else {}
    if record and config.get("kind") != "forecast":
        raise InputError(f"{url} is a {config.get('kind')} archive: needed what `earthformer forecast` wrote")
    root = store.root
    if config["archive_hash"] != archive.config_hash:
        raise InputError(
            f"{url} was made from archive {config['archive_hash']}, {archive.url} is {archive.config_hash}: "
            "needed the archive it was made from"
        )
    tiles = zip(root["tile_y"].values.tolist(), root["tile_x"].values.tolist(), strict=True)
    keys = zip(root["series"].values.tolist(), root["start"].values.tolist(), tiles, strict=True)
    return Source(
        store,
        TypeAdapter(Task).validate_python(config["task"]),
        tuple(Window(str(series), start, tile if tile[0] >= 0 else None) for series, start, tile in keys),
        config,
    )


def score(
    forecasts: Sequence[str],
    archive: str,
    *,
    out: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[ScoreCard]:
    """Score forecasts of the same windows against their archive; writes JSON beside each.

    Args:
        forecasts: URLs of finished forecasts.
        archive: URL of the archive they were made from.
        out: write all cards into this JSON file, and nothing beside the forecasts.
        workers: parallel tasks at most.
        progress: show a progress bar.

    Raises:
        InputError: a forecast is absent, unfinished, damaged or of another archive; the forecasts are of
            different tasks or windows.
    """
    opened = open_archive(archive)
    sources = [open_forecast(url, opened) for url in forecasts]
    blank = [_card(source) for source in sources]
    check_comparable(blank)
    work = [
        {"forecast": i, "first": first, "last": min(first + step, len(source.keys))}
        for i, source in enumerate(sources)
        # One task reads one shard of the forecast, or its chunks over again.
        for step in [(source.values.shards or source.values.chunks)[0]]
        for first in range(0, len(source.keys), step)
    ]
    engine.connect(workers)
    scored = ray.data.from_items(work, override_num_blocks=len(work)).map(
        partial(_score_shard, sources=sources, blank=blank, archive=opened), num_cpus=1, concurrency=workers
    )
    rows = list(engine.track(scored, len(work), "score: shards", progress))
    cards = []
    for i, card in enumerate(blank):
        # In the order of the windows, so that the last digits do not depend on who finished first.
        mine = sorted((row for row in rows if row["forecast"] == i), key=lambda row: row["first"])
        parts = [ScoreCard.from_dict(json.loads(row["card"])) for row in mine]
        cards.append(reduce(_merge, parts, card))
    if out is None:
        for card in cards:
            write_json(card.forecast, RECORD, card.to_dict())
    else:
        folder, _, name = out.rpartition("/")
        write_json(folder or ".", name, [card.to_dict() for card in cards])
    return cards


def saved(forecast: str, archive: str) -> ScoreCard | None:
    """The card that `score` wrote beside a forecast, unless forecast, archive or code have changed since.

    Raises:
        InputError: forecast or archive are absent or unfinished, or do not belong together.
    """
    source = open_forecast(forecast, open_archive(archive))
    found = read_json(forecast, RECORD)
    if found is None or found["code_version"] != version("earthformer-ray"):
        return None
    card = replace(ScoreCard.from_dict(found), forecast=forecast)
    return card if card.forecast_hash == source.store.config_hash else None


def check_comparable(cards: Sequence[ScoreCard]) -> None:
    """Refuse to put scores side by side that are of different things.

    Raises:
        InputError: no cards; tasks, archives or windows differ; both are named.
    """
    if not cards:
        raise InputError("no forecasts to score: needed at least one")
    first = cards[0]
    for other in cards[1:]:
        where = f"{other.forecast} cannot be put beside {first.forecast}"
        for name in _SAME:
            theirs, mine = getattr(other.task, name), getattr(first.task, name)
            if theirs != mine:
                raise InputError(
                    f"{where}: task {other.task.name} has {name} {theirs}, task {first.task.name} has {mine}"
                )
        if other.archive_hash != first.archive_hash:
            raise InputError(f"{where}: archive {other.archive_hash} is not {first.archive_hash}")
        if other.windows_hash != first.windows_hash:
            raise InputError(
                f"{where}: its {other.windows} {other.split} windows are not the same as the other's "
                f"{first.windows} {first.split} windows"
            )


def _card(source: Source) -> ScoreCard:
    """A card with no samples in it yet."""
    task, root = source.task, source.store.root
    height, width = source.values.shape[-2:]
    nothing = torch.empty(0, task.target, height, width, 1)
    if task.archive == "enso":
        lead = tuple(range(1, task.target + 1))
    else:
        lead = tuple((root["lead_time"].values / np.timedelta64(1, "m")).tolist())
    return ScoreCard(
        forecast=source.store.url,
        forecaster=source.config["forecaster"],
        forecast_hash=source.store.config_hash,
        run_hash=source.config["run_hash"],
        archive_hash=source.config["archive_hash"],
        split=source.config["split"],
        task=task,
        windows=len(source.keys),
        series=len({key.series for key in source.keys}),
        windows_hash=hashlib.sha256(repr(source.keys).encode()).hexdigest()[:16],
        members=source.values.shape[1],
        lead_times=lead,
        counts=tuple(_count(task, nothing, nothing)),
        errors=Errors.of(nothing, nothing, scale=task.error_scale),
        nino=Nino.of(nothing[..., 0], nothing[:, 2:, 0, 0, 0]) if task.archive == "enso" else None,
    )


def _count(task: Task, forecast: torch.Tensor, truth: torch.Tensor) -> list[Contingency]:
    if not task.thresholds:
        return []
    return [
        Contingency.of(forecast, truth, thresholds=task.thresholds, pool=pool)
        for pool in POOLS
        if pool <= min(truth.shape[2:4])
    ]


def _score_shard(
    row: dict[str, Any], sources: list[Source], blank: list[ScoreCard], archive: Archive
) -> dict[str, Any]:
    source, card = sources[row["forecast"]], blank[row["forecast"]]
    task = source.task
    for first in range(row["first"], row["last"], BATCH):
        last = min(first + BATCH, row["last"])
        keys = source.keys[first:last]
        pixels = torch.from_numpy(windows.read(task, archive, keys)["target"])
        truth = torch.where(present(pixels), pixels.float(), math.nan)
        forecast = torch.from_numpy(source.read(first, last))
        nino = None
        if task.archive == "enso":
            nino = Nino.of(forecast[..., 0], torch.from_numpy(windows.read_nino(task, archive, keys)))
        counts = tuple(_count(task, forecast, truth))
        part = replace(
            card, counts=counts, errors=Errors.of(forecast, truth, scale=task.error_scale), nino=nino
        )
        card = _merge(card, part)
    return {"forecast": row["forecast"], "first": row["first"], "card": json.dumps(card.to_dict())}


def _merge(a: ScoreCard, b: ScoreCard) -> ScoreCard:
    return replace(
        a,
        counts=tuple(x + y for x, y in zip(a.counts, b.counts, strict=True)),
        errors=a.errors + b.errors,
        nino=a.nino + b.nino if a.nino is not None and b.nino is not None else None,
    )


# --------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Sheet:
    """A table of text: the same on the terminal and on the page."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the best score, where forecasts are compared."""
    text_columns: int = 1
    """The first so many columns are words, the others numbers."""


def labels(cards: Sequence[ScoreCard]) -> list[str]:
    """Names that tell the forecasts apart: with the run's hash where two forecasters are of a name."""
    many = Counter(card.label for card in cards)
    return [c.label if many[c.label] == 1 else f"{c.label} {c.run_hash[:6]}" for c in cards]


def sheets(cards: Sequence[ScoreCard]) -> list[Sheet]:
    """A sheet for each protocol and one for the errors, the forecasts side by side.

    Raises:
        InputError: the forecasts are of different tasks, archives or windows.
        ValueError: their scores are of different thresholds, pools or scales.
    """
    check_comparable(cards)
    for one, other in itertools.pairwise(cards):
        one.errors.check_same(other.errors)
        for mine, theirs in zip(one.counts, other.counts, strict=True):
            mine.check_same(theirs)
    found = [_protocol_sheet(cards, protocol) for protocol in PROTOCOLS if cards[0].counts]
    if cards[0].nino is not None:
        found.append(_nino_sheet(cards))
    return [*found, _errors_sheet(cards)]


def tables(cards: Sequence[ScoreCard]) -> list[Table]:
    """The sheets for the terminal."""
    found = []
    for sheet in sheets(cards):
        table = Table(
            title=sheet.title,
            caption=f"{sheet.note}\n",
            title_justify="left",
            title_style="bold",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(sheet.columns):
            table.add_column(
                name, justify="left" if i < sheet.text_columns else "right", no_wrap=name != "forecast"
            )
        for i, row in enumerate(sheet.rows):
            cells = [Text(c, style="bold" if (i, j) in sheet.best else "") for j, c in enumerate(row)]
            # A score's forecasts stand together: only its first row names it.
            named = i + 1 < len(sheet.rows) and sheet.rows[i + 1][0] != ""
            table.add_row(*cells, end_section=sheet.text_columns > 1 and named)
        found.append(table)
    return found


def _title(card: ScoreCard) -> str:
    return f"{card.task.name}, {card.split}, {card.windows} windows"


def _protocol_sheet(cards: Sequence[ScoreCard], protocol: Protocol) -> Sheet:
    thresholds = cards[0].task.thresholds
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    undefined = False
    kinds = [("CSI", i) for i in range(len(cards[0].counts))] + [("POD", 0), ("SUCR", 0), ("bias", 0)]
    for score_name, i in kinds:
        pool = cards[0].counts[i].pool
        title = score_name + (f" {pool}×{pool}" if pool > 1 else "")
        block = []
        for card in cards:
            counts = card.counts[i].under(protocol)
            values, defined = counts.per_threshold()[score_name], counts.defined()[score_name]
            undefined |= not bool(defined.all())
            # In the published means CSI, POD and SUCR of what never occurs are 0; a bias has no such value.
            mean = float(values.mean()) if score_name != "bias" or bool(defined.all()) else math.nan
            block.append(
                [mean, *(v if d else math.nan for v, d in zip(values.tolist(), defined, strict=True))]
            )
        if score_name == "CSI":
            best |= {(len(rows) + r, c + 2) for c, r in _highest(block)}
        digits = 2 if score_name == "bias" else 4
        for n, (label, row) in enumerate(zip(labels(cards), block, strict=True)):
            rows.append((title if n == 0 else "", label, *(_number(v, digits) for v in row)))
    return Sheet(
        title=f"{_title(cards[0])}: protocol “{protocol}”",
        note=(
            f"{_HOW[protocol]}. The mean is over thresholds (CSI: CSI-M). 4×4 and 16×16: maxima of so many "
            f"pixels. Bias: forecast over observed events, best 1."
            + (" –: no such events, 0 in a mean." if undefined else "")
        ),
        columns=("score", "forecast", "mean", *(f"≥{t:g}" for t in thresholds)),
        rows=tuple(rows),
        best=frozenset(best),
        text_columns=2,
    )


def _nino_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    names = ("C-Nino3.4-M", "C-Nino3.4-WM", "RMSE")
    block = [[card.nino.result()[name] for name in names] for card in cards if card.nino is not None]
    best = {(r, c + 1) for c, r in _highest([[m, wm, -rmse] for m, wm, rmse in block])}
    return Sheet(
        title=f"{_title(cards[0])}: Niño3.4 index",
        note="Correlation with the labels, mean and weighted mean over lead months; RMSE in K.",
        columns=("forecast", "C-Nino3.4-M", "C-Nino3.4-WM", "RMSE (K)"),
        rows=tuple(
            (label, *(_number(v, 4) for v in values))
            for label, values in zip(labels(cards), block, strict=True)
        ),
        best=frozenset(best),
    )


def error_units(task: Task) -> tuple[tuple[str, float], tuple[str, float]]:
    """What MSE and MAE are called in tables, and the factor to the unit that they are shown in."""
    if task.error_scale == 1.0:
        unit = task.units.replace("mm h-1", "mm/h")
        return (f"MSE ({unit})²", 1.0), (f"MAE ({unit})", 1.0)
    scale = "normalised SST" if task.archive == "enso" else "0–1 scale"
    return (f"MSE ×10⁻³ ({scale})", 1e3), (f"MAE ×10⁻³ ({scale})", 1e3)


def _errors_sheet(cards: Sequence[ScoreCard]) -> Sheet:
    (mse, mse_factor), (mae, mae_factor) = error_units(cards[0].task)
    block = [
        [results["MSE"] * mse_factor, results["MAE"] * mae_factor]
        for results in (card.errors.result() for card in cards)
    ]
    pixels = {int(card.errors.count.sum()) for card in cards}
    return Sheet(
        title=f"{_title(cards[0])}: errors",
        note="Means over all pixels and lead times where truth and forecast are present"
        + ("." if len(pixels) == 1 else ", which are not the same for all forecasts."),
        columns=("forecast", mse, mae, "pixels"),
        rows=tuple(
            (label, *(_number(v, 4) for v in values), f"{int(card.errors.count.sum()):,}")
            for label, values, card in zip(labels(cards), block, cards, strict=True)
        ),
        best=frozenset((r, c + 1) for c, r in _highest([[-v for v in values] for values in block])),
    )


def _highest(block: list[list[float]]) -> list[tuple[int, int]]:
    """(column, row) of the one highest value of each column; none where there is nothing to compare."""
    found = []
    for column, values in enumerate(zip(*block, strict=True)):
        finite = [v for v in values if math.isfinite(v)]
        if len(finite) > 1 and finite.count(max(finite)) == 1:
            found.append((column, values.index(max(finite))))
    return found


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
