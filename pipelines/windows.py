"""Windows: which stretches of an archive are samples, in which split, and how their pixels are read.

Windows are keys. They are enumerated, split and shuffled without touching a pixel (radar excepted, whose
tiles are chosen by their rain), and read by whoever needs them.

A batch carries what the archive stores: uint8 (255 is missing) and float32 as they are; packed integers,
such as radar's, are unpacked to float32 in their units, NaN where missing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
import xarray as xr

from pipelines.archives.store import Archive
from pipelines.configs import unknown
from pipelines.errors import InputError
from pipelines.series import KINDS, SPLITS, Window, pixels
from pipelines.tasks import Task, Tiles

READ_WINDOWS = 16
"""Windows that one task reads: 16 of SEVIR are 59 MB."""


def enumerate_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    """All windows of a split, in evaluation order: by event id, source or sequence, then by start, then tile.

    Quarantined series are left out. No window holds frames of two splits, with one exception that is
    published so: `Splits.val_fraction`.

    Raises:
        InputError: unknown split; archive of another kind, or without the task's variable; a split without
            windows.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: needed one of {', '.join(SPLITS)}")
    if archive.kind != task.archive:
        raise InputError(f"{archive.url} is a {archive.kind} archive: task {task.name} needs {task.archive}")
    held = ("rate",) if task.archive == "radar" else tuple(map(str, archive.root.data_vars))
    if task.variable not in held:
        raise InputError(
            f"{archive.url} holds {', '.join(held)}: task {task.name} needs the variable {task.variable}"
        )
    found = KINDS[task.archive].windows(task, archive, split)
    if not found:
        raise InputError(
            f"{archive.url} has no {split} windows of {task.frames} frames for task {task.name}: "
            f"it spans {_span(archive)}; needed other split dates or a longer archive"
        )
    return found


def epoch_order(windows: Sequence[Window], seed: int, epoch: int) -> list[Window]:
    """The windows in the order of a training epoch: a permutation that (seed, epoch) alone decides."""
    return [windows[i] for i in np.random.default_rng([seed, epoch]).permutation(len(windows))]


def read(task: Task, archive: Archive, windows: Sequence[Window]) -> dict[str, np.ndarray]:
    """Pixels of windows: `context` (B, T_in, H, W, 1) and `target` (B, T_out, H, W, 1).

    SEVIR's VIL stays uint8; ENSO is float32 in K, radar float32 in mm/h.

    Raises:
        InputError: a chunk of the archive is damaged.
    """
    frames = np.stack([KINDS[task.archive].frames(task, archive, window, task.frames) for window in windows])[
        ..., None
    ]
    return {"context": frames[:, : task.context], "target": frames[:, task.context :]}


def read_context(task: Task, archive: Archive, window: Window) -> np.ndarray:
    """The `context` (1, T_in, H, W, 1) alone, of a window whose target may not have been observed yet.

    Raises:
        InputError: a chunk of the archive is damaged.
    """
    frames: np.ndarray = KINDS[task.archive].frames(task, archive, window, task.context)
    return frames[None, ..., None]


def check(task: Task, archive: Archive, window: Window) -> None:
    """
    Raises:
        InputError: the archive has no such series, or the context lies partly outside of it.
    """
    series, last_starts = window.series, KINDS[task.archive].last_starts(task, archive)
    if series in archive.quarantine:
        raise InputError(f"{series} could not be read when the archive was prepared: needed another event")
    if series not in last_starts:
        unknown("event", series, sorted(last_starts))
    last = last_starts[series]
    if not 0 <= window.start <= last:
        needed = f"0 to {last}" if last >= 0 else "a longer event"
        raise InputError(
            f"start is {window.start}: needed {needed}, for {task.context} frames of context in {series}"
        )
    if task.archive != "radar":
        if window.tile is not None:
            raise InputError(f"tile is {list(window.tile)}: needed none, for {archive.kind} has no tiles")
        return
    size, sizes = (task.tiles or Tiles()).size, archive.group(series).sizes
    most = sizes["y"] - size, sizes["x"] - size
    if window.tile is None or not all(0 <= n <= end for n, end in zip(window.tile, most, strict=True)):
        raise InputError(
            f"tile is {window.tile and list(window.tile)}: needed its first row and column, at most {most}"
        )


def batches(
    task: Task, archive: Archive, windows: Sequence[Window], batch_size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of these windows in this order, read ahead by Ray Data tasks; the last may be smaller.

    Pixels travel in the archive's dtype (SEVIR: uint8) and are scaled on the device, by the forecaster.
    """
    read = partial(_read_table, task=task, archive=archive)
    return read_ahead(to_table(windows).to_pylist(), read, batch_size, device)


def read_ahead(
    rows: Sequence[dict[str, Any]],
    read: Callable[[pa.Table], dict[str, np.ndarray]],
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of what is read of each row, in their order, by Ray Data tasks, on this node if it takes any.

    The tasks claim no processors, for theirs are in the claim of whoever reads: those of workers that have
    claimed all there are would wait for ever.
    """
    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # A block is what one task reads: a few batches, so that a task's overhead is small beside its work.
    blocks = math.ceil(len(rows) / (batch_size * max(1, READ_WINDOWS // batch_size)))
    dataset = ray.data.from_items(list(rows), override_num_blocks=blocks).map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        fallback_strategy=[{"label_selector": {}}],
        concurrency=min(2, blocks),
    )
    for batch in dataset.iter_batches(batch_size=batch_size, prefetch_batches=2):
        # Copied: Ray's blocks are shared and cannot be written to.
        yield {str(name): torch.tensor(values, device=device) for name, values in batch.items()}


def to_table(windows: Sequence[Window]) -> pa.Table:
    """Keys as an Arrow table: `series`, `start`, `tile_y`, `tile_x` (-1 without a tile)."""
    tiles = [window.tile or (-1, -1) for window in windows]
    return pa.table(
        {
            "series": [window.series for window in windows],
            "start": [window.start for window in windows],
            "tile_y": [tile[0] for tile in tiles],
            "tile_x": [tile[1] for tile in tiles],
        }
    )


def from_table(table: pa.Table) -> list[Window]:
    """The inverse of `to_table`."""
    return [
        Window(row["series"], row["start"], (row["tile_y"], row["tile_x"]) if row["tile_y"] >= 0 else None)
        for row in table.to_pylist()
    ]


def _read_table(table: pa.Table, task: Task, archive: Archive) -> dict[str, np.ndarray]:
    return read(task, archive, from_table(table))


def frame_times(task: Task, archive: Archive, windows: Sequence[Window]) -> np.ndarray:
    """Valid time of every frame, datetime64[ns] (B, T_in + T_out)."""
    return np.stack([KINDS[task.archive].times(task, archive, window, task.frames) for window in windows])


def context_times(task: Task, archive: Archive, window: Window) -> np.ndarray:
    """Valid time of every frame of the context and of the target to come, datetime64[ns] (T_in + T_out,)."""
    return continued(task, KINDS[task.archive].times(task, archive, window, task.context))


def continued(task: Task, times: np.ndarray) -> np.ndarray:
    """Times of the context (T_in,), and after them those of the target, datetime64[ns] (T_in + T_out,)."""
    ahead = np.arange(1, task.target + 1)
    if task.step_minutes is None:
        target = (times[-1].astype("datetime64[M]") + ahead).astype("datetime64[ns]")
    else:
        target = times[-1] + ahead * np.timedelta64(task.step_minutes, "m")
    return np.concatenate([times.astype("datetime64[ns]"), target])


def read_nino(task: Task, archive: Archive, windows: Sequence[Window]) -> np.ndarray:
    """Niño3.4 labels in K of each window's first T_out - 2 lead months, (B, T_out - 2).

    Label m is the mean of months m, m+1 and m+2, so that the last two forecast months have none.
    """
    row = archive.positions("source")
    labels = {name: pixels(archive, "", "nino34", (row[name],)) for name in {w.series for w in windows}}
    months = task.context + np.arange(task.target - 2)
    return np.stack([labels[w.series][w.start + months] for w in windows])


def placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    """Where the pixels of windows lie: two spatial axes, and of each window its origin and projection.

    `y` and `x` are offsets: a window's pixel lies at (`y_origin` + y, `x_origin` + x) in the window's own
    projection, `proj`. ENSO has `lat` and `lon` (degrees) instead, the same for all windows.

    Raises:
        InputError: the windows are of grids with different pixels.
    """
    return KINDS[task.archive].place(task, archive, windows)


def attributes(task: Task, archive: Archive, key: Window) -> dict[str, Any]:
    """CF attributes of the task's variable in the units of `read`, as forecasts carry them."""
    stored = archive.group(key.series if task.archive == "radar" else "")[task.variable].attrs
    packing = ("scale_factor", "add_offset", "_FillValue", "grid_mapping")
    return {name: value for name, value in stored.items() if name not in packing}


def _span(archive: Archive) -> str:
    for name in ("time_utc", "start_time"):
        if name in archive.root:
            values = archive.root[name].values
            if len(values):
                return f"{values.min().astype('datetime64[D]')} to {values.max().astype('datetime64[D]')}"
    return ", ".join(f"{name}={size}" for name, size in archive.root.sizes.items())
