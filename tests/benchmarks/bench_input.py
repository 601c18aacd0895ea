"""How fast training's windows come, beside a bare loop that reads the same ones with zarr.

    python tests/benchmarks/bench_input.py [--task sevir] [--events 72] [--batch-size 4] [--repeats 3]

The archive is synthetic SEVIR in its real size, written once. An epoch of its training windows, shuffled as
training shuffles them, goes to a consumer that does nothing. The bare loops index the Zarr array, a window at
a time in the same order, and stack batches: one in a process, and one in each of two processes that have half
of the windows each. Ray's workers are up, and have imported what they need, before the clock runs.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import ray
import torch
import zarr
from rich.console import Console
from rich.table import Table

from pipelines import engine, windows
from pipelines.archives import synthetic
from pipelines.archives.store import Archive
from pipelines.prepare import prepare
from pipelines.series import Window
from pipelines.tasks import TASKS, Task

Keys = list[tuple[int, int]]


def bare_loop(url: str, keys: Keys, frames: int, batch_size: int) -> float:
    """Seconds for all windows, each an event's row and its first frame."""
    began = time.perf_counter()
    array = zarr.open_array(url, path="vil", mode="r")
    for first in range(0, len(keys), batch_size):
        batch = [array[row, start : start + frames] for row, start in keys[first : first + batch_size]]
        torch.tensor(np.stack(batch)[..., None])
    return time.perf_counter() - began


def training(task: Task, archive: Archive, order: list[Window], batch_size: int) -> float:
    """Seconds for the same windows, as a training worker has them."""
    began, count = time.perf_counter(), 0
    for batch in windows.batches(task, archive, order, batch_size, torch.device("cpu")):
        count += len(batch["context"])
    assert count == len(order)
    return time.perf_counter() - began


def main() -> None:
    """Write the archive, read it in turn, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--task", choices=("sevir", "sevir-lr"), default="sevir")
    parser.add_argument("--events", type=int, default=72)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-input-") as scratch:
        measure(arguments, Path(scratch))


def measure(arguments: argparse.Namespace, scratch: Path) -> None:
    """All ways, `repeats` times in turn."""
    task, load = TASKS[arguments.task], os.getloadavg()[0]
    synthetic.write_sevir(scratch / "raw", events=arguments.events)
    url = str(scratch / "archive.zarr")
    engine.connect(2, address="local")
    prepare(arguments.task, str(scratch / "raw"), url, progress=False)
    archive = Archive(url)
    row = archive.positions("event")
    order = windows.epoch_order(windows.enumerate_windows(task, archive, "train"), seed=0, epoch=0)
    keys = [(row[window.series], window.start) for window in order]
    parts = [(url, keys[half::2], task.frames, arguments.batch_size) for half in range(2)]
    training(task, archive, order, arguments.batch_size)
    seconds: dict[str, list[float]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(bare_loop, [(url, keys[:2], task.frames, 1)] * 4, chunksize=1)
        for _ in range(arguments.repeats):
            seconds["bare loop"].append(bare_loop(url, keys, task.frames, arguments.batch_size))
            began = time.perf_counter()
            pool.starmap(bare_loop, parts, chunksize=1)
            seconds["bare loops in two processes"].append(time.perf_counter() - began)
            seconds["training's input"].append(training(task, archive, order, arguments.batch_size))
    ray.shutdown()
    table = Table(
        title=f"{task.name}, {len(order)} windows of {task.frames} frames in batches of "
        f"{arguments.batch_size}; median of {arguments.repeats}; load before {load:.1f}"
    )
    for name in ("", "s", "windows/s", "of the bare loop"):
        table.add_column(name, justify="right" if name else "left")
    for name, spent in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(seconds["bare loop"], spent, strict=True))
        second = statistics.median(spent)
        table.add_row(name, f"{second:.2f}", f"{len(order) / second:.1f}", f"{ratio:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
