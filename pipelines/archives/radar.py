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
import fsspec
import h5py
import numpy as np
import pandas as pd
import pyproj
import xarray as xr

from pipelines.archives import Bad, Plan, Region, local_copy
from pipelines.errors import InputError

FILL = 65535
SCALE = 0.01
"""mm/h of one stored count."""
CHUNK = 256
RATE_NAMES = ("rate", "rainfall_rate", "precipitation_rate", "precipitation_flux", "tprate", "rr", "RAINRATE")
PER_HOUR = {"mm/h": 1.0, "mm h-1": 1.0, "mm hr-1": 1.0, "mm/hr": 1.0, "kg m-2 s-1": 3600.0, "mm s-1": 3600.0}


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


def plan(source: str, *, variable: str | None = None, shard_mb: int = 128) -> Plan:
    """What preparing an archive of the sequences in a folder (or of one file) would read and write.

    Args:
        source: folder of files, or one file or Zarr store.
        variable: name of the rain rate where it is not one of the usual ones.
        shard_mb: about the size of a shard before compression.

    Raises:
        InputError: nothing to read, or no file that can be read (the first one's reason is given).
    """
    sequences, broken = [], []
    for url in _files(source):
        try:
            sequences.append(_describe(url, variable))
        except (OSError, KeyError, ValueError, InputError) as error:
            broken.append(BrokenFile(url.rstrip("/").rpartition("/")[2], " ".join(str(error).split())))
    if not sequences:
        raise InputError(
            f"{source}: {broken[0].file} cannot be read as a radar sequence: {broken[0].reason}"
        )
    sequences.sort(key=lambda s: s.name)
    shards: list[RadarShard | BrokenFile] = [*broken]
    groups: dict[str, xr.Dataset] = {"": _root(sequences)}
    frames = 0
    for sequence in sequences:
        height, width = len(sequence.y), len(sequence.x)
        each = max(1, min(len(sequence.times), shard_mb * 1_000_000 // (2 * height * width)))
        groups[sequence.name] = _template(sequence, each)
        frames += len(sequence.times)
        for first in range(0, len(sequence.times), each):
            last = min(first + each, len(sequence.times))
            shards.append(
                RadarShard(sequence.name, sequence.url, sequence.variable, first, last, (height, width))
            )
    stored = sum(2 * len(s.times) * len(s.y) * len(s.x) for s in sequences)
    return Plan(
        kind="radar",
        groups=groups,
        config={
            "kind": "radar",
            "sequences": [
                [s.name, len(s.times), str(s.times[0]), len(s.y), len(s.x), s.proj] for s in sequences
            ],
            "broken": [one.file for one in broken],
            "shards": len(shards),
        },
        shards=tuple(shards),
        series=len(sequences) + len(broken),
        frames=frames,
        stored_bytes=stored,
        decoded_bytes=stored,
    )


@dataclass(frozen=True)
class RadarShard:
    """A run of frames of one sequence."""

    name: str
    url: str
    variable: str
    first: int
    last: int
    grid: tuple[int, int]

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """Read the frames as counts of 0.01 mm/h; unreadable ones are filled with the missing value."""
        region = {"time": slice(self.first, self.last)}
        file_name = self.url.rpartition("/")[2]
        try:
            with _opened(self.url) as (kind, handle):
                rate = (
                    _ours_counts(handle, self.first, self.last)
                    if kind == "ours"
                    else _cf_counts(handle[self.variable][self.first : self.last])
                )
            if rate.shape[1:] != self.grid:
                raise ValueError(f"frames of {rate.shape[1:]}: needed {self.grid}")
        except (OSError, KeyError, ValueError, InputError) as error:
            rate = np.full((self.last - self.first, *self.grid), FILL, np.uint16)
            reason = " ".join(str(error).split())
            return [Region(self.name, region, {"rate": rate})], [Bad(self.name, file_name, reason)]
        return [Region(self.name, region, {"rate": rate})], []


@dataclass(frozen=True)
class BrokenFile:
    """A file whose metadata cannot be read: it has no group, only a line in the quarantine."""

    file: str
    reason: str

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """Nothing to write."""
        return [], [Bad(self.file, self.file, self.reason)]


def _files(source: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(source)
    if not fs.exists(path):
        raise InputError(
            f"{source} is absent: needed a folder of radar files (HDF5, NetCDF or Zarr), or one of them"
        )
    if fs.isfile(path) or fs.exists(f"{path}/zarr.json") or fs.exists(f"{path}/.zgroup"):
        return [source]
    names = [
        n for n in sorted(fs.ls(path, detail=False)) if n.endswith((".h5", ".hdf5", ".nc", ".nc4", ".zarr"))
    ]
    if not names:
        raise InputError(f"{source} holds no .h5, .nc or .zarr: needed radar sequences")
    return [fs.unstrip_protocol(name) if "://" in source else name for name in names]


@contextmanager
def _opened(url: str) -> Iterator[tuple[str, Any]]:
    """("ours", h5py.File) or ("cf", Dataset)."""
    fs, path = fsspec.core.url_to_fs(url)
    if fs.isdir(path):
        with xr.open_zarr(url) as dataset:
            yield "cf", dataset
        return
    with local_copy(url) as local:
        if h5py.is_hdf5(local):
            with h5py.File(local, "r") as file:
                if "rate" in file and "time_utc" in file:
                    yield "ours", file
                    return
        with xr.open_dataset(local) as dataset:
            yield "cf", dataset


def _describe(url: str, variable: str | None) -> Sequence:
    name = url.rstrip("/").rpartition("/")[2].rpartition(".")[0]
    with _opened(url) as (kind, handle):
        return _ours(name, url, handle) if kind == "ours" else _cf(name, url, handle, variable)


def _cadence(times: np.ndarray) -> int:
    steps = np.unique(np.diff(times).astype("timedelta64[s]").astype(int))
    if len(steps) != 1 or steps[0] % 60:
        raise ValueError(f"frames are {steps[:4].tolist()} s apart: needed equal steps of whole minutes")
    return int(steps[0]) // 60


# --------------------------------------------------------------------------------- the HDF5 layout


def _ours(name: str, url: str, file: h5py.File) -> Sequence:
    rate = file["rate"]
    if rate.ndim != 3:
        raise ValueError(f"rate is {rate.ndim}-D: needed (time, y, x)")
    units = rate.attrs.get("units", "")
    if units not in ("mm/h", "mm h-1"):
        raise InputError(f"rate has units {units!r}: needed mm/h")
    texts = [t.decode() if isinstance(t, bytes) else str(t) for t in file["time_utc"][:]]
    # 2010-08-26T00:00 in some files, 20190610000000 in others.
    times = pd.to_datetime([t + "00" if len(t) == 12 else t for t in texts]).to_numpy("datetime64[ns]")
    if len(times) != len(rate):
        raise ValueError(f"{len(times)} times for {len(rate)} frames")
    height, width = rate.shape[1:]
    if "projection" in file.attrs:
        y, x, proj = _metres(str(file.attrs["projection"]), np.asarray(file.attrs["ext"]), height, width)
    else:
        y, x, proj = file.attrs["lat"], file.attrs["lon"], ""
    return Sequence(name, url, "rate", times, _cadence(times), np.asarray(y), np.asarray(x), proj)


def _metres(proj: str, extent: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixel centres and PROJ string in metres: KNMI writes its Earth, and so its grid, in kilometres."""
    parts = dict(part.lstrip("+").partition("=")[::2] for part in proj.split())
    if float(parts.get("a", 6.4e6)) < 1e5:
        for key in ("a", "b", "x_0", "y_0"):
            if key in parts:
                parts[key] = f"{float(parts[key]) * 1000:.10g}"
        extent = extent * 1000
        proj = " ".join(f"+{k}={v}" if v else f"+{k}" for k, v in parts.items())
    x1, y1, x2, y2 = extent
    dx, dy = (x2 - x1) / width, (y2 - y1) / height
    return y2 - (np.arange(height) + 0.5) * dy, x1 + (np.arange(width) + 0.5) * dx, proj


def _ours_counts(file: h5py.File, first: int, last: int) -> np.ndarray:
    data = file["rate"]
    stored, fill = data[first:last], data.attrs.get("fill_value", FILL)
    scale = float(data.attrs.get("scale_factor", 1.0))
    if stored.dtype == np.uint16 and fill == FILL and scale == SCALE:
        return stored
    return _to_counts(np.where(stored == fill, np.nan, stored * scale))


# ------------------------------------------------------------------------------- CF NetCDF or Zarr


def _cf(name: str, url: str, dataset: xr.Dataset, variable: str | None) -> Sequence:
    found = variable or next((n for n in RATE_NAMES if n in dataset), None)
    if found is None:
        by_name = {v.attrs.get("standard_name"): n for n, v in dataset.data_vars.items()}
        found = next((str(by_name[n]) for n in RATE_NAMES if n in by_name), None)
    if found is None or found not in dataset:
        names = ", ".join(map(str, dataset.data_vars))
        raise InputError(
            f"no rain rate among {names}: needed {', '.join(RATE_NAMES[:4])}, or --variable NAME"
        )
    rate = dataset[found]
    _per_hour(rate)
    if rate.ndim != 3 or "time" not in str(rate.dims[0]).lower():
        raise InputError(f"{found} has dimensions {rate.dims}: needed (time, y, x)")
    times = rate[rate.dims[0]].values.astype("datetime64[ns]")
    y, x = (rate[dim].values.astype(float) for dim in rate.dims[1:])
    return Sequence(name, url, found, times, _cadence(times), y, x, _cf_proj(dataset, rate))


def _cf_proj(dataset: xr.Dataset, rate: xr.DataArray) -> str:
    mapping = rate.attrs.get("grid_mapping", rate.encoding.get("grid_mapping"))
    if mapping in dataset.variables:
        attrs = dataset[mapping].attrs
        if "proj4" in attrs or "proj4_params" in attrs:
            return str(attrs.get("proj4", attrs.get("proj4_params")))
        crs = pyproj.CRS.from_cf(attrs)
        return "" if crs.is_geographic else str(crs.to_proj4())
    names = [str(dim).lower() for dim in rate.dims[1:]]
    if names[0].startswith("lat") and names[1].startswith("lon"):
        return ""
    raise InputError(f"{rate.name} has no grid_mapping: needed a projection, or lat and lon as dimensions")


def _cf_counts(rate: xr.DataArray) -> np.ndarray:
    return _to_counts(rate.values * _per_hour(rate))


def _per_hour(rate: xr.DataArray) -> float:
    units = str(rate.attrs.get("units", ""))
    if units not in PER_HOUR:
        raise InputError(f"{rate.name} has units {units!r}: needed mm/h or kg m-2 s-1")
    return PER_HOUR[units]


def _to_counts(rate: np.ndarray) -> np.ndarray:
    """mm/h to counts of 0.01 mm/h; NaN and negative rates to the missing value, 655.34 mm/h at most."""
    missing = ~(rate >= 0)
    counts = np.rint(np.clip(np.nan_to_num(rate), 0, (FILL - 1) * SCALE) / SCALE).astype(np.uint16)
    counts[missing] = FILL
    return counts


# ------------------------------------------------------------------------------------------ templates


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
            "file": column([s.url.rpartition("/")[2] for s in sequences]),
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
        else {"units": f"degrees_{'north' if d == 'y' else 'east'}"}
        for d in ("y", "x")
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
