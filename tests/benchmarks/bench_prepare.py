"""Speed and memory of `prepare`, beside a bare loop that does the same work without Ray.

    python tests/benchmarks/bench_prepare.py [--mb 1000] [--workers 2] [--repeats 3] [--folder FOLDER]

The raw archive is synthetic SEVIR VIL in the real layout, written once (and kept in FOLDER, if one is given).
Both ways inflate its HDF5, turn each event to (time, y, x) and write shards of the same Zarr array, by as
many processes, taken in turn; processes are started, and have imported what they need, before the clock runs.
Speed is in decoded pixels (one byte each); memory is the peak of a worker's resident set over its life.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import ray
import zarr
from rich.console import Console
from rich.table import Table

from pipelines import engine
from pipelines.archives import sevir, store, synthetic
from pipelines.prepare import prepare

EVENT_MB = 384 * 384 * 49 / 1e6
SHARE = 0.8
MOST_GB = 1.0
SHARD_MB = 128
Job = tuple[str, str, int, list[tuple[str, int]]]


def bare_shard(job: Job) -> float:
    """Inflate, turn and write one shard; returns the process's peak memory in GB so far."""
    source, archive, first, rows = job
    values = np.empty((len(rows), 49, 384, 384), np.uint8)
    for place, (file_name, index) in enumerate(rows):
        with h5py.File(f"{source}/data/{file_name}", "r") as file:
            values[place] = file["vil"][index].transpose(2, 0, 1)
    array = zarr.open_array(archive, path="vil", mode="r+")
    array[first : first + len(rows)] = values
    return peak_gb(os.getpid())


def jobs(source: str, archive: str) -> list[Job]:
    """The shards of `prepare`'s own plan, without its records, checks and quarantine."""
    planned = sevir.plan(source, shard_mb=SHARD_MB)
    store.create(
        archive,
        planned.groups,
        config=planned.config,
        shards=len(planned.shards),
        contents=planned.contents,
    )
    return [
        (source, archive, shard.start, list(shard.places["vil"]))
        for shard in planned.shards
        if isinstance(shard, sevir.SevirShard)
    ]


def peak_gb(pid: int) -> float:
    """Greatest resident set that a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def ray_workers() -> list[psutil.Process]:
    """Ray's worker processes, idle or not."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if (p.cmdline() or [""])[0].startswith(("ray::IDLE", "ray::Map"))]


class FirstTasks:
    """Watches, within a `with`, when each worker gets its first task."""

    def __enter__(self) -> "FirstTasks":
        self.workers, self.start, self.over = ray_workers(), time.perf_counter(), threading.Event()
        self.seen: dict[int, float] = {}
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            for worker in self.workers:
                if worker.pid not in self.seen and worker.cmdline()[0].startswith("ray::Map"):
                    self.seen[worker.pid] = time.perf_counter() - self.start

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.start
        self.start_up = statistics.mean(self.seen.values())


def main() -> None:
    """Write the raw archive, measure both ways in turn, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mb", type=int, default=1000, help="raw size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the raw archive is kept, or is found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        measure(arguments, Path(arguments.folder or scratch), Path(scratch))


def measure(arguments: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """Both ways, `repeats` times in turn."""
    events = max(4, round(arguments.mb / EVENT_MB))
    source, warm = folder / f"sevir-{events}", scratch / "warm"
    if not (source / "CATALOG.csv").exists():
        synthetic.write_sevir(source, events=events)
    synthetic.write_sevir(warm, events=2 * arguments.workers, size=48)
    megabytes = events * EVENT_MB
    load = os.getloadavg()[0]
    engine.connect(arguments.workers, address="local")
    prepare(
        "sevir", str(warm), str(scratch / "warm.zarr"), shard_mb=0, workers=arguments.workers, progress=False
    )
    seconds: dict[str, list[float]] = {"prepare": [], "prepare, start-up excluded": [], "bare loop": []}
    peaks = dict.fromkeys(seconds, 0.0)
    niceness = ray_workers()[0].nice() - os.nice(0)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, os.nice, (niceness,)) as pool:
        pool.map(peak_gb, [os.getpid()] * arguments.workers * 4, chunksize=1)
        for _ in range(arguments.repeats):
            target = str(scratch / "bare.zarr")
            work = jobs(str(source), target)
            start = time.perf_counter()
            peaks["bare loop"] = max(pool.imap_unordered(bare_shard, work))
            seconds["bare loop"].append(time.perf_counter() - start)
            shutil.rmtree(target)
            target = str(scratch / "prepared.zarr")
            with FirstTasks() as watched:
                prepare(
                    "sevir", str(source), target, shard_mb=SHARD_MB, workers=arguments.workers, progress=False
                )
            seconds["prepare"].append(watched.seconds)
            seconds["prepare, start-up excluded"].append(watched.seconds - watched.start_up)
            peaks["prepare"] = max(peak_gb(worker.pid) for worker in watched.workers)
            stored = sum(f.stat().st_size for f in Path(target).rglob("*") if f.is_file()) / 1e6
            shutil.rmtree(target)
    ray.shutdown()
    table = Table(
        title=f"SEVIR, {megabytes:.0f} MB raw to {stored:.0f} MB, {arguments.workers} workers; "
        f"median of {arguments.repeats}; load before {load:.1f}"
    )
    for name in ("", "s", "MB/s", "of the bare loop", "at least", "worker GB", "at most"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in seconds.items():
        second = statistics.median(values)
        # Of each pair, which ran next to each other: what else the machine does changes by the minute.
        pairs = zip(seconds["bare loop"], values, strict=True)
        table.add_row(
            name,
            f"{second:.1f}",
            f"{megabytes / second:.0f}",
            f"{statistics.median(bare / ours for bare, ours in pairs):.0%}",
            f"{SHARE:.0%}" if name.endswith("excluded") else "",
            f"{peaks[name]:.2f}" if peaks[name] else "",
            f"{MOST_GB:.0f}" if name == "prepare" else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
