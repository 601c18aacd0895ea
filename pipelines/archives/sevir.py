"""SEVIR (Veillette et al., NeurIPS 2020): the catalogue, which events are kept, and their pixels.

Raw layout: `CATALOG.csv` and `data/<file_name>`; HDF5 of (event, y, x, time), row 0 in the south. The archive
is (event, time, y, x), in raw units. SEVIR-LR (Gao et al., PreDiff, NeurIPS 2023, Appendix A) keeps every
second frame and takes the maximum of 3 × 3 pixels.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask.array
import h5py
import numpy as np
import pandas as pd
import pyproj
import xarray as xr

from pipelines.archives import UNREADABLE, Bad, Decoded, Plan, Region, Source, hdf5, in_order, why
from pipelines.archives.catalog import NEEDED, NUMBERS, TEXTS, left_out, read_catalog, select
from pipelines.errors import InputError
from pipelines.storage import METADATA_BLOCK, join, readable

MISSING = 255
EXTENT_M = 384_000.0
FRAMES = 49
FRAME_MINUTES = 5
TIMES_EVENTS = 1 << 16
"""Events whose frames' times are held at once."""
FIRST_MINUTE = -120
"""Frames lie from two hours before `time_utc` to two hours after."""

Grid = tuple[int, int, int]
"""Frames, rows and columns of an event."""


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


# ----------------------------------------------------------------------------------------------- plan


def plan(
    source: str,
    *,
    modalities: Sequence[str] = ("vil",),
    low_resolution: bool = False,
    shard_mb: int = 128,
    known: Sequence[str] = (),
) -> Plan:
    """What preparing a SEVIR archive would read and write.

    Args:
        source: folder with `CATALOG.csv` and `data/`, or a catalogue of another name (`.csv`) beside `data/`.
        modalities: image types; an event needs one whole row of each.
        low_resolution: SEVIR-LR: every second frame, 3 × 3 maximum (VIL alone). Events that are so already
            are taken as they are.
        shard_mb: about the size of a shard before compression.
        known: events that the archive holds already, which stay where they are.

    Raises:
        InputError: no catalogue, an unknown modality, or no event that can be kept; an event of `known` is
            gone.
    """
    _check(modalities, low_resolution)
    catalog = read_catalog(source)
    kept, dropped = select(catalog, modalities), left_out(catalog, modalities)
    if kept.empty:
        raise InputError(
            f"{source} has no event with one whole row of {', '.join(modalities)} among {len(catalog)} "
            "catalogue rows" + "".join(f", {n} {reason}" for reason, n in dropped.items())
        )
    by_type = {name: kept[kept["img_type"] == name] for name in modalities}
    # Neighbours in the archive are neighbours in the raw files.
    first = by_type[modalities[0]].sort_values(["file_name", "file_index"], kind="stable")
    ids = in_order(first["id"].astype(object), known, source)
    by_type = {name: rows.iloc[pd.Index(rows["id"]).get_indexer(ids)] for name, rows in by_type.items()}
    raw = {name: _grid(by_type[name], name) for name in modalities}
    grids = {name: lowered(grid) for name, grid in raw.items()} if low_resolution else raw
    stored, decoded = _event_bytes(grids), _event_bytes(raw)
    each = max(1, min(32, shard_mb * 1_000_000 // stored))
    folder = (source.rpartition("/")[0] or ".") if source.endswith(".csv") else source.rstrip("/")
    files = {name: _texts(rows["file_name"]) for name, rows in by_type.items()}
    rows_of = {name: rows["file_index"].astype(int).tolist() for name, rows in by_type.items()}
    kind = "sevir-lr" if low_resolution else "sevir"

    def shard(start: int) -> SevirShard:
        some = slice(start, start + each)
        places = {
            name: tuple(zip(files[name][some], rows_of[name][some], strict=True)) for name in modalities
        }
        return SevirShard(folder, start, tuple(ids[some]), places, raw, low_resolution)

    return Plan(
        kind=kind,
        groups={"": _template(by_type[modalities[0]], ids, grids, each, kind)},
        config={
            "kind": kind,
            "modalities": list(modalities),
            "grids": {name: list(grid) for name, grid in grids.items()},
            "shard_events": each,
        },
        contents=_contents(ids, by_type),
        shards=tuple(map(shard, range(0, len(ids), each))),
        series=len(ids),
        frames=len(ids) * grids[modalities[0]][0],
        stored_bytes=stored * len(ids),
        decoded_bytes=decoded * len(ids),
        dropped=dropped,
    )


def _texts(column: pd.Series) -> np.ndarray:
    """A column as an array of objects, one for each different text however often it occurs."""
    codes, texts = pd.factorize(column)
    return np.array([*map(str, texts), ""], object)[codes]


def _contents(ids: Sequence[str], by_type: dict[str, pd.DataFrame]) -> dict[str, str]:
    """What the catalogue says of each event.

    Tells apart archives whose events bear the same names, such as synthetic ones of two seeds.
    """
    published = [name for name in dict.fromkeys((*NEEDED, *TEXTS, *NUMBERS)) if name != "id"]
    digests = [
        pd.util.hash_pandas_object(rows[[name for name in published if name in rows]], index=False)
        for rows in by_type.values()
    ]
    return {event: " ".join(f"{d:016x}" for d in of) for event, *of in zip(ids, *digests, strict=True)}


def _check(modalities: Sequence[str], low_resolution: bool) -> None:
    unknown = [name for name in modalities if name not in MODALITIES]
    repeated = len(set(modalities)) < len(modalities)
    if unknown or repeated or not modalities or (low_resolution and tuple(modalities) != ("vil",)):
        needed = "vil alone (SEVIR-LR)" if low_resolution else f"{', '.join(MODALITIES)}, each once"
        given = ", ".join(unknown or modalities)
        raise InputError(f"modalities {given!r} cannot be prepared: needed {needed}")


def _event_bytes(grids: dict[str, Grid]) -> int:
    return sum(int(np.prod(grid)) * np.dtype(MODALITIES[n].dtype).itemsize for n, grid in grids.items())


def _grid(rows: pd.DataFrame, name: str) -> Grid:
    """What most rows of a modality say; an event that is otherwise is found out when its file is read."""
    size = MODALITIES[name].size
    # Flashes are given on 48 × 48 pixels, whatever the catalogue says.
    height, width = (size if name == "lght" else _usual(rows, c, size) for c in ("size_y", "size_x"))
    return _minutes(rows)[0].shape[1], height, width


def _usual(rows: pd.DataFrame, column: str, otherwise: int) -> int:
    values = rows[column][rows[column] > 0] if column in rows else rows["file_index"][:0]
    return int(values.mode().iloc[0]) if len(values) else otherwise


def _minutes(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Minutes of the frames relative to `time_utc`, (kinds, time), and which kind each event is of, (event,).

    The nominal ones where the catalogue is damaged.
    """
    texts = rows["minute_offsets"] if "minute_offsets" in rows else pd.Series(np.nan, index=rows.index)
    codes, different = pd.factorize(texts)
    # The last one is for events without.
    parsed = [*(_parse_minutes(str(text)) for text in different), []]
    counts = Counter(len(parsed[code]) for code in codes)
    del counts[0]
    usual = counts.most_common(1)[0][0] if counts else FRAMES
    nominal = [FIRST_MINUTE + FRAME_MINUTES * frame for frame in range(usual)]
    kinds = np.array([minutes if len(minutes) == usual else nominal for minutes in parsed])
    return kinds, codes % len(kinds)


def _parse_minutes(text: str) -> list[int]:
    try:
        return [int(minute) for minute in text.split(":")]
    except ValueError:
        return []


def _template(
    first: pd.DataFrame, ids: list[str], grids: dict[str, Grid], each: int, kind: str
) -> xr.Dataset:
    step = 2 if kind == "sevir-lr" else 1
    kinds, kind_of = _minutes(first)
    kinds = kinds[:, ::step].astype("timedelta64[m]").astype("timedelta64[ns]")
    nominal = np.arange(kinds.shape[1]) * FRAME_MINUTES * step + FIRST_MINUTE
    # Of a million events they are too many to be held.
    utc, of = (
        dask.array.from_array(values, chunks=TIMES_EVENTS)
        for values in (first["time_utc"].to_numpy("datetime64[ns]"), kind_of)
    )
    times = dask.array.map_blocks(
        lambda utc, of: utc[:, None] + kinds[of],
        utc,
        of,
        dtype="datetime64[ns]",
        chunks=(utc.chunks[0], (kinds.shape[1],)),
        new_axis=1,
    )
    crs = pyproj.CRS.from_proj4(str(first["proj"].iloc[0]))
    coords: dict[str, Any] = {
        "event": ("event", np.array(ids, object), {"long_name": "SEVIR event id"}),
        "time": (
            "time",
            nominal.astype("timedelta64[m]").astype("timedelta64[ns]"),
            {"long_name": "nominal time relative to time_utc"},
        ),
        "time_utc": ("event", first["time_utc"].to_numpy(), {"long_name": "reference time of the event"}),
        "frame_time": (("event", "time"), times, {"standard_name": "time"}),
        "crs": ((), np.int32(0), {**crs.to_cf(), "proj4": str(first["proj"].iloc[0])}),
        **_origins(first, crs),
    }
    of = {"long_name": f"catalogue column, of the event's {first['img_type'].iloc[0]}"}
    for name in TEXTS:
        if name in first:
            coords[name] = ("event", _texts(first[name]), of)
    for name in NUMBERS:
        if name in first:
            numbers = first[name].to_numpy()
            whole = np.isfinite(numbers).all() and (numbers % 1 == 0).all() and not name.startswith("data")
            coords[name] = ("event", numbers.astype(np.int64) if whole else numbers, of)
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


def _origins(first: pd.DataFrame, crs: pyproj.CRS) -> dict[str, Any]:
    """The lower left corner of every event in metres; NaN where the catalogue does not tell it."""
    x = y = np.full(len(first), np.nan)
    if {"llcrnrlon", "llcrnrlat"} <= set(first.columns):
        to_metres = pyproj.Transformer.from_crs(crs.geodetic_crs, crs, always_xy=True)
        x, y = to_metres.transform(first["llcrnrlon"].to_numpy(), first["llcrnrlat"].to_numpy())
        x, y = (np.where(np.isfinite(values), values, np.nan) for values in (x, y))
    attrs = {"units": "m", "comment": "of the event's lower left corner, in the projection crs"}
    return {"x_origin": ("event", x, attrs), "y_origin": ("event", y, attrs)}


# --------------------------------------------------------------------------------------------- decode


class Row(NamedTuple):
    """An event of a shard, and where it lies in its file."""

    place: int
    event: str
    file_index: int


_Found = tuple[Row, np.ndarray | Exception, list[hdf5.Range]]
"""Frames (time, y, x), or what is wrong with them, and the bytes of the file that they lie in."""


@dataclass(frozen=True)
class SevirShard:
    """Some successive events of the archive."""

    source: str
    """Folder that holds `data/`."""
    start: int
    """Index of the first event."""
    events: tuple[str, ...]
    places: Mapping[str, tuple[tuple[str, int], ...]]
    """Modality to file_name and file_index of each event."""
    raw: dict[str, Grid]
    """What an event of each modality is to be in its file."""
    low_resolution: bool

    @property
    def identity(self) -> list[Any]:
        """What the shard is made of."""
        return [self.start, self.events, dict(self.places)]

    def decode(self) -> Decoded:
        """Read the events; those that cannot be read are filled with the missing value and listed."""
        grids = {name: lowered(grid) if self.low_resolution else grid for name, grid in self.raw.items()}
        arrays = {
            name: np.full((len(self.events), *grid), MODALITIES[name].missing, MODALITIES[name].dtype)
            for name, grid in grids.items()
        }
        bad: dict[str, Bad] = {}
        sources: dict[str, list[Source]] = {event: [] for event in self.events}
        for name in self.raw:
            for file_name, rows in self.by_file(name).items():
                for row, found, ranges in self._read(name, file_name, rows):
                    try:
                        arrays[name][row.place] = self._fitted(name, row, found)
                    except UNREADABLE as error:
                        bad.setdefault(row.event, Bad(row.event, file_name, why(error)))
                    sources[row.event].append(Source(f"data/{file_name}", ranges))
        for place, event in enumerate(self.events):
            if event in bad:
                for name, values in arrays.items():
                    values[place] = MODALITIES[name].missing
        region = {"event": slice(self.start, self.start + len(self.events))}
        return Decoded([Region("", region, arrays)], list(bad.values()), sources, self.source)

    def by_file(self, name: str) -> dict[str, list[Row]]:
        """Where the events of a modality lie."""
        files: dict[str, list[Row]] = {}
        for place, (event, (file_name, index)) in enumerate(zip(self.events, self.places[name], strict=True)):
            files.setdefault(file_name, []).append(Row(place, event, index))
        return files

    def _read(self, name: str, file_name: str, rows: list[Row]) -> Iterator[_Found]:
        url = join(self.source, f"data/{file_name}")
        try:
            with readable(url, METADATA_BLOCK) as opened, h5py.File(opened, "r") as file:
                found, layout = _located(file, name, rows, self.raw[name])
        except FileNotFoundError:
            found, layout = [(row, FileNotFoundError("the file is not there"), []) for row in rows], None
        except OSError as error:
            unreadable = ValueError(f"not readable as HDF5: {why(error)}")
            found, layout = [(row, unreadable, []) for row in rows], None
        yield from found
        if layout is not None:
            of = {row.file_index: row for row in rows}
            for index, values in hdf5.read_rows(url, layout):
                yield of[index], _turned(values), layout.ranges(index)

    def _fitted(self, name: str, row: Row, found: np.ndarray | Exception) -> np.ndarray:
        if isinstance(found, Exception):
            raise found
        grid = self.raw[name]
        if self.low_resolution and found.shape == lowered(grid):
            return found
        if found.shape != grid:
            raise ValueError(f"row {row.file_index} has shape {found.shape} (time, y, x): needed {grid}")
        return block_maximum(found) if self.low_resolution else found


def _located(
    file: h5py.File, name: str, rows: list[Row], grid: Grid
) -> tuple[list[_Found], hdf5.Layout | None]:
    """Events that HDF5 has to read, or that are bad, and where in the file the others lie."""
    found: list[_Found] = []
    sound: list[Row] = []
    for row in rows:
        try:
            if name == "lght":
                flashes = _flashes(file, row.event)
                found.append((row, _counts(flashes[()], grid), hdf5.ranges(flashes)))
            else:
                _check_frames(file, name, row)
                sound.append(row)
        except UNREADABLE as error:
            found.append((row, error, []))
    if not sound:
        return found, None
    try:
        layout = hdf5.layout(file[name], [row.file_index for row in sound])
    except UNREADABLE:
        # Of one event, as a rule: the others are found one by one.
        layout = None
    if layout is None:
        found += [(row, _by_hdf5(file[name], row.file_index), []) for row in sound]
    return found, layout


def _by_hdf5(dataset: h5py.Dataset, index: int) -> np.ndarray | Exception:
    try:
        return dataset[index].transpose(2, 0, 1)
    except UNREADABLE as error:
        return error


def _check_frames(file: h5py.File, name: str, row: Row) -> None:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"no dataset {name!r}, found {', '.join(list(file)[:5])}")
    wanted = np.dtype(MODALITIES[name].dtype)
    if dataset.ndim != 4 or dataset.dtype.newbyteorder("=") != wanted:
        raise ValueError(f"dataset {name} is {dataset.ndim}-D {dataset.dtype}: needed 4-D {wanted}")
    if not 0 <= row.file_index < dataset.shape[0]:
        raise IndexError(f"file_index {row.file_index} lies outside its {dataset.shape[0]} events")
    if "id" in file and (stored := _text(file["id"][row.file_index])) != row.event:
        raise ValueError(f"row {row.file_index} holds event {stored}")


def _turned(values: np.ndarray | Exception) -> np.ndarray | Exception:
    """(y, x, time) as (time, y, x)."""
    return values if isinstance(values, Exception) else values.transpose(2, 0, 1)


def _flashes(file: h5py.File, event: str) -> h5py.Dataset:
    dataset = file.get(event)
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"no dataset {event!r}")
    if dataset.ndim != 2 or dataset.shape[1] != 5 or dataset.dtype.kind not in "fiu":
        raise ValueError(f"flashes {event} are {dataset.shape} {dataset.dtype}: needed numbers, (n, 5)")
    return dataset


def _counts(flashes: np.ndarray, grid: Grid) -> np.ndarray:
    """Lightning counts on a grid, from flashes (n, 5): seconds after `time_utc`, lat, lon, x, y."""
    seconds, x, y = flashes[:, [0, 3, 4]].astype(float).T
    frames, height, width = grid
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & np.isfinite(seconds)
    starts = (FIRST_MINUTE + FRAME_MINUTES * np.arange(frames)) * 60
    # The last frame not after the flash; flashes before the first frame go to it.
    frame = np.maximum(np.searchsorted(starts, seconds[inside], side="right") - 1, 0)
    counts = np.zeros(grid, np.int16)
    np.add.at(counts, (frame, y[inside].astype(int), x[inside].astype(int)), 1)
    return counts


def lowered(grid: Grid) -> Grid:
    """The grid that `block_maximum` makes of a grid.

    Raises:
        InputError: rows or columns do not part into threes.
    """
    frames, height, width = grid
    if height % 3 or width % 3:
        raise InputError(f"events of {height} × {width} pixels have no SEVIR-LR: needed multiples of 3")
    return (frames + 1) // 2, height // 3, width // 3


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
