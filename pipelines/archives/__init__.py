"""Raw archives and what is made of them: each reader turns a source into a `Plan`, without any Ray."""

import errno
import gc
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
import numpy as np
import xarray as xr

from pipelines.errors import InputError

UNREADABLE = (InputError, OSError, EOFError, LookupError, ValueError, TypeError, RuntimeError, zlib.error)
"""What reading a damaged file raises, by one library or another."""
_NOT_THE_FILE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
HDF5 = b"\x89HDF"
_NETCDF = (HDF5, b"CDF\x01", b"CDF\x02", b"CDF\x05")
"""First bytes of NetCDF 4 and of the three classic kinds."""


@dataclass(frozen=True)
class Region:
    """Values for a shard-aligned part of one group."""

    group: str
    region: Mapping[str, slice]
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bad:
    """A series that cannot be read: it is filled with the missing value and listed, not fatal."""

    series: str
    file: str
    reason: str


class Shard(Protocol):
    """What one task reads and writes. Picklable; reads nothing before `decode`."""

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """Read and decode the raw data of this shard."""


@dataclass(frozen=True)
class BrokenFile:
    """A file whose metadata cannot be read: it has no place in the archive, only a line in the quarantine."""

    file: str
    reason: str

    def decode(self) -> tuple[list[Region], list[Bad]]:
        """Nothing to write."""
        return [], [Bad(self.file, self.file, self.reason)]


@dataclass(frozen=True)
class Plan:
    """What preparing an archive would read and write."""

    kind: str
    groups: Mapping[str, xr.Dataset]
    """Templates: coordinates, attributes and dask variables that are only laid out."""
    config: Mapping[str, Any]
    """Decides the archive's contents; its hash guards the store."""
    shards: tuple[Shard, ...]
    series: int
    frames: int
    stored_bytes: int
    """Before compression."""
    decoded_bytes: int
    """Raw pixels that are decoded on the way."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Catalogue rows left out, by reason."""


def why(error: Exception) -> str:
    """What is wrong with a file, in one line.

    Raises:
        Exception: the error itself where the file is not to blame (a full disk, a lost connection): such a
            task is to be tried again, and its series not to be given up.
    """
    if isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in _NOT_THE_FILE:
        raise error
    return " ".join(str(error).strip("'\"").split()) or type(error).__name__


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path on it.

    Raises:
        InputError: no such kind of URL is known, or its driver is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url} cannot be opened: {why(error)}; needed a path or an fsspec URL") from error


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder, which of a chain, such as `zip://folder::raw.zip`, is the first link."""
    first, separator, rest = folder.partition("::")
    if separator and "://" not in first:
        return f"{first}::{join(rest, name)}"
    return f"{first if first.endswith('://') else first.rstrip('/') + '/'}{name}{separator}{rest}"


@contextmanager
def readable(url: str) -> Iterator[str | BinaryIO]:
    """The path of a local file, or a file object that fetches of a remote one only what is read."""
    fs, path = filesystem(url)
    if "file" in fs.protocol or "local" in fs.protocol:
        yield path
        return
    # HDF5 holds its lock while it waits for a remote file. A garbage collection in the thread that fetches
    # would wait for that lock to free HDF5's objects, for ever (h5py issue 2019).
    collected = gc.isenabled()
    gc.disable()
    try:
        with fs.open(path, "rb") as file:
            yield file
    finally:
        if collected:
            gc.enable()


@contextmanager
def open_netcdf(url: str) -> Iterator[xr.Dataset]:
    """A NetCDF file of any kind, decoded, nothing loaded.

    Raises:
        ValueError: the file is no NetCDF.
        OSError: it is absent or damaged.
    """
    with readable(url) as file:
        start = first_bytes(file)
        if start not in _NETCDF:
            raise ValueError(f"begins with {start!r}: needed NetCDF or HDF5")
        with xr.open_dataset(file) as dataset:
            yield dataset


def first_bytes(file: str | BinaryIO) -> bytes:
    """The first four bytes of a file, by which its format is known."""
    if isinstance(file, str):
        with Path(file).open("rb") as opened:
            return opened.read(4)
    start = file.read(4)
    file.seek(0)
    return start
