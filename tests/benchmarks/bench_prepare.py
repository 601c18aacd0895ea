"""Speed and memory of `prepare`, beside a bare loop that does the same work, and beside xarray with Dask.

    python tests/benchmarks/bench_prepare.py [--mb 1000] [--repeats 3] [--folder FOLDER] [--times 1]

The raw archive is synthetic SEVIR VIL in the real layout, one file of so many MB as it is stored, written
once (and kept in FOLDER, if one is given). All ways inflate its HDF5, turn each event to (time, y, x) and
write shards of the same Zarr array with the same codec, in turn, in one run. `prepare` and the bare loop of
processes have one worker and then two, whose processes are started, and have imported what they need, before
the clock runs. xarray opens the files with h5netcdf, chunks them by shards and writes them with `to_zarr` on
as many of Dask's threads as there are processors.

Speed is in decoded pixels (one byte each); memory is the peak of a worker's resident set over its life. With
`--times 10` a source of ten times the size is prepared once more, for its memory.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import psutil
import ray
import xarray as xr
import zarr
from rich.console import Console
from rich.table import Table

from pipelines import engine
from pipelines.archives import sevir, store, synthetic
from pipelines.prepare import prepare

EVENT_MB = 384 * 384 * 49 / 1e6
DISTINCT = 24
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


def by_dask(source: Path, target: str) -> None:
    """The same archive by xarray alone."""
    files = sorted((source / "data/vil").rglob("*.h5"))
    opened = xr.open_mfdataset(
        files, engine="h5netcdf", phony_dims="access", combine="nested", concat_dim="phony_dim_0", chunks={}
    )
    event, y, x, time_ = opened["vil"].dims
    planned = sevir.plan(str(source), shard_mb=SHARD_MB)
    stored = planned.groups[""]["vil"].encoding
    turned = opened[["vil"]].transpose(event, time_, y, x)
    whole = turned.chunk({event: stored["shards"][0], time_: -1, y: -1, x: -1}).drop_encoding()
    encoding = store._encoding(planned.groups[""]["vil"])
    whole.to_zarr(target, encoding={"vil": encoding}, consolidated=False, zarr_format=3)


def main() -> None:
    """Write the raw archive, measure all ways in turn, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mb", type=int, default=1000, help="size of the raw file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="also prepare a source so many times as large")
    parser.add_argument("--folder", help="where the raw archive is kept, or is found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        measure(arguments, Path(arguments.folder or scratch), Path(scratch))


def raw_archive(folder: Path, megabytes: int) -> tuple[Path, int]:
    """SEVIR's VIL in one file of so many MB, and how many events that is.

    It holds the stored chunks of a few synthetic events again and again.
    """
    place = folder / f"sevir-{megabytes}"
    if (place / "CATALOG.csv").exists():
        return place, len(pd.read_csv(place / "CATALOG.csv"))
    synthetic.write_sevir(folder / "few", events=DISTINCT)
    few = pd.read_csv(folder / "few/CATALOG.csv", dtype={"id": str})
    chunks = []
    for name, index in zip(few["file_name"], few["file_index"], strict=True):
        with h5py.File(folder / "few/data" / name) as file:
            chunks.append(file["vil"].id.read_direct_chunk((index, 0, 0, 0))[1])
    events = math.ceil(megabytes * 1e6 / np.mean([len(chunk) for chunk in chunks]))
    rows = few.iloc[np.arange(events) % DISTINCT].assign(
        file_name=few["file_name"][0], file_index=range(events)
    )
    rows["id"] = [f"S{number:06d}" for number in range(events)]
    path = place / "data" / few["file_name"][0]
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["id"] = rows["id"].to_numpy().astype("S10")
        shape = (events, 384, 384, 49)
        gzip = {"chunks": (1, *shape[1:]), "compression": "gzip", "compression_opts": 1}
        vil = file.create_dataset("vil", shape, "u1", **gzip)
        for number in range(events):
            vil.id.write_direct_chunk((number, 0, 0, 0), chunks[number % DISTINCT])
    rows.to_csv(place / "CATALOG.csv", index=False)
    return place, events


def ours(source: Path, target: Path, workers: int) -> tuple[float, float]:
    """Seconds, without start-up, and the greatest memory of a worker in GB."""
    with FirstTasks() as watched:
        prepare("sevir", str(source), str(target), shard_mb=SHARD_MB, workers=workers, progress=False)
    return watched.seconds - watched.start_up, max(peak_gb(worker.pid) for worker in watched.workers)


def measure(arguments: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """All ways, `repeats` times in turn."""
    source, events = raw_archive(folder, arguments.mb)
    megabytes, load = events * EVENT_MB, os.getloadavg()[0]
    synthetic.write_sevir(scratch / "raw", events=4, size=48)
    engine.connect(2, address="local")
    prepare("sevir", str(scratch / "raw"), str(scratch / "warm.zarr"), shard_mb=0, progress=False)
    niceness = ray_workers()[0].nice() - os.nice(0)
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = {}
    target = scratch / "made.zarr"
    with multiprocessing.get_context("spawn").Pool(2, os.nice, (niceness,)) as pool:
        pool.map(peak_gb, [os.getpid()] * 8, chunksize=1)
        for _ in range(arguments.repeats):
            for workers in (1, 2):
                work = jobs(str(source), str(target))
                start = time.perf_counter()
                if workers == 1:
                    peak = max(pool.apply(bare_shard, (job,)) for job in work)
                else:
                    peak = max(pool.imap_unordered(bare_shard, work))
                seconds[f"bare loop, {workers}"].append(time.perf_counter() - start)
                peaks[f"bare loop, {workers}"] = peak
                shutil.rmtree(target)
                spent, peaks[f"prepare, {workers}"] = ours(source, target, workers)
                seconds[f"prepare, {workers}"].append(spent)
                stored = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6
                shutil.rmtree(target)
            start = time.perf_counter()
            by_dask(source, str(target))
            seconds["xarray and Dask"].append(time.perf_counter() - start)
            shutil.rmtree(target)
    table = Table(
        title=f"SEVIR, {arguments.mb} MB of HDF5, {megabytes:.0f} MB of pixels, to {stored:.0f} MB; "
        f"median of {arguments.repeats}, without start-up; load before {load:.1f}"
    )
    for name in (
        "workers",
        "s",
        "MB/s",
        "of the bare loop",
        "of Dask's speed",
        "of one worker's",
        "worker GB",
    ):
        table.add_column(name, justify="left" if name == "workers" else "right")

    def ratio(of: str, to: str) -> str:
        # Of each pair, which ran in the same round: what else the machine does changes by the minute.
        pairs = zip(seconds[to], seconds[of], strict=True)
        return f"{statistics.median(theirs / mine for theirs, mine in pairs):.2f}"

    for name in sorted(seconds):
        kind, _, workers = name.partition(", ")
        second = statistics.median(seconds[name])
        table.add_row(
            name,
            f"{second:.1f}",
            f"{megabytes / second:.0f}",
            ratio(name, f"bare loop, {workers}") if kind == "prepare" else "",
            ratio(name, "xarray and Dask") if kind == "prepare" else "",
            ratio(name, f"{kind}, 1") if workers == "2" else "",
            f"{peaks[name]:.2f}" if name in peaks else "",
        )
    if arguments.times > 1:
        larger, count = raw_archive(folder, arguments.mb * arguments.times)
        spent, peak = ours(larger, target, 2)
        rate = f"{count * EVENT_MB / spent:.0f}"
        name = f"prepare, 2, {arguments.times} times the size"
        table.add_row(name, f"{spent:.1f}", rate, "", "", "", f"{peak:.2f}")
    ray.shutdown()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
