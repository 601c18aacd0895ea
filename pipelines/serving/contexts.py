"""The context of a forecast: from one of the service's archives, or from the bytes of a request.

Nothing that a client sends is a path, and nothing is unpickled.
"""

import contextlib
import hashlib
import io
import json
import math
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from zarr.storage import ZipStore

from pipelines import series, windows
from pipelines.archives.cf import axes_of, grid_of, in_metres
from pipelines.archives.store import Archive
from pipelines.configs import unknown
from pipelines.errors import InputError
from pipelines.events import unit_factor
from pipelines.plans import Samples
from pipelines.series import Window
from pipelines.serving.asked import Inline, Referenced
from pipelines.tasks import Task

PROJ_KEYS = frozenset(
    (
        *("proj", "lat_0", "lon_0", "lat_1", "lat_2", "lat_ts", "lonc", "alpha", "gamma", "x_0", "y_0"),
        *("k", "k_0", "zone", "south", "h", "sweep", "a", "b", "R", "rf", "f", "ellps", "datum", "pm"),
        *("units", "to_meter", "no_defs", "type", "over", "wktext", "o_proj", "o_lat_p", "o_lon_p"),
    )
)
"""Of PROJ strings: others name files, such as grids, or pipelines."""
CODECS = frozenset({"bytes", "transpose", "zstd", "gzip", "blosc", "crc32c", "sharding_indexed", "vlen-utf8"})
"""Of Zarr 3: what only decompresses and reorders."""


class Refused(InputError):
    """Something that a client asked for is wrong: `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, eq=False)
class Context:
    """What is forecast from."""

    pixels: np.ndarray
    """(1, T_in, H, W, 1), as archives store it."""
    samples: Samples
    """One window."""
    said: dict[str, Any]
    """Where it is from."""


def read_context(
    asked: Referenced | Inline,
    task: Task,
    grid: tuple[int, int],
    archives: Mapping[str, Archive],
    most_bytes: int,
) -> Context:
    """The context that a request asks for.

    Args:
        asked: of the request.
        task: of the model.
        grid: height and width that the model takes.
        archives: those that may be read, by name.
        most_bytes: what an inline context may be unpacked to.

    Raises:
        Refused: it is unknown, malformed, incomplete or does not fit the model.
    """
    if isinstance(asked, Referenced):
        return _referenced(asked, task, archives)
    if (asked.npy is None) == (asked.zarr_zip is None):
        raise Refused("context", "needed either npy or zarr_zip")
    return (
        _from_npy(asked, task, grid) if asked.npy is not None else _from_zarr(asked, task, grid, most_bytes)
    )


def _referenced(asked: Referenced, task: Task, archives: Mapping[str, Archive]) -> Context:
    if asked.archive not in archives:
        with refusing("context.archive"):
            unknown("archive", asked.archive, sorted(archives))
    archive, window = archives[asked.archive], Window(asked.event, asked.start, asked.tile)
    with refusing("context"):
        windows.check(task, archive, window)
    samples = Samples(
        task,
        (window,),
        windows.context_times(task, archive, window)[None],
        windows.placement(task, archive, [window]),
        windows.attributes(task, archive, window),
    )
    return Context(windows.read_context(task, archive, window), samples, asked.model_dump(mode="json"))


@contextlib.contextmanager
def refusing(field: str) -> Iterator[None]:
    """What turns out to be wrong inside is wrong with this field of the request.

    Raises:
        Refused: an InputError was raised.
    """
    try:
        yield
    except Refused:
        raise
    except InputError as error:
        raise Refused(field, str(error)) from error


# ----------------------------------------------------------------------------------------------- inline


def _from_npy(asked: Inline, task: Task, grid: tuple[int, int]) -> Context:
    assert asked.npy is not None
    try:
        values = np.load(io.BytesIO(asked.npy), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise Refused(
            "context.npy", "is not a .npy file of numbers: needed what numpy.save writes"
        ) from error
    if not isinstance(values, np.ndarray):
        raise Refused("context.npy", "is an archive of arrays: needed one array, as numpy.save writes")
    monthly = task.step_minutes is None
    needed = ("times", "units") if monthly else ("times", "units", "proj", "y", "x")
    for name in needed:
        if getattr(asked, name) is None:
            raise Refused(f"context.{name}", f"is missing: needed beside npy ({', '.join(needed)})")
    assert asked.times is not None
    assert asked.units is not None
    with refusing("context.times"):
        times = _times(asked.times)
    _check_values(values, "context.npy", task, grid)
    if monthly:
        place = _enso_place(grid)
    else:
        assert asked.proj is not None
        place = _place(np.array(asked.y), np.array(asked.x), asked.proj, grid)
    return _context(values, times, asked.units, place, task, "context")


def _from_zarr(asked: Inline, task: Task, grid: tuple[int, int], most_bytes: int) -> Context:
    assert asked.zarr_zip is not None
    where = "context.zarr_zip"
    for name in ("times", "units", "proj", "y", "x"):
        if getattr(asked, name) is not None:
            raise Refused(f"context.{name}", "is given beside zarr_zip, which says it itself: needed none")
    _check_zip(asked.zarr_zip, where, most_bytes)
    with tempfile.NamedTemporaryFile(suffix=".zip") as file:
        file.write(asked.zarr_zip)
        file.flush()
        try:
            with ZipStore(file.name, mode="r") as packed:
                return _from_dataset(_open(packed), task, grid, where)
        except Refused:
            raise
        except InputError as error:
            raise Refused(where, str(error)) from error
        except Exception as error:  # whatever Zarr and its codecs make of bytes from anywhere
            raise Refused(where, "cannot be read as a Zarr of version 3 with CF attributes") from error


def _check_zip(content: bytes, where: str, most_bytes: int) -> None:
    """Nothing but arrays of numbers and plain codecs, of a size that is allowed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            infos = packed.infolist()
            if len(infos) > 10_000 or sum(info.file_size for info in infos) > most_bytes:
                raise Refused(where, f"unpacks to too much: needed {most_bytes} bytes or less")
            metadata = [
                json.loads(packed.read(info)) for info in infos if info.filename.endswith("zarr.json")
            ]
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise Refused(where, "is no zip of a Zarr: needed what zarr.storage.ZipStore writes") from error
    arrays = [each for each in metadata if isinstance(each, dict) and each.get("node_type") == "array"]
    if not arrays:
        raise Refused(where, "holds no array of Zarr version 3: needed one")
    size = 0
    for each in arrays:
        known = _codecs(each.get("codecs"))
        if not known <= CODECS:
            raise Refused(
                where, f"has codec {min(known - CODECS)}: needed one of {', '.join(sorted(CODECS))}"
            )
        inside = each.get("chunk_grid")
        for key in ("configuration", "chunk_shape"):
            inside = inside.get(key) if isinstance(inside, dict) else None
        # A chunk is unpacked whole, however little of it the array takes.
        sizes = [_product(each.get("shape")), _product(inside)]
        if None in sizes:
            raise Refused(where, "has an array without a shape and chunks: needed both")
        size += 8 * max(n for n in sizes if n is not None)
    if size > 8 * most_bytes:
        raise Refused(where, f"unpacks to too much: needed {most_bytes} bytes or less")


def _product(lengths: Any) -> int | None:
    """Of a list of whole numbers; None of anything else."""
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n >= 0 for n in lengths):
        return None
    return math.prod(lengths)


def _codecs(found: Any) -> set[str]:
    """Names of codecs, those inside of shards too."""
    if not isinstance(found, list):
        return set()
    names: set[str] = set()
    for codec in found:
        if not isinstance(codec, dict):
            names.add(str(codec))
            continue
        names.add(str(codec.get("name")))
        inner = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            names |= _codecs(inner.get(key)) if isinstance(inner, dict) else set()
    return names


def _open(packed: ZipStore) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return xr.open_zarr(packed, chunks=None, consolidated=False, zarr_format=3)


def _from_dataset(dataset: xr.Dataset, task: Task, grid: tuple[int, int], where: str) -> Context:
    fields = [name for name, each in dataset.data_vars.items() if each.ndim >= 3]
    if task.variable not in dataset and len(fields) != 1:
        held = ", ".join(map(str, dataset.data_vars)) or "no variable"
        raise Refused(where, f"holds {held}: needed {task.variable}")
    field = dataset[task.variable if task.variable in dataset else fields[0]]
    for each in dataset.variables.values():
        for key in ("proj4", "proj4_params", "proj4_string"):
            if key in each.attrs:
                _check_proj(str(each.attrs[key]), f"{where}.{key}")
    axes = axes_of(field)
    field = field.squeeze([dim for dim in field.dims if dim not in axes], drop=True).transpose(*axes)
    if "units" not in field.attrs and task.units != "1":
        raise Refused(where, f"{field.name} has no units: needed {task.units}")
    values = field.values
    if field.encoding.get("dtype") == np.uint8 and values.dtype.kind == "f":
        # Packed bytes, whose missing value xarray has made NaN.
        values = np.where(np.isnan(values), 255, values).astype(np.uint8)
    _check_values(values, where, task, grid)
    with refusing(where):
        times = _times([str(time) for time in field[axes[0]].values])
    if task.step_minutes is None:
        place = _enso_place(grid)
    else:
        y, x, proj = grid_of(dataset, field, axes)
        if not proj:
            raise Refused(where, f"lies on latitudes and longitudes: task {task.name} needs a projection")
        place = _place(y, x, proj, grid, where)
    return _context(values, times, str(field.attrs.get("units", "1")), place, task, where)


def _times(texts: list[str]) -> np.ndarray:
    try:
        times = np.array([np.datetime64(text.removesuffix("Z"), "ns") for text in texts])
    except ValueError as error:
        raise InputError(f"are no times: {error}; needed ISO 8601, such as 2019-06-01T12:00") from error
    if np.isnat(times).any():
        raise InputError("have one that is missing: needed a time of each frame")
    return times


def _check_values(values: np.ndarray, where: str, task: Task, grid: tuple[int, int]) -> None:
    shape = (task.context, *grid)
    if values.shape != shape:
        raise Refused(where, f"has shape {values.shape}: needed {shape}, (time, y, x)")
    allowed = ("uint8",) if task.variable == "vil" else ("float32", "float64")
    if values.dtype.name not in allowed:
        raise Refused(where, f"has dtype {values.dtype}: needed {' or '.join(allowed)}")
    wrong = np.isinf(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    if wrong.any():
        raise Refused(where, f"has {wrong.sum()} infinite values: needed finite ones")
    missing = np.isnan(values) if values.dtype.kind == "f" else values == 255
    most = 1 - task.tiles.min_cover if task.tiles else 0.0
    if values.dtype.kind == "f" and missing.mean() > most:
        t, y, x = (int(n) for n in np.argwhere(missing)[0])
        raise Refused(
            where,
            f"has {missing.sum()} NaN values, the first at frame {t}, row {y}, column {x}: needed "
            + ("none" if not most else f"at most {most:.0%}"),
        )
    if missing.all():
        raise Refused(where, "has no value but missing ones: needed some")


def _place(
    y: np.ndarray, x: np.ndarray, proj: str, grid: tuple[int, int], where: str = "context"
) -> xr.Dataset:
    for name, axis, size in (("y", y, grid[0]), ("x", x, grid[1])):
        if axis.shape != (size,):
            raise Refused(f"{where}.{name}", f"has {axis.size} values: needed {size}")
        steps = np.diff(axis)
        if not np.isfinite(axis).all() or (steps == 0).any() or np.ptp(steps) > 0.01 * abs(steps.mean()):
            raise Refused(f"{where}.{name}", "has unequal steps: needed centres at equal distances")
    _check_proj(proj, f"{where}.proj")
    try:
        proj, unit = in_metres(proj)
    except Exception as error:  # pyproj raises its own
        raise Refused(f"{where}.proj", f"is {proj!r:.80}: needed a PROJ string of a projection") from error
    if unit != 1.0:
        raise Refused(f"{where}.proj", "is not in metres: needed one with +units=m")
    axes = {name: series.offsets(name, axis - axis[0], metres=True) for name, axis in (("y", y), ("x", x))}
    return xr.Dataset(coords={**axes, **series.origins(y[:1], x[:1], [proj])})


def _check_proj(proj: str, where: str) -> None:
    """PROJ opens what files a string names, and understands other things than strings of parameters."""
    keys = {part.partition("=")[0] for part in proj.split()}
    unknown_keys = sorted(key for key in keys if key.removeprefix("+") not in PROJ_KEYS)
    if unknown_keys or not keys:
        found = f"{unknown_keys[0]!r:.40}" if unknown_keys else "nothing"
        raise Refused(where, f"has {found}: needed a PROJ string of +proj and its parameters")


def _enso_place(grid: tuple[int, int]) -> xr.Dataset:
    # The one grid of the ENSO models: 5 degrees, from 55°S and 95°E.
    lat, lon = (first + 5.0 * np.arange(size) for first, size in zip((-55.0, 95.0), grid, strict=True))
    return xr.Dataset(coords={"lat": ("lat", lat.astype(np.float32)), "lon": ("lon", lon.astype(np.float32))})


def _context(
    values: np.ndarray, times: np.ndarray, units: str, place: xr.Dataset, task: Task, where: str
) -> Context:
    if len(times) != len(values):
        raise Refused(f"{where}.times", f"are {len(times)}: needed one of each of {len(values)} frames")
    _check_steps(times, task, where)
    with refusing(f"{where}.units"):
        factor = unit_factor(units, task)
    if factor != 1.0:
        values = values * factor
    if values.dtype != np.uint8:
        values = values.astype(np.float32)
    digest = hashlib.sha256(values.tobytes() + times.tobytes()).hexdigest()[:32]
    samples = Samples(
        task,
        (Window(f"inline-{digest}", 0),),
        windows.continued(task, times)[None],
        place,
        {"units": task.units, "long_name": task.variable},
    )
    return Context(values[None, ..., None], samples, {"inline": digest, "times": [str(t) for t in times]})


def _check_steps(times: np.ndarray, task: Task, where: str) -> None:
    if task.step_minutes is None:
        steps, needed, unit = np.diff(times.astype("datetime64[M]").astype(int)), 1, "month"
    else:
        steps, needed, unit = np.diff(times) / np.timedelta64(1, "m"), task.step_minutes, "min"
    wrong = np.flatnonzero(steps != needed)
    if len(wrong):
        at = wrong[0]
        raise Refused(
            f"{where}.times",
            f"have a step of {steps[at]:g} {unit} after {times[at].astype('datetime64[s]')}: needed "
            f"{needed} {unit} between all frames",
        )
