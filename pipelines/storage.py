"""Files at any URL: file systems, files that are whole or absent, JSON."""

import gc
import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO

import fsspec
import zarr.storage
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import InputError, one_line

METADATA_BLOCK = 1 << 16
"""Bytes of a remote HDF5 file that are fetched at once while its metadata are read, which are small."""

# An object store under load answers 503, or not at all; botocore then waits, longer each time, and asks
# again. Who knows better says so in fsspec's own configuration.
_PATIENT = {
    "retries": {"mode": "standard", "max_attempts": 8},
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 64,
}
_s3 = fsspec.config.conf.setdefault("s3", {})
_s3["config_kwargs"] = {**_PATIENT, **_s3.get("config_kwargs", {})}
# s3fs would ask for the size of each object before it fetches it, to fetch large ones in parts.
_s3.setdefault("max_concurrency", 1)


# ----------------------------------------------------------------------------------------- file systems


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path on it.

    Raises:
        InputError: no such kind of URL is known, or its driver is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url, **_options(url))
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{url} cannot be opened: {one_line(error)}; needed a path or an fsspec URL"
        ) from error


def _options(url: str) -> dict[str, Any]:
    """What fsspec is to know of a URL besides its own configuration, by protocol."""
    link = next((link for link in url.split("::") if link.startswith("s3://")), "")
    bucket = link.removeprefix("s3://").partition("/")[0]
    return {"s3": {"anon": True}} if bucket and _is_public(bucket) else {}


@cache
def _is_public(bucket: str) -> bool:
    """Whether a bucket lets in whoever signs nothing, and not us by our credentials, if we have any.

    So are open data read, such as those of `s3://sevir`.
    """
    from botocore.exceptions import BotoCoreError, NoCredentialsError
    from s3fs import S3FileSystem

    def lets_in(anon: bool) -> bool:
        S3FileSystem(anon=anon, config_kwargs={"retries": {"max_attempts": 2}}).call_s3(
            "list_objects_v2", Bucket=bucket, MaxKeys=1
        )
        return True

    try:
        return not lets_in(anon=False)
    except (PermissionError, NoCredentialsError):
        try:
            return lets_in(anon=True)
        except (OSError, BotoCoreError):
            return False
    except (OSError, BotoCoreError):
        # What is wrong is better said by whoever wants something of it.
        return False


def zarr_store(url: str) -> zarr.storage.StoreLike:
    """The URL as Zarr takes it."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        # Through fsspec Zarr would make no folders, and no replacement in one stroke.
        return path
    return zarr.storage.FsspecStore.from_url(url, storage_options=_options(url))


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder, which of a chain, such as `zip://folder::raw.zip`, is the first link."""
    first, separator, rest = folder.partition("::")
    if separator and "://" not in first:
        return f"{first}::{join(rest, name)}"
    return f"{first if first.endswith('://') else first.rstrip('/') + '/'}{name}{separator}{rest}"


@contextmanager
def readable(url: str, block_size: int | None = None) -> Iterator[str | BinaryIO]:
    """The path of a local file, or a file object that fetches of a remote one only what is read.

    Args:
        url: of the file.
        block_size: bytes that are fetched at once, and kept; default: the file system's own.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    # HDF5 holds its lock while it waits for a remote file. A garbage collection in the thread that fetches
    # would wait for that lock to free HDF5's objects, for ever (h5py issue 2019).
    collected = gc.isenabled()
    gc.disable()
    blocks = {"block_size": block_size, "cache_type": "blockcache"} if block_size else {}
    try:
        with fs.open(path, "rb", **blocks) as file:
            yield file
    finally:
        if collected:
            gc.enable()


# ---------------------------------------------------------------------------------------------- files


def write_whole(url: str, name: str, content: bytes) -> None:
    """Write a file of a folder so that a reader, or a kill, finds the old one or the new one, never a part.

    Raises:
        OSError: a full or absent disk, with the file's name.
    """
    fs, path = filesystem(url)
    target = f"{path}/{name}"
    try:
        if isinstance(fs, AsyncFileSystem):
            # Object stores make an object whole or not at all, and know no folders.
            fs.pipe_file(target, content)
            return
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        part = f"{target}.{uuid.uuid4().hex}.partial"
        fs.pipe_file(part, content)
        fs.mv(part, target)
    except OSError as error:
        # A full disk does not say by itself at which file it was full.
        error.filename = error.filename or target
        raise


def write_all(url: str, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder, each as `write_whole`; many at a time where that is quicker."""
    fs, path = filesystem(url)
    if isinstance(fs, AsyncFileSystem):
        fs.pipe({f"{path}/{name}": content for name, content in contents.items()})
        return
    for name, content in contents.items():
        write_whole(url, name, content)


@contextmanager
def local_folder(url: str) -> Iterator[str]:
    """A folder of this machine whose files are in that of the URL afterwards, which may be the same."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        fs.put(f"{folder}/", path, recursive=True)


def read(url: str, name: str) -> bytes | None:
    """A file of a folder; None where it is absent."""
    return read_all(url, [name])[name]


def read_all(url: str, names: Sequence[str]) -> dict[str, bytes | None]:
    """Files of a folder, None for those that are absent; many at a time where that is quicker."""
    fs, path = fresh(url)
    if isinstance(fs, AsyncFileSystem) and len(names) > 1:
        contents = fs.cat([f"{path}/{name}" for name in names], on_error="return")
        return {name: _present(contents[f"{path}/{name}"]) for name in names}
    return {name: _cat(fs, f"{path}/{name}") for name in names}


def _cat(fs: AbstractFileSystem, path: str) -> bytes | None:
    try:
        return bytes(fs.cat_file(path))
    except OSError as error:
        return _present(error)


def _present(found: bytes | Exception) -> bytes | None:
    if isinstance(found, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return None
    if isinstance(found, Exception):
        raise found
    return found


def listed(url: str, folder: str = "") -> list[str]:
    """Names of what lies in a folder; none where it is absent."""
    fs, path = fresh(url)
    try:
        names = fs.ls(f"{path}/{folder}".rstrip("/"), detail=False)
        return [name.rstrip("/").rpartition("/")[2] for name in names]
    except (FileNotFoundError, NotADirectoryError):
        return []


def fresh(url: str) -> tuple[AbstractFileSystem, str]:
    """As `filesystem`, with nothing remembered of a folder: other processes write there as well."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return fs, path


# ----------------------------------------------------------------------------------------------- JSON


def write_json(url: str, name: str, value: Any, indent: int | None = 1) -> None:
    """Write JSON under a directory URL."""
    write_whole(url, name, json.dumps(value, indent=indent, default=str).encode())


def read_json(url: str, name: str) -> dict[str, Any] | None:
    """Read JSON under a directory URL; None when it is absent or damaged."""
    return parsed(read(url, name))


def parsed(text: bytes | None) -> dict[str, Any] | None:
    """A JSON object; None of anything else."""
    try:
        found = json.loads(text or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
