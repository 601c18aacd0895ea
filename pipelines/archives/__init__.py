"""Raw archives and what is made of them: each reader turns a source into a `Plan`, without any Ray."""

import errno
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import xarray as xr

from pipelines.errors import InputError, one_line
from pipelines.storage import readable

UNREADABLE = (InputError, OSError, EOFError, LookupError, ValueError, TypeError, RuntimeError, zlib.error)
"""What reading a damaged file raises, by one library or another."""
_NOT_THE_FILE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.EBUSY, errno.EREMOTEIO),
}
"""The last two are what s3fs makes of 503 and 500, once it has asked often enough."""
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


class Source(NamedTuple):
    """Where in the raw archive values come from."""

    file: str
    """Relative to the archive."""
    ranges: Sequence[tuple[int, int]]
    """First byte and number of bytes; none where the whole file was read."""


class Decoded(NamedTuple):
    """What a shard reads."""

    regions: list[Region]
    bad: list[Bad]
    sources: Mapping[str, Sequence[Source]]
    """By series."""
    folder: str
    """URL of the raw archive."""


class Shard(Protocol):
    """What one task reads and writes. Picklable; reads nothing before `decode`."""

    @property
    def identity(self) -> Any:
        """What the shard is made of, for JSON: a shard of another identity has to be written anew."""

    def decode(self) -> Decoded:
        """Read and decode the raw data of this shard."""


@dataclass(frozen=True)
class BrokenFile:
    """A file whose metadata cannot be read: it has no place in the archive, only a line in the quarantine."""

    file: str
    reason: str

    @property
    def identity(self) -> Any:
        """The file's name."""
        return [self.file]

    def decode(self) -> Decoded:
        """Nothing to write."""
        return Decoded([], [Bad(self.file, self.file, self.reason)], {}, "")


@dataclass(frozen=True)
class Plan:
    """What preparing an archive would read and write."""

    kind: str
    groups: Mapping[str, xr.Dataset]
    """Templates: coordinates, attributes and dask variables that are only laid out."""
    config: Mapping[str, Any]
    """Decides the archive's layout, which is the same however many series are added later."""
    contents: Mapping[str, str]
    """Name of each series, in the archive's order, to what it is made of; more may be added at the end."""
    shards: tuple[Shard, ...]
    series: int
    frames: int
    stored_bytes: int
    """Before compression."""
    decoded_bytes: int
    """Raw pixels that are decoded on the way."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Catalogue rows left out, by reason."""


def in_order(names: Iterable[str], known: Sequence[str], source: str) -> list[str]:
    """Names of series with those that an archive holds first, as it holds them; the others as they come.

    Raises:
        InputError: the source has no longer what the archive holds.
    """
    found = list(names)
    if not known:
        return found
    gone = set(known) - set(found)
    if gone:
        raise InputError(
            f"{source} has no {min(gone)} any more, nor {len(gone) - 1} others that the archive holds: "
            "needed a source that has only gained, or another URL for the archive"
        )
    held = set(known)
    return [*known, *(name for name in found if name not in held)]


def why(error: Exception) -> str:
    """What is wrong with a file, in one line.

    Raises:
        Exception: the error itself where the file is not to blame (a full disk, a lost connection, expired
            credentials): such a task is to be tried again, and its series not to be given up.
    """
    number = getattr(error, "errno", None)
    # Of the errors of a disk each has a number; s3fs gives those for refused credentials none.
    refused = isinstance(error, PermissionError) and number is None
    if refused or isinstance(error, ConnectionError | TimeoutError) or number in _NOT_THE_FILE:
        raise error
    return one_line(error)


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
