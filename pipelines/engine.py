"""Joining a Ray cluster, or starting a quiet local one."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import dask
import ray
import ray.data
import ray.exceptions
from dask.base import DaskMethodsMixin

from pipelines import telemetry
from pipelines.clusters import knock
from pipelines.errors import InputError

OBJECT_STORE_BYTES = 1 << 30


def connect(workers: int | None = None, address: str | None = None) -> None:
    """Attach to the cluster at `address` (or `RAY_ADDRESS`), else start a local one of `workers` CPUs.

    Does nothing when this process already has a cluster.

    Raises:
        InputError: no cluster answers at `address`, or `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers: needed 1 or more")
    if ray.is_initialized():
        return
    # Ray's own progress and hints are for those who write Ray programs; ours come from the verbs.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Notice soon that a training worker has died.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A node that is lost or just starting leaves room for fewer workers than asked: then look again sooner.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    # Threads that wait for one another by spinning, as OpenMP's do unless told otherwise, make a step up to
    # a hundred times slower when another process wants the processor, as Ray Data's tasks do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Of chunks that many threads have had in turn, glibc keeps an arena of memory for each of them: a worker
    # of `prepare` grew to 1.3 GB instead of 0.6.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Ray ends a worker process that was idle for a second, and each new one imports PyTorch again: 3 seconds
    # of a core at every epoch.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    address = address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "", "local")
    if local:
        # Nobody takes a laptop away with a notice: a process less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray listens on all addresses of the machine, and does what it is told by whoever has its token.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    start = partial(
        ray.init,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Of workers; what people are told here is said in words.
        logging_config=ray.LoggingConfig(encoding="JSON", log_level="INFO"),
    )
    with _unlogged():
        if local:
            start(
                address="local",
                num_cpus=max(workers or 0, cores()),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
        else:
            knock(str(address))
            try:
                start(address=address)
            except ConnectionError as error:
                raise InputError(
                    f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}; needed a running "
                    "cluster and, if it asks for one, its token"
                ) from error
    quiet()
    _let_ray_warn_unseen()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """While Ray sets up the logs of workers, and this process's in the same way: it is left as it was."""
    loggers = [logging.getLogger(name) for name in (None, "ray")]
    kept = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for logger, (handlers, level, propagate) in zip(loggers, kept, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def quiet() -> None:
    """Keep Ray's logs in its log files."""
    for name in ("ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What Ray Data logs as an error is a task's exception, which travels to whoever says it in one line.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _let_ray_warn_unseen() -> None:
    """Use up a warning that Ray prints once a process, past all loggers, whenever Ray Data starts actors.

    Ray Data hands its actors their work by reference, and Ray says of any such actor that it might not
    restart (ray-project/ray#57733). The actor here is of that kind, asks for what no node has, and never
    starts.
    """
    never: Any = ray.remote(num_cpus=0, resources={"nowhere": 1}, max_restarts=1)(_Never)
    with _no_stderr():
        actor = never.remote(ray.put(None))
    ray.kill(actor)


class _Never:
    """An actor of whatever argument: no node will ever make one."""

    def __init__(self, _: None) -> None:
        super().__init__()


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def track(rows: ray.data.Dataset, total: int, stage: str, progress: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as its tasks finish, with progress told.

    Raises:
        Exception: what a task raised, as itself.
    """
    context = rows.context
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    with _as_raised():
        yield from telemetry.progress(rows.iter_rows(), total, stage, progress)


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """Let a task's exception out as itself."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def from_anywhere(shards: Sequence[int]) -> list[int]:
    """The same shards, beginning at any of them.

    Two commands that do the same at the same time begin at different places, and so share the work.
    """
    first = secrets.randbelow(max(1, len(shards)))
    return [*shards[first:], *shards[:first]]


@contextlib.contextmanager
def dask_on_cluster(workers: int | None = None, address: str | None = None) -> Iterator[None]:
    """Within it Dask's tasks are tasks of the Ray cluster that `connect` finds; then Dask is as it was.

    What a task gives lies in Ray's object store until no task needs it any more. `persist` leaves it there,
    to be computed with inside of the same `with`. It may stand in a task of Ray, too: while that task waits,
    its processor is free for others.

    Raises:
        InputError: as `connect`.
        Exception: from a computation inside, what a task raised, as itself.
    """
    connect(workers, address)
    persist = dask.persist, DaskMethodsMixin.persist
    # Here and not above: it takes half a second, and replaces Dask's `persist` as soon as it is imported.
    from ray.util import dask as on_ray

    on_ray.patch_dask(on_ray.ray_dask_persist, on_ray.ray_dask_persist_mixin)
    try:
        # As `enable_dask_on_ray`, which calls the shuffle by a name that Dask has given up, and so is warned.
        # The other shuffle writes to a disk, which must then be one for all machines.
        with dask.config.set({"scheduler": _dask_get, "dataframe.shuffle.method": "tasks"}):
            yield
    finally:
        on_ray.patch_dask(*persist)


def _dask_get(graph: Any, keys: Any, **options: Any) -> Any:
    from ray.util.dask import ray_dask_get

    with _as_raised():
        return ray_dask_get(graph, keys, **options)


def replicate(
    replica: type,
    arguments: dict[str, Any],
    shards: Sequence[int],
    stage: str,
    workers: int,
    gpu: bool,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Have `workers` actors of a class make all shards; each is told its number of threads and its device.

    Returns the rows that they gave, in any order.

    Raises:
        Exception: what a replica raised, as itself.
    """
    if not shards:
        return []
    order = from_anywhere(shards)
    rows = ray.data.from_items([{"shard": i} for i in order], override_num_blocks=len(order))
    done = rows.map(
        cast(Any, replica),
        fn_constructor_kwargs={
            **arguments,
            # By what was asked, not by what is left: a resumed job gives the same last digits.
            "threads": max(1, int(ray.cluster_resources().get("CPU", 1)) // workers),
            "device": "cuda" if gpu else "cpu",
        },
        concurrency=min(workers, len(shards)),
        num_cpus=None if gpu else 0.5,
        num_gpus=1 if gpu else None,
    )
    return list(track(done, len(shards), stage, progress))


def absolute(url: str) -> str:
    """A URL that means the same in a worker, whose working directory is another.

    Of a chain, such as `zip://::raw.zip`, the last link is the one that lies somewhere.
    """
    *chain, last = url.split("::")
    scheme, separator, rest = last.partition("://")
    if not separator or scheme in ("file", "local"):
        last = str(Path(rest if separator else last).expanduser().resolve())
    return "::".join([*chain, last])
