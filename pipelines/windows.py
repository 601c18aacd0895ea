"""Windows: which stretches of an archive are samples, in which split, and how their pixels are read.

Windows are keys. They are enumerated, split and shuffled without touching a pixel (radar excepted, whose
tiles are chosen by their rain), and read by whoever needs them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.data
import torch
import torch.nn.functional as F
import xarray as xr
from torch.utils.data import random_split

from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.tasks import Task, Tiles

SPLITS = ("train", "val", "test")
READ_WINDOWS = 16
"""Windows that one task reads: 16 of SEVIR are 59 MB."""
ENSO_LONGITUDES = slice(19, 67)
"""Columns of the 5-degree grid from 95 to 330°E, the 48 that the ENSO models see."""


@dataclass(frozen=True, order=True)
class Window:
    """A sample's key: `frames` successive steps of a series, or of one tile of it."""

    series: str
    """Event id (SEVIR), source (ENSO) or sequence name (radar)."""
    start: int
    """Index of the first frame, on the archive's own time axis."""
    tile: tuple[int, int] | None = None
    """Row and column of the tile's first pixel, in the archive's row order."""


def enumerate_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    """All windows of a split, in evaluation order: by event id, source or sequence, then by start, then tile.

    Quarantined series are left out. No window holds frames of two splits, with one exception that is
    published so: `Splits.val_fraction`.

    Raises:
        InputError: unknown split; archive of another kind; a split without windows.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: needed one of {', '.join(SPLITS)}")
    if archive.kind != task.archive:
        raise InputError(f"{archive.url} is a {archive.kind} archive: task {task.name} needs {task.archive}")
    found = _ENUMERATE[task.archive](task, archive, split)
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

    SEVIR stays uint8 (255 is missing); ENSO is float32 in K; radar becomes float32 in mm/h (NaN is missing).
    """
    frames = np.stack([_READ[task.archive](task, archive, window) for window in windows])[..., None]
    return {"context": frames[:, : task.context], "target": frames[:, task.context :]}


def batches(
    task: Task, archive: Archive, windows: Sequence[Window], batch_size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of these windows in this order, read ahead by Ray Data tasks; the last may be smaller.

    Pixels travel in the archive's dtype (SEVIR: uint8) and are scaled on the device, by the forecaster.
    """
    if not windows:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # A block is what one task reads: a few batches, so that a task's overhead is small beside its work.
    size = batch_size * max(1, READ_WINDOWS // batch_size)
    blocks = [to_table(windows[i : i + size]) for i in range(0, len(windows), size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        partial(_read_table, task=task, archive=archive),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
        concurrency=2,
    )
    for batch in dataset.iter_batches(batch_size=batch_size, prefetch_batches=2):
        yield {
            str(name): torch.from_numpy(pixels).to(device, non_blocking=True)
            for name, pixels in batch.items()
        }


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
    return np.stack([_TIMES[task.archive](task, archive, window) for window in windows])


def read_nino(task: Task, archive: Archive, windows: Sequence[Window]) -> np.ndarray:
    """Niño3.4 labels in K of each window's first T_out - 2 lead months, (B, T_out - 2).

    Label m is the mean of months m, m+1 and m+2, so that the last two forecast months have none.
    """
    labels = archive.root["nino34"].values
    row = archive.positions("source")
    months = task.context + np.arange(task.target - 2)
    return np.stack([labels[row[w.series], w.start + months] for w in windows])


def placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    """Where the pixels of windows lie: spatial coordinates, and of each window its origin and projection.

    `y` and `x` (metres) are relative to `y_origin` and `x_origin` of each window, in the projection `proj`.
    ENSO has `lat` and `lon` (degrees), the same for all windows.
    """
    return _PLACE[task.archive](task, archive, windows)


def attributes(task: Task, archive: Archive, key: Window) -> dict[str, Any]:
    """CF attributes of the task's variable in physical units, as forecasts carry them."""
    stored = archive.group(key.series if task.archive == "radar" else "")[task.variable].attrs
    packing = ("scale_factor", "add_offset", "_FillValue", "grid_mapping")
    return {name: value for name, value in stored.items() if name not in packing}


# ---------------------------------------------------------------------------------------------- SEVIR


def _sevir_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    times = pd.Series(archive.root["time_utc"].values, index=archive.root["event"].values.astype(str))
    times = times.drop(labels=list(archive.quarantine), errors="ignore").sort_index()
    start, end = _bounds(task, split)
    if task.splits.val_fraction and split != "test":
        return _published_random_split(task, archive, times[times <= end], split)
    chosen = times[(times > start) & (times <= end)]
    return _slide(task, archive, chosen.index, split)


def _published_random_split(task: Task, archive: Archive, times: pd.Series, split: str) -> list[Window]:
    # The published loader shuffles events twice by pandas, then parts their windows by torch.
    shuffled = times.sample(frac=1, random_state=1).sample(frac=1, random_state=1) if len(times) else times
    both = _slide(task, archive, shuffled.index, split)
    fraction = task.splits.val_fraction or 0.0
    generator = torch.Generator().manual_seed(0)
    places = torch.utils.data.TensorDataset(torch.arange(len(both)))
    parts = random_split(places, [1 - fraction, fraction], generator=generator)
    return [both[i] for i in parts[SPLITS.index(split)].indices]


def _slide(task: Task, archive: Archive, events: Iterable[str], split: str) -> list[Window]:
    total = archive.root.sizes["time"]
    starts = range(0, total - task.frames + 1, task.stride[SPLITS.index(split)])
    return [Window(str(event), start) for event in events for start in starts]


def _sevir_frames(task: Task, archive: Archive, window: Window) -> np.ndarray:
    event = archive.positions("event")[window.series]
    stored = archive.array("", task.variable)
    return np.asarray(stored[event, window.start : window.start + task.frames])


def _sevir_times(task: Task, archive: Archive, window: Window) -> np.ndarray:
    event = archive.positions("event")[window.series]
    return archive.root["frame_time"].values[event, window.start : window.start + task.frames]


def _sevir_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    root, rows = archive.root, [archive.positions("event")[w.series] for w in windows]
    origin = {
        name: ("window", root[name].values[rows], root[name].attrs) for name in ("y_origin", "x_origin")
    }
    y, x = root[task.variable].dims[-2:]
    proj = ("window", np.full(len(windows), root["crs"].attrs["proj4"]))
    return xr.Dataset(coords={y: root[y], x: root[x], **origin, "proj": proj, "crs": root["crs"]})


# ----------------------------------------------------------------------------------------------- ENSO


def _enso_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    months = dict(
        zip(archive.root["source"].values.astype(str), archive.root["n_months"].values, strict=True)
    )
    cmip6 = sorted(name for name in months if name.startswith("CMIP6-"))
    cmip5 = sorted(name for name in months if name.startswith("CMIP5-"))
    sources = {"train": cmip6 + cmip5[:-2], "val": cmip5[-2:-1], "test": cmip5[-1:]}[split]
    stride = task.stride[SPLITS.index(split)]
    return [
        Window(source, start)
        for source in sources
        if source not in archive.quarantine
        for start in range(0, int(months[source]) - task.frames + 1, stride)
    ]


def _enso_frames(task: Task, archive: Archive, window: Window) -> np.ndarray:
    source = archive.positions("source")[window.series]
    stored = archive.array("", task.variable)
    return np.asarray(stored[source, window.start : window.start + task.frames, :, ENSO_LONGITUDES])


def _enso_times(task: Task, archive: Archive, window: Window) -> np.ndarray:
    # Model years have no date: count months from a nominal January 1700, inside what datetime64[ns] holds.
    first = np.datetime64("1700-01", "M") + window.start
    return (first + np.arange(task.frames)).astype("datetime64[ns]")


def _enso_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    return xr.Dataset(coords={"lat": archive.root["lat"], "lon": archive.root["lon"][ENSO_LONGITUDES]})


# ---------------------------------------------------------------------------------------------- radar


def _radar_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    tiles = task.tiles or Tiles()
    usable = {}
    for name in sorted(archive.root["sequence"].values.astype(str)):
        if name in archive.quarantine:
            continue
        cadence = _cadence(archive, name)
        if (task.step_minutes or 0) % cadence:
            warnings.warn(
                f"{name} has a frame every {cadence} min, which gives no steps of {task.step_minutes} min: "
                "it is left out",
                stacklevel=3,
            )
            continue
        usable[name] = archive.group(name)["time"].values
    start, end = _bounds(task, split, np.concatenate(list(usable.values())) if usable else None)
    found = []
    for name, times in usable.items():
        step = (task.step_minutes or 0) // _cadence(archive, name)
        length = (task.frames - 1) * step + 1
        starts = [
            first
            for first in range(0, len(times) - length + 1, task.stride[SPLITS.index(split)] * step)
            if times[first] > start and times[first + length - 1] <= end
        ]
        if starts:
            wet, covered = _tile_fractions(archive.url, name, tiles)
            for first in starts:
                seen = slice(first, first + task.context * step, step)
                good = (wet[seen].mean(0) >= tiles.min_wet) & (
                    covered[first : first + length : step].mean(0) >= tiles.min_cover
                )
                found += [
                    Window(name, first, (int(i) * tiles.stride, int(j) * tiles.stride))
                    for i, j in np.argwhere(good)
                ]
    return found


@lru_cache(maxsize=64)
def _tile_fractions(url: str, name: str, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Wet and covered fraction of every tile of every frame, two (T, tiles_y, tiles_x)."""
    archive = Archive(url)
    stored = archive.array(name, "rate")
    wet, covered = [], []
    for frame in range(stored.shape[0]):
        rate = _to_rate(archive, name, np.asarray(stored[frame]))
        planes = torch.from_numpy(np.stack([rate >= tiles.wet, np.isfinite(rate)]).astype(np.float32))
        pooled = F.avg_pool2d(planes[:, None], tiles.size, tiles.stride)[:, 0].numpy()
        wet.append(pooled[0])
        covered.append(pooled[1])
    return np.stack(wet), np.stack(covered)


def _radar_frames(task: Task, archive: Archive, window: Window) -> np.ndarray:
    step = (task.step_minutes or 0) // _cadence(archive, window.series)
    size = (task.tiles or Tiles()).size
    y, x = window.tile or (0, 0)
    stop = window.start + (task.frames - 1) * step + 1
    stored = archive.array(window.series, "rate")[window.start : stop, y : y + size, x : x + size]
    return _to_rate(archive, window.series, np.asarray(stored)[::step])


def _to_rate(archive: Archive, name: str, stored: np.ndarray) -> np.ndarray:
    """Stored counts to mm/h, float32, NaN outside the radar's coverage."""
    attributes = archive.group(name)["rate"].attrs
    fill = attributes.get("_FillValue")
    rate = stored.astype(np.float32) * np.float32(attributes.get("scale_factor", 1.0))
    if fill is not None:
        rate[stored == fill] = np.nan
    return rate


def _radar_times(task: Task, archive: Archive, window: Window) -> np.ndarray:
    step = (task.step_minutes or 0) // _cadence(archive, window.series)
    times = archive.group(window.series)["time"].values
    return times[window.start : window.start + (task.frames - 1) * step + 1 : step]


def _radar_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    size = (task.tiles or Tiles()).size
    origins, projections = [], []
    for window in windows:
        group, (row, column) = archive.group(window.series), window.tile or (0, 0)
        origins.append((group["y"].values[row], group["x"].values[column]))
        projections.append(str(archive.root["proj"].values[archive.positions("sequence")[window.series]]))
    first = archive.group(windows[0].series)
    axes = {
        name: (name, first[name].values[:size] - first[name].values[0], {**first[name].attrs})
        for name in ("y", "x")
    }
    y, x = np.array(origins).T
    return xr.Dataset(
        coords={**axes, "y_origin": ("window", y), "x_origin": ("window", x), "proj": ("window", projections)}
    )


def _cadence(archive: Archive, name: str) -> int:
    return int(archive.root["cadence_minutes"].values[archive.positions("sequence")[name]])


# --------------------------------------------------------------------------------------------- common


def _bounds(task: Task, split: str, times: np.ndarray | None = None) -> tuple[np.datetime64, np.datetime64]:
    """Instants between which a split lies, the first exclusive and the last inclusive."""
    never, always = np.datetime64("1678-01-01", "ns"), np.datetime64("2261-12-31", "ns")
    val_from, test_from = task.splits.val_from, task.splits.test_from
    if not (val_from or test_from) and times is not None:
        days = np.unique(times.astype("datetime64[D]"))
        if len(days) < 3:
            raise InputError(
                f"the archive holds {len(days)} date(s) that task {task.name} can use: needed 3, to hold "
                "one out for validation and one for the test, or splits.val_from and splits.test_from"
            )
        # The split's first instant is exclusive: step back to take midnight in.
        before = np.timedelta64(1, "ns")
        val, test = (day.astype("datetime64[ns]") - before for day in days[-2:])
    else:
        test = np.datetime64(test_from, "ns") if test_from else always
        val = np.datetime64(val_from, "ns") if val_from else test
    return {"train": (never, val), "val": (val, test), "test": (test, always)}[split]


def _span(archive: Archive) -> str:
    for name in ("time_utc", "start_time"):
        if name in archive.root:
            values = archive.root[name].values
            if len(values):
                return f"{values.min().astype('datetime64[D]')} to {values.max().astype('datetime64[D]')}"
    return ", ".join(f"{name}={size}" for name, size in archive.root.sizes.items())


_ENUMERATE: dict[str, Callable[[Task, Archive, str], list[Window]]] = {
    "sevir": _sevir_windows,
    "sevir-lr": _sevir_windows,
    "enso": _enso_windows,
    "radar": _radar_windows,
}
_READ: dict[str, Callable[[Task, Archive, Window], np.ndarray]] = {
    "sevir": _sevir_frames,
    "sevir-lr": _sevir_frames,
    "enso": _enso_frames,
    "radar": _radar_frames,
}
_PLACE: dict[str, Callable[[Task, Archive, Sequence[Window]], xr.Dataset]] = {
    "sevir": _sevir_placement,
    "sevir-lr": _sevir_placement,
    "enso": _enso_placement,
    "radar": _radar_placement,
}
_TIMES: dict[str, Callable[[Task, Archive, Window], np.ndarray]] = {
    "sevir": _sevir_times,
    "sevir-lr": _sevir_times,
    "enso": _enso_times,
    "radar": _radar_times,
}
