"""What the driver costs where an archive is large, and what that makes of archives of 1 TB and 1 PB.

    python tests/benchmarks/bench_scale.py [--events 1000000] [--shards 1000000] [--mb-per-s 60] [--s3]

First a process of its own plans an archive of SEVIR's VIL from a synthetic catalogue and lays it out, up to
the moment when its first task can run. Then the real driver has Ray Data do so many shards on this machine,
each of which does nothing: what is left is what the driver itself can do, whatever the number of workers.
Last, the records of many shards are read, as they are when an archive is completed or gone on with, from this
machine's disk or (`--s3`) from an S3 server on it.

From these rates and a worker's own (`--mb-per-s`, decoded, as `bench_prepare.py` finds it) follows how long
each part takes on 10, 100 and 1,000 nodes; the longest is the bottleneck.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import xarray as xr
from rich.console import Console
from rich.table import Table

from pipelines import engine, prepare, storage
from pipelines.archives import BrokenFile, Plan, catalog, records, sevir, store
from pipelines.costs import duration

sys.path.append(str(Path(__file__).parents[1]))
from tiny_s3 import reserved, serving

FILE_EVENTS = 700
MOST_SECONDS, MOST_GB = 60.0, 2.0


def write_catalogue(folder: Path, events: int) -> None:
    """Rows as SEVIR's, of files of 700 events."""
    number = np.arange(events)
    times = pd.Timestamp("2018-01-01") + pd.to_timedelta(number * 5, unit="m")
    minutes = ":".join(str(minute) for minute in range(-120, 121, 5))
    columns = {
        "id": [f"S{n:07d}" for n in number],
        "file_name": [f"vil/2018/SEVIR_VIL_STORMEVENTS_{n // FILE_EVENTS:05d}.h5" for n in number],
        "file_index": number % FILE_EVENTS,
        "img_type": "vil",
        "time_utc": times.strftime("%Y-%m-%d %H:%M:%S"),
        "minute_offsets": minutes,
        "episode_id": number,
        "event_id": number,
        "event_type": "Hail",
        "llcrnrlat": 30 + number % 700 / 100,
        "llcrnrlon": -100 + number % 900 / 100,
        "urcrnrlat": 34 + number % 700 / 100,
        "urcrnrlon": -96 + number % 900 / 100,
        "proj": catalog.PROJ,
        "size_x": 384,
        "size_y": 384,
        "height_m": 384_000.0,
        "width_m": 384_000.0,
        "data_min": 0,
        "data_max": 255,
        "pct_missing": 0.0,
    }
    pd.DataFrame(columns).to_csv(folder / "CATALOG.csv", index=False)


def start(folder: str) -> dict[str, float]:
    """Plan, lay out and cut into tasks; seconds after each, and the peak of this process's memory in GB."""
    began, found = time.perf_counter(), {}

    def lap(what: str) -> None:
        found[what] = time.perf_counter() - began

    plan = sevir.plan(folder)
    lap("planned")
    url = f"{folder}/archive.zarr"
    store.create(url, plan.groups, config=plan.config, shards=len(plan.shards), contents=plan.contents)
    lap("laid out")
    pending, _ = prepare._pending(url, plan)
    tasks = list(prepare._tables(plan, pending, os.cpu_count() or 1))
    lap("cut into tasks")
    found |= {"shards": len(plan.shards), "tasks": len(tasks)}
    return found | {"GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def nothing(row: dict[str, Any], **_: Any) -> dict[str, Any]:
    """In the place of a shard."""
    return {"written": True, "items": 1, "bytes": 0}


def drive(shards: int) -> tuple[float, int, float]:
    """Seconds for so many shards of nothing, in how many tasks, and the peak of the driver's memory in GB."""
    one = BrokenFile("a file of SEVIR's, of a name as long as they are", "nothing")
    plan = Plan("sevir", {"": xr.Dataset()}, {}, {}, (one,) * shards, shards, 0, 0, 0)
    engine.connect(address="local")
    prepare._write_shard = nothing
    began = time.perf_counter()
    prepare._write_all(plan, "nowhere", range(shards), None, None, False, False)
    seconds = time.perf_counter() - began
    tasks = sum(1 for _ in prepare._tasks(range(shards), int(ray.cluster_resources()["CPU"])))
    ray.shutdown()
    return seconds, tasks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def read_records(url: str, shards: int) -> float:
    """Seconds to read the records of so many shards of 17 events, which are written first."""
    places = {
        f"S{n:07d}": [["data/vil/2018/SEVIR_VIL_STORMEVENTS_2018_0101_0630.h5", [[n, n]]]] for n in range(17)
    }
    region = store.region_record("", {"event": slice(0, 17)}, {"vil": 1})
    said = {"identity": "0" * 16, "regions": [region], "quarantine": [], "sources": places, "source": url}
    text = json.dumps(
        {**said, "code_version": "0.1.0+000000000000", "written": "2026-01-01T00:00:00Z"}
    ).encode()
    storage.write_all(url, {f"records/{n:06d}.json": text for n in range(shards)})
    began = time.perf_counter()
    assert len(records.read(url)) == shards
    return time.perf_counter() - began


def records_read(shards: int, s3: bool) -> float:
    """Seconds to read so many from this machine's disk, or from an S3 server on it."""
    if not s3:
        with tempfile.TemporaryDirectory(prefix="bench-scale-") as scratch:
            return read_records(scratch, shards)
    place = reserved()
    os.environ |= place.environment
    with serving(place):
        return read_records("s3://private/archive", shards)


@dataclass(frozen=True)
class Rates:
    """What was measured, and what a node and an object store are."""

    worker: float
    """Decoded bytes a second."""
    plan: float
    """Seconds an event, of the driver's alone."""
    plan_bytes: float
    """The driver's memory an event."""
    tasks: float
    """That the driver can have done, a second; a task has eight shards, or more of very many."""
    records: float
    """That it reads, a second."""
    workers: int = 4
    """Of a node, as in `cluster/raycluster.yaml`."""
    puts: float = 3500.0
    """A second, of objects under one prefix, that S3 promises."""
    shard: float = 128e6
    event: float = 384 * 384 * 49
    """Bytes before compression."""

    def hours(self, size: float, nodes: int) -> dict[str, float]:
        """How long each part would take by itself."""
        shards = round(size / self.shard)
        tasks = sum(1 for _ in prepare._tasks(range(shards), self.workers * nodes))
        return {
            "workers": size / (self.worker * self.workers * nodes) / 3600,
            "PUT requests": 2 * shards / self.puts / 3600,
            "driver": tasks / self.tasks / 3600,
        }

    def alone(self, size: float) -> float:
        """Hours in which the driver plans, lays out and reads records, and no worker works."""
        return (size / self.event * self.plan + size / self.shard / self.records) / 3600


def outlook(rates: Rates) -> Table:
    """Archives of 1 TB and 1 PB on 10, 100 and 1,000 nodes."""
    table = Table(
        title=f"from these rates and {rates.worker / 1e6:.0f} MB/s a worker, {rates.workers} a node"
    )
    for name in (
        "archive",
        "nodes",
        "shards",
        "driver GB",
        "driver alone",
        *rates.hours(1, 1),
        "first bottleneck",
    ):
        table.add_column(name, justify="left" if name in ("archive", "first bottleneck") else "right")
    for name, size in (("SEVIR, 1 TB", 1e12), ("1 PB", 1e15)):
        for nodes in (10, 100, 1000):
            hours, alone = rates.hours(size, nodes), rates.alone(size)
            memory = size / rates.event * rates.plan_bytes / 1e9
            longest = max(hours, key=lambda part: hours[part])
            if alone > hours[longest]:
                longest = "driver alone"
            table.add_row(
                name,
                f"{nodes:,}",
                f"{size / rates.shard:,.0f}",
                f"{memory:.1f}",
                duration(alone),
                *map(duration, hours.values()),
                longest,
            )
    return table


def main() -> None:
    """All, and the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--mb-per-s", type=float, default=60.0, help="a worker's, before compression")
    parser.add_argument("--s3", action="store_true", help="records are on an S3 server on this machine")
    arguments = parser.parse_args()
    table = Table(title=f"the driver; load before {os.getloadavg()[0]:.1f}")
    for name in ("", "s", "at most", "GB", "at most"):
        table.add_column(name, justify="right" if name else "left")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as scratch:
        write_catalogue(Path(scratch), arguments.events)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(start, (scratch,))
        for what in ("planned", "laid out", "cut into tasks"):
            last = what == "cut into tasks"
            limits = (f"{MOST_SECONDS:.0f}", f"{found['GB']:.2f}", f"{MOST_GB:.0f}") if last else ("", "", "")
            name = f"{arguments.events:,} events {what}" + (f" ({found['tasks']:,.0f})" if last else "")
            table.add_row(name, f"{found[what]:.1f}", *limits)
    driven, tasks, gigabytes = drive(arguments.shards)
    rate = f"{arguments.shards / driven:,.0f} shards/s, {tasks / driven:.0f} tasks/s"
    table.add_row(f"{arguments.shards:,} shards driven, {rate}", f"{driven:.0f}", "", f"{gigabytes:.2f}", "")
    read = records_read(arguments.records, arguments.s3)
    rate = f"{arguments.records / read:,.0f} records/s"
    where = "S3" if arguments.s3 else "disk"
    table.add_row(f"{arguments.records:,} records read from {where}, {rate}", f"{read:.1f}", "", "", "")
    console = Console(width=130)
    console.print(table)
    rates = Rates(
        worker=arguments.mb_per_s * 1e6,
        plan=found["cut into tasks"] / arguments.events,
        plan_bytes=found["GB"] * 1e9 / arguments.events,
        tasks=tasks / driven,
        records=arguments.records / read,
    )
    console.print(outlook(rates))


if __name__ == "__main__":
    main()
