"""Joining a Ray cluster, or starting a quiet local one."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.errors import InputError

OBJECT_STORE_BYTES = 1 << 30


def connect(workers: int | None = None, address: str | None = None) -> None:
    """Attach to the cluster at `address` (or `RAY_ADDRESS`), else start a local one of `workers` CPUs.

    Does nothing when this process already has a cluster.

    Raises:
        InputError: no cluster answers at `address`.
    """
    if ray.is_initialized():
        return
    # Ray's own progress and hints are for those who write Ray programs; ours come from the verbs.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A worker killed just after `report` loses what the controller has not yet seen: look often.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    address = address or os.environ.get("RAY_ADDRESS")
    start = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    if address in (None, "", "local"):
        start(
            address="local",
            num_cpus=max(workers or 0, cores()),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
    else:
        try:
            start(address=address)
        except ConnectionError as error:
            raise InputError(
                f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}; needed a running "
                "cluster and, if it asks for one, its token"
            ) from error
    quiet()


def quiet() -> None:
    """Keep Ray's logs in its log files."""
    for name in ("ray.data", "ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def track(rows: ray.data.Dataset, total: int, label: str, progress: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as its tasks finish, under a progress bar."""
    context = rows.context
    context.enable_progress_bars = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not progress) as bar:
        task = bar.add_task(label, total=total)
        for row in rows.iter_rows():
            bar.advance(task)
            yield row


def absolute(url: str) -> str:
    """A URL that means the same in a worker, whose working directory is another."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme not in ("file", "local"):
        return url
    return str(Path(rest if separator else url).resolve())
