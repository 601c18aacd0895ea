"""Forecasts of a split of an archive: replicas of a forecaster on Ray Data, into a Forecast Zarr."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from earthformer.forecasters import Forecaster, Members, members_of
from pipelines import configs, engine, runs, windows
from pipelines.archives import store
from pipelines.archives.store import Archive
from pipelines.baselines import BASELINES, ENSEMBLES
from pipelines.ensembles import Reduction
from pipelines.errors import InputError
from pipelines.events import Bound, Event, bind
from pipelines.forecast_store import lead_times, member_seeds, template
from pipelines.tasks import Task
from pipelines.windows import Window

SHARD_BYTES = 64 << 20
"""Forecast values that one task holds and writes at once."""
SHARD_WINDOWS = 16
"""Windows of a shard at most: what is done again after a kill, and the least that a replica is given."""
MOST_MEMBERS = 10_000


@dataclass(frozen=True)
class Drawing:
    """How a diffusion model draws its members."""

    sampler: str = "dpm++"
    steps: int = 20
    precision: str = "float32"
    compile: bool = False
    alignment: str | None = None
    """URL of the run of an alignment network, for knowledge alignment."""
    alignment_hash: str | None = None
    deviations: float = 0.0
    """n: the forecast's functional is asked to be mu + n sigma."""
    strength: float = 50.0


@dataclass(frozen=True)
class Ensemble:
    """How many members, and what becomes of them."""

    members: int = 1
    """At most, with `until_ci`."""
    until_ci: float | None = None
    """Draw members until no event's confidence interval has a larger half-width."""
    events: tuple[Event, ...] = ()
    quantiles: tuple[float, ...] = ()
    keep_members: bool = False

    def __post_init__(self) -> None:
        _need(1 <= self.members <= MOST_MEMBERS, "members", self.members, f"1 to {MOST_MEMBERS}")
        inside = all(0 <= q <= 1 for q in self.quantiles)
        _need(inside, "quantiles", self.quantiles, "fractions from 0 to 1")
        ci = self.until_ci
        _need(ci is None or 0 < ci < 0.5, "until-ci", ci, "a half-width between 0 and 0.5")
        _need(ci is None or bool(self.events), "until-ci", ci, "--events, whose probabilities it is of")
        for name, asked in (("events", self.events), ("quantiles", self.quantiles)):
            _need(not asked or self.members > 1, "members", self.members, f"2 or more for {name}")

    @property
    def reduced(self) -> bool:
        """Whether moments and probabilities are written, rather than the members alone."""
        return self.members > 1

    @property
    def kept(self) -> bool:
        """Whether the members themselves are written."""
        return self.keep_members or self.members == 1


def parse_quantiles(text: str) -> tuple[float, ...]:
    """Numbers of a comma-separated list.

    Raises:
        InputError: one of them is no number.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"quantiles {text!r}: needed numbers, such as 0.1,0.5,0.9") from error


def _need(holds: bool, name: str, found: Any, needed: str) -> None:
    if not holds:
        raise InputError(f"{name} is {found}: needed {needed}")


@dataclass(frozen=True)
class Forecasted:
    """What a finished forecast reports."""

    url: str
    forecaster: str
    windows: int
    written: int
    """Windows that this call wrote; the others were there."""
    seconds: float
    """Without starting Ray."""
    drawn: tuple[int, ...] = ()
    """Members of each window that this call wrote, of an ensemble."""

    def __str__(self) -> str:
        total = f"{self.url}: {self.windows} windows by {self.forecaster}"
        if not self.written:
            return f"{total}, all there before"
        some = "" if self.written == self.windows else f", {self.written} of them now,"
        speed = f"{total}{some} at {self.written / self.seconds:.3g} windows/s"
        if not self.drawn:
            return speed
        low, high = min(self.drawn), max(self.drawn)
        return f"{speed}, {low if low == high else f'{low} to {high}'} members each"


@dataclass(frozen=True)
class Plan:
    """What is to be forecast: enough to write the template, to cut shards and to make any one of them."""

    task: Task
    forecaster: str
    """Its name, as tables and plots show it."""
    run: str
    """URL of a run, or the name of a baseline."""
    run_hash: str
    archive: Archive
    keys: tuple[Window, ...]
    split: str
    seed: int
    shard_windows: int
    ensemble: Ensemble = field(default_factory=Ensemble)
    drawing: Drawing | None = None
    """Of a diffusion model."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(len(self.keys) / self.shard_windows)

    def shard(self, index: int) -> slice:
        """Windows of a shard."""
        first = index * self.shard_windows
        return slice(first, min(first + self.shard_windows, len(self.keys)))

    @property
    def config(self) -> dict[str, Any]:
        """What decides the forecast's values; its hash guards the store."""
        return {
            "kind": "forecast",
            "task": asdict(self.task),
            "forecaster": self.forecaster,
            "run_hash": self.run_hash,
            "archive_hash": self.archive.config_hash,
            "split": self.split,
            "windows": len(self.keys),
            "ensemble": asdict(self.ensemble),
            "drawing": asdict(self.drawing) if self.drawing else None,
            "seed": self.seed,
            "shard_windows": self.shard_windows,
        }

    def bound(self) -> Bound:
        """The events in the terms of this forecast.

        Raises:
            InputError: an event that does not fit the task or its grid.
        """
        place = windows.placement(self.task, self.archive, self.keys)
        leads = lead_times(self.task, windows.frame_times(self.task, self.archive, self.keys[:1])[0])
        return bind(self.ensemble.events, self.task, place, leads)

    def load(self) -> Forecaster:
        """The forecaster, on the CPU.

        Raises:
            InputError: a run's weights are absent, damaged or of another model.
        """
        if self.run in BASELINES:
            return BASELINES[self.run](self.task)
        forecaster = runs.open_run(self.run).forecaster()
        if self.drawing is not None:
            _set_up(cast(Any, forecaster), self.drawing)
        return forecaster


def _set_up(prediff: Any, drawing: Drawing) -> None:
    from earthformer.prediff import Guide, Sampling

    prediff.sampling = Sampling(drawing.sampler, drawing.steps, drawing.precision)
    if drawing.compile:
        prediff.ema.module.compile()
    if drawing.alignment is not None:
        constraint = cast(Any, runs.open_run(drawing.alignment).module())
        prediff.guide = Guide(constraint, drawing.deviations, drawing.strength)


def plan(
    forecaster: str,
    archive: str,
    split: str,
    *,
    task: Task | None = None,
    seed: int = 0,
    limit: int | None = None,
    every: int = 1,
    ensemble: Ensemble = Ensemble(),
    drawing: Drawing | None = None,
) -> Plan:
    """Resolve what a forecast of `split` would do; reads keys and metadata only.

    Args:
        forecaster: URL of a finished run, or the name of a baseline, which needs `task`.
        archive: URL of a complete archive.
        split: `train`, `val` or `test`.
        task: for baselines alone: a run has its own.
        seed: the forecast's seed, from 0; members' seeds derive from it.
        limit: forecast only the first so many windows.
        every: of the windows, take only each so many-th.
        ensemble: members, and what becomes of them.
        drawing: for a diffusion model alone: how members are drawn; default: `Drawing()`.

    Raises:
        InputError: run or archive absent, unfinished or of another kind; no windows; no task, or one too
            many; an impossible seed, limit or number of members; an unknown sampler, or an impossible number
            of steps; an event that does not fit.
    """
    for name, value, least in (("seed", seed, 0), ("limit", limit, 1), ("every", every, 1)):
        _need(value is None or value >= least, name, value, f"{least} or more")
    trained = None
    if forecaster in BASELINES:
        if task is None:
            raise InputError(f"{forecaster} has no run to take the task from: needed --task NAME")
        BASELINES[forecaster](task)
        name, run, run_hash = forecaster, forecaster, store.config_hash({forecaster: asdict(task)})
    else:
        run = engine.absolute(forecaster)
        trained = runs.open_run(run)
        trained.check_forecasts()
        if task is not None:
            raise InputError(
                f"{run} was trained for task {trained.config.task.name}: baselines alone take another"
            )
        task, name, run_hash = trained.config.task, _NAMES[trained.config.trainable], trained.hash
    diffusion = trained is not None and trained.config.trainable == "denoiser"
    _check_members(name, ensemble, diffusion)
    if diffusion:
        assert trained is not None
        drawing = _checked(drawing or Drawing(), trained)
        name += f" μ{drawing.deviations:+g}σ" if drawing.alignment is not None else ""
    elif drawing is not None:
        raise InputError(
            f"{name} draws no members by diffusion: needed a denoiser's run for --sampler and the like"
        )
    opened = store.open_archive(engine.absolute(archive))
    keys = tuple(windows.enumerate_windows(task, opened, split)[::every][:limit])
    height, width = grid_shape(task, opened, keys)
    if trained is not None:
        _check_model(trained, opened, height, width)
    each = task.target * height * width * 4 * (ensemble.members if ensemble.kept else 1)
    # An ensemble takes long: little is to be done again after a kill.
    most = 1 if ensemble.reduced else SHARD_WINDOWS
    shard_windows = max(1, min(SHARD_BYTES // each, most, len(keys)))
    planned = Plan(task, name, run, run_hash, opened, keys, split, seed, shard_windows, ensemble, drawing)
    planned.bound()
    return planned


_NAMES = {"earthformer": "earthformer", "denoiser": "prediff"}


def grid_shape(task: Task, archive: Archive, keys: Sequence[Window]) -> tuple[int, int]:
    """Height and width of the windows."""
    place = windows.placement(task, archive, keys[:1])
    height, width = (size for dim, size in place.sizes.items() if dim != "window")
    return height, width


def _check_members(name: str, ensemble: Ensemble, diffusion: bool) -> None:
    if not diffusion and name not in ENSEMBLES and ensemble.members > 1:
        raise InputError(
            f"{ensemble.members} members asked of {name}, which is deterministic: needed 1, or one of "
            "prediff, " + ", ".join(ENSEMBLES)
        )


def _checked(drawing: Drawing, run: runs.Run) -> Drawing:
    """The drawing with its alignment network's hash, once sampler, steps and network are known to fit."""
    from earthformer.diffusion import Diffusion

    try:
        Diffusion(run.config.model.diffusion).stepper(drawing.sampler, drawing.steps)
    except ValueError as error:
        raise InputError(str(error)) from error
    if drawing.alignment is None:
        return drawing
    url = engine.absolute(drawing.alignment)
    aligned = runs.open_run(url)
    if aligned.config.trainable != "alignment":
        raise InputError(f"{url} is a run of {aligned.config.trainable}: needed one of alignment")
    mine, theirs = (r.record.get("autoencoder_hash") for r in (run, aligned))
    if mine != theirs:
        raise InputError(f"{url} reads latents of autoencoder {theirs}: {run.url} makes those of {mine}")
    return replace(drawing, alignment=url, alignment_hash=aligned.hash)


def _check_model(run: runs.Run, archive: Archive, height: int, width: int) -> None:
    task = run.config.task
    for what, shape in configs.fields(run.config).items():
        frames = getattr(task, what)
        if shape != (frames, height, width, 1):
            raise InputError(
                f"{archive.url} gives task {task.name} a {what} of {frames} × {height} × {width}: "
                f"the model of {run.url} needs {' × '.join(map(str, shape[:3]))}"
            )


def forecast(
    planned: Plan,
    out: str,
    *,
    workers: int = 1,
    gpu: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Forecasted:
    """Write the Forecast Zarr `(window, member, lead_time, y, x)` at `out`; the same call resumes.

    Args:
        planned: what `plan` gave.
        out: URL of the forecast.
        workers: replicas of the forecaster, which share the processors.
        gpu: one GPU a replica.
        batch_size: windows a forward pass, or of an ensemble members.
        progress: show a progress bar.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration; the run's weights
            are damaged; an impossible number; no GPU.
    """
    for what, value in (("workers", workers), ("batch size", batch_size)):
        _need(value >= 1, what, value, "1 or more")
    if gpu and not os.environ.get("RAY_ADDRESS") and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that PyTorch can use: needed one, or no --gpu")
    todo, place = pending(planned, out), engine.absolute(out)
    if todo:
        # What is wrong with the weights is said here, before anything is written, rather than by a replica.
        planned.load()
    store.create(place, {"": template(planned)}, config=planned.config, shards=planned.shards)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if todo:
        engine.connect(workers)
        began = time.perf_counter()
        replica = {"planned": planned, "out": place, "batch_size": batch_size}
        rows = engine.replicate(_Replica, replica, todo, "forecast: shards", workers, gpu, progress)
    seconds = time.perf_counter() - began
    if not store.is_complete(place):
        store.complete(place, {"counts": {"windows": len(planned.keys), "members": planned.ensemble.members}})
    written = sum(len(planned.keys[planned.shard(index)]) for index in todo)
    drawn = tuple(int(count) for row in rows for count in row["drawn"])
    return Forecasted(out, planned.forecaster, len(planned.keys), written, seconds, drawn)


def pending(planned: Plan, out: str) -> list[int]:
    """Shards that are still to be made; reads records only.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration.
    """
    place = engine.absolute(out)
    if store.begun(place, planned.config):
        return store.pending(place, planned.shards)
    return list(range(planned.shards))


class _Replica:
    """One replica of the forecaster: makes and writes whole shards."""

    def __init__(self, planned: Plan, out: str, batch_size: int, threads: int, device: str) -> None:
        engine.quiet()
        self.planned, self.out, self.batch_size = planned, out, batch_size
        self.device = torch.device(device)
        torch.set_num_threads(min(threads, engine.cores()))
        self.forecaster = cast(Any, planned.load()).to(self.device)
        self.bound = planned.bound() if planned.ensemble.reduced else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        planned, shard = self.planned, int(row["shard"])
        place = planned.shard(shard)
        make = self._ensembles if planned.ensemble.reduced else self._fields
        values = make(range(place.start, place.stop))
        region = {"window": place}
        crc32 = store.write_region(self.out, "", values, region)
        store.write_record(self.out, shard, {"regions": [store.region_record("", region, crc32)]})
        drawn = values["n_members"].tolist() if planned.ensemble.reduced else []
        return {"shard": shard, "drawn": drawn}

    def _fields(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Deterministic forecasts of some windows."""
        planned, parts = self.planned, []
        for first in range(0, len(places), self.batch_size):
            keys = [planned.keys[i] for i in places[first : first + self.batch_size]]
            fields = self.forecaster.forecast(self._context(keys), member_seeds(planned.seed, keys, 1))
            parts.append(fields[..., 0].cpu().numpy())
        return {planned.task.variable: np.concatenate(parts)}

    def _ensembles(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Ensembles of some windows, reduced as their members arrive."""
        each = [self._ensemble(i) for i in places]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    def _ensemble(self, place: int) -> dict[str, np.ndarray]:
        planned, ensemble = self.planned, self.planned.ensemble
        assert self.bound is not None
        reduction = Reduction(self.bound, place, ensemble.quantiles)
        kept: list[np.ndarray] = []
        achieved, requested = [], np.float32(np.nan)
        for some in self._members([planned.keys[place]]):
            fields = some.fields[0, ..., 0].cpu().numpy()
            reduction.add(fields)
            if ensemble.kept:
                kept.append(fields)
            if some.achieved is not None and some.requested is not None:
                achieved.append(some.achieved[0].cpu().numpy())
                requested = np.float32(some.requested[0].item())
            if ensemble.until_ci is not None and reduction.half_width() <= ensemble.until_ci:
                break
        found = reduction.result()
        if ensemble.kept:
            found[planned.task.variable] = _filled(np.concatenate(kept), ensemble.members)
        if achieved:
            found["functional_achieved"] = _filled(np.concatenate(achieved), ensemble.members)
            found["functional_requested"] = np.asarray(requested)
        return found

    def _members(self, keys: Sequence[Window]) -> Iterator[Members]:
        planned = self.planned
        seeds = member_seeds(planned.seed, keys, planned.ensemble.members)
        return members_of(self.forecaster, self._context(keys), seeds, self.batch_size)

    def _context(self, keys: Sequence[Window]) -> torch.Tensor:
        pixels = windows.read(self.planned.task, self.planned.archive, keys)["context"]
        return torch.from_numpy(pixels).to(self.device)


def _filled(members: np.ndarray, count: int) -> np.ndarray:
    """Members (m, ...) as (count, ...), NaN for those that were not drawn."""
    missing = np.full((count - len(members), *members.shape[1:]), np.nan, members.dtype)
    return np.concatenate([members, missing])
