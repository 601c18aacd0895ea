"""Forecasts of known values, written by hand in the layout of `earthformer forecast`."""

from collections.abc import Sequence
from dataclasses import asdict

import dask.array
import numpy as np
import xarray as xr

from pipelines import windows
from pipelines.archives import store
from pipelines.archives.store import Archive
from pipelines.tasks import Task
from pipelines.windows import Window


def write_forecast(
    url: str,
    task: Task,
    archive: Archive,
    keys: Sequence[Window],
    values: np.ndarray,
    *,
    forecaster: str = "persistence",
    shard_windows: int = 2,
    split: str = "test",
    archive_hash: str | None = None,
    finish: bool = True,
) -> str:
    """Write `values` (window, member, lead_time, y, x) as a finished forecast; returns its URL."""
    count, members = values.shape[:2]
    times = windows.frame_times(task, archive, keys)
    place = windows.placement(task, archive, keys)
    y, x = (name for name in place.sizes if name != "window")
    config = {
        "kind": "forecast",
        "task": asdict(task),
        "forecaster": forecaster,
        "run_hash": store.config_hash({"run": forecaster}),
        "archive_hash": archive_hash or archive.config_hash,
        "split": split,
        "windows": count,
        "members": members,
        "seed": 0,
        "values": float(np.nanmean(values)),
    }
    chunks = (1, members, *values.shape[2:])
    template = xr.Dataset(
        {
            task.variable: (
                ("window", "member", "lead_time", y, x),
                dask.array.zeros(values.shape, dtype=np.float32, chunks=values.shape),
                {"units": task.units},
                {"chunks": chunks, "shards": (min(shard_windows, count), *chunks[1:])},
            )
        },
        coords={
            **place.coords,
            "window": np.arange(count),
            "member": np.arange(members),
            "lead_time": (times[0] - times[0][task.context - 1])[task.context :],
            "series": ("window", np.array([k.series for k in keys])),
            "start": ("window", np.array([k.start for k in keys])),
            "tile_y": ("window", np.array([k.tile[0] if k.tile else -1 for k in keys])),
            "tile_x": ("window", np.array([k.tile[1] if k.tile else -1 for k in keys])),
            "init_time": ("window", times[:, task.context - 1]),
            "valid_time": (("window", "lead_time"), times[:, task.context :]),
        },
        attrs={"task": task.name, "forecaster": forecaster, "run": forecaster, "archive": archive.url},
    )
    starts = range(0, count, shard_windows)
    store.create(url, {"": template}, config=config, shards=len(starts))
    for shard, first in enumerate(starts):
        region = {"window": slice(first, min(first + shard_windows, count))}
        part = {task.variable: values[region["window"]].astype(np.float32)}
        crc32 = store.write_region(url, "", part, region)
        store.write_record(url, shard, {"regions": [store.region_record("", region, crc32)]})
        if not finish:
            return url
    store.complete(url, {"counts": {"windows": count, "members": members}})
    return url


def persist(task: Task, archive: Archive, keys: Sequence[Window]) -> np.ndarray:
    """The last frame of the context, repeated: (window, 1, lead_time, y, x)."""
    last = windows.read(task, archive, keys)["context"][:, -1:, ..., 0].astype(np.float32)
    return np.repeat(last, task.target, axis=1)[:, None]
