"""Raw archives and what is made of them: each reader turns a source into a `Plan`, without any Ray."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import xarray as xr


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


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """A local path to a file, downloaded when it is remote: HDF5 over a network file can deadlock."""
    fs, path = fsspec.core.url_to_fs(url)
    if "file" in fs.protocol or "local" in fs.protocol:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="earthformer-") as folder:
        target = str(Path(folder) / path.rpartition("/")[2])
        fs.get_file(path, target)
        yield target
