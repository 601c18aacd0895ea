"""ICAR-ENSO 2021: CMIP5, CMIP6 and SODA fields with Niño3.4 labels, unfolded to monthly series.

Row y of the raw files holds the months of years y to y + 2, so that successive rows overlap by 24 months.
The archive is (source, month, lat, lon), one source a climate model, NaN beyond a source's last month. A
gridded SST observation (ERSST and the like) in the folder becomes a source of anomalies on the same grid.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.array
import numpy as np
import xarray as xr

from pipelines.archives import (
    UNREADABLE,
    Bad,
    BrokenFile,
    Decoded,
    Plan,
    Region,
    Source,
    in_order,
    open_netcdf,
    why,
)
from pipelines.errors import InputError
from pipelines.storage import filesystem, join

LAT = np.arange(-55.0, 61.0, 5.0)
LON = np.arange(0.0, 360.0, 5.0)
STEP = 5.0
PUBLISHED = {"cmip6_models": 15, "cmip6_years": 151, "cmip5_models": 17, "cmip5_years": 140}
"""Models and rows a model of `CMIP_train.nc`, unless its attributes give others."""
LARGEST = 25.0
"""No anomaly in K reaches this (the published ones stay within -16.6 and 10.2); temperatures do."""
LEAST_MONTHS = 36
"""Of an observation, whose anomalies are of its own mean year."""
CHUNK_BYTES = 1 << 26
"""Of an observation, at most, that a task has in memory (and some five times as much while it computes)."""
_READING = threading.Lock()
"""Of this process's threads: netCDF and HDF5 are read by one at a time."""
TEMPERATURE = re.compile(r"k|kelvin|(deg(ree)?s?[ _]?)?c(elsius)?", re.IGNORECASE)


def unfold(rows: np.ndarray) -> np.ndarray:
    """Overlapping rows (n, 36, …) to one monthly series: rows 0, 3, 6, … and what the last row adds."""
    series = np.concatenate(list(rows[::3]))
    rest = (len(rows) - 1) % 3
    return np.concatenate([series, rows[-1][-12 * rest :]]) if rest else series


def series_months(rows: int) -> int:
    """Months of an unfolded series of so many rows."""
    return 36 * -(-rows // 3) + 12 * ((rows - 1) % 3)


# ----------------------------------------------------------------------------------------------- plan


def plan(source: str, *, known: Sequence[str] = ()) -> Plan:
    """What preparing an ENSO archive would read and write.

    Args:
        source: folder with `CMIP_train.nc` and `CMIP_label.nc`, and/or `SODA_train.nc` and `SODA_label.nc`,
            and/or NetCDF files of monthly SST on a regular grid; or one such SST file.
        known: sources that the archive holds already, which stay where they are.

    Raises:
        InputError: none of these is there, one of the first four cannot be read, or its shape is another; a
            source of `known` is gone.
    """
    folder, names = _names(source)
    shards: list[EnsoShard] = []
    if "CMIP_train.nc" in names:
        shards += _cmip(folder, names)
    if "SODA_train.nc" in names:
        rows, _ = _rows(folder, "SODA", names)
        shards.append(EnsoShard(folder, "SODA", "SODA", (0, rows), series_months(rows)))
    published = {f"{kind}_{part}.nc" for kind in ("CMIP", "SODA") for part in ("train", "label")}
    broken = []
    for name in sorted(n for n in names - published if n.endswith((".nc", ".nc4")) and not n.startswith(".")):
        try:
            with open_netcdf(join(folder, name)) as data:
                months, first = _calendar(_sst(data))
        except UNREADABLE as error:
            broken.append(BrokenFile(name, why(error)))
            continue
        stem = name.rpartition(".")[0]
        shards.append(EnsoShard(folder, stem, name, (0, 0), months, first=first))
    if not shards:
        found = f" ({broken[0].file}: {broken[0].reason})" if broken else ""
        raise InputError(
            f"{source} has no CMIP_train.nc, SODA_train.nc or monthly SST grid{found}: needed one of them"
        )
    by_name = {shard.name: shard for shard in shards}
    order = in_order(by_name, known, source)
    shards = [replace(by_name[name], position=position) for position, name in enumerate(order)]
    longest = max(s.months for s in shards)
    cells = len(LAT) * len(LON)
    return Plan(
        kind="enso",
        groups={"": _template(shards, longest)},
        config={"kind": "enso", "months": longest},
        contents={s.name: f"{s.file} {s.rows[0]}-{s.rows[1]} {s.months} {s.first}".rstrip() for s in shards},
        shards=(*shards, *broken),
        series=len(shards) + len(broken),
        frames=sum(s.months for s in shards),
        stored_bytes=len(shards) * longest * cells * 4,
        decoded_bytes=sum(s.months for s in shards) * cells * 4,
    )


def _names(source: str) -> tuple[str, set[str]]:
    """The folder and the names of its files; of one file, its folder and its own name."""
    fs, path = filesystem(source)
    if not fs.exists(path):
        raise InputError(f"{source} is absent: needed the folder of CMIP_train.nc, CMIP_label.nc, SODA_…")
    if fs.isfile(path):
        folder, _, name = source.rpartition("/")
        return folder or ".", {name}
    return source.rstrip("/"), {n.rstrip("/").rpartition("/")[2] for n in fs.ls(path, detail=False)}


def _cmip(folder: str, names: set[str]) -> list["EnsoShard"]:
    total, attrs = _rows(folder, "CMIP", names)
    counts = {key: int(attrs.get(key, value)) for key, value in PUBLISHED.items()}
    six, five = (counts[f"cmip{k}_models"] * counts[f"cmip{k}_years"] for k in (6, 5))
    if total != six + five:
        raise InputError(
            f"{folder}/CMIP_train.nc has {total} rows: needed {six + five} "
            f"({counts['cmip6_models']} × {counts['cmip6_years']} of CMIP6, then "
            f"{counts['cmip5_models']} × {counts['cmip5_years']} of CMIP5)"
        )
    shards: list[EnsoShard] = []
    for kind, offset in (("6", 0), ("5", six)):
        years = counts[f"cmip{kind}_years"]
        for model in range(counts[f"cmip{kind}_models"]):
            first = offset + model * years
            name = f"CMIP{kind}-{model:02d}"
            rows, months = (first, first + years), series_months(years)
            shards.append(EnsoShard(folder, name, "CMIP", rows, months))
    # In the order of the published loader: CMIP6 first, model after model.
    return shards


def _rows(folder: str, kind: str, names: set[str]) -> tuple[int, dict[str, Any]]:
    """Rows of `CMIP_train.nc` or `SODA_train.nc`, whose labels fit, and its attributes."""
    shapes = {}
    attrs: dict[str, Any] = {}
    for part, variable in (("train", "sst"), ("label", "nino")):
        name = f"{kind}_{part}.nc"
        if name not in names:
            raise InputError(f"{folder}/{name} is absent: needed beside {kind}_train.nc")
        try:
            with open_netcdf(join(folder, name)) as data:
                shapes[part] = _row_variable(data, variable).shape
                attrs |= data.attrs if part == "train" else {}
        except UNREADABLE as error:
            raise InputError(f"{folder}/{name} cannot be read: {why(error)}") from error
    rows = shapes["train"][0]
    if shapes["label"][0] != rows:
        raise InputError(f"{folder}/{kind}_label.nc has {shapes['label'][0]} rows: needed {rows}")
    return rows, attrs


def _row_variable(data: xr.Dataset, name: str) -> xr.DataArray:
    """`sst` (year, 36, 24, 72) or `nino` (year, 36) on the grid of ICAR-ENSO."""
    if name not in data:
        raise KeyError(f"no variable {name}, found {', '.join(map(str, data.data_vars))}")
    found = data[name]
    needed = (36, len(LAT), len(LON)) if name == "sst" else (36,)
    if found.shape[1:] != needed or found.ndim != len(needed) + 1 or not len(found):
        raise ValueError(f"{name} has shape {found.shape}: needed (year, {', '.join(map(str, needed))})")
    for axis, values in zip(found.dims[2:], (LAT, LON), strict=False):
        if axis in found.coords and not np.allclose(found[axis], values):
            at = found[axis].values
            raise ValueError(f"{axis} runs {at[0]:g} to {at[-1]:g}: needed {values[0]:g} to {values[-1]:g}")
    return found


# --------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class EnsoShard:
    """One source."""

    folder: str
    name: str
    file: str
    """`CMIP` or `SODA`, or the name of an observation file."""
    rows: tuple[int, int]
    months: int
    position: int = 0
    """Among the archive's sources."""
    first: str = ""
    """First month of an observation, YYYY-MM; empty for model years, which have no date."""

    @property
    def identity(self) -> Any:
        """What the shard is made of."""
        return [self.position, self.name, self.file, *self.rows, self.months, self.first]

    @property
    def files(self) -> list[str]:
        """Names of the files that it is read from."""
        of = [f"{self.file}_train.nc", f"{self.file}_label.nc"]
        return of if self.file in ("CMIP", "SODA") else [self.file]

    def decode(self) -> Decoded:
        """The source's SST anomalies and labels, filled to the longest source by the template."""
        region = {"source": slice(self.position, self.position + 1), "month": slice(0, self.months)}
        bad = []
        try:
            sst, nino = self._read()
            if len(sst) != self.months:
                raise ValueError(f"holds {len(sst)} months: needed {self.months}, as when it was planned")
        except UNREADABLE as error:
            shape = (self.months, len(LAT), len(LON))
            sst, nino = np.full(shape, np.nan, np.float32), np.full(self.months, np.nan, np.float32)
            bad = [Bad(self.name, self.files[0], why(error))]
        sources = {self.name: [Source(file, []) for file in self.files]}
        return Decoded(
            [Region("", region, {"sst": sst[None], "nino34": nino[None]})], bad, sources, self.folder
        )

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        if self.file not in ("CMIP", "SODA"):
            return observed(join(self.folder, self.file))
        first, last = self.rows
        with open_netcdf(join(self.folder, f"{self.file}_train.nc")) as data:
            sst = unfold(_row_variable(data, "sst")[first:last].values.astype(np.float32))
        with open_netcdf(join(self.folder, f"{self.file}_label.nc")) as data:
            nino = unfold(_row_variable(data, "nino")[first:last].values.astype(np.float32))
        # Land is 0 in some copies and NaN in others; the published loader takes NaN as 0.
        sst = np.where(np.isnan(sst), np.float32(0), sst)
        if np.abs(sst).max() > LARGEST:
            raise ValueError(f"sst reaches {sst.flat[np.abs(sst).argmax()]:g}: needed anomalies in K")
        if not np.isfinite(nino).all():
            month = np.isfinite(nino).argmin()
            raise ValueError(f"the label of month {month} in {self.file}_label.nc is missing")
        return sst, nino


def observed(url: str) -> tuple[np.ndarray, np.ndarray]:
    """Monthly SST on a regular grid to anomalies (month, 24, 72) in K and the Niño3.4 label (month,).

    Anomalies are of each calendar month's mean over the file. Cells of 5° hold the area-weighted mean of
    their ocean; those that are mostly land are 0, as in ICAR-ENSO. The label is the three-month running
    mean (months m, m+1, m+2) of Niño3.4 (5°S-5°N, 170-120°W) on the file's own grid, NaN for the last two.

    Dask computes it, on threads or wherever it was told to. A chunk of Dask's is a calendar month in all of
    its years, whose mean needs no other, in a band of latitudes that keeps it to `CHUNK_BYTES`.

    Raises:
        ValueError: no monthly SST on (time, lat, lon), or not in °C or K.
    """
    with open_netcdf(url) as data:
        sst = _sst(data)
        months, latitudes, longitudes = sst.shape
        whole = np.outer(*(weights.sum(1) for weights in _weights(sst)))
    height = max(1, CHUNK_BYTES // (-(-months // 12) * longitudes * sst.dtype.itemsize))
    bands = [slice(first, first + height) for first in range(0, latitudes, height)]
    chunks = [(month, band) for month in range(12) for band in bands]
    # One task does all with a chunk: were they several, chunks would lie in the cluster's memory meanwhile,
    # and all of them, for it runs what can be run at once.
    sums = dask.compute(*(dask.delayed(_sums)(url, month, band) for month, band in chunks))
    total, area = np.zeros((2, months, *whole.shape))
    for (month, _), (of_anomalies, of_ocean) in zip(chunks, sums, strict=True):
        total[month::12] += of_anomalies
        area[month::12] += of_ocean
    # To rounding: what is half land is land.
    mean = np.divide(total, area, out=np.full_like(total, np.nan), where=area > whole * (0.5 + 1e-9))
    cells, box = mean[:, : len(LAT), : len(LON)], mean[:, -1, -1]
    if np.isnan(box).any():
        raise ValueError(f"month {np.isnan(box).argmax()} has no value in Niño3.4, 5°S-5°N and 170-120°W")
    nino = np.full(months, np.nan, np.float32)
    nino[:-2] = np.convolve(box, np.ones(3) / 3, mode="valid")
    return np.nan_to_num(cells).astype(np.float32), nino


def _sums(url: str, month: int, band: slice) -> tuple[np.ndarray, np.ndarray]:
    """Of a calendar month in a band of latitudes, over each of `_weights`' boxes, (year, 25, 73) each: the
    sum of anomalies times area, and the area that has values.

    The file is opened here, since the task may run anywhere.
    """
    with _READING, open_netcdf(url) as data:
        sst = _sst(data)
        rows, columns = _weights(sst)
        # One by one: HDF5 takes five times as long for a slice with a step.
        fields = np.stack([sst[at, band].values for at in range(month, len(sst), 12)])
    years = xr.DataArray(fields, dims=("year", "lat", "lon"))
    anomaly = (years - years.mean("year")).values
    valid = np.isfinite(anomaly)
    parts = (np.where(valid, anomaly, 0), valid)
    of_anomalies, of_ocean = (rows[:, band] @ part @ columns.T for part in parts)
    return of_anomalies, of_ocean


def _sst(data: xr.Dataset) -> xr.DataArray:
    """The file's monthly SST (time, lat, lon), not loaded."""
    if "sst" not in data:
        raise KeyError(f"no variable sst, found {', '.join(map(str, data.data_vars))}")
    sst = data["sst"].rename({k: v for k, v in (("latitude", "lat"), ("longitude", "lon")) if k in data})
    single = [d for d in sst.dims if d not in ("time", "lat", "lon") and sst.sizes[d] == 1]
    sst = sst.squeeze(single, drop=True)
    if set(sst.dims) != {"time", "lat", "lon"} or min(sst.sizes.values()) < 2:
        raise ValueError(f"sst has dimensions {dict(sst.sizes)}: needed time, lat and lon")
    if not TEMPERATURE.fullmatch(str(sst.attrs.get("units", ""))):
        raise ValueError(f"sst has units {sst.attrs.get('units')!r}: needed degC or K")
    for axis in ("lat", "lon"):
        steps = np.diff(sst[axis].values)
        if axis not in sst.coords or not np.allclose(steps, steps[0], rtol=1e-3) or not steps[0]:
            raise ValueError(f"{axis} has no equally spaced coordinate: needed a regular grid in degrees")
    _calendar(sst)
    return sst.transpose("time", "lat", "lon")


def _calendar(sst: xr.DataArray) -> tuple[int, str]:
    """How many months, and the first one as YYYY-MM."""
    time = sst["time"]
    if not hasattr(time, "dt"):
        raise ValueError(f"time is {time.dtype}: needed dates")
    months = (12 * time.dt.year + time.dt.month - 1).values
    names = [f"{month // 12:04d}-{month % 12 + 1:02d}" for month in months]
    jumps = np.flatnonzero(np.diff(months) != 1)
    if len(jumps):
        before, after = names[jumps[0] : jumps[0] + 2]
        raise ValueError(f"time goes from {before} to {after}: needed successive months")
    if len(names) < LEAST_MONTHS:
        raise ValueError(f"time spans {len(names)} months: needed {LEAST_MONTHS} for a mean year")
    return len(names), names[0]


def _weights(sst: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Areas of pixels within boxes, as factors (25, lat) and (73, lon): the 24 × 72 cells and, last of both,
    Niño3.4.
    """
    lat, lon = sst["lat"].values, sst["lon"].values
    rows = np.concatenate([_overlap(lat, LAT, STEP / 2), _overlap(lat, np.array([0.0]), 5.0)])
    columns = np.concatenate([_overlap(lon, LON, STEP / 2), _overlap(lon, np.array([215.0]), 25.0)])
    return rows * np.cos(np.deg2rad(lat)), columns


def _overlap(pixels: np.ndarray, boxes: np.ndarray, half: float) -> np.ndarray:
    """Degrees of each pixel that lie within each box, (box, pixel), around the globe."""
    pixel = abs(pixels[1] - pixels[0]) / 2
    apart = (pixels[None].astype(float) - boxes[:, None] + 180) % 360 - 180
    return np.clip(np.minimum(apart + pixel, half) - np.maximum(apart - pixel, -half), 0, None)


def _template(shards: Sequence[EnsoShard], longest: int) -> xr.Dataset:
    shape = (len(shards), longest, len(LAT), len(LON))
    sst = xr.Variable(
        ("source", "month", "lat", "lon"),
        dask.array.zeros(shape, dtype=np.float32, chunks=shape),
        attrs={
            "standard_name": "sea_surface_temperature_anomaly",
            "long_name": "sea surface temperature anomaly, 0 over land",
            "units": "K",
        },
        encoding={
            "chunks": (1, 36, *shape[2:]),
            "shards": (1, -(-longest // 36) * 36, *shape[2:]),
            "_FillValue": np.float32("nan"),
        },
    )
    label = xr.Variable(
        ("source", "month"),
        dask.array.zeros(shape[:2], dtype=np.float32, chunks=shape[:2]),
        attrs={"long_name": "Nino3.4 index, mean of months m, m+1 and m+2", "units": "K"},
        encoding={"chunks": (1, longest), "_FillValue": np.float32("nan")},
    )
    return xr.Dataset(
        {"sst": sst, "nino34": label},
        coords={
            "source": (
                "source",
                np.array([s.name for s in shards]),
                {"long_name": "climate model or analysis"},
            ),
            "n_months": (
                "source",
                np.array([s.months for s in shards]),
                {"long_name": "months of the source"},
            ),
            "first_month": (
                "source",
                np.array([s.first for s in shards]),
                {"long_name": "first month of an analysis; model years have no date"},
            ),
            "month": ("month", np.arange(longest), {"long_name": "months since the source's first"}),
            "lat": ("lat", LAT, {"units": "degrees_north", "standard_name": "latitude"}),
            "lon": ("lon", LON, {"units": "degrees_east", "standard_name": "longitude"}),
        },
        attrs={
            "Conventions": "CF-1.11",
            "title": "Monthly SST anomalies with Nino3.4 labels",
            "kind": "enso",
            "source": "ICAR-ENSO 2021 (CMIP5, CMIP6, SODA) and SST analyses",
        },
    )
