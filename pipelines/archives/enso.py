"""ICAR-ENSO 2021: CMIP5, CMIP6 and SODA fields with Niño3.4 labels, unfolded to monthly series.

Row y of the raw files holds the months of years y to y + 2, so that successive rows overlap by 24 months.
The archive is (source, month, lat, lon), one source a climate model, NaN beyond a source's last month. A
gridded SST observation (ERSST and the like) in the folder becomes a source of anomalies on the same grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array
import fsspec
import numpy as np
import xarray as xr

from pipelines.archives import Bad, Plan, Region, local_copy
from pipelines.errors import InputError

LAT = np.arange(-55.0, 61.0, 5.0)
LON = np.arange(0.0, 360.0, 5.0)
PUBLISHED = {"cmip6_models": 15, "cmip6_years": 151, "cmip5_models": 17, "cmip5_years": 140}
"""Models and rows a model of `CMIP_train.nc`, unless its attributes give others."""


def unfold(rows: np.ndarray) -> np.ndarray:
    """Overlapping rows (n, 36, …) to one monthly series: rows 0, 3, 6, … and what the last row adds."""
    series = np.concatenate(list(rows[::3]))
    rest = (len(rows) - 1) % 3
    return np.concatenate([series, rows[-1][-12 * rest :]]) if rest else series


def series_months(rows: int) -> int:
    """Months of an unfolded series of so many rows."""
    return 36 * -(-rows // 3) + 12 * ((rows - 1) % 3)


def plan(source: str) -> Plan:
    """What preparing an ENSO archive would read and write.

    Args:
        source: folder with `CMIP_train.nc` and `CMIP_label.nc`, and/or `SODA_train.nc` and `SODA_label.nc`,
            and/or NetCDF files of monthly SST on a regular grid.

    Raises:
        InputError: none of these is there, one cannot be read, or its shape is another.
    """
    fs, path = fsspec.core.url_to_fs(source)
    if not fs.exists(path):
        raise InputError(f"{source} is absent: needed the folder of CMIP_train.nc, CMIP_label.nc, SODA_…")
    names = {n.rpartition("/")[2] for n in fs.ls(path, detail=False)}
    shards: list[EnsoShard] = []
    if "CMIP_train.nc" in names:
        shards += _cmip(source, names)
    if "SODA_train.nc" in names:
        _needs(source, names, "SODA_label.nc")
        rows = _rows(f"{source}/SODA_train.nc")[0]
        shards.append(EnsoShard(source, "SODA", "SODA", (0, rows), series_months(rows), len(shards)))
    known = {f"{kind}_{part}.nc" for kind in ("CMIP", "SODA") for part in ("train", "label")}
    for name in sorted(n for n in names - known if n.endswith((".nc", ".nc4"))):
        months = _observed_months(f"{source}/{name}")
        if months:
            shards.append(EnsoShard(source, name.rpartition(".")[0], name, (0, 0), months, len(shards)))
    if not shards:
        raise InputError(
            f"{source} has no CMIP_train.nc, SODA_train.nc or monthly SST grid: needed one of them"
        )
    longest = max(s.months for s in shards)
    stored = len(shards) * longest * len(LAT) * len(LON) * 4
    return Plan(
        kind="enso",
        groups={"": _template(shards, longest)},
        config={"kind": "enso", "sources": [[s.name, s.file, list(s.rows), s.months] for s in shards]},
        shards=tuple(shards),
        series=len(shards),
        frames=sum(s.months for s in shards),
        stored_bytes=stored,
        decoded_bytes=stored,
    )


def _cmip(source: str, names: set[str]) -> list["EnsoShard"]:
    _needs(source, names, "CMIP_label.nc")
    total, attrs = _rows(f"{source}/CMIP_train.nc")
    counts = {key: int(attrs.get(key, value)) for key, value in PUBLISHED.items()}
    six, five = (counts[f"cmip{k}_models"] * counts[f"cmip{k}_years"] for k in (6, 5))
    if total != six + five:
        raise InputError(
            f"{source}/CMIP_train.nc has {total} rows: needed {six + five} "
            f"({counts['cmip6_models']} × {counts['cmip6_years']} of CMIP6, then "
            f"{counts['cmip5_models']} × {counts['cmip5_years']} of CMIP5)"
        )
    shards: list[EnsoShard] = []
    for kind, offset in (("6", 0), ("5", six)):
        years = counts[f"cmip{kind}_years"]
        for model in range(counts[f"cmip{kind}_models"]):
            first = offset + model * years
            name = f"CMIP{kind}-{model:02d}"
            shards.append(
                EnsoShard(source, name, "CMIP", (first, first + years), series_months(years), len(shards))
            )
    # In the order of the published loader: CMIP6 first, model after model.
    return shards


@dataclass(frozen=True)
class EnsoShard:
    """One source."""

    source: str
    name: str
    file: str
    """`CMIP` or `SODA`, or the name of an observation file."""
    rows: tuple[int, int]
    months: int
    position: int

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """The source's SST anomalies and labels, filled to the longest source by the template."""
        region = {"source": slice(self.position, self.position + 1), "month": slice(0, self.months)}
        try:
            sst, nino = self._read()
        except (OSError, KeyError, ValueError) as error:
            shape = (self.months, len(LAT), len(LON))
            sst, nino = np.full(shape, np.nan, np.float32), np.full(self.months, np.nan, np.float32)
            bad = [Bad(self.name, self.file, " ".join(str(error).split()))]
            return [Region("", region, {"sst": sst[None], "nino34": nino[None]})], bad
        return [Region("", region, {"sst": sst[None], "nino34": nino[None]})], []

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        if self.file not in ("CMIP", "SODA"):
            return observed(f"{self.source}/{self.file}")
        rows = slice(*self.rows)
        with local_copy(f"{self.source}/{self.file}_train.nc") as path, xr.open_dataset(path) as data:
            sst = unfold(data["sst"][rows].values.astype(np.float32))
        with local_copy(f"{self.source}/{self.file}_label.nc") as path, xr.open_dataset(path) as data:
            nino = unfold(data["nino"][rows].values.astype(np.float32))
        if sst.shape != (self.months, len(LAT), len(LON)) or nino.shape != (self.months,):
            raise ValueError(f"unfolds to {sst.shape} and labels {nino.shape}: needed {self.months} months")
        # Land is 0 in some copies and NaN in others; the published loader takes NaN as 0.
        return np.nan_to_num(sst), nino


def observed(url: str) -> tuple[np.ndarray, np.ndarray]:
    """Monthly SST on a regular grid to anomalies (month, 24, 72) in K and the Niño3.4 label (month,).

    Anomalies are of each calendar month's mean over the file. Cells of 5° hold the cos(latitude)-weighted
    mean of the ocean pixels whose centres they contain; land is 0, as in ICAR-ENSO. The label is the
    three-month running mean (months m, m+1, m+2) of Niño3.4 from the file's own grid.

    Raises:
        ValueError: no SST on (time, lat, lon), or not in °C or K.
    """
    with local_copy(url) as path, xr.open_dataset(path) as data:
        sst = data["sst"].transpose("time", "lat", "lon").load()
    if str(sst.attrs.get("units", "")).lower() not in (
        "degc",
        "celsius",
        "degree_c",
        "k",
        "kelvin",
        "degrees_c",
    ):
        raise ValueError(f"sst has units {sst.attrs.get('units')!r}: needed degC or K")
    anomaly = sst.groupby("time.month") - sst.groupby("time.month").mean()
    anomaly = anomaly.assign_coords(lon=anomaly["lon"] % 360).sortby(["lat", "lon"])
    weight = _area(anomaly)
    box = anomaly.sel(lat=slice(-5, 5), lon=slice(190, 240)).weighted(weight).mean(("lat", "lon")).values
    nino = np.full(len(box), np.nan, np.float32)
    nino[:-2] = np.convolve(box, np.ones(3) / 3, mode="valid")
    return _regrid(anomaly, weight), nino


def _area(field: xr.DataArray) -> xr.DataArray:
    """Area of a pixel, up to a factor, for each latitude."""
    return xr.apply_ufunc(np.cos, np.deg2rad(field["lat"]))


def _regrid(anomaly: xr.DataArray, weight: xr.DataArray) -> np.ndarray:
    row = np.rint((anomaly["lat"].values - LAT[0]) / 5).astype(int)
    column = np.rint(anomaly["lon"].values / 5).astype(int) % len(LON)
    inside = (row >= 0) & (row < len(LAT))
    target = (row[inside, None] * len(LON) + column[None]).ravel()
    values = anomaly.values[:, inside].reshape(len(anomaly), -1)
    area = np.repeat(weight.values[inside], anomaly.sizes["lon"])
    weights = np.where(np.isfinite(values), area, 0.0)
    cells = len(LAT) * len(LON)
    summed = np.stack(
        [np.bincount(target, np.nan_to_num(v) * w, cells) for v, w in zip(values, weights, strict=True)]
    )
    total = np.stack([np.bincount(target, w, cells) for w in weights])
    mean = np.divide(summed, total, out=np.zeros_like(summed), where=total > 0)
    return mean.reshape(-1, len(LAT), len(LON)).astype(np.float32)


def _needs(source: str, names: set[str], name: str) -> None:
    if name not in names:
        raise InputError(f"{source}/{name} is absent: needed beside {name.replace('label', 'train')}")


def _rows(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with local_copy(url) as path, xr.open_dataset(path) as data:
            sst = data["sst"]
            shape = sst.shape
            attrs = dict(data.attrs)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{url} is not readable as NetCDF with sst: {' '.join(str(error).split())}"
        ) from error
    if sst.ndim != 4 or shape[1:] != (36, len(LAT), len(LON)):
        raise InputError(f"{url}: sst has shape {shape}: needed (year, 36, {len(LAT)}, {len(LON)})")
    return shape[0], attrs


def _observed_months(url: str) -> int:
    with local_copy(url) as path, xr.open_dataset(path) as data:
        if "sst" not in data or not {"time", "lat", "lon"} <= set(data["sst"].dims):
            return 0
        return int(data.sizes["time"])


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
            "month": ("month", np.arange(longest), {"long_name": "months since the source's first January"}),
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
