"""Zarr stores that are cut into shards: metadata before data, and a record written last.

    URL/zarr.json, URL/<variable>/…    a plain Zarr v3 group; `xarray.open_zarr(URL)` reads it
    URL/records/config.json            what the store is to hold, and the hash of it, written first
    URL/records/000012.json            shard 12 is written: its checksums and counts
    URL/records/complete.json          all shards are written: counts, quarantine

A shard is the unit of writing, of retry and of resumption: one task writes the whole of it. "The object
exists" is not "done"; its record is. A record that cannot be parsed was cut off and counts as absent.
"""

import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import fsspec
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.metadata import ArrayV3Metadata

from pipelines.errors import InputError

COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
"""Fast enough for two workers to keep up with inflating the source."""


def config_hash(config: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def create(url: str, groups: Mapping[str, xr.Dataset], *, config: Mapping[str, Any], shards: int) -> None:
    """Write a store's full template; does nothing where the same one has been written before.

    Args:
        url: where; any fsspec URL or a local path.
        groups: group name ("" is the root) to a Dataset whose coordinates are written and whose dask
            variables are only laid out. A variable's `encoding` may hold `chunks` and `shards`.
        config: what decides the store's contents.
        shards: how many shards make the store.

    Raises:
        InputError: `url` holds a store of another configuration (both hashes are named), or other files.
    """
    digest = config_hash(config)
    found = read_json(url, "records/config.json")
    if found is not None:
        if found["config_hash"] != digest:
            raise InputError(
                f"{url} was written under configuration {found['config_hash']}, asked is {digest}: "
                "needed the same configuration, or another URL"
            )
        return
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path) and not _only_ours(fs.ls(path, detail=False)):
        raise InputError(f"{url} exists and is no store of ours: needed an empty or absent folder")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        for name, dataset in groups.items():
            dataset = _with_plain_strings(dataset)
            encoding = {str(v): _encoding(dataset[v]) for v in dataset.data_vars if dataset[v].chunks}
            plain = dataset.drop_encoding() if not encoding else dataset
            plain.to_zarr(
                url,
                group=name or None,
                mode="w",
                compute=False,
                encoding=encoding,
                consolidated=False,
                zarr_format=3,
            )
        root = zarr.open_group(url, mode="r+")
        root.require_group("records")
        zarr.consolidate_metadata(root.store)
    record = {"config_hash": digest, "config": config, "shards": shards}
    write_json(url, "records/config.json", record)


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
    opened = zarr.open_group(url, path=group or None, mode="r+", use_consolidated=False)
    for name, values in arrays.items():
        stored = _array(opened, name)
        values = np.ascontiguousarray(values, dtype=stored.dtype)
        stored[_selection(stored, region)] = values
        checksums[name] = _crc32(values)
    return checksums


def write_record(url: str, shard: int, record: Mapping[str, Any]) -> None:
    """Say that a shard is written. Call it after the data.

    A record that `validate` can check holds `regions`: a list of {group, region, crc32}.
    """
    write_json(url, f"records/{shard:06d}.json", record)


def region_record(group: str, region: Mapping[str, slice], crc32: Mapping[str, int]) -> dict[str, Any]:
    """What a shard's record says of one region that `write_region` wrote."""
    return {"group": group, "region": {d: [s.start, s.stop] for d, s in region.items()}, "crc32": dict(crc32)}


def records(url: str) -> dict[int, dict[str, Any]]:
    """The records of all shards that are done."""
    fs, path = fsspec.core.url_to_fs(url)
    names = fs.glob(f"{path}/records/[0-9]*.json")
    found = {}
    for name, text in zip(names, fs.cat(names).values() if names else (), strict=True):
        try:
            found[int(name.rpartition("/")[2].removesuffix(".json"))] = json.loads(text)
        except json.JSONDecodeError:
            continue
    return found


def pending(url: str, shards: int) -> list[int]:
    """Shards that are still to be written."""
    done = records(url)
    return [shard for shard in range(shards) if shard not in done]


def complete(url: str, summary: Mapping[str, Any]) -> None:
    """Write the completion record.

    Raises:
        InputError: a shard has no record.
    """
    config = _config(url)
    missing = pending(url, config["shards"])
    if missing:
        raise InputError(_unfinished(url, config["shards"], len(missing)))
    record = {
        "config_hash": config["config_hash"],
        "shards": config["shards"],
        "code_version": version("earthformer-ray"),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **summary,
    }
    write_json(url, "records/complete.json", record)


def is_complete(url: str) -> bool:
    """Whether the completion record is there."""
    return read_json(url, "records/complete.json") is not None


def open_store(url: str, group: str = "") -> xr.Dataset:
    """A finished store's Dataset, raw: nothing is masked or scaled, times are decoded, nothing is loaded.

    Raises:
        InputError: there is no store at `url`, or it is unfinished.
    """
    config = _config(url)
    if not is_complete(url):
        raise InputError(_unfinished(url, config["shards"], len(pending(url, config["shards"]))))
    return xr.open_zarr(url, group=group or None, mask_and_scale=False, decode_timedelta=True, chunks=None)


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
            self._arrays[key] = zarr.open_array(self.url, path=path, mode="r")
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
        return _config(self.url)

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
        record = read_json(self.url, "records/complete.json") or {}
        return frozenset(row["series"] for row in record.get("quarantine", ()))

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


def validate(url: str) -> list[str]:
    """Read everything back; one line a problem: missing shards, checksums that differ, unreadable chunks.

    Raises:
        InputError: there is no store at `url`.
    """
    config = _config(url)
    problems = []
    done = records(url)
    missing = [shard for shard in range(config["shards"]) if shard not in done]
    if missing:
        problems.append(f"{len(missing)} of {config['shards']} shards are missing: {missing[:8]}")
    elif not is_complete(url):
        problems.append("the completion record is missing")
    for shard, record in sorted(done.items()):
        for part in record["regions"]:
            group = zarr.open_group(url, path=part["group"] or None, mode="r", use_consolidated=False)
            region = {d: slice(*bounds) for d, bounds in part["region"].items()}
            for name, expected in part["crc32"].items():
                where = f"shard {shard}, {part['group']}/{name}".replace(" /", " ")
                try:
                    stored = _array(group, name)
                    found = _crc32(np.ascontiguousarray(stored[_selection(stored, region)]))
                except (ValueError, RuntimeError, KeyError, OSError) as error:
                    problems.append(f"{where} cannot be read: {' '.join(str(error).split())}")
                    continue
                if found != expected:
                    problems.append(f"{where} has CRC-32 {found:08x}: needed {expected:08x}")
    return problems


def describe(url: str) -> str:
    """What a store holds and how far it is, finished or not, for people.

    Raises:
        InputError: there is no store at `url`.
    """
    config, done = _config(url), read_json(url, "records/complete.json")
    fs, path = fsspec.core.url_to_fs(url)
    lines = [
        f"{url}: {config['config']['kind']}, configuration {config['config_hash']}, "
        f"{fs.du(path) / 1e6:.1f} MB",
        f"complete since {done['finished']}: {config['shards']} shards, code {done['code_version']}"
        if done
        else _unfinished(url, config["shards"], len(pending(url, config["shards"]))),
    ]
    if done:
        counts = {**done["counts"], **done["counts"].get("dropped", {})}
        lines.append(", ".join(f"{n} {what}" for what, n in counts.items() if what != "dropped"))
        quarantine = done.get("quarantine", ())
        lines += [f"quarantined: {row['series']} ({row['file']}): {row['reason']}" for row in quarantine]
    root = zarr.open_group(url, mode="r")
    lines.append(str(xr.open_zarr(url, mask_and_scale=False, decode_timedelta=True, chunks=None)))
    for name in sorted(name for name in root.group_keys() if name != "records"):
        group = xr.open_zarr(url, group=name, mask_and_scale=False, chunks=None)
        lines.append(f"{name}: " + "; ".join(f"{k} {dict(v.sizes)} {v.dtype}" for k, v in group.items()))
    return "\n".join(lines)


def write_json(url: str, name: str, value: Any) -> None:
    """Write JSON under a directory URL, creating directories."""
    fs, path = fsspec.core.url_to_fs(url)
    target = f"{path}/{name}"
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(target, json.dumps(value, indent=1, default=str).encode())


def read_json(url: str, name: str) -> dict[str, Any] | None:
    """Read JSON under a directory URL; None when it is absent or was cut off in mid-write."""
    fs, path = fsspec.core.url_to_fs(url)
    try:
        return json.loads(fs.cat_file(f"{path}/{name}"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _config(url: str) -> dict[str, Any]:
    found = read_json(url, "records/config.json")
    if found is None:
        raise InputError(
            f"{url} is not a store: it has no records/config.json; needed what `prepare` or `forecast` wrote"
        )
    return found


def _unfinished(url: str, shards: int, missing: int) -> str:
    return (
        f"{url} is not complete: {shards - missing} of {shards} shards are there; "
        "run the same command again to finish it"
    )


def _only_ours(names: list[str]) -> bool:
    # A template whose writing was cut off has no config.json yet and is written again.
    return not names or any(name.rpartition("/")[2] == "zarr.json" for name in names)


def _with_plain_strings(dataset: xr.Dataset) -> xr.Dataset:
    # Zarr v3 specifies strings of any length, not NumPy's of fixed length.
    strings = {name: v.astype(object) for name, v in dataset.variables.items() if v.dtype.kind == "U"}
    return dataset.assign({k: v for k, v in strings.items() if k in dataset.data_vars}).assign_coords(
        {k: v for k, v in strings.items() if k in dataset.coords}
    )


def _encoding(variable: xr.DataArray) -> dict[str, Any]:
    kept = {k: v for k, v in variable.encoding.items() if k in ("chunks", "shards", "_FillValue", "dtype")}
    return {"compressors": (COMPRESSOR, Crc32cCodec()), "write_empty_chunks": True, **kept}


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise KeyError(f"{name} is a group: needed an array")
    return found


def _crc32(values: np.ndarray) -> int:
    return zlib.crc32(values.data.cast("B"))


def _selection(stored: zarr.Array, region: Mapping[str, slice]) -> tuple[slice, ...]:
    assert isinstance(stored.metadata, ArrayV3Metadata)
    names = stored.metadata.dimension_names or ()
    return tuple(region.get(str(name), slice(None)) for name in names)
