"""What the driver costs where an archive is large: the catalogue of a million events, and a million shards.

    python tests/benchmarks/bench_scale.py [--events 1000000] [--shards 1000000]

First a process of its own plans an archive of SEVIR's VIL from a synthetic catalogue and lays it out, up to
the moment when its first task can run. Then the real driver has Ray Data do so many shards on this machine,
each of which does nothing: what is left is what the driver itself can do, whatever the number of workers.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import xarray as xr
from rich.console import Console
from rich.table import Table

from pipelines import engine, prepare
from pipelines.archives import BrokenFile, Plan, catalog, sevir, store

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


def drive(shards: int) -> tuple[float, float]:
    """Seconds for so many shards of nothing, and the peak of the driver's memory in GB."""
    one = BrokenFile("a file of SEVIR's, of a name as long as they are", "nothing")
    plan = Plan("sevir", {"": xr.Dataset()}, {}, {}, (one,) * shards, shards, 0, 0, 0)
    engine.connect(address="local")
    prepare._write_shard = nothing
    began = time.perf_counter()
    prepare._write_all(plan, "nowhere", range(shards), None, None, False, False)
    seconds = time.perf_counter() - began
    ray.shutdown()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Both, and the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
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
    seconds, gigabytes = drive(arguments.shards)
    rate = f"{arguments.shards / seconds:,.0f} shards/s"
    table.add_row(f"{arguments.shards:,} shards driven, {rate}", f"{seconds:.0f}", "", f"{gigabytes:.2f}", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
