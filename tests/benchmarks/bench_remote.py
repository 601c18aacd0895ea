"""Bytes and time of reading SEVIR's HDF5 from an S3 server, beside h5py over fsspec.

    python tests/benchmarks/bench_remote.py [--mb 1000] [--shards 3] [--delay 0.03]

One file of at least so many MB, in SEVIR's layout, on a real S3 server on this machine, behind a proxy that
counts the bytes and has each answer wait, as answers of object stores do. Needed are the stored bytes of the
chunks of the events that are wanted; read is everything that came, the file's metadata too. The shards lie
far apart in the file, and each is read as a task of its own does: by nobody who knows the file already.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import h5py
import numpy as np
import s3fs
from bench_prepare import EVENT_MB, raw_archive
from rich.console import Console
from rich.table import Table

from pipelines.archives import sevir

sys.path.append(str(Path(__file__).parents[1]))
from tiny_faults import Faults, faults
from tiny_s3 import reserved, serving

URL = "s3://private/raw"


def by_h5py(shard: sevir.SevirShard, block: int) -> int:
    """The same events, read by h5py over fsspec with its read-ahead; how many."""
    ((name, rows),) = shard.by_file("vil").items()
    fs = fsspec.filesystem("s3")
    with fs.open(f"{URL}/data/{name}", block_size=block) as opened, h5py.File(opened) as file:
        for row in rows:
            assert file["vil"][row.file_index].any()
    return len(rows)


def measure(shards: list[sevir.SevirShard], proxy: Faults, gigabytes: float) -> None:
    """All ways, and the table."""
    needed = sum(n for s in shards for of in s.decode().sources.values() for one in of for _, n in one.ranges)
    events = sum(len(shard.events) for shard in shards)
    table = Table(
        title=f"{len(shards)} shards of {events} events, {needed / 1e6:.0f} MB of one file of "
        f"{gigabytes:.2f} GB; answers after {proxy.delay * 1000:.0f} ms"
    )
    for name in ("", "MB read", "of those needed", "requests", "s", "decoded MB/s"):
        table.add_column(name, justify="right" if name else "left")
    ways: dict[str, Callable[[sevir.SevirShard], object]] = {
        "by byte ranges": sevir.SevirShard.decode,
        "h5py over fsspec, blocks of 50 MB (s3fs's own)": lambda shard: by_h5py(shard, 50 << 20),
        "h5py over fsspec, blocks of 64 KB": lambda shard: by_h5py(shard, 64 << 10),
    }
    for name, read in ways.items():
        sent, requests, began = proxy.sent, proxy.done.total(), time.perf_counter()
        for shard in shards:
            read(shard)
        seconds, read_bytes = time.perf_counter() - began, proxy.sent - sent
        table.add_row(
            name,
            f"{read_bytes / 1e6:.1f}",
            f"{read_bytes / needed:.3f}",
            f"{proxy.done.total() - requests}",
            f"{seconds:.1f}",
            f"{events * EVENT_MB / seconds:.0f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Write the file, read some of it in each way, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.03, help="seconds before each answer")
    arguments = parser.parse_args()
    place = reserved()
    os.environ |= place.environment
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder, serving(place):
        source, _ = raw_archive(Path(folder), arguments.mb)
        (path,) = source.rglob("*.h5")
        gigabytes = path.stat().st_size / 1e9
        fsspec.filesystem("s3").put(str(source), URL, recursive=True)
        with faults(place.port, delay=arguments.delay) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            s3fs.S3FileSystem.clear_instance_cache()
            shards = [shard for shard in sevir.plan(URL).shards if isinstance(shard, sevir.SevirShard)]
            far_apart = np.linspace(0, len(shards) - 1, arguments.shards).astype(int)
            measure([shards[i] for i in far_apart], proxy, gigabytes)


if __name__ == "__main__":
    main()
