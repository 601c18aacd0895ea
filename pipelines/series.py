"""Series: how each kind of archive is cut into windows, read, dated and placed.

SEVIR's events, ENSO's sources and radar's sequences differ in all of this; `windows` does not.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from torch.utils.data import random_split

from pipelines.archives import UNREADABLE, why
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.tasks import Task, Tiles

SPLITS = ("train", "val", "test")
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


@dataclass(frozen=True)
class Kind:
    """What differs between archives."""

    windows: Callable[[Task, Archive, str], list[Window]]
    """All windows of a split, in evaluation order."""
    frames: Callable[[Task, Archive, Window, int], np.ndarray]
    """Pixels (T, H, W) of the first so many frames of a window."""
    times: Callable[[Task, Archive, Window, int], np.ndarray]
    """Their valid times, datetime64[ns] (T,)."""
    place: Callable[[Task, Archive, Sequence[Window]], xr.Dataset]
    """As `windows.placement`."""
    last_starts: Callable[[Task, Archive], dict[str, int]]
    """Of each series the last frame that a context may start at; negative where it is too short."""


def pixels(archive: Archive, group: str, variable: str, place: tuple[Any, ...]) -> np.ndarray:
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
    return pixels(archive, "", task.variable, (event, slice(window.start, window.start + frames)))


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
    # Analyses are what models are tested on where there is no climate model.
    test = cmip5[-1:] if cmip6 + cmip5 else list(months)
    sources = {"train": cmip6 + cmip5[:-2], "val": cmip5[-2:-1], "test": test}[split]
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
    return pixels(archive, "", task.variable, (source, months, slice(None), ENSO_LONGITUDES))


def _enso_times(task: Task, archive: Archive, window: Window, frames: int) -> np.ndarray:
    source = archive.positions("source")[window.series]
    # Model years have no date: count months from a nominal January 1700, inside what datetime64[ns] holds.
    first = np.datetime64(str(archive.root["first_month"].values[source]) or "1700-01", "M")
    return (first + window.start + np.arange(frames)).astype("datetime64[ns]")


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
        rate = pixels(archive, name, variable, (frame,))
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
    return pixels(archive, window.series, task.variable, place)


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


_SEVIR = Kind(_sevir_windows, _sevir_frames, _sevir_times, _sevir_placement, _sevir_last_starts)
_ENSO = Kind(_enso_windows, _enso_frames, _enso_times, _enso_placement, _enso_last_starts)
_RADAR = Kind(_radar_windows, _radar_frames, _radar_times, _radar_placement, _radar_last_starts)
KINDS = {"sevir": _SEVIR, "sevir-lr": _SEVIR, "enso": _ENSO, "radar": _RADAR}
"""By the kind of archive that a task names."""
