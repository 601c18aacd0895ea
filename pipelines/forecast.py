"""Forecasts of a whole split, or a whole archive: Ray Data over an actor pool, into a Forecast Zarr."""

import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import dask.array
import numpy as np
import ray
import ray.data
import torch
import xarray as xr

from pipelines import engine, runs, windows
from pipelines.archives import store
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.tasks import Task, Tiles
from pipelines.windows import Window

SHARD_BYTES = 64 << 20
"""Forecast values that one task holds and writes at once."""


@dataclass(frozen=True)
class Forecasted:
    """What a finished forecast reports."""

    url: str
    forecaster: str
    windows: int
    members: int
    seconds: float
    megabytes: float

    def __str__(self) -> str:
        rate = self.windows / self.seconds if self.seconds else 0.0
        return (
            f"{self.url}: {self.windows} windows × {self.members} member(s) of {self.forecaster}, "
            f"{self.megabytes:.1f} MB in {self.seconds:.1f} s ({rate:.2f} windows/s)"
        )


@dataclass(frozen=True)
class Plan:
    """What is to be forecast: enough to write the template, to cut shards and to make any one of them."""

    task: Task
    run: str
    """URL of a run, or `persistence`."""
    run_hash: str
    archive: Archive
    keys: tuple[Window, ...]
    split: str
    seed: int
    shard_windows: int

    @property
    def name(self) -> str:
        """The forecaster's name, as tables and plots show it."""
        return self.run if self.run == "persistence" else "earthformer"

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
            "forecaster": self.name,
            "run_hash": self.run_hash,
            "archive_hash": self.archive.config_hash,
            "split": self.split,
            "windows": len(self.keys),
            "members": 1,
            "seed": self.seed,
            "shard_windows": self.shard_windows,
        }


def plan(
    run: str, archive: str, split: str, *, task: Task | None = None, seed: int = 0, limit: int | None = None
) -> Plan:
    """Resolve what a forecast of `split` would do; reads keys and metadata only.

    Args:
        run: URL of a finished run, or `persistence`, which needs `task`.
        archive: URL of a complete archive.
        split: `train`, `val` or `test`.
        task: for `persistence`.
        seed: the forecast's seed; members' seeds derive from it.
        limit: forecast only the first so many windows.

    Raises:
        InputError: run or archive absent, unfinished or of another kind; no windows; no task.
    """
    opened = store.open_archive(archive)
    if run == "persistence":
        if task is None:
            raise InputError("persistence has no run to take the task from: needed --task NAME")
        run_hash = store.config_hash({"persistence": asdict(task)})
    else:
        trained = runs.open_run(run)
        task, run_hash = trained.config.task, trained.hash
    keys = tuple(windows.enumerate_windows(task, opened, split)[:limit])
    height, width = _grid(task, opened, keys[0])
    each = task.target * height * width * 4
    return Plan(task, run, run_hash, opened, keys, split, seed, max(1, min(SHARD_BYTES // each, len(keys))))


def forecast(
    planned: Plan, out: str, *, workers: int | None = None, gpu: bool = False, batch_size: int = 8
) -> Forecasted:
    """Write the Forecast Zarr `(window, member, lead_time, y, x)` at `out`; the same call resumes.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration.
    """
    store.create(out, {"": template(planned)}, config=planned.config, shards=planned.shards)
    pending = store.pending(out, planned.shards)
    began = time.perf_counter()
    if pending:
        engine.connect()
        actors = min(workers or 1, len(pending))
        forecasts = ray.data.from_items([{"shard": i} for i in pending], override_num_blocks=len(pending))
        written = forecasts.map(
            cast(Any, _Forecast),
            fn_constructor_kwargs={
                "planned": planned,
                "out": out,
                "batch_size": batch_size,
                "actors": actors,
            },
            concurrency=actors,
            num_cpus=None if gpu else 0.5,
            num_gpus=1 if gpu else None,
        )
        for _ in engine.track(written, len(pending), "forecast shards"):
            pass
    megabytes = (
        len(planned.keys)
        * planned.task.target
        * np.prod(_grid(planned.task, planned.archive, planned.keys[0]))
        * 4e-6
    )
    done = Forecasted(out, planned.name, len(planned.keys), 1, time.perf_counter() - began, float(megabytes))
    if not store.is_complete(out):
        store.complete(out, {"counts": {"windows": done.windows, "members": done.members}})
    return done


class _Forecast:
    """One replica of the forecaster: makes and writes whole shards."""

    def __init__(self, planned: Plan, out: str, batch_size: int, actors: int) -> None:
        engine.quiet()
        self.planned, self.out, self.batch_size = planned, out, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, engine.cores() // actors))
        task = planned.task
        forecaster = (
            runs.persistence(task)
            if planned.run == "persistence"
            else runs.open_run(planned.run).forecaster()
        )
        self.forecaster = forecaster.to(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        planned, shard = self.planned, int(row["shard"])
        place = planned.shard(shard)
        keys = planned.keys[place]
        parts = []
        for first in range(0, len(keys), self.batch_size):
            part = keys[first : first + self.batch_size]
            pixels = windows.read(planned.task, planned.archive, part)["context"]
            members = self.forecaster.forecast(
                torch.from_numpy(pixels).to(self.device), member_seeds(planned.seed, part, 1)
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
        identity = [zlib.crc32(key.series.encode()), key.start, *(key.tile or ())]
        rows.append(
            [
                np.random.SeedSequence([seed, *identity, m]).generate_state(1, np.uint64)[0] >> 1
                for m in range(members)
            ]
        )
    return torch.from_numpy(np.array(rows, dtype=np.uint64).astype(np.int64))


def template(planned: Plan) -> xr.Dataset:
    """Metadata and coordinates of the forecast; its values are not computed."""
    task, archive, keys = planned.task, planned.archive, planned.keys
    times = windows.frame_times(task, archive, keys)
    place = windows.placement(task, archive, keys)
    lead = (times[0] - times[0][task.context - 1])[task.context :]
    y, x = (dim for dim in place.sizes if dim != "window")
    shape = (len(keys), 1, task.target, place.sizes[y], place.sizes[x])
    chunks = (1, 1, *shape[2:])
    values = xr.Variable(
        ("window", "member", "lead_time", y, x),
        dask.array.zeros(shape, dtype=np.float32, chunks=shape),
        attrs=windows.attributes(task, archive, keys[0])
        | {"coordinates": "init_time valid_time"}
        | ({"grid_mapping": "crs"} if "crs" in place.coords else {}),
        encoding={"chunks": chunks, "shards": (planned.shard_windows, *chunks[1:])},
    )
    return xr.Dataset(
        {task.variable: values},
        coords={
            **place.coords,
            "window": ("window", np.arange(len(keys))),
            "member": ("member", np.arange(1)),
            "lead_time": ("lead_time", lead, {"standard_name": "forecast_period", "long_name": "lead time"}),
            "series": ("window", np.array([k.series for k in keys]), {"long_name": "series of the archive"}),
            "start": ("window", np.array([k.start for k in keys]), {"long_name": "index of the first frame"}),
            "tile_y": ("window", np.array([k.tile[0] if k.tile else -1 for k in keys])),
            "tile_x": ("window", np.array([k.tile[1] if k.tile else -1 for k in keys])),
            "init_time": (
                "window",
                times[:, task.context - 1],
                {
                    "standard_name": "forecast_reference_time",
                    "long_name": "time of the last frame of the context",
                },
            ),
            "valid_time": (("window", "lead_time"), times[:, task.context :], {"standard_name": "time"}),
            "seed": (("window", "member"), member_seeds(planned.seed, keys, 1).numpy()),
        },
        attrs={
            "Conventions": "CF-1.11",
            "title": f"{planned.name} forecast of {task.variable}, task {task.name}, split {planned.split}",
            "task": task.name,
            "forecaster": planned.name,
            "run": planned.run,
            "run_hash": planned.run_hash,
            "archive": archive.url,
            "archive_hash": archive.config_hash,
            "split": planned.split,
        },
    )


def _grid(task: Task, archive: Archive, key: Window) -> tuple[int, int]:
    if task.archive == "radar":
        size = (task.tiles or Tiles()).size
        return size, size
    height, width = archive.array("", task.variable).shape[-2:]
    if task.archive == "enso":
        width = windows.ENSO_LONGITUDES.stop - windows.ENSO_LONGITUDES.start
    return height, width
