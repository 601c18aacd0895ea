"""Windows: which stretches of an archive are samples, in which split, and how their pixels are read.

Windows are keys. They are enumerated, split and shuffled without touching a pixel (radar excepted, whose
tiles are chosen by their rain), and read by whoever needs them.

A batch carries what the archive stores: uint8 (255 is missing) and float32 as they are; packed integers,
such as radar's, are unpacked to float32 in their units, NaN where missing.
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

from pipelines.archives import UNREADABLE, why
from pipelines.archives.store import Archive
from pipelines.configs import unknown
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

    SEVIR's VIL stays uint8; ENSO is float32 in K, radar float32 in mm/h.

    Raises:
        InputError: a chunk of the archive is damaged.
    """
    frames = np.stack([_READ[task.archive](task, archive, window, task.frames) for window in windows])[
        ..., None
    ]
    return {"context": frames[:, : task.context], "target": frames[:, task.context :]}


def read_context(task: Task, archive: Archive, window: Window) -> np.ndarray:
    """The `context` (1, T_in, H, W, 1) alone, of a window whose target may not have been observed yet.

    Raises:
        InputError: a chunk of the archive is damaged.
    """
    frames: np.ndarray = _READ[task.archive](task, archive, window, task.context)
    return frames[None, ..., None]


def check(task: Task, archive: Archive, window: Window) -> None:
    """
    Raises:
        InputError: the archive has no such series, or the context lies partly outside of it.
    """
    series, last_starts = window.series, _LAST_STARTS[task.archive](task, archive)
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
        concurrency=min(2, len(blocks)),
    )
    for batch in dataset.iter_batches(batch_size=batch_size, prefetch_batches=2):
        # Copied: Ray's blocks are shared and cannot be written to.
        yield {str(name): torch.tensor(pixels, device=device) for name, pixels in batch.items()}


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
    return np.stack([_TIMES[task.archive](task, archive, window, task.frames) for window in windows])


def context_times(task: Task, archive: Archive, window: Window) -> np.ndarray:
    """Valid time of every frame of the context and of the target to come, datetime64[ns] (T_in + T_out,)."""
    return continued(task, _TIMES[task.archive](task, archive, window, task.context))


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
    labels = {name: _pixels(archive, "", "nino34", (row[name],)) for name in {w.series for w in windows}}
    months = task.context + np.arange(task.target - 2)
    return np.stack([labels[w.series][w.start + months] for w in windows])


def placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    """Where the pixels of windows lie: two spatial axes, and of each window its origin and projection.

    `y` and `x` are offsets: a window's pixel lies at (`y_origin` + y, `x_origin` + x) in the window's own
    projection, `proj`. ENSO has `lat` and `lon` (degrees) instead, the same for all windows.

    Raises:
        InputError: the windows are of grids with different pixels.
    """
    return _PLACE[task.archive](task, archive, windows)


def attributes(task: Task, archive: Archive, key: Window) -> dict[str, Any]:
    """CF attributes of the task's variable in the units of `read`, as forecasts carry them."""
    stored = archive.group(key.series if task.archive == "radar" else "")[task.variable].attrs
    packing = ("scale_factor", "add_offset", "_FillValue", "grid_mapping")
    return {name: value for name, value in stored.items() if name not in packing}


def _pixels(archive: Archive, group: str, variable: str, place: tuple[Any, ...]) -> np.ndarray:
    """Part of a variable: bytes and floats as stored, packed integers as float32 with NaN for missing."""
    try:
        stored = np.asarray(archive.array(group, variable)[place])
    except UNREADABLE as error:
        raise InputError(
            f"{archive.url}, {group}/{variable}".replace(" /", " ")
            + f", cannot be read: {why(error)}; `earthformer validate` lists what is damaged"
        ) from error
    if stored.dtype == np.uint8 or stored.dtype.kind == "f":
        return stored
    packing = archive.group(group)[variable].attrs
    # In double precision, so that 10 counts of 0.01 mm/h reach a threshold of 0.1 mm/h.
    values = (stored * float(packing.get("scale_factor", 1.0))).astype(np.float32)
    if "_FillValue" in packing:
        values[stored == packing["_FillValue"]] = np.nan
    return values


def origins(y: np.ndarray, x: np.ndarray, proj: Sequence[str]) -> dict[str, Any]:
    """Coordinates of each window: where its offsets count from."""
    found: dict[str, Any] = {
        "proj": ("window", np.array(proj), {"long_name": "PROJ string; empty: latitude and longitude"})
    }
    for axis, values, degrees in (
        ("y", y, {"units": "degrees_north", "standard_name": "latitude"}),
        ("x", x, {"units": "degrees_east", "standard_name": "longitude"}),
    ):
        metres = {"units": "m", "standard_name": f"projection_{axis}_coordinate"}
        comment = {"comment": f"of offset {axis} = 0, in the window's projection proj"}
        found[f"{axis}_origin"] = ("window", values, (metres if all(proj) else degrees) | comment)
    return found


def offsets(axis: str, values: np.ndarray, metres: bool) -> tuple[str, np.ndarray, dict[str, str]]:
    # No standard name: an offset is no projection coordinate, and no latitude.
    said = {"units": "m" if metres else "degrees", "long_name": f"offset from the window's {axis[0]}_origin"}
    return axis, values, said


# ---------------------------------------------------------------------------------------------- SEVIR


def _sevir_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    step = np.diff(archive.root["time"].values).min() / np.timedelta64(1, "m")
    if step != task.step_minutes:
        raise InputError(
            f"{archive.url} has a frame every {step:g} min: task {task.name} needs {task.step_minutes} min"
        )
    times = pd.Series(archive.root["time_utc"].values, index=archive.root["event"].values.astype(str))
    times = times.drop(labels=list(archive.quarantine), errors="ignore").sort_index()
    start, end = _bounds(task, archive, split, times.to_numpy())
    if task.splits.val_fraction and split != "test":
        test_from, _ = _bounds(task, archive, "test", times.to_numpy())
        return _published_random_split(task, archive, times[times <= test_from], split)
    chosen = times[(times > start) & (times <= end)]
    return _slide(task, archive, chosen.index, split)


def _published_random_split(task: Task, archive: Archive, times: pd.Series, split: str) -> list[Window]:
    # The published loader shuffles events twice by pandas, then parts their windows by torch.
    shuffled = times.sample(frac=1, random_state=1).sample(frac=1, random_state=1) if len(times) else times
    return _random_part(task, _slide(task, archive, shuffled.index, "train"), split)


def _random_part(task: Task, both: list[Window], split: str) -> list[Window]:
    """The windows of `split` among those of train and val together, parted at random with seed 0."""
    fraction = task.splits.val_fraction or 0.0
    generator = torch.Generator().manual_seed(0)
    places = torch.utils.data.TensorDataset(torch.arange(len(both)))
    parts = random_split(places, [1 - fraction, fraction], generator=generator)
    return [both[i] for i in parts[SPLITS.index(split)].indices]


def _slide(task: Task, archive: Archive, events: Iterable[str], split: str) -> list[Window]:
    total = archive.root.sizes["time"]
    starts = range(0, total - task.frames + 1, task.stride[SPLITS.index(split)])
    return [Window(str(event), start) for event in events for start in starts]


def _sevir_frames(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    event = archive.positions("event")[window.series]
    return _pixels(archive, "", task.variable, (event, slice(window.start, window.start + frames)))


def _sevir_times(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    event = archive.positions("event")[window.series]
    return archive.root["frame_time"].values[event, window.start : window.start + frames]


def _sevir_last_starts(task: Task, archive: Archive) -> dict[str, int]:
    return dict.fromkeys(archive.positions("event"), archive.root.sizes["time"] - task.context)


def _sevir_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    root, rows = archive.root, [archive.positions("event")[w.series] for w in windows]
    y, x = (str(dim) for dim in root[task.variable].dims[-2:])
    corners = origins(
        root["y_origin"].values[rows], root["x_origin"].values[rows], [root["crs"].attrs["proj4"]] * len(rows)
    )
    axes = {dim: offsets(dim, root[dim].values, metres=True) for dim in (y, x)}
    return xr.Dataset(coords={**axes, **corners})


# ----------------------------------------------------------------------------------------------- ENSO


def _enso_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    # The archive holds the sources in the published order.
    months = dict(
        zip(archive.root["source"].values.astype(str), archive.root["n_months"].values, strict=True)
    )
    cmip6, cmip5 = ([name for name in months if name.startswith(kind)] for kind in ("CMIP6-", "CMIP5-"))
    sources = {"train": cmip6 + cmip5[:-2], "val": cmip5[-2:-1], "test": cmip5[-1:]}[split]
    stride = task.stride[SPLITS.index(split)]
    return [
        Window(source, start)
        for source in sources
        if source not in archive.quarantine
        for start in range(0, int(months[source]) - task.frames + 1, stride)
    ]


def _enso_frames(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    source = archive.positions("source")[window.series]
    months = slice(window.start, window.start + frames)
    return _pixels(archive, "", task.variable, (source, months, slice(None), ENSO_LONGITUDES))


def _enso_times(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    # Model years have no date: count months from a nominal January 1700, inside what datetime64[ns] holds.
    first = np.datetime64("1700-01", "M") + window.start
    return (first + np.arange(frames)).astype("datetime64[ns]")


def _enso_last_starts(task: Task, archive: Archive) -> dict[str, int]:
    months = (int(n) for n in archive.root["n_months"].values)
    return {name: n - task.context for name, n in zip(archive.positions("source"), months, strict=True)}


def _enso_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    return xr.Dataset(coords={"lat": archive.root["lat"], "lon": archive.root["lon"][ENSO_LONGITUDES]})


# ---------------------------------------------------------------------------------------------- radar


def _radar_windows(task: Task, archive: Archive, split: str) -> list[Window]:
    tiles, usable = task.tiles or Tiles(), {}
    for name in sorted(archive.root["sequence"].values.astype(str)):
        if name in archive.quarantine:
            continue
        unfit = _unfit(task, archive, name, tiles)
        if unfit:
            warnings.warn(f"{name} {unfit}: it is left out", stacklevel=3)
        else:
            usable[name] = archive.group(name)["time"].values
    if not usable:
        return []
    random = task.splits.val_fraction is not None and split != "test"
    first_of, last_of = ("train", "val") if random else (split, split)
    all_times = np.concatenate(list(usable.values()))
    start, _ = _bounds(task, archive, first_of, all_times)
    _, end = _bounds(task, archive, last_of, all_times)
    found = []
    for name, times in usable.items():
        step = _step(task, archive, name)
        length = (task.frames - 1) * step + 1
        starts = [
            first
            for first in range(0, len(times) - length + 1, task.stride[SPLITS.index(first_of)] * step)
            if times[first] > start and times[first + length - 1] <= end
        ]
        if starts:
            wet, covered = _tile_counts(archive, name, task.variable, tiles)
        for first in starts:
            seen = wet[first : first + task.context * step : step]
            whole = covered[first : first + length : step]
            good = (seen.sum(0) >= tiles.min_wet * len(seen) * tiles.size**2) & (
                whole.sum(0) >= tiles.min_cover * len(whole) * tiles.size**2
            )
            found += [
                Window(name, first, (int(i) * tiles.stride, int(j) * tiles.stride))
                for i, j in np.argwhere(good)
            ]
    return _random_part(task, found, split) if random else found


def _unfit(task: Task, archive: Archive, name: str, tiles: Tiles) -> str | None:
    """Why a sequence has no windows for this task, if so."""
    cadence, sizes = _cadence(archive, name), archive.group(name).sizes
    if (task.step_minutes or 0) % cadence:
        return f"has a frame every {cadence} min, which gives no steps of {task.step_minutes} min"
    if min(sizes["y"], sizes["x"]) < tiles.size:
        return f"is {sizes['y']} × {sizes['x']} pixels, smaller than a tile of {tiles.size} × {tiles.size}"
    return None


@lru_cache(maxsize=64)
def _tile_counts(archive: Archive, name: str, variable: str, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Wet and covered pixels of every tile of every frame, two of int64 (T, tiles_y, tiles_x)."""
    wet, covered = [], []
    for frame in range(archive.group(name).sizes["time"]):
        rate = _pixels(archive, name, variable, (frame,))
        planes = torch.from_numpy(np.stack([rate >= tiles.wet, np.isfinite(rate)]).astype(np.float32))
        # Sums of ones: whole numbers, far below what float32 can count.
        pooled = (
            F.avg_pool2d(planes[:, None], tiles.size, tiles.stride, divisor_override=1)[:, 0].long().numpy()
        )
        wet.append(pooled[0])
        covered.append(pooled[1])
    return np.stack(wet), np.stack(covered)


def _radar_frames(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    step, size = _step(task, archive, window.series), (task.tiles or Tiles()).size
    y, x = window.tile or (0, 0)
    steps = slice(window.start, window.start + (frames - 1) * step + 1, step)
    place = (steps, slice(y, y + size), slice(x, x + size))
    return _pixels(archive, window.series, task.variable, place)


def _radar_times(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    step = _step(task, archive, window.series)
    times = archive.group(window.series)["time"].values
    return times[window.start : window.start + (frames - 1) * step + 1 : step]


def _radar_last_starts(task: Task, archive: Archive) -> dict[str, int]:
    tiles = task.tiles or Tiles()
    names = [n for n in archive.positions("sequence") if n not in archive.quarantine]
    return {
        name: archive.group(name).sizes["time"] - (task.context - 1) * _step(task, archive, name) - 1
        for name in names
        if not _unfit(task, archive, name, tiles)
    }


def _radar_placement(task: Task, archive: Archive, windows: Sequence[Window]) -> xr.Dataset:
    size = (task.tiles or Tiles()).size
    names, proj = [window.series for window in windows], archive.root["proj"].values
    axes = {n: (archive.group(n)["y"].values, archive.group(n)["x"].values) for n in dict.fromkeys(names)}
    apart = {name: np.stack([axis[:size] - axis[0] for axis in both]) for name, both in axes.items()}
    first = next(iter(apart))
    for name, other in apart.items():
        # Producers round: up to half a pixel over a whole tile is no difference.
        if (np.abs(other - apart[first]).max(1) > np.abs(apart[first][:, -1]) / max(1, size - 1) / 2).any():
            raise InputError(
                f"{archive.url}: pixels of {name} are {other[0, 1]:g} × {other[1, 1]:g} apart, those of "
                f"{first} {apart[first][0, 1]:g} × {apart[first][1, 1]:g}: needed one pixel size"
            )
    corners = [(window.series, *(window.tile or (0, 0))) for window in windows]
    projections = [str(proj[archive.positions("sequence")[name]]) for name in names]
    placed = origins(
        np.array([axes[name][0][row] for name, row, _ in corners]),
        np.array([axes[name][1][column] for name, _, column in corners]),
        projections,
    )
    y, x = apart[first]
    metres = bool(projections[0])
    return xr.Dataset(coords={"y": offsets("y", y, metres), "x": offsets("x", x, metres), **placed})


def _cadence(archive: Archive, name: str) -> int:
    return int(archive.root["cadence_minutes"].values[archive.positions("sequence")[name]])


def _step(task: Task, archive: Archive, name: str) -> int:
    """Frames of a sequence from one step of the task to the next."""
    return (task.step_minutes or 0) // _cadence(archive, name)


# --------------------------------------------------------------------------------------------- common


def _bounds(
    task: Task, archive: Archive, split: str, times: np.ndarray
) -> tuple[np.datetime64, np.datetime64]:
    """Instants between which a split lies, the first exclusive and the last inclusive."""
    never, always = np.datetime64("1678-01-01", "ns"), np.datetime64("2261-12-31", "ns")
    val_from, test_from = task.splits.val_from, task.splits.test_from
    if val_from or test_from:
        test = np.datetime64(test_from, "ns") if test_from else always
        val = np.datetime64(val_from, "ns") if val_from else test
    else:
        days = np.unique(times.astype("datetime64[D]"))
        if len(days) < 3:
            raise InputError(
                f"{archive.url} holds {len(days)} date(s) that task {task.name} can use: needed 3, to hold "
                "one out for validation and one for the test, or splits.val_from and splits.test_from"
            )
        # The split's first instant is exclusive: step back to take midnight in.
        before = np.timedelta64(1, "ns")
        val, test = (day.astype("datetime64[ns]") - before for day in days[-2:])
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
_READ: dict[str, Callable[[Task, Archive, Window, int], np.ndarray]] = {
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
_TIMES: dict[str, Callable[[Task, Archive, Window, int], np.ndarray]] = {
    "sevir": _sevir_times,
    "sevir-lr": _sevir_times,
    "enso": _enso_times,
    "radar": _radar_times,
}
_LAST_STARTS: dict[str, Callable[[Task, Archive], dict[str, int]]] = {
    "sevir": _sevir_last_starts,
    "sevir-lr": _sevir_last_starts,
    "enso": _enso_last_starts,
    "radar": _radar_last_starts,
}
