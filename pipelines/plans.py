"""What a forecast would do, checked before anything is made: forecaster, windows and ensemble."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import xarray as xr

from earthformer.forecasters import Forecaster
from pipelines import configs, engine, runs, windows
from pipelines.archives import records, store
from pipelines.archives.store import Archive
from pipelines.baselines import BASELINES, ENSEMBLES
from pipelines.errors import InputError
from pipelines.events import Bound, Event, bind
from pipelines.series import Window
from pipelines.tasks import Task

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
    strength: float | None = None
    """Scale of the guidance; None: that of the alignment network's configuration."""

    def __post_init__(self) -> None:
        finite, strong = math.isfinite(self.deviations), 0 <= (self.strength or 0) < math.inf
        need(finite, "deviations", self.deviations, "a finite number")
        need(strong, "strength", self.strength, "a finite number from 0")
        for name, asked in (("deviations", self.deviations != 0), ("strength", self.strength is not None)):
            alone = asked and self.alignment is None
            need(not alone, name, getattr(self, name), "--alignment RUN beside it")


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
        need(1 <= self.members <= MOST_MEMBERS, "members", self.members, f"1 to {MOST_MEMBERS}")
        inside = all(0 <= q <= 1 for q in self.quantiles)
        need(inside, "quantiles", self.quantiles, "fractions from 0 to 1")
        ci = self.until_ci
        need(ci is None or 0 < ci < 0.5, "until-ci", ci, "a half-width between 0 and 0.5")
        need(ci is None or bool(self.events), "until-ci", ci, "--events, whose probabilities it is of")
        for name, asked in (("events", self.events), ("quantiles", self.quantiles)):
            need(not asked or self.members > 1, "members", self.members, f"2 or more for {name}")

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


def need(holds: bool, name: str, found: Any, needed: str) -> None:
    """
    Raises:
        InputError: what was asked does not hold.
    """
    if not holds:
        raise InputError(f"{name} is {found}: needed {needed}")


@dataclass(frozen=True, eq=False)
class Samples:
    """The windows of a forecast, but for their pixels: which they are, and when and where they lie."""

    task: Task
    keys: tuple[Window, ...]
    times: np.ndarray
    """datetime64[ns] (N, T_in + T_out), of context and target."""
    place: xr.Dataset
    """As `windows.placement`."""
    attrs: Mapping[str, Any]
    """CF attributes of the task's variable."""

    @property
    def lead_times(self) -> np.ndarray:
        """(T_out,), timedelta64, or for ENSO months."""
        if self.task.step_minutes is None:
            return np.arange(1, self.task.target + 1)
        times, context = self.times[0], self.task.context
        leads: np.ndarray = (times - times[context - 1])[context:]
        return leads

    def bind(self, events: tuple[Event, ...]) -> Bound:
        """Events in the terms of this forecast.

        Raises:
            InputError: an event that does not fit the task or its grid.
        """
        return bind(events, self.task, self.place, self.lead_times)


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
    every: int = 1
    limit: int | None = None
    """How the windows were picked; what they are decides the forecast."""

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
            "windows_hash": hashlib.sha256(repr(self.keys).encode()).hexdigest()[:16],
            "ensemble": asdict(self.ensemble),
            # Of the alignment's run what it is, not where it lies.
            "drawing": {**asdict(self.drawing), "alignment": None} if self.drawing else None,
            "seed": self.seed,
            "shard_windows": self.shard_windows,
        }

    def samples(self) -> Samples:
        """When and where the windows lie."""
        task, archive, keys = self.task, self.archive, self.keys
        return Samples(
            task,
            keys,
            windows.frame_times(task, archive, keys),
            windows.placement(task, archive, keys),
            windows.attributes(task, archive, keys[0]),
        )

    def bound(self) -> Bound:
        """The events in the terms of this forecast.

        Raises:
            InputError: an event that does not fit the task or its grid.
        """
        return self.samples().bind(self.ensemble.events)

    def check_weights(self) -> None:
        """
        Raises:
            InputError: a run's weights are absent or damaged.
        """
        guide = self.drawing.alignment if self.drawing else None
        for run in (self.run, guide):
            if run is not None and run not in BASELINES:
                # Their digests say so at once; a network is built by the replicas alone.
                runs.open_run(run).weights()

    def load(self) -> Forecaster:
        """The forecaster, on the CPU.

        Raises:
            InputError: a run's weights are absent, damaged or of another model.
        """
        if self.run in BASELINES:
            return BASELINES[self.run](self.task)
        forecaster = runs.open_run(self.run).forecaster()
        if self.drawing is not None:
            guiding = self.drawing.alignment
            set_up(forecaster, self.drawing, runs.open_run(guiding).module() if guiding else None)
            if self.drawing.compile:
                cast(Any, forecaster).ema.module.compile()
        return forecaster


def set_up(forecaster: Forecaster, drawing: Drawing, constraint: Any) -> None:
    """Have a diffusion model draw its members like this.

    `constraint` is the alignment network that the drawing names, if it names one.
    """
    from earthformer.prediff import Guide, Sampling

    prediff = cast(Any, forecaster)
    prediff.sampling = Sampling(drawing.sampler, drawing.steps, drawing.precision)
    prediff.guide = None
    if drawing.alignment is not None:
        assert drawing.strength is not None
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
        need(value is None or value >= least, name, value, f"{least} or more")
    trained = None
    if forecaster in BASELINES:
        if task is None:
            raise InputError(f"{forecaster} has no run to take the task from: needed --task NAME")
        BASELINES[forecaster](task)
        name, run, run_hash = forecaster, forecaster, records.config_hash({forecaster: asdict(task)})
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
        drawing = checked(drawing or Drawing(), trained)
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
    planned = Plan(
        task, name, run, run_hash, opened, keys, split, seed, shard_windows, ensemble, drawing, every, limit
    )
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


def check_sampling(drawing: Drawing, run: runs.Run) -> None:
    """
    Raises:
        InputError: the run's model cannot be sampled like this.
    """
    from earthformer.diffusion import Diffusion

    try:
        Diffusion(run.config.model.diffusion).stepper(drawing.sampler, drawing.steps)
    except ValueError as error:
        raise InputError(str(error)) from error


def checked(drawing: Drawing, run: runs.Run) -> Drawing:
    """The drawing with its network's hash and strength, once sampler, steps and network are known to fit.

    Raises:
        InputError: they do not fit.
    """
    check_sampling(drawing, run)
    if drawing.alignment is None:
        return drawing
    url = engine.absolute(drawing.alignment)
    aligned = runs.open_run(url)
    if aligned.config.trainable != "alignment":
        raise InputError(f"{url} is a run of {aligned.config.trainable}: needed one of alignment")
    mine, theirs = (r.record.get("autoencoder_hash") for r in (run, aligned))
    if mine != theirs:
        raise InputError(f"{url} reads latents of autoencoder {theirs}: {run.url} makes those of {mine}")
    model, constraint = run.config.model, aligned.config.model
    if model.match:
        raise InputError(f"{run.url} has model.match: knowledge alignment needs it to be false")
    for name, found, needed in (
        ("task", aligned.config.task, run.config.task),
        ("target", constraint.target, model.denoiser.target),
        ("normalise", constraint.normalise, model.normalise),
        ("diffusion.timesteps", constraint.diffusion.timesteps, model.diffusion.timesteps),
        ("diffusion.schedule", _schedule(constraint.diffusion), _schedule(model.diffusion)),
    ):
        if found != needed:
            raise InputError(
                f"{url} was trained with {name} {found}: {run.url} has {needed}; needed the same"
            )
    strength = constraint.strength if drawing.strength is None else drawing.strength
    return replace(drawing, alignment=url, alignment_hash=aligned.hash, strength=strength)


def _schedule(diffusion: Any) -> tuple[Any, ...]:
    return diffusion.schedule, diffusion.beta_start, diffusion.beta_end


def _check_model(run: runs.Run, archive: Archive, height: int, width: int) -> None:
    task = run.config.task
    for what, shape in configs.fields(run.config).items():
        frames = getattr(task, what)
        if shape != (frames, height, width, 1):
            raise InputError(
                f"{archive.url} gives task {task.name} a {what} of {frames} × {height} × {width}: "
                f"the model of {run.url} needs {' × '.join(map(str, shape[:3]))}"
            )
