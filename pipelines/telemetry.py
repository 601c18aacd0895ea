"""What workers say of their work: Ray metrics, log lines of JSON, and progress for people."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from ray.util import metrics
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("earthformer")
"""In a worker its lines are JSON, with the ids of job, node, worker and task, which Ray adds."""
LINE_SECONDS = 60.0
"""Between two lines of progress where there is no terminal."""
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@cache
def _counter(name: str, what: str) -> metrics.Counter:
    return metrics.Counter(f"earthformer_{name}", description=what, tag_keys=("stage",))


@cache
def _seconds() -> metrics.Histogram:
    return metrics.Histogram(
        "earthformer_shard_seconds",
        description="Time to make and write a shard.",
        boundaries=list(SECONDS),
        tag_keys=("stage",),
    )


@cache
def _pending() -> metrics.Gauge:
    return metrics.Gauge(
        "earthformer_shards_pending", description="Shards still to be done.", tag_keys=("stage",)
    )


def shard_done(
    stage: str,
    store: str,
    shard: int,
    *,
    seconds: float,
    items: int,
    read_bytes: int = 0,
    written_bytes: int = 0,
    quarantined: int = 0,
) -> None:
    """Say that this worker has written a shard.

    Args:
        stage: `prepare`, `forecast`, …
        store: URL.
        shard: its number.
        seconds: from reading to the record.
        items: series, windows or members that it holds.
        read_bytes: of the source, where they are known.
        written_bytes: before compression.
        quarantined: series that could not be read.
    """
    tags = {"stage": stage}
    for name, what, value in (
        ("shards", "Shards written.", 1),
        ("items", "Series, or windows, written.", items),
        ("read_bytes", "Bytes read of sources.", read_bytes),
        ("written_bytes", "Bytes written, before compression.", written_bytes),
        ("quarantined_series", "Series that could not be read.", quarantined),
    ):
        if value:
            _counter(name, what).inc(value, tags=tags)
    _seconds().observe(seconds, tags=tags)
    about = {"stage": stage, "store": store, "shard": shard, "seconds": round(seconds, 3), "items": items}
    sizes = {"read_bytes": read_bytes, "written_bytes": written_bytes, "quarantined": quarantined}
    log.info("shard written", extra=about | sizes)


def progress(
    rows: Iterable[dict[str, Any]], total: int, stage: str, shown: bool = True
) -> Iterator[dict[str, Any]]:
    """The rows of finished shards as they come, under a bar; without a terminal a line a minute.

    Args:
        rows: may hold `items` and `bytes`, of which the rates are told.
        total: how many shards are awaited.
        stage: what is done.
        shown: for people at all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = sys.stdout.isatty()
    began = said = time.monotonic()
    done = items = size = 0
    with Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        transient=True,
        disable=not (shown and terminal),
    ) as bar:
        task = bar.add_task(f"{stage}: shards", total=total, rate="")
        for row in rows:
            done, items, size = done + 1, items + row.get("items", 0), size + row.get("bytes", 0)
            now = time.monotonic()
            rate = _rate(items, size, now - began)
            bar.update(task, advance=1, rate=rate)
            _pending().set(total - done, tags={"stage": stage})
            if shown and not terminal and now - said >= LINE_SECONDS:
                left = (total - done) * (now - began) / done
                print(f"{stage}: {done}/{total} shards, {rate}, {left / 60:.0f} min to go", flush=True)
                said = now
            yield row


def _rate(items: int, size: int, seconds: float) -> str:
    parts = [f"{items / seconds:.3g}/s"] * bool(items) + [f"{size / seconds / 1e6:.0f} MB/s"] * bool(size)
    return ", ".join(parts)
