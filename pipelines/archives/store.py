"""Zarr stores that are cut into shards: laid out whole, written shard by shard, read by xarray.

What is done of a store is said by its records: see `pipelines.archives.records`.
"""

import uuid
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import dask.array
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata

from pipelines.archives import UNREADABLE, records, why
from pipelines.errors import InputError
from pipelines.storage import filesystem, write_all, zarr_store

SECONDS = {"units": "seconds since 1970-01-01", "dtype": "int64"}


# ------------------------------------------------------------------------------------------ writing


def create(
    url: str,
    groups: Mapping[str, xr.Dataset],
    *,
    config: Mapping[str, Any],
    shards: int,
    contents: Mapping[str, str] = records.NO_SERIES,
) -> None:
    """Write a store's full template; does nothing where the same one has been written before.

    Args:
        url: where; any fsspec URL or a local path.
        groups: group name ("" is the root) to a Dataset whose coordinates are written, part after part those
            that are dask's, and whose dask variables are only laid out. A variable's `encoding` may hold
            `chunks` and `shards`.
        config: what decides the store's layout.
        shards: how many shards make the store.
        contents: name of each series to what it is made of. A store whose series are the first of these
            grows, and is unfinished until the others are written.

    Raises:
        InputError: `url` holds a store of another configuration (both hashes are named), of other series, or
            other files, or cannot be written to.
    """
    if "records" in groups:
        raise InputError(f"{url} would hold a series called records: needed another name, for these are ours")
    digest = records.begin(url, config, shards, contents)
    if digest is not None:
        records.laid_out(url, digest, _write_template(url, groups))


def _write_template(url: str, groups: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """Returns the CRC-32 of each file."""
    # Made in memory, so that nothing lies there that is not written by all who write it at the same time.
    scratch = f"memory://earthformer-template-{uuid.uuid4().hex}"
    memory, folder = filesystem(scratch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        root = zarr.open_group(scratch, mode="a", zarr_format=3)
        root.require_group("records")
        for name, dataset in groups.items():
            dataset = _with_plain_strings(dataset)
            encoding = {str(v): _encoding(dataset[v]) for v in dataset.data_vars if dataset[v].chunks}
            # Of these coordinates, which are times, xarray lays out no more than of variables.
            times = {str(c): dataset[c].variable.copy() for c in dataset.coords if dataset[c].chunks}
            encoding |= dict.fromkeys(times, SECONDS)
            dataset.drop_encoding().to_zarr(
                scratch,
                group=name or None,
                mode="a",
                compute=False,
                encoding=encoding,
                consolidated=False,
                zarr_format=3,
            )
            for part, variable in times.items():
                variable.encoding = dict(SECONDS)
                encoded = xr.conventions.encode_cf_variable(variable).data
                dask.array.store(encoded, cast(Any, _array(root, f"{name}/{part}".lstrip("/"))), lock=False)
        zarr.consolidate_metadata(root.store)
    names = [name.removeprefix(f"{folder}/") for name in memory.find(folder)]
    written = {name: memory.cat_file(f"{folder}/{name}") for name in names}
    memory.rm(folder, recursive=True)
    write_all(url, written)
    return {name: zlib.crc32(text) for name, text in written.items() if not name.startswith("records/")}


def write_region(
    url: str, group: str, arrays: Mapping[str, np.ndarray], region: Mapping[str, slice]
) -> dict[str, int]:
    """Write shard-aligned parts of variables; returns the CRC-32 of each array's bytes in C order.

    Args:
        url: the store.
        group: name of the group, "" for the root.
        arrays: variable name to values, already in the stored dtype and units.
        region: dimension to the slice that the arrays fill; dimensions not named are filled whole.
    """
    checksums = {}
    opened = zarr.open_group(zarr_store(url), path=group or None, mode="r+", use_consolidated=False)
    for name, values in arrays.items():
        stored = _array(opened, name)
        values = np.ascontiguousarray(values, dtype=stored.dtype)
        stored[_selection(stored, region)] = values
        checksums[name] = _crc32(values)
    return checksums


def stored_crc32(url: str, group: str, name: str, region: Mapping[str, slice]) -> int:
    """The CRC-32 of a part of a variable as it is stored; see `write_region`."""
    opened = zarr.open_group(zarr_store(url), path=group or None, mode="r", use_consolidated=False)
    stored = _array(opened, name)
    return _crc32(np.ascontiguousarray(stored[_selection(stored, region)]))


def region_record(group: str, region: Mapping[str, slice], crc32: Mapping[str, int]) -> dict[str, Any]:
    """What a shard's record says of one region that `write_region` wrote."""
    return {"group": group, "region": {d: [s.start, s.stop] for d, s in region.items()}, "crc32": dict(crc32)}


# ------------------------------------------------------------------------------------------ reading


def open_store(url: str, group: str = "") -> xr.Dataset:
    """A finished store's Dataset, raw: nothing is masked or scaled, times are decoded, nothing is loaded.

    Raises:
        InputError: there is no store at `url`, or it is unfinished or damaged.
    """
    _check_complete(url)
    return open_unfinished(url, group)


def open_dataset(url: str, group: str = "", chunks: str = "shards") -> xr.Dataset:
    """A finished store's Dataset as xarray decodes it: NaN where missing, in the units that it names.

    Nothing is loaded: variables are Dask's, coordinates are read when they are looked at.

    Args:
        url: of an archive or a forecast.
        group: of a radar archive a sequence, "" for the root.
        chunks: what a chunk of Dask's is: `shards`, whole ones, so that a task reads one object, for
            computations over the whole store; or `chunks`, the parts that can be read of a shard by
            themselves (an event, a member of a window, a tile of a frame of radar), for a few of them or
            where memory is short. Decoded, bytes and packed integers are four times as large.

    Raises:
        InputError: as `open_store`, or `chunks` is neither.
    """
    if chunks not in ("shards", "chunks"):
        raise InputError(f"chunks {chunks!r} are unknown: needed shards or chunks")
    _check_complete(url)
    opened = open_unfinished(url, group, decode=True)
    cut = {
        name: values.chunk(
            dict(zip(values.dims, values.encoding[chunks] or values.encoding["chunks"], strict=True))
        )
        for name, values in opened.data_vars.items()
        if values.dims
    }
    return opened.assign(cut)


def _check_complete(url: str) -> None:
    config = records.config_record(url)
    if not records.is_complete(url):
        raise InputError(
            records.unfinished(url, config["shards"], len(records.pending(url, config["shards"])))
        )


def open_unfinished(url: str, group: str = "", decode: bool = False) -> xr.Dataset:
    """As `open_store`, of a store in any state that can be opened."""
    try:
        return xr.open_zarr(
            zarr_store(url), group=group or None, mask_and_scale=decode, decode_timedelta=True, chunks=None
        )
    except UNREADABLE as error:
        raise InputError(
            f"{url} cannot be opened: {why(error)}; `earthformer validate` says what is damaged"
        ) from error


@dataclass(frozen=True)
class Archive:
    """A finished archive: pickles as its URL and opens itself again where it is used."""

    url: str

    @cached_property
    def root(self) -> xr.Dataset:
        """The root group, with its coordinates in memory."""
        return load_coordinates(open_store(self.url))

    @cached_property
    def _groups(self) -> dict[str, xr.Dataset]:
        return {"": self.root}

    def group(self, name: str) -> xr.Dataset:
        """A group, with its coordinates in memory."""
        if name not in self._groups:
            self._groups[name] = load_coordinates(open_store(self.url, name))
        return self._groups[name]

    @cached_property
    def _arrays(self) -> dict[tuple[str, str], zarr.Array]:
        return {}

    def array(self, group: str, name: str) -> zarr.Array:
        """A variable as stored, for reading by index without xarray's overhead."""
        key = (group, name)
        if key not in self._arrays:
            path = f"{group}/{name}".lstrip("/")
            self._arrays[key] = zarr.open_array(zarr_store(self.url), path=path, mode="r")
        return self._arrays[key]

    @cached_property
    def _positions(self) -> dict[str, dict[str, int]]:
        return {}

    def positions(self, dimension: str) -> dict[str, int]:
        """Index of each label of a root coordinate."""
        if dimension not in self._positions:
            labels = self.root[dimension].values
            self._positions[dimension] = {str(label): i for i, label in enumerate(labels)}
        return self._positions[dimension]

    @cached_property
    def _record(self) -> dict[str, Any]:
        return records.config_record(self.url)

    @property
    def config_hash(self) -> str:
        """Identifies what the archive holds."""
        return str(self._record["config_hash"])

    @property
    def kind(self) -> str:
        """`sevir`, `sevir-lr`, `enso` or `radar`."""
        return str(self._record["config"]["kind"])

    @cached_property
    def quarantine(self) -> frozenset[str]:
        """Names of the series that could not be read, and are to be left out."""
        return frozenset(row["series"] for row in records.quarantined(self.url))

    def __reduce__(self) -> tuple[type["Archive"], tuple[str]]:
        return Archive, (self.url,)


def open_archive(url: str) -> Archive:
    """Open a finished archive.

    Raises:
        InputError: there is no archive at `url`, or it is unfinished.
    """
    archive = Archive(url)
    if archive.kind == "forecast":
        raise InputError(f"{url} is a forecast: needed an archive, which `earthformer prepare` writes")
    _ = archive.root
    return archive


def load_coordinates(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with its coordinates (not its variables) in memory, strings as NumPy's of fixed length."""
    loaded = dataset.assign_coords({name: dataset[name].load() for name in dataset.coords})
    # NumPy's own `astype(str)` knows no strings of any length, nor do most of its functions.
    texts = {n: c.astype(object).astype(str) for n, c in loaded.coords.items() if c.dtype.kind in "TO"}
    return loaded.assign_coords(texts)


# ------------------------------------------------------------------------------------------- shared


def _with_plain_strings(dataset: xr.Dataset) -> xr.Dataset:
    # Zarr v3 specifies strings of any length, not NumPy's of fixed length.
    strings = {name: v.astype(object) for name, v in dataset.variables.items() if v.dtype.kind == "U"}
    return dataset.assign({k: v for k, v in strings.items() if k in dataset.data_vars}).assign_coords(
        {k: v for k, v in strings.items() if k in dataset.coords}
    )


def _encoding(variable: xr.DataArray) -> dict[str, Any]:
    kept = {k: v for k, v in variable.encoding.items() if k in ("chunks", "shards", "_FillValue", "dtype")}
    # Level 1 of either, so that two workers keep up with inflating the source. Bytes gain nothing from
    # being shuffled, and Zstandard by itself is then faster, both ways, and smaller.
    shuffled = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
    compressor = ZstdCodec(level=1) if variable.dtype.itemsize == 1 else shuffled
    found = {"compressors": (compressor, Crc32cCodec()), "write_empty_chunks": True, **kept}
    if "_FillValue" in kept:
        # What is not yet written, or lost, is missing: it is not zero.
        found["fill_value"] = kept["_FillValue"]
    return found


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise KeyError(f"{name} is a group: needed an array")
    return found


def _crc32(values: np.ndarray) -> int:
    return zlib.crc32(values.data.cast("B"))


def _selection(stored: zarr.Array, region: Mapping[str, slice]) -> tuple[slice, ...]:
    return tuple(region.get(name, slice(None)) for name in dimensions(stored))


def dimensions(stored: zarr.Array) -> list[str]:
    """Names of a variable's dimensions."""
    assert isinstance(stored.metadata, ArrayV3Metadata)
    return [str(name) for name in stored.metadata.dimension_names or ()]
