"""Scores of forecasts against their archive: a state for each shard, reduced with `+`, ratios at the end."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import ray.data
import torch
from pydantic import TypeAdapter

from earthformer.forecasters import present
from earthformer.scores import PROTOCOLS, Contingency, Errors, Nino
from pipelines import engine, verification, windows
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError
from pipelines.forecast_store import member_seeds
from pipelines.series import Window
from pipelines.storage import read_json, write_json
from pipelines.tasks import Task
from pipelines.verification import Scored, Verification, verify
from pipelines.version import code_version

BATCH = 4
"""Windows of a deterministic forecast held at once: 4 of SEVIR, their truth and errors take 300 MB."""
RECORD = "records/scores.json"
FORMAT = 2
"""Of that record; others are not read."""

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
    """More than one: counts and errors are of the ensemble's mean."""
    lead_times: tuple[float, ...]
    """In minutes, or for ENSO in months."""
    counts: tuple[Contingency, ...]
    """For each of `verification.POOLS` that fits the grid; none for ENSO."""
    errors: Errors
    probabilistic: Verification
    nino: Nino | None = None

    @property
    def label(self) -> str:
        """The forecaster's name in tables and plots, where the mean of an ensemble is scored."""
        return self.forecaster if self.members == 1 else f"{self.forecaster} (mean of {self.members})"

    @property
    def member_label(self) -> str:
        """The same where its members are scored, if they were kept."""
        scored = self.probabilistic.spread is not None
        return f"{self.forecaster} ({self.members} members)" if scored else self.label

    def result(self) -> dict[str, dict[str, float]]:
        """All scores by protocol: `pooled`, `pooled, 4x4 maxima`, …, `errors`, `Nino3.4`."""
        named = {
            protocol + (f", {c.pool}x{c.pool} maxima" if c.pool > 1 else ""): c.under(protocol).result()
            for protocol in PROTOCOLS
            for c in self.counts
        }
        named["errors"] = self.errors.result()
        named |= self.probabilistic.result()
        if self.nino is not None:
            named["Nino3.4"] = self.nino.result()
        return named

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the states, and for human eyes the scores."""
        return {
            **vars(self),
            "task": asdict(self.task),
            "counts": [counts.to_dict() for counts in self.counts],
            "errors": self.errors.to_dict(),
            "probabilistic": self.probabilistic.to_dict(),
            "nino": self.nino.to_dict() if self.nino else None,
            "scores": {
                name: {score: value if math.isfinite(value) else None for score, value in values.items()}
                for name, values in self.result().items()
            },
            "code_version": code_version(),
            "format": FORMAT,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScoreCard":
        """The inverse of `to_dict`."""
        extra = ("scores", "code_version", "format")
        fields = {name: value for name, value in values.items() if name not in extra}
        return cls(
            **{
                **fields,
                "task": TypeAdapter(Task).validate_python(fields["task"]),
                "lead_times": tuple(fields["lead_times"]),
                "counts": tuple(map(Contingency.from_dict, fields["counts"])),
                "errors": Errors.from_dict(fields["errors"]),
                "probabilistic": Verification.from_dict(fields["probabilistic"]),
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
    def name(self) -> str:
        """Of the variable that is scored: the members, or their mean where no members were kept."""
        name = self.task.variable
        return name if name in self.store.root else f"{name}_mean"

    @property
    def values(self) -> Any:
        """The forecast as stored, (window, member, lead_time, y, x) or the mean (window, lead_time, y, x)."""
        return self.store.array("", self.name)

    @property
    def members(self) -> int:
        """How many members are stored; 1 where only their mean is."""
        return int(self.values.shape[1]) if self.values.ndim == 5 else 1

    def read_members(
        self, first: int, last: int, which: slice = slice(None), rows: slice = slice(None)
    ) -> torch.Tensor:
        """Members of windows first … last - 1, float32 (B, m, T, H, W, 1); NaN where they are not finite.

        Raises:
            InputError: a chunk is damaged.
        """
        place = (slice(first, last), which, slice(None), rows)
        try:
            found = np.asarray(self.values[place if self.values.ndim == 5 else (place[0], *place[2:])])
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.store.url}, windows {first} to {last - 1}, cannot be read: "
                f"{' '.join(str(error).split())}; `earthformer validate` lists what is damaged"
            ) from error
        members = torch.from_numpy(found.reshape(last - first, -1, *found.shape[-3:]))[..., None]
        return members.nan_to_num_(math.nan, math.nan, math.nan)

    def read(self, first: int, last: int) -> np.ndarray:
        """Forecasts of windows first … last - 1, the mean over members, float32 (B, T, H, W, 1).

        Members that have failed, being NaN all over, are left out of the mean.

        Raises:
            InputError: a chunk is damaged.
        """
        read = partial(self.read_members, first, last)
        return verification.mean(verification.groups(read, self.members)).numpy()


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
    if "ensemble" not in config or "history" not in root.attrs:
        raise InputError(f"{url} was made by an earlier version: make it anew with `earthformer forecast`")
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
    rows = list(engine.track(scored, len(work), "score", progress))
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


def scored(forecasts: Sequence[str], archive: str, *, workers: int | None = None) -> list[ScoreCard]:
    """The cards of forecasts: those that were written before are read, and the other forecasts scored.

    Raises:
        InputError: as `score`.
    """
    found = {url: saved(url, archive) for url in forecasts}
    rest = [url for url, card in found.items() if card is None]
    if rest:
        found |= dict(zip(rest, score(rest, archive, workers=workers), strict=True))
    cards = [card for url in forecasts if (card := found[url]) is not None]
    check_comparable(cards)
    return cards


def saved(forecast: str, archive: str) -> ScoreCard | None:
    """The card that `score` wrote beside a forecast, unless forecast, archive or code have changed since.

    Raises:
        InputError: forecast or archive are absent or unfinished, or do not belong together.
    """
    source = open_forecast(forecast, open_archive(archive))
    found = read_json(forecast, RECORD)
    written = (code_version(), FORMAT)
    if found is None or (found["code_version"], found.get("format")) != written:
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
    if task.archive == "enso":
        lead = tuple(range(1, task.target + 1))
    else:
        lead = tuple((root["lead_time"].values / np.timedelta64(1, "m")).tolist())
    height, width = source.values.shape[-2:]
    nothing = torch.empty(0, source.members, task.target, height, width, 1)
    labels = torch.empty(0, task.target - 2) if task.archive == "enso" else None
    blank = verify(
        task,
        lambda which, rows: nothing[:, which, :, rows],
        source.members,
        nothing[:, 0],
        seeds=torch.empty(0, dtype=torch.int64),
        labels=labels,
    )
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
        members=source.config["ensemble"]["members"],
        lead_times=lead,
        **vars(blank),
    )


def _score_shard(
    row: dict[str, Any], sources: list[Source], blank: list[ScoreCard], archive: Archive
) -> dict[str, Any]:
    source, card = sources[row["forecast"]], blank[row["forecast"]]
    task = source.task
    step = BATCH if source.members == 1 else 1
    for first in range(row["first"], row["last"], step):
        last = min(first + step, row["last"])
        keys = source.keys[first:last]
        pixels = torch.from_numpy(windows.read(task, archive, keys)["target"])
        truth = torch.where(present(pixels), pixels.float(), math.nan)
        labels = None
        if task.archive == "enso":
            labels = torch.from_numpy(windows.read_nino(task, archive, keys))
        scored = verify(
            task,
            partial(source.read_members, first, last),
            source.members,
            truth,
            # Ties are broken by the window alone: the same for every forecast, however sharded.
            seeds=member_seeds(0, keys, 1)[:, 0],
            labels=labels,
        )
        card = _merge(card, scored)
    return {"forecast": row["forecast"], "first": row["first"], "card": json.dumps(card.to_dict())}


def _merge(a: ScoreCard, b: ScoreCard | Scored) -> ScoreCard:
    return replace(
        a,
        counts=tuple(x + y for x, y in zip(a.counts, b.counts, strict=True)),
        errors=a.errors + b.errors,
        nino=a.nino + b.nino if a.nino is not None and b.nino is not None else None,
        probabilistic=a.probabilistic + b.probabilistic,
    )
