"""Forecasts of a split of an archive: Ray Data over an actor pool, into a Forecast Zarr."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import dask.array
import numpy as np
import ray
import ray.data
import torch
import xarray as xr

from earthformer.forecasters import Forecaster
from pipelines import engine, runs, windows
from pipelines.archives import store
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.tasks import Task
from pipelines.windows import Window

PERSISTENCE = "persistence"
SHARD_BYTES = 64 << 20
"""Forecast values that one task holds and writes at once."""
SHARD_WINDOWS = 16
"""Windows of a shard at most: what is done again after a kill, and the least that a replica is given."""


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

    def __str__(self) -> str:
        total = f"{self.url}: {self.windows} windows by {self.forecaster}"
        if not self.written:
            return f"{total}, all there before"
        some = "" if self.written == self.windows else f", {self.written} of them now,"
        return f"{total}{some} at {self.written / self.seconds:.3g} windows/s"


@dataclass(frozen=True)
class Plan:
    """What is to be forecast: enough to write the template, to cut shards and to make any one of them."""

    task: Task
    forecaster: str
    """Its name, as tables and plots show it."""
    run: str
    """URL of a run, or `persistence`."""
    run_hash: str
    archive: Archive
    keys: tuple[Window, ...]
    split: str
    seed: int
    shard_windows: int
    members: int = 1

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
            "members": self.members,
            "seed": self.seed,
            "shard_windows": self.shard_windows,
        }

    def load(self) -> Forecaster:
        """The forecaster, on the CPU.

        Raises:
            InputError: the run's weights are absent, damaged or of another model.
        """
        if self.run == PERSISTENCE:
            return runs.persistence(self.task)
        return runs.open_run(self.run).forecaster()


def plan(
    run: str, archive: str, split: str, *, task: Task | None = None, seed: int = 0, limit: int | None = None
) -> Plan:
    """Resolve what a forecast of `split` would do; reads keys and metadata only.

    Args:
        run: URL of a finished run, or `persistence`, which needs `task`.
        archive: URL of a complete archive.
        split: `train`, `val` or `test`.
        task: for `persistence` alone: a run has its own.
        seed: the forecast's seed, from 0; members' seeds derive from it.
        limit: forecast only the first so many windows.

    Raises:
        InputError: run or archive absent, unfinished or of another kind; no windows; no task, or one too
            many; an impossible seed or limit.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}: needed 0 or more")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: needed 1 window or more")
    trained = None
    if run == PERSISTENCE:
        if task is None:
            raise InputError("persistence has no run to take the task from: needed --task NAME")
        run_hash = store.config_hash({PERSISTENCE: asdict(task)})
    else:
        run = engine.absolute(run)
        trained = runs.open_run(run)
        if task is not None:
            raise InputError(
                f"{run} was trained for task {trained.config.task.name}: persistence alone takes another"
            )
        task, run_hash = trained.config.task, trained.hash
    opened = store.open_archive(engine.absolute(archive))
    keys = tuple(windows.enumerate_windows(task, opened, split)[:limit])
    height, width = _grid(windows.placement(task, opened, keys[:1])).values()
    if trained is not None:
        _check_model(trained, opened, height, width)
    each = task.target * height * width * 4
    shard_windows = max(1, min(SHARD_BYTES // each, SHARD_WINDOWS, len(keys)))
    name = trained.config.trainable if trained is not None else PERSISTENCE
    return Plan(task, name, run, run_hash, opened, keys, split, seed, shard_windows)


def _check_model(run: runs.Run, archive: Archive, height: int, width: int) -> None:
    task, model = run.config.task, run.config.model
    for what, frames, shape in (
        ("context", task.context, model.context),
        ("target", task.target, model.target),
    ):
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
        batch_size: windows a forward pass.
        progress: show a progress bar.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration; the run's weights
            are damaged; an impossible number; no GPU.
    """
    for what, value in (("workers", workers), ("batch size", batch_size)):
        if value < 1:
            raise InputError(f"{what} is {value}: needed 1 or more")
    if gpu and not os.environ.get("RAY_ADDRESS") and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that PyTorch can use: needed one, or no --gpu")
    todo, place = pending(planned, out), engine.absolute(out)
    if todo:
        # What is wrong with the weights is said here, before anything is written, rather than by a replica.
        planned.load()
    store.create(place, {"": template(planned)}, config=planned.config, shards=planned.shards)
    began = time.perf_counter()
    if todo:
        engine.connect(workers)
        began = time.perf_counter()
        _write_all(planned, place, todo, workers, gpu, batch_size, progress)
    seconds = time.perf_counter() - began
    if not store.is_complete(place):
        store.complete(place, {"counts": {"windows": len(planned.keys), "members": planned.members}})
    written = sum(len(planned.keys[planned.shard(index)]) for index in todo)
    return Forecasted(out, planned.forecaster, len(planned.keys), written, seconds)


def pending(planned: Plan, out: str) -> list[int]:
    """Shards that are still to be made; reads records only.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration.
    """
    place = engine.absolute(out)
    if store.begun(place, planned.config):
        return store.pending(place, planned.shards)
    return list(range(planned.shards))


def _write_all(
    planned: Plan, out: str, todo: list[int], workers: int, gpu: bool, batch_size: int, progress: bool
) -> None:
    shards = ray.data.from_items([{"shard": i} for i in todo], override_num_blocks=len(todo))
    written = shards.map(
        cast(Any, _Replica),
        fn_constructor_kwargs={
            "planned": planned,
            "out": out,
            "batch_size": batch_size,
            # By what was asked, not by what is left: a resumed forecast has the same last digits.
            "threads": max(1, int(ray.cluster_resources().get("CPU", 1)) // workers),
            "device": "cuda" if gpu else "cpu",
        },
        concurrency=min(workers, len(todo)),
        num_cpus=None if gpu else 0.5,
        num_gpus=1 if gpu else None,
    )
    for _ in engine.track(written, len(todo), "forecast: shards", progress):
        pass


class _Replica:
    """One replica of the forecaster: makes and writes whole shards."""

    def __init__(self, planned: Plan, out: str, batch_size: int, threads: int, device: str) -> None:
        engine.quiet()
        self.planned, self.out, self.batch_size = planned, out, batch_size
        self.device = torch.device(device)
        torch.set_num_threads(min(threads, engine.cores()))
        self.forecaster = cast(Any, planned.load()).to(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        planned, shard = self.planned, int(row["shard"])
        place = planned.shard(shard)
        keys = planned.keys[place]
        parts = []
        for first in range(0, len(keys), self.batch_size):
            part = keys[first : first + self.batch_size]
            pixels = windows.read(planned.task, planned.archive, part)["context"]
            members = self.forecaster.forecast(
                torch.from_numpy(pixels).to(self.device), member_seeds(planned.seed, part, planned.members)
            )
            parts.append(members[..., 0].cpu().numpy())
        name = planned.task.variable
        region = {"window": place}
        crc32 = store.write_region(self.out, "", {name: np.concatenate(parts)}, region)
        store.write_record(self.out, shard, {"regions": [store.region_record("", region, crc32)]})
        return {"shard": shard}


def member_seeds(seed: int, keys: Sequence[Window], members: int) -> torch.Tensor:
    """Seeds (B, M), int64: each follows from (forecast seed, window, member) alone."""
    rows = []
    for key in keys:
        name = key.series.encode()
        identity = [seed, len(name), *name, key.start, *(key.tile or ())]
        states = [np.random.SeedSequence([*identity, m]).generate_state(1, np.uint64) for m in range(members)]
        rows.append(np.concatenate(states) >> 1)
    return torch.from_numpy(np.array(rows, dtype=np.uint64).astype(np.int64))


def template(planned: Plan) -> xr.Dataset:
    """Metadata and coordinates of the forecast; its values are not computed."""
    task, archive, keys = planned.task, planned.archive, planned.keys
    times = windows.frame_times(task, archive, keys)
    place = windows.placement(task, archive, keys)
    grid = _grid(place)
    shape = (len(keys), planned.members, task.target, *grid.values())
    each = (planned.members, *shape[2:])
    coords: dict[str, Any] = {
        **{str(name): value for name, value in place.coords.items()},
        "window": ("window", np.arange(len(keys)), {"long_name": "sample, in evaluation order"}),
        "member": ("member", np.arange(planned.members), {"standard_name": "realization"}),
        "lead_time": _lead_time(task, times[0]),
        "series": ("window", np.array([k.series for k in keys]), {"long_name": "series of the archive"}),
        "start": (
            "window",
            np.array([k.start for k in keys]),
            {"long_name": "index of the context's first frame in the series"},
        ),
        "init_time": (
            "window",
            times[:, task.context - 1],
            {"standard_name": "forecast_reference_time", "long_name": "time of the context's last frame"}
            | _calendar(task),
        ),
        "valid_time": (
            ("window", "lead_time"),
            times[:, task.context :],
            {"standard_name": "time", "long_name": "time of the forecast frame"} | _calendar(task),
        ),
        "seed": (
            ("window", "member"),
            member_seeds(planned.seed, keys, planned.members).numpy(),
            {"long_name": "seed of the member's random numbers"},
        ),
    }
    for axis, what, of in ((0, "tile_y", "row"), (1, "tile_x", "column")):
        corners = np.array([k.tile[axis] if k.tile else -1 for k in keys])
        coords[what] = (
            "window",
            corners,
            {"long_name": f"first {of} of the tile in the series' grid; -1: no tile"},
        )
    values = xr.Variable(
        ("window", "member", "lead_time", *grid),
        dask.array.zeros(shape, dtype=np.float32, chunks=shape),
        attrs=windows.attributes(task, archive, keys[0])
        | {"coordinates": " ".join(sorted(set(coords) - {"window", "member", "lead_time", *grid}))},
        encoding={
            "chunks": (1, 1, *shape[2:]),
            "shards": (planned.shard_windows, *each),
            "_FillValue": np.float32("nan"),
        },
    )
    return xr.Dataset(
        {task.variable: values},
        coords=coords,
        attrs={
            "Conventions": "CF-1.11",
            "title": f"{planned.forecaster} forecast of {task.variable}, {task.name} {planned.split} windows",
            "task": task.name,
            "forecaster": planned.forecaster,
            "run": planned.run,
            "run_hash": planned.run_hash,
            "archive": archive.url,
            "archive_hash": archive.config_hash,
            "split": planned.split,
            "seed": planned.seed,
        },
    )


def _grid(place: xr.Dataset) -> dict[str, int]:
    """Name and length of the two spatial dimensions."""
    return {str(dim): size for dim, size in place.sizes.items() if dim != "window"}


def _lead_time(task: Task, times: np.ndarray) -> tuple[str, np.ndarray, dict[str, str]]:
    attrs = {"standard_name": "forecast_period", "long_name": "time since init_time"}
    if task.step_minutes is None:
        return "lead_time", np.arange(1, task.target + 1), attrs | {"units": "months"}
    return "lead_time", (times - times[task.context - 1])[task.context :], attrs


def _calendar(task: Task) -> dict[str, str]:
    if task.step_minutes is not None:
        return {}
    return {"comment": "nominal: model years have no date, and count from January 1700"}
