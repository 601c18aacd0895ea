"""SEVIR (Veillette et al., NeurIPS 2020): the catalogue, which events are kept, and their pixels.

Raw layout: `CATALOG.csv` and `data/<file_name>`; HDF5 of (event, y, x, time), row 0 in the south. The archive
is (event, time, y, x), in raw units. SEVIR-LR (Gao et al., PreDiff, NeurIPS 2023, Appendix A) keeps every
second frame and takes the maximum of 3 × 3 pixels.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
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

PROJ = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"
MISSING = 255


@dataclass(frozen=True)
class Modality:
    """One image type of the raw archive."""

    dtype: str
    missing: int
    suffix: str
    """Of the archive's spatial dimensions, which differ in resolution."""
    size: int
    """Pixels a side of the 384 km square."""
    attrs: dict[str, Any]


MODALITIES = {
    "vil": Modality(
        "uint8",
        MISSING,
        "",
        384,
        {
            "long_name": "vertically integrated liquid, encoded 0-254",
            "units": "1",
            "comment": "kg m-2: 0 for v <= 5, (v - 2) / 90.66 for 5 < v <= 18, "
            "exp((v - 83.9) / 38.9) for v > 18",
        },
    ),
    "ir069": Modality(
        "int16",
        -32768,
        "_2km",
        192,
        {"long_name": "brightness temperature, 6.9 um", "units": "degC", "scale_factor": 0.01},
    ),
    "ir107": Modality(
        "int16",
        -32768,
        "_2km",
        192,
        {"long_name": "brightness temperature, 10.7 um", "units": "degC", "scale_factor": 0.01},
    ),
    "vis": Modality(
        "int16",
        -32768,
        "_500m",
        768,
        {"long_name": "visible reflectance, 0.64 um", "units": "1", "scale_factor": 1e-4},
    ),
    "lght": Modality(
        "int16",
        -1,
        "_8km",
        48,
        {"long_name": "lightning flashes in a pixel and a frame's time", "units": "1"},
    ),
}
EXTENT_M = 384_000.0
FRAME_SECONDS = 300
"""SEVIR's frames are 5 minutes apart."""


# ----------------------------------------------------------------------------------------- catalogue


def read_catalog(source: str) -> pd.DataFrame:
    """`CATALOG.csv`, with `time_utc` parsed and the damage of spreadsheets repaired (with a warning).

    Raises:
        InputError: no catalogue, or one without a column that is needed.
    """
    url = source if source.endswith(".csv") else f"{source.rstrip('/')}/CATALOG.csv"
    try:
        with fsspec.open(url, "rb") as file:
            text = file.read()
    except FileNotFoundError as error:
        raise InputError(
            f"{url} is absent: needed the SEVIR folder, which holds CATALOG.csv and data/"
        ) from error
    try:
        # utf-8-sig also eats the byte-order mark that spreadsheets write.
        table = pd.read_csv(io.BytesIO(text), encoding="utf-8-sig", dtype={"id": str}, low_memory=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{url} is not a CSV table: {error}") from error
    needed = ["id", "file_name", "file_index", "img_type", "time_utc", "pct_missing"]
    absent = [name for name in needed if name not in table.columns]
    if absent:
        raise InputError(f"{url} has no column {absent[0]}: needed {', '.join(needed)}")
    return _repaired(table, url)


def _repaired(table: pd.DataFrame, url: str) -> pd.DataFrame:
    table = table.copy()
    times = pd.to_datetime(table["time_utc"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
    if times.isna().any():
        short = pd.to_datetime(table["time_utc"], format="%m/%d/%y %H:%M", errors="coerce")
        if (times.isna() & short.isna()).any():
            odd = table["time_utc"][times.isna() & short.isna()].iloc[0]
            raise InputError(f"{url} has time_utc {odd!r}: needed YYYY-MM-DD HH:MM:SS")
        warnings.warn(f"{url} went through a spreadsheet: times read as m/d/yy H:MM", stacklevel=3)
        times = times.fillna(short)
    table["time_utc"] = times.astype("datetime64[ns]")
    if "proj" not in table:
        table["proj"] = PROJ
    broken = ~table["proj"].astype(str).str.startswith("+proj")
    if broken.any():
        odd = table.loc[broken, "proj"].iloc[0]
        warnings.warn(f"{url} has proj {odd!r} in {broken.sum()} rows: SEVIR's own is taken", stacklevel=3)
        table.loc[broken, "proj"] = PROJ
    return table


def select(
    catalog: pd.DataFrame,
    modalities: Sequence[str] = ("vil",),
    start: str | None = None,
    end: str | None = None,
) -> pd.DataFrame:
    """Rows of the events that are kept, sorted by id: one row of every modality for each event.

    In the published order: time later than `start` and not later than `end`, nothing missing, the image
    types asked for, and every id with more (or fewer) than one row of each dropped.
    """
    rows = catalog
    if start is not None:
        rows = rows[rows["time_utc"] > pd.Timestamp(start)]
    if end is not None:
        rows = rows[rows["time_utc"] <= pd.Timestamp(end)]
    rows = rows[(rows["pct_missing"] == 0) & rows["img_type"].isin(modalities)]
    counts = rows.groupby("id")["img_type"].agg(["size", "nunique"])
    whole = counts.index[(counts["size"] == len(modalities)) & (counts["nunique"] == len(modalities))]
    return rows[rows["id"].isin(whole)].sort_values(["id", "img_type"], kind="stable")


# ----------------------------------------------------------------------------------------------- plan


def plan(
    source: str, *, modalities: Sequence[str] = ("vil",), low_resolution: bool = False, shard_mb: int = 128
) -> Plan:
    """What preparing a SEVIR archive would read and write.

    Args:
        source: folder with `CATALOG.csv` and `data/`.
        modalities: image types; an event needs one whole row of each.
        low_resolution: SEVIR-LR: every second frame, 3 × 3 maximum (VIL alone).
        shard_mb: about the size of a shard before compression.

    Raises:
        InputError: no catalogue, an unknown modality, or no event that can be kept.
    """
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown or (low_resolution and tuple(modalities) != ("vil",)):
        known = "vil alone (SEVIR-LR)" if low_resolution else ", ".join(MODALITIES)
        raise InputError(f"modality {', '.join(unknown or modalities)} cannot be prepared: needed {known}")
    catalog = read_catalog(source)
    kept = select(catalog, modalities)
    if kept.empty:
        raise InputError(
            f"{source} has no event with one complete row of {', '.join(modalities)} "
            f"among {len(catalog)} catalogue rows"
        )
    # Neighbours in the archive are neighbours in the raw files.
    first = kept[kept["img_type"] == modalities[0]].sort_values(["file_name", "file_index"], kind="stable")
    located = zip(kept["id"], kept["img_type"], kept["file_name"], kept["file_index"], strict=True)
    by_id = {(str(i), str(kind)): (str(file), int(row)) for i, kind, file, row in located}
    grids = {name: _grid(first, name, modalities[0], low_resolution) for name in modalities}
    stored = sum(int(np.prod(grid)) * np.dtype(MODALITIES[n].dtype).itemsize for n, grid in grids.items())
    each = max(1, min(32, len(first), shard_mb * 1_000_000 // stored))
    ids = [str(i) for i in first["id"]]
    shards = tuple(
        SevirShard(
            source.rstrip("/"),
            start,
            tuple((i, {name: by_id[i, name] for name in modalities}) for i in ids[start : start + each]),
            grids,
            low_resolution,
        )
        for start in range(0, len(ids), each)
    )
    decoded = stored * (9 * 49 // 25 if low_resolution else 1)
    kind = "sevir-lr" if low_resolution else "sevir"
    return Plan(
        kind=kind,
        groups={"": _template(first, grids, each, kind)},
        config={
            "kind": kind,
            "modalities": list(modalities),
            "grids": {name: list(grid) for name, grid in grids.items()},
            "events": [[i, *by_id[i, name]] for i in ids for name in modalities],
            "shard_events": each,
        },
        shards=shards,
        series=len(ids),
        frames=len(ids) * next(iter(grids.values()))[0],
        stored_bytes=stored * len(ids),
        decoded_bytes=decoded * len(ids),
        dropped=_dropped(catalog, kept, modalities),
    )


def _dropped(catalog: pd.DataFrame, kept: pd.DataFrame, modalities: Sequence[str]) -> dict[str, int]:
    wanted = catalog[catalog["img_type"].isin(modalities)]
    whole = wanted[wanted["pct_missing"] == 0]
    return {
        "pct_missing > 0": len(wanted) - len(whole),
        "duplicate id or modality missing": len(whole) - len(kept),
    }


def _grid(first: pd.DataFrame, name: str, reference: str, low_resolution: bool) -> tuple[int, int, int]:
    frames = len(_offsets(first)[0])
    scale = MODALITIES[name].size / MODALITIES[reference].size
    if "size_y" in first and "size_x" in first:
        sizes = {(int(y), int(x)) for y, x in zip(first["size_y"], first["size_x"], strict=True)}
        height, width = sizes.pop() if len(sizes) == 1 else (MODALITIES[reference].size,) * 2
    else:
        height = width = MODALITIES[reference].size
    height, width = round(height * scale), round(width * scale)
    return ((frames + 1) // 2, height // 3, width // 3) if low_resolution else (frames, height, width)


def _offsets(first: pd.DataFrame) -> np.ndarray:
    """Minutes of every frame relative to `time_utc`, (event, time)."""
    if "minute_offsets" not in first:
        return np.tile(np.arange(-120, 121, 5), (len(first), 1))
    rows = [[int(m) for m in str(text).split(":")] for text in first["minute_offsets"]]
    usual = max(set(map(len, rows)), key=list(map(len, rows)).count)
    # A row with another number of frames is found out, and quarantined, when its file is read.
    return np.array([row if len(row) == usual else rows[0] for row in rows])


def _template(
    first: pd.DataFrame, grids: dict[str, tuple[int, int, int]], each: int, kind: str
) -> xr.Dataset:
    step = 2 if kind == "sevir-lr" else 1
    offsets = _offsets(first)[:, ::step]
    nominal = (
        (np.arange(offsets.shape[1]) * 5 * step - 120).astype("timedelta64[m]").astype("timedelta64[ns]")
    )
    times = first["time_utc"].to_numpy()[:, None] + offsets.astype("timedelta64[m]")
    crs = pyproj.CRS.from_proj4(str(first["proj"].iloc[0]))
    coords: dict[str, Any] = {
        "event": ("event", first["id"].to_numpy(str), {"long_name": "SEVIR event id"}),
        "time": ("time", nominal, {"long_name": "nominal time relative to time_utc"}),
        "time_utc": ("event", first["time_utc"].to_numpy(), {"long_name": "reference time of the event"}),
        "frame_time": (("event", "time"), times.astype("datetime64[ns]"), {"standard_name": "time"}),
        "crs": ((), np.int32(0), {**crs.to_cf(), "proj4": str(first["proj"].iloc[0])}),
    }
    if {"llcrnrlon", "llcrnrlat"} <= set(first.columns):
        to_metres = pyproj.Transformer.from_crs(crs.geodetic_crs, crs, always_xy=True)
        x, y = to_metres.transform(first["llcrnrlon"].to_numpy(), first["llcrnrlat"].to_numpy())
    else:
        x = y = np.full(len(first), np.nan)
    corner = {"units": "m", "comment": "of the event's lower left corner, in the projection crs"}
    coords |= {"x_origin": ("event", x, corner), "y_origin": ("event", y, corner)}
    for name in first.columns:
        if name not in ("id", "img_type", "time_utc", "proj", "minute_offsets"):
            values = first[name]
            text = not pd.api.types.is_numeric_dtype(values)
            coords[name] = ("event", values.fillna("").to_numpy(str) if text else values.to_numpy())
    variables = {}
    for name, (frames, height, width) in grids.items():
        modality = MODALITIES[name]
        y_dim, x_dim = f"y{modality.suffix}", f"x{modality.suffix}"
        for dim, size in ((y_dim, height), (x_dim, width)):
            metres = (np.arange(size) + 0.5) * EXTENT_M / size
            axis = {
                "units": "m",
                "standard_name": f"projection_{dim[0]}_coordinate",
                "comment": "from the event's lower left corner; row 0 is the south",
            }
            coords[dim] = (dim, metres, axis)
        shape = (len(first), frames, height, width)
        variables[name] = xr.Variable(
            ("event", "time", y_dim, x_dim),
            dask.array.zeros(shape, dtype=modality.dtype, chunks=shape),
            attrs={**modality.attrs, "grid_mapping": "crs"},
            encoding={
                "chunks": (1, frames, height, width),
                "shards": (each, frames, height, width),
                "_FillValue": modality.missing,
            },
        )
    return xr.Dataset(
        variables,
        coords=coords,
        attrs={
            "Conventions": "CF-1.11",
            "title": "SEVIR storm events" + (", low resolution (10 min, 3 km)" if kind == "sevir-lr" else ""),
            "kind": kind,
            "references": "Veillette et al., SEVIR, NeurIPS 2020",
            "source": "SEVIR HDF5, raw units",
        },
    )


# --------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class SevirShard:
    """Some successive events of the archive."""

    source: str
    start: int
    """Index of the first event."""
    events: tuple[tuple[str, dict[str, tuple[str, int]]], ...]
    """(id, modality to (file_name, file_index))."""
    grids: dict[str, tuple[int, int, int]]
    low_resolution: bool

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """Read the events; those that cannot be read are filled with the missing value and listed."""
        arrays = {
            name: np.full((len(self.events), *grid), MODALITIES[name].missing, MODALITIES[name].dtype)
            for name, grid in self.grids.items()
        }
        bad: dict[str, Bad] = {}
        for name, grid in self.grids.items():
            for file_name, rows in self._by_file(name).items():
                url = f"{self.source}/data/{file_name}"
                for place, event, found in _read_events(url, name, rows, grid, self.low_resolution):
                    if isinstance(found, str):
                        bad.setdefault(event, Bad(event, file_name, found))
                    else:
                        arrays[name][place] = found
        for place, (event, _) in enumerate(self.events):
            if event in bad:
                for name, values in arrays.items():
                    values[place] = MODALITIES[name].missing
        region = {"event": slice(self.start, self.start + len(self.events))}
        return [Region("", region, arrays)], list(bad.values())

    def _by_file(self, name: str) -> dict[str, list[tuple[int, str, int]]]:
        files: dict[str, list[tuple[int, str, int]]] = {}
        for place, (event, rows) in enumerate(self.events):
            file_name, index = rows[name]
            files.setdefault(file_name, []).append((place, event, index))
        return files


def _read_events(
    url: str, name: str, rows: list[tuple[int, str, int]], grid: tuple[int, int, int], low_resolution: bool
) -> Iterator[tuple[int, str, np.ndarray | str]]:
    """(place in the shard, event id, frames (time, y, x) or why there are none)."""
    try:
        with local_copy(url) as path, h5py.File(path, "r") as file:
            for place, event, index in rows:
                try:
                    frames = _flashes(file, event) if name == "lght" else _frames(file, name, event, index)
                    frames = block_maximum(frames) if low_resolution else frames
                    if frames.shape != grid:
                        raise ValueError(f"shape {frames.shape} (time, y, x): needed {grid}")
                    yield place, event, frames
                except (OSError, KeyError, ValueError, IndexError) as error:
                    yield place, event, _one_line(error)
    except FileNotFoundError:
        yield from ((place, event, "the file is not there") for place, event, _ in rows)
    except OSError as error:
        reason = f"not readable as HDF5: {_one_line(error)}"
        yield from ((place, event, reason) for place, event, _ in rows)


def _frames(file: h5py.File, name: str, event: str, index: int) -> np.ndarray:
    if name not in file:
        raise KeyError(f"no dataset {name!r}, found {', '.join(list(file)[:5])}")
    dataset = file[name]
    wanted = np.dtype(MODALITIES[name].dtype)
    if dataset.ndim != 4 or dataset.dtype != wanted:
        raise ValueError(f"dataset {name} is {dataset.ndim}-D {dataset.dtype}: needed 4-D {wanted}")
    if not 0 <= index < dataset.shape[0]:
        raise IndexError(f"file_index {index} lies outside its {dataset.shape[0]} events")
    if "id" in file and (stored := _text(file["id"][index])) != event:
        raise ValueError(f"row {index} holds event {stored}")
    return np.ascontiguousarray(dataset[index].transpose(2, 0, 1))


def _flashes(file: h5py.File, event: str) -> np.ndarray:
    """Lightning counts (49, 48, 48) from flashes (n, 5): seconds, lat, lon, x, y."""
    if event not in file:
        raise KeyError(f"no dataset {event!r}")
    flashes = np.asarray(file[event])
    if flashes.ndim != 2 or flashes.shape[1] != 5:
        raise ValueError(f"flashes of {event} have shape {flashes.shape}: needed (n, 5)")
    size = MODALITIES["lght"].size
    edges = np.arange(-7200, 7201, FRAME_SECONDS)
    x, y = np.floor(flashes[:, 3]).astype(int), np.floor(flashes[:, 4]).astype(int)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    # The last frame not after the flash; flashes before the first frame go to it.
    frame = np.maximum(np.searchsorted(edges, flashes[:, 0], side="right") - 1, 0)
    counts = np.zeros((len(edges), size, size), np.int16)
    np.add.at(counts, (frame[inside], y[inside], x[inside]), 1)
    return counts


def block_maximum(frames: np.ndarray) -> np.ndarray:
    """SEVIR-LR of one event: every second frame, maximum of 3 × 3 pixels; (T, H, W) to (ceil T/2, H/3, W/3).

    Missing (255) is the largest value, so that a block with a missing pixel is missing.
    """
    kept = frames[::2]
    steps, height, width = kept.shape
    rows = kept.reshape(steps, height // 3, 3, width)
    tall = np.maximum(np.maximum(rows[:, :, 0], rows[:, :, 1]), rows[:, :, 2])
    return np.maximum(np.maximum(tall[..., 0::3], tall[..., 1::3]), tall[..., 2::3])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).strip("'\"").split())
