"""Zarr stores that are cut into shards: metadata before data, and a record written last.

    URL/records/config.json         what the store is to hold, and the hash of it: written first
    URL/zarr.json, URL/<variable>/  a plain Zarr v3 group, laid out whole; `xarray.open_zarr(URL)` reads it
    URL/records/template.json       the layout is written: checksums of its files
    URL/records/000012.json         shard 12 is written: its checksums and counts
    URL/records/complete.json       all shards are written: counts, quarantine

A shard is the unit of writing, of retry and of resumption: one task writes the whole of it. "The object
exists" is not "done"; its record is. A record that cannot be parsed was cut off and counts as absent.
"""

import hashlib
import json
import re
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
import zarr
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata

from pipelines.archives import UNREADABLE, filesystem, why
from pipelines.errors import InputError

CONFIG, TEMPLATE, COMPLETE = (f"records/{name}.json" for name in ("config", "template", "complete"))
THREADS = 16
"""Small files that are read at once: object stores answer slowly, but many questions at a time."""


# ------------------------------------------------------------------------------------------ writing


def config_hash(config: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def begun(url: str, config: Mapping[str, Any]) -> bool:
    """Whether a store of this configuration has been begun at `url`; False where there is nothing yet.

    Raises:
        InputError: `url` holds a store of another configuration (both hashes are named), or other files.
    """
    digest, found = config_hash(config), read_json(url, CONFIG)
    if found is not None and found["config_hash"] != digest:
        raise InputError(
            f"{url} was written under configuration {found['config_hash']}, asked is {digest}: "
            "needed the same configuration, or another URL"
        )
    # The configuration is the first file of a store, so that it may be all there is, and cut off.
    if found is None and not (
        set(_list(url)) <= {"records"} and set(_list(url, "records")) <= {"config.json"}
    ):
        raise InputError(f"{url} exists and is no store of ours: needed an empty or absent folder")
    return found is not None


def create(url: str, groups: Mapping[str, xr.Dataset], *, config: Mapping[str, Any], shards: int) -> None:
    """Write a store's full template; does nothing where the same one has been written before.

    Args:
        url: where; any fsspec URL or a local path.
        groups: group name ("" is the root) to a Dataset whose coordinates are written and whose dask
            variables are only laid out. A variable's `encoding` may hold `chunks` and `shards`.
        config: what decides the store's contents.
        shards: how many shards make the store.

    Raises:
        InputError: `url` holds a store of another configuration (both hashes are named), or other files, or
            cannot be written to.
    """
    if "records" in groups:
        raise InputError(f"{url} would hold a series called records: needed another name, for these are ours")
    if not begun(url, config):
        record = {"config_hash": config_hash(config), "config": config, "shards": shards}
        try:
            write_json(url, CONFIG, record)
        except (NotImplementedError, ValueError) as error:  # an archive of files opened to be read, the web
            raise InputError(f"{url} cannot be written to: needed a URL of a file system that can") from error
    elif read_json(url, TEMPLATE) is not None:
        return
    elif records(url):
        raise InputError(f"{url} has shards but no {TEMPLATE}: it is damaged; needed another URL")
    _write_template(url, groups)


def _write_template(url: str, groups: Mapping[str, xr.Dataset]) -> None:
    fs, path = filesystem(url)
    for name in _list(url):
        # Of a template whose writing was cut off.
        if name != "records":
            fs.rm(f"{path}/{name}", recursive=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        root = zarr.open_group(_zarr_url(url), mode="a", zarr_format=3)
        root.require_group("records")
        for name, dataset in groups.items():
            dataset = _with_plain_strings(dataset)
            encoding = {str(v): _encoding(dataset[v]) for v in dataset.data_vars if dataset[v].chunks}
            dataset.drop_encoding().to_zarr(
                _zarr_url(url),
                group=name or None,
                mode="a",
                compute=False,
                encoding=encoding,
                consolidated=False,
                zarr_format=3,
            )
        zarr.consolidate_metadata(root.store)
    fs, path = _fresh(url)
    names = [name.removeprefix(f"{path}/") for name in fs.find(path)]
    written = _read_all(url, [name for name in names if not name.startswith("records/")])
    if None in written.values():
        raise FileNotFoundError(f"{url}: files of the template went away while it was written")
    write_json(url, TEMPLATE, {"crc32": {name: zlib.crc32(text or b"") for name, text in written.items()}})


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
    opened = zarr.open_group(_zarr_url(url), path=group or None, mode="r+", use_consolidated=False)
    for name, values in arrays.items():
        stored = _array(opened, name)
        values = np.ascontiguousarray(values, dtype=stored.dtype)
        stored[_selection(stored, region)] = values
        checksums[name] = _crc32(values)
    return checksums


def write_record(url: str, shard: int, record: Mapping[str, Any]) -> None:
    """Say that a shard is written. Call it after the data.

    Args:
        url: the store.
        shard: its number.
        record: holds `regions`, a list of what `region_record` returns, for `validate` to check.
    """
    write_json(url, f"records/{shard:06d}.json", record)


def region_record(group: str, region: Mapping[str, slice], crc32: Mapping[str, int]) -> dict[str, Any]:
    """What a shard's record says of one region that `write_region` wrote."""
    return {"group": group, "region": {d: [s.start, s.stop] for d, s in region.items()}, "crc32": dict(crc32)}


def records(url: str) -> dict[int, dict[str, Any]]:
    """The records of all shards that are done, by number."""
    names = [name for name in _list(url, "records") if re.fullmatch(r"\d+\.json", name)]
    texts = _read_all(url, [f"records/{name}" for name in sorted(names)])
    parsed = {int(name[len("records/") : -len(".json")]): _parsed(text) for name, text in texts.items()}
    return {shard: record for shard, record in parsed.items() if record is not None and "regions" in record}


def pending(url: str, shards: int) -> list[int]:
    """Shards that are still to be written."""
    done = records(url)
    return [shard for shard in range(shards) if shard not in done]


def complete(url: str, summary: Mapping[str, Any]) -> None:
    """Write the completion record.

    Args:
        url: the store.
        summary: what the record adds: `counts`, and `quarantine` (rows of `series`, `file`, `reason`).

    Raises:
        InputError: a shard has no record.
    """
    config = _config(url)
    missing = pending(url, config["shards"])
    if missing:
        raise InputError(_unfinished(url, config["shards"], len(missing)))
    _sweep(url)
    record = {
        "config_hash": config["config_hash"],
        "shards": config["shards"],
        "code_version": version("earthformer-ray"),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **summary,
    }
    write_json(url, COMPLETE, record)


def reopen(url: str) -> None:
    """Take the completion record away: shards whose records were removed are about to be written again."""
    fs, path = filesystem(url)
    if is_complete(url):
        fs.rm_file(f"{path}/{COMPLETE}")


def _sweep(url: str) -> None:
    """Remove what killed writers left: Zarr writes a local file under another name first."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        for name in fs.find(path):
            if name.endswith(".partial"):
                fs.rm_file(name)


# ------------------------------------------------------------------------------------------ reading


def is_complete(url: str) -> bool:
    """Whether the completion record is there."""
    return read_json(url, COMPLETE) is not None


def open_store(url: str, group: str = "") -> xr.Dataset:
    """A finished store's Dataset, raw: nothing is masked or scaled, times are decoded, nothing is loaded.

    Raises:
        InputError: there is no store at `url`, or it is unfinished or damaged.
    """
    _check_complete(url)
    return _open(url, group)


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
    opened = _open(url, group, decode=True)
    cut = {
        name: values.chunk(
            dict(zip(values.dims, values.encoding[chunks] or values.encoding["chunks"], strict=True))
        )
        for name, values in opened.data_vars.items()
        if values.dims
    }
    return opened.assign(cut)


def _check_complete(url: str) -> None:
    config = _config(url)
    if not is_complete(url):
        raise InputError(_unfinished(url, config["shards"], len(pending(url, config["shards"]))))


def _open(url: str, group: str = "", decode: bool = False) -> xr.Dataset:
    try:
        return xr.open_zarr(
            _zarr_url(url), group=group or None, mask_and_scale=decode, decode_timedelta=True, chunks=None
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
            self._arrays[key] = zarr.open_array(_zarr_url(self.url), path=path, mode="r")
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
        return frozenset(row["series"] for row in quarantined(self.url))

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


def quarantined(url: str) -> list[dict[str, str]]:
    """The series that could not be read, each once: rows of `series`, `file` and `reason`.

    Of an unfinished store, those found so far.
    """
    done = read_json(url, COMPLETE)
    if done is not None:
        return list(done.get("quarantine", ()))
    rows = [row for _, record in sorted(records(url).items()) for row in record.get("quarantine", ())]
    return list({row["series"]: row for row in reversed(rows)}.values())[::-1]


# ----------------------------------------------------------------------------------------- checking


def validate(url: str) -> list[str]:
    """Read everything back; one line a problem: what is missing, differs from its checksum or is unreadable.

    Raises:
        InputError: there is no store at `url`.
    """
    config, done = _config(url), records(url)
    problems = list(_template_problems(url, config))
    missing = [shard for shard in range(config["shards"]) if shard not in done]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        problems.append(f"{len(missing)} of {config['shards']} shards have no record: {some}")
    elif not is_complete(url):
        problems.append(f"{COMPLETE} is missing or cut off")
    # Two at a time: one is read while another is decompressed, and no more than that is held in memory.
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda item: list(_shard_problems(url, *item)), sorted(done.items())):
            problems += found
    return problems


def _template_problems(url: str, config: Mapping[str, Any]) -> Iterator[str]:
    if config_hash(config["config"]) != config["config_hash"]:
        yield f"{CONFIG} does not have the hash that it names, {config['config_hash']}"
    template = read_json(url, TEMPLATE)
    if template is None:
        yield f"{TEMPLATE} is missing or cut off"
        return
    for name, text in _read_all(url, list(template["crc32"])).items():
        expected = template["crc32"][name]
        if text is None:
            yield f"{name} is missing"
        elif zlib.crc32(text) != expected:
            yield f"{name} has CRC-32 {zlib.crc32(text):08x}: needed {expected:08x}"


def _shard_problems(url: str, shard: int, record: Mapping[str, Any]) -> Iterator[str]:
    for part in record["regions"]:
        region = {d: slice(*bounds) for d, bounds in part["region"].items()}
        for name, expected in part["crc32"].items():
            where = f"shard {shard}, " + f"{part['group']}/{name}".lstrip("/")
            try:
                group = zarr.open_group(
                    _zarr_url(url), path=part["group"] or None, mode="r", use_consolidated=False
                )
                stored = _array(group, name)
                found = _crc32(np.ascontiguousarray(stored[_selection(stored, region)]))
            except UNREADABLE as error:
                yield f"{where} cannot be read: {why(error)}"
                continue
            if found != expected:
                yield f"{where} has CRC-32 {found:08x}: needed {expected:08x}"


def describe(url: str) -> str:
    """What a store holds and how far it is, finished or not, for people.

    Raises:
        InputError: there is no store at `url`, or its metadata are damaged.
    """
    config, done = _config(url), read_json(url, COMPLETE)
    fs, path = filesystem(url)
    lines = [
        f"{url}: {config['config']['kind']}, configuration {config['config_hash']}, "
        f"{fs.du(path) / 1e6:.1f} MB"
    ]
    if read_json(url, TEMPLATE) is None:
        return "\n".join([*lines, "not complete: its template is cut off; run the same command again"])
    if done is None:
        lines.append(_unfinished(url, config["shards"], len(pending(url, config["shards"]))))
    else:
        lines.append(
            f"complete since {done['finished']}: {config['shards']} shards, code {done['code_version']}"
        )
        counts = dict(done.get("counts", {}))
        dropped = counts.pop("dropped", {})
        lines.append(", ".join(f"{n} {what}" for what, n in counts.items()) + left_out(dropped))
    lines.append(str(_open(url)))
    names = zarr.open_group(_zarr_url(url), mode="r").group_keys()
    for name in sorted(set(names) - {"records"}):
        group = _open(url, name)
        lines.append(f"{name}: " + "; ".join(f"{k} {dict(v.sizes)} {v.dtype}" for k, v in group.items()))
    return "\n".join(lines)


def left_out(dropped: Mapping[str, int]) -> str:
    """`; left out: …`, from counts of catalogue rows by reason; empty when none are."""
    reasons = ", ".join(f"{n} rows ({reason})" for reason, n in dropped.items() if n)
    return f"; left out: {reasons}" if reasons else ""


# --------------------------------------------------------------------------------------------- JSON


def write_json(url: str, name: str, value: Any) -> None:
    """Write JSON under a directory URL, creating directories."""
    fs, path = filesystem(url)
    target = f"{path}/{name}"
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(target, json.dumps(value, indent=1, default=str).encode())


def read_json(url: str, name: str) -> dict[str, Any] | None:
    """Read JSON under a directory URL; None when it is absent or was cut off in mid-write."""
    return _parsed(_read(url, name))


def _parsed(text: bytes | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _fresh(url: str) -> tuple[AbstractFileSystem, str]:
    """As `filesystem`, with nothing remembered of a folder: other processes write there as well."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return fs, path


def _read(url: str, name: str) -> bytes | None:
    fs, path = _fresh(url)
    try:
        return bytes(fs.cat_file(f"{path}/{name}"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _read_all(url: str, names: Sequence[str]) -> dict[str, bytes | None]:
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _read(url, name), names), strict=True))


def _list(url: str, folder: str = "") -> list[str]:
    fs, path = _fresh(url)
    try:
        names = fs.ls(f"{path}/{folder}".rstrip("/"), detail=False)
        return [name.rstrip("/").rpartition("/")[2] for name in names]
    except (FileNotFoundError, NotADirectoryError):
        return []


# ------------------------------------------------------------------------------------------- shared


def _config(url: str) -> dict[str, Any]:
    found = read_json(url, CONFIG)
    if found is None or not {"config", "config_hash", "shards"} <= set(found):
        raise InputError(
            f"{url} is not a store: it has no {CONFIG}; needed what `prepare` or `forecast` wrote"
        )
    return found


def _unfinished(url: str, shards: int, missing: int) -> str:
    return (
        f"{url} is not complete: {shards - missing} of {shards} shards are there; "
        "run the same command again to finish it"
    )


def _zarr_url(url: str) -> str:
    # At a file:// URL Zarr writes through fsspec, which makes no folders and no replacement in one stroke.
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else url


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
    assert isinstance(stored.metadata, ArrayV3Metadata)
    names = stored.metadata.dimension_names or ()
    return tuple(region.get(str(name), slice(None)) for name in names)
