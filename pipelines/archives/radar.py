"""Gridded radar sequences: the project's HDF5 layout, and any CF NetCDF or Zarr with time and a projection.

One sequence a file becomes one group `(time, y, x)` of the archive, in counts of 0.01 mm/h; the root holds a
table of the sequences. Row 0 stays where the file has it (the north, as a rule): `y` says which way it runs.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.array
import h5py
import numpy as np
import pandas as pd
import pyproj
import xarray as xr

from pipelines.archives import (
    HDF5,
    UNREADABLE,
    Bad,
    BrokenFile,
    Decoded,
    Plan,
    Region,
    Source,
    first_bytes,
    in_order,
    open_netcdf,
    why,
)
from pipelines.archives.cf import axes_of, grid_of, in_metres
from pipelines.errors import InputError
from pipelines.storage import filesystem, join, readable

FILL = 65535
SCALE = 0.01
"""mm/h of one stored count."""
HIGHEST = 3000.0
"""mm/h. No rain is heavier: such a value is a missing one that the file does not declare."""
CHUNK = 256
SUFFIXES = (".h5", ".hdf5", ".nc", ".nc4", ".zarr")
RATE_NAMES = ("rate", "rainfall_rate", "precipitation_rate", "precipitation_flux", "tprate", "rr", "RAINRATE")
PER_HOUR = {
    **dict.fromkeys(("mm/h", "mm h-1", "mm hr-1", "mm/hr", "mm/hour", "kg m-2 h-1"), 1.0),
    **dict.fromkeys(("kg m-2 s-1", "mm s-1", "mm/s", "kg/m2/s"), 3600.0),
    **dict.fromkeys(("m s-1", "m/s"), 3.6e6),
}


@dataclass(frozen=True)
class Sequence:
    """What a file's metadata say of its frames."""

    name: str
    url: str
    variable: str
    times: np.ndarray
    cadence: int
    """Minutes between frames."""
    y: np.ndarray
    x: np.ndarray
    proj: str
    """PROJ string in metres; empty on a grid of latitudes and longitudes."""


def plan(
    source: str, *, variable: str | None = None, shard_mb: int = 128, known: tuple[str, ...] = ()
) -> Plan:
    """What preparing an archive of the sequences in a folder (or of one file) would read and write.

    Args:
        source: folder of files, or one file or Zarr store.
        variable: name of the rain rate where it is not one of the usual ones.
        shard_mb: about the size of a shard before compression.
        known: sequences that the archive holds already, which stay where they are.

    Raises:
        InputError: nothing to read, or no file that can be read (the first one's reason is given); a sequence
            of `known` is gone.
    """
    sequences: dict[str, Sequence] = {}
    broken = []
    for url in _files(source):
        try:
            one = _describe(url, variable)
            if one.name in sequences:
                raise ValueError(f"sequence {one.name} is in {_file(sequences[one.name].url)} already")
            sequences[one.name] = one
        except UNREADABLE as error:
            broken.append(BrokenFile(_file(url), why(error)))
    if not sequences:
        raise InputError(f"{source}: {broken[0].file} cannot be read as a radar sequence: {broken[0].reason}")
    found = [sequences[name] for name in in_order(sorted(sequences), known, source)]
    each = {s.name: _frames_each(s, shard_mb) for s in found}
    stored = sum(2 * len(s.times) * len(s.y) * len(s.x) for s in found)
    return Plan(
        kind="radar",
        groups={"": _root(found), **{s.name: _template(s, each[s.name]) for s in found}},
        config={"kind": "radar", "shard_mb": shard_mb},
        contents={
            s.name: f"{s.variable} {len(s.times)}x{len(s.y)}x{len(s.x)} {s.times[0]} {s.cadence} min {s.proj}"
            for s in found
        },
        shards=(
            *(
                RadarShard(
                    s.name, s.url, s.variable, i, min(i + each[s.name], len(s.times)), (len(s.y), len(s.x))
                )
                for s in found
                for i in range(0, len(s.times), each[s.name])
            ),
            *broken,
        ),
        series=len(found) + len(broken),
        frames=sum(len(s.times) for s in found),
        stored_bytes=stored,
        decoded_bytes=stored,
    )


def _frames_each(sequence: Sequence, shard_mb: int) -> int:
    return max(1, min(len(sequence.times), shard_mb * 1_000_000 // (2 * len(sequence.y) * len(sequence.x))))


def _file(url: str) -> str:
    link = next((link for link in url.split("::") if "://" in link), url)
    return link.rstrip("/").rpartition("/")[2]


def _files(source: str) -> list[str]:
    fs, path = filesystem(source)
    if not fs.exists(path):
        raise InputError(
            f"{source} is absent: needed a folder of radar files (HDF5, NetCDF or Zarr), or one of them"
        )
    if fs.isfile(path) or any(fs.exists(f"{path}/{name}") for name in ("zarr.json", ".zgroup")):
        return [source.rstrip("/")]
    names = sorted(name.rstrip("/") for name in fs.ls(path, detail=False))
    names = [name for name in names if name.endswith(SUFFIXES) and not _file(name).startswith(".")]
    if not names:
        raise InputError(f"{source} holds no {', '.join(SUFFIXES)}: needed radar sequences")
    return [join(source, _file(name)) for name in names]


@dataclass(frozen=True)
class RadarShard:
    """A run of frames of one sequence."""

    name: str
    url: str
    variable: str
    first: int
    last: int
    grid: tuple[int, int]

    @property
    def identity(self) -> Any:
        """What the shard is made of."""
        return [self.name, _file(self.url), self.variable, self.first, self.last, *self.grid]

    def decode(self) -> Decoded:
        """Read the frames as counts of 0.01 mm/h; unreadable ones are filled with the missing value."""
        region = {"time": slice(self.first, self.last)}
        shape = (self.last - self.first, *self.grid)
        bad = []
        try:
            with _opened(self.url) as (kind, handle):
                read = _ours_counts if kind == "ours" else _cf_counts
                rate = read(handle[self.variable], self.first, self.last)
            if rate.shape != shape:
                raise ValueError(
                    f"frames {self.first} to {self.last} have shape {rate.shape}: needed {shape}"
                )
        except UNREADABLE as error:
            rate = np.full(shape, FILL, np.uint16)
            bad = [Bad(self.name, _file(self.url), why(error))]
        file = _file(self.url)
        folder, regions = "".join(self.url.rsplit(file, 1)), [Region(self.name, region, {"rate": rate})]
        return Decoded(regions, bad, {self.name: [Source(file, [])]}, folder)


@contextmanager
def _opened(url: str) -> Iterator[tuple[str, Any]]:
    """("ours", h5py.File) or ("cf", Dataset)."""
    fs, path = filesystem(url)
    if fs.isdir(path):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolidated metadata")
            dataset = xr.open_zarr(url, chunks=None)
        with dataset:
            yield "cf", dataset
        return
    with readable(url) as opened:
        if first_bytes(opened) == HDF5:
            with h5py.File(opened, "r") as file:
                if "rate" in file and "time_utc" in file:
                    yield "ours", file
                    return
    with open_netcdf(url) as dataset:
        yield "cf", dataset


def _describe(url: str, variable: str | None) -> Sequence:
    name = _file(url)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    # These would lie where the root's own table lies.
    name += "_" if name in ("records", *_COLUMNS) else ""
    with _opened(url) as (kind, handle):
        return _ours(name, url, handle) if kind == "ours" else _cf(name, url, handle, variable)


def _cadence(times: np.ndarray) -> int:
    if len(times) < 2 or np.isnat(times).any():
        raise ValueError(
            f"holds {len(times)} frames, {np.isnat(times).sum()} without time: needed a sequence"
        )
    steps = np.diff(times) / np.timedelta64(1, "s")
    values, counts = np.unique(steps, return_counts=True)
    usual = values[counts.argmax()]
    odd = np.flatnonzero(steps != usual)
    if len(odd):
        raise ValueError(
            f"frames are {usual:g} s apart, but {steps[odd[0]]:g} s after "
            f"{times[odd[0]].astype('datetime64[s]')}: needed equal steps"
        )
    if usual <= 0 or usual % 60:
        raise ValueError(f"frames are {usual:g} s apart: needed whole minutes, forwards")
    return int(usual) // 60


# --------------------------------------------------------------------------------- the HDF5 layout


def _ours(name: str, url: str, file: h5py.File) -> Sequence:
    rate = file["rate"]
    if not isinstance(rate, h5py.Dataset) or rate.ndim != 3 or rate.dtype.kind not in "fiu":
        raise ValueError(f"rate is {getattr(rate, 'shape', 'a group')}: needed numbers, (time, y, x)")
    _per_hour("rate", _text(rate.attrs.get("units", "")))
    texts = [_text(time) for time in file["time_utc"][:]]
    # 2010-08-26T00:00 in some files, 20190610000000 in others.
    digits = [len(text) if text.isdigit() else 0 for text in texts]
    pattern = {14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M"}.get(min(digits, default=0), "ISO8601")
    times = pd.to_datetime(texts, format=pattern).to_numpy("datetime64[ns]")
    if len(times) != len(rate):
        raise ValueError(f"{len(times)} times for {len(rate)} frames")
    height, width = rate.shape[1:]
    if {"projection", "ext"} <= set(file.attrs):
        y, x, proj = _extent(_text(file.attrs["projection"]), np.asarray(file.attrs["ext"]), height, width)
    elif {"lat", "lon"} <= set(file.attrs):
        y, x, proj = np.asarray(file.attrs["lat"]), np.asarray(file.attrs["lon"]), ""
    else:
        raise KeyError(f"attributes are {', '.join(file.attrs)}: needed projection and ext, or lat and lon")
    if (len(y), len(x)) != (height, width):
        raise ValueError(f"{len(y)} latitudes and {len(x)} longitudes for {height} × {width} pixels")
    return Sequence(name, url, "rate", times, _cadence(times), y, x, proj)


def _extent(proj: str, extent: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixel centres, row 0 in the north, and PROJ string, in metres."""
    proj, unit = in_metres(proj)
    x1, y1, x2, y2 = extent * unit
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"ext is {extent.tolist()}: needed x1 < x2 and y1 < y2")
    dx, dy = (x2 - x1) / width, (y2 - y1) / height
    return y2 - (np.arange(height) + 0.5) * dy, x1 + (np.arange(width) + 0.5) * dx, proj


def _ours_counts(rate: h5py.Dataset, first: int, last: int) -> np.ndarray:
    stored, fill = rate[first:last], rate.attrs.get("fill_value", FILL)
    scale = float(rate.attrs.get("scale_factor", 1.0))
    scale *= _per_hour("rate", _text(rate.attrs.get("units", "")))
    if stored.dtype == np.uint16 and fill == FILL and scale == SCALE:
        return stored
    return _to_counts(np.where(stored == fill, np.nan, stored * scale))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# ------------------------------------------------------------------------------- CF NetCDF or Zarr


def _cf(name: str, url: str, dataset: xr.Dataset, variable: str | None) -> Sequence:
    rate = _find(dataset, variable)
    _per_hour(str(rate.name), rate.attrs.get("units", ""))
    axes = axes_of(rate)
    bare = [axis for axis in axes if axis not in rate.coords or rate[axis].dtype.kind not in "Mfiu"]
    if bare or rate[axes[0]].dtype.kind != "M":
        raise InputError(
            f"dimension {(bare or axes)[0]} has no coordinate: needed dates, and y and x as numbers"
        )
    # Times as fractions of a day are off by some microseconds.
    times = rate[axes[0]].values + np.timedelta64(500, "ms")
    times = times.astype("datetime64[s]").astype("datetime64[ns]")
    y, x, proj = grid_of(dataset, rate, axes)
    return Sequence(name, url, str(rate.name), times, _cadence(times), y, x, proj)


def _find(dataset: xr.Dataset, variable: str | None) -> xr.DataArray:
    by_name = {str(v.attrs.get("standard_name")): str(n) for n, v in dataset.data_vars.items()}
    known = {**by_name, **{str(n): str(n) for n in dataset.data_vars}}
    wanted = (variable,) if variable else RATE_NAMES
    found = next((known[name] for name in wanted if name in known), None)
    if found is None:
        raise InputError(
            f"no {variable or 'rain rate'} among {', '.join(map(str, dataset.data_vars))}: "
            f"needed {', '.join(RATE_NAMES[:4])}, or --variable NAME"
        )
    return dataset[found]


def _cf_counts(rate: xr.DataArray, first: int, last: int) -> np.ndarray:
    axes = axes_of(rate)
    part = rate.isel({axes[0]: slice(first, last)})
    part = part.squeeze([dim for dim in part.dims if dim not in axes], drop=True).transpose(*axes)
    return _to_counts(part.values * _per_hour(str(rate.name), rate.attrs.get("units", "")))


def _per_hour(name: str, units: str) -> float:
    plain = str(units).replace("**", "").replace("^", "").strip()
    if plain not in PER_HOUR:
        raise InputError(f"{name} has units {units!r}: needed mm/h or kg m-2 s-1")
    return PER_HOUR[plain]


def _to_counts(rate: np.ndarray) -> np.ndarray:
    """mm/h to counts of 0.01 mm/h, at most 655.34; the missing value for NaN, negative and absurd rates."""
    valid = (rate >= 0) & (rate <= HIGHEST)
    counts = np.rint(np.clip(np.where(valid, rate, 0), 0, (FILL - 1) * SCALE) / SCALE).astype(np.uint16)
    return np.where(valid, counts, np.uint16(FILL))


# ------------------------------------------------------------------------------------------ templates


_COLUMNS = ("sequence", "start_time", "end_time", "cadence_minutes", "n_frames", "proj", "file")


def _root(sequences: list[Sequence]) -> xr.Dataset:
    def column(values: list[Any], **attrs: Any) -> tuple[str, np.ndarray, dict[str, Any]]:
        return "sequence", np.array(values), attrs

    return xr.Dataset(
        coords={
            "sequence": column([s.name for s in sequences], long_name="group that holds the sequence"),
            "start_time": column([s.times[0] for s in sequences]),
            "end_time": column([s.times[-1] for s in sequences]),
            "cadence_minutes": column([s.cadence for s in sequences]),
            "n_frames": column([len(s.times) for s in sequences]),
            "proj": column(
                [s.proj for s in sequences], long_name="PROJ string; empty: latitude and longitude"
            ),
            "file": column([_file(s.url) for s in sequences]),
        },
        attrs={"Conventions": "CF-1.11", "title": "radar rain-rate sequences, a group each", "kind": "radar"},
    )


def _template(sequence: Sequence, each: int) -> xr.Dataset:
    height, width = len(sequence.y), len(sequence.x)
    side = CHUNK if min(height, width) > CHUNK else max(height, width)
    padded = tuple(-(-n // side) * side for n in (height, width))
    shape = (len(sequence.times), height, width)
    metres = bool(sequence.proj)
    axis = {
        d: {"units": "m", "standard_name": f"projection_{d}_coordinate"}
        if metres
        else {"units": f"degrees_{direction}", "standard_name": name}
        for d, direction, name in (("y", "north", "latitude"), ("x", "east", "longitude"))
    }
    coords: dict[str, Any] = {
        "time": ("time", sequence.times, {"standard_name": "time"}),
        "y": ("y", sequence.y, axis["y"]),
        "x": ("x", sequence.x, axis["x"]),
    }
    attrs = {"standard_name": "rainfall_rate", "units": "mm h-1", "scale_factor": SCALE}
    if metres:
        crs = pyproj.CRS.from_proj4(sequence.proj)
        with warnings.catch_warnings():
            # CF cannot say all of the Swiss oblique Mercator; the WKT in the same attributes does.
            warnings.simplefilter("ignore", UserWarning)
            coords["crs"] = ((), np.int32(0), {**crs.to_cf(), "proj4": sequence.proj})
        attrs["grid_mapping"] = "crs"
    rate = xr.Variable(
        ("time", "y", "x"),
        dask.array.zeros(shape, dtype=np.uint16, chunks=shape),
        attrs=attrs,
        encoding={"chunks": (1, side, side), "shards": (each, *padded), "_FillValue": np.uint16(FILL)},
    )
    return xr.Dataset({"rate": rate}, coords=coords, attrs={"title": sequence.name})
