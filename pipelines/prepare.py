"""Raw archive to sharded Zarr, on Ray Data: one task a shard, records written last, resumable."""

import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data

from pipelines import engine
from pipelines.archives import BrokenFile, Plan, Shard, enso, filesystem, radar, sevir, store
from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.tasks import Task

KINDS = ("sevir", "sevir-lr", "enso", "radar")
MOST_SHARDS = 8
"""Of a task; a worker that is killed does them again."""
_SCRATCH = "memory://earthformer-estimate"


@dataclass(frozen=True)
class Prepared:
    """What a finished preparation reports."""

    archive: str
    plan: Plan
    written: int
    """Shards that this call wrote."""
    seconds: float
    """Of writing them, on a cluster that was up."""
    quarantine: tuple[dict[str, str], ...] = ()

    def __str__(self) -> str:
        plan, total = self.plan, len(self.plan.shards)
        done = f"all {total} shards were there"
        if self.written:
            raw = plan.decoded_bytes * self.written / total
            speed = f"{_size(raw)} at {raw / self.seconds / 1e6:.0f} MB/s"
            done = f"{self.written}/{total} shards written, {speed}"
        return (
            f"{self.archive}: {plan.kind}, {plan.frames} frames, configuration "
            f"{store.config_hash(plan.config)}{store.left_out(plan.dropped)}\n"
            f"{plan.series} series, {len(self.quarantine)} quarantined, {done}"
        )


@dataclass(frozen=True)
class Estimate:
    """What a preparation would do, judging by one of its shards."""

    archive: str
    plan: Plan
    pending: int
    """Shards that are still to be written."""
    windows: str
    stored_bytes: float
    """Of those shards, after compression."""
    seconds: float
    workers: int

    def __str__(self) -> str:
        plan, share = self.plan, self.pending / len(self.plan.shards)
        rows = {
            "series": f"{plan.series} ({plan.frames} frames){store.left_out(plan.dropped)}",
            "windows": self.windows,
            "shards": f"{len(plan.shards)}, of which {self.pending} are to be written",
            "read": f"{_size(plan.decoded_bytes * share)} of raw pixels",
            "write": f"{_size(plan.stored_bytes * share)}, about {_size(self.stored_bytes)} compressed",
            "time": f"about {self.seconds:.0f} s by {self.workers} worker(s), once Ray is up",
        }
        first = f"{self.archive}: would hold {plan.kind}, configuration {store.config_hash(plan.config)}"
        return "\n".join([first, *(f"  {name:<8} {text}" for name, text in rows.items())])


def prepare(
    kind: str,
    source: str,
    archive: str,
    *,
    modalities: Sequence[str] = ("vil",),
    variable: str | None = None,
    workers: int | None = None,
    memory_mb: int | None = None,
    shard_mb: int = 128,
    strict: bool = False,
    progress: bool = True,
) -> Prepared:
    """Write the archive at `archive` from the raw one at `source`; the same call resumes.

    A series that cannot be read is filled with the missing value, listed in the quarantine and left out by
    every later stage; with `strict` it is an error. While an archive is unfinished, each call tries the
    shards that hold such series again.

    Args:
        kind: `sevir`, `sevir-lr`, `enso` or `radar`.
        source: URL of the raw archive: a folder.
        archive: URL of the Zarr store.
        modalities: SEVIR's image types.
        variable: name of the rain rate in radar files of other layouts.
        workers: parallel tasks at most; those of Dask, for an SST analysis, come on top.
        memory_mb: memory that a task claims from Ray.
        shard_mb: about the size of a shard before compression; a series at least.
        strict: no quarantine.
        progress: show a progress bar.

    Raises:
        InputError: the source is absent or unusable; the archive was written under another configuration;
            every series is bad, or any with `strict`.
    """
    plan = _plan(kind, source, archive, modalities, variable, shard_mb)
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers: needed 1 or more")
    place = engine.absolute(archive)
    store.create(place, plan.groups, config=plan.config, shards=len(plan.shards))
    pending = _pending(place, plan)
    seconds = 0.0
    if pending:
        store.reopen(place)
        engine.connect(workers)
        _check_memory(memory_mb)
        start = time.perf_counter()
        _write_all(plan, place, pending, workers, memory_mb, strict, progress)
        seconds = time.perf_counter() - start
    quarantine = tuple(store.quarantined(place))
    if strict and quarantine:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    if len(quarantine) >= plan.series:
        raise InputError(
            _bad_line(quarantine[0]) + f" (and so for all {plan.series} series): nothing was prepared"
        )
    if pending or not store.is_complete(place):
        counts = {"series": plan.series, "frames": plan.frames, "dropped": dict(plan.dropped)}
        store.complete(place, {"counts": counts, "quarantine": quarantine})
    return Prepared(archive, plan, len(pending), seconds, quarantine)


def _plan(
    kind: str, source: str, archive: str, modalities: Sequence[str], variable: str | None, shard_mb: int
) -> Plan:
    if kind not in KINDS:
        raise InputError(f"kind {kind!r} is unknown: needed one of {', '.join(KINDS)}")
    if variable is not None and kind != "radar":
        raise InputError(f"--variable {variable}: only radar takes one, not {kind}")
    if shard_mb < 0:
        raise InputError(f"shards of {shard_mb} MB: needed 0 (a series each) or more")
    for url in (source, archive):
        _check_reach(url)
    place = engine.absolute(source)
    if kind == "enso":
        return enso.plan(place)
    if kind == "radar":
        return radar.plan(place, variable=variable, shard_mb=shard_mb)
    return sevir.plan(place, modalities=modalities, low_resolution=kind == "sevir-lr", shard_mb=shard_mb)


def _check_reach(url: str) -> None:
    if "memory://" in url:
        raise InputError(f"{url} lies in the memory of one process: needed a URL that every worker reaches")
    try:
        fs, path = filesystem(url)
        fs.exists(path)
    except InputError:
        raise
    except Exception as error:  # of as many kinds as there are file systems: no credentials, no such host
        raise InputError(f"{url} cannot be reached: {type(error).__name__}: {error}") from error


def _check_memory(memory_mb: int | None) -> None:
    # Ray would wait for ever for a machine that has as much.
    most = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
    if memory_mb is not None and not 0 < memory_mb * 1_000_000 <= most:
        raise InputError(f"{memory_mb} MB of memory a worker: needed 1 to {most // 1_000_000}")


def _pending(archive: str, plan: Plan) -> list[int]:
    """Shards without a record; in an unfinished archive also those whose series may have come back."""
    done, finished = store.records(archive), store.is_complete(archive)
    return [
        number
        for number in range(len(plan.shards))
        if number not in done or (not finished and done[number].get("quarantine"))
    ]


# -------------------------------------------------------------------------------------------- tasks


def _write_all(
    plan: Plan,
    archive: str,
    pending: Sequence[int],
    workers: int | None,
    memory_mb: int | None,
    strict: bool,
    progress: bool,
) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A shard travels with its row, and not all of them with the function that every task loads.
    tasks = [
        pa.table({"number": numbers, "shard": [pickle.dumps(plan.shards[n]) for n in numbers]})
        for numbers in _tasks(pending, workers or int(ray.cluster_resources()["CPU"]))
    ]
    written = ray.data.from_arrow(tasks).map(
        partial(_write_shard, archive=archive, strict=strict),
        num_cpus=1,
        memory=memory_mb * 1_000_000 if memory_mb else None,
        concurrency=workers,
    )
    for _ in engine.track(written, len(pending), "prepare: shards", progress):
        pass


def _tasks(pending: Sequence[int], workers: int) -> Iterator[Sequence[int]]:
    """Shards task by task: several at first, since Ray Data looks for free workers ten times a second only,
    and single ones at last, so that all workers end at about the same time."""
    while pending:
        size = min(MOST_SHARDS, -(-len(pending) // (2 * workers)))
        yield pending[:size]
        pending = pending[size:]


def _write_shard(row: dict[str, Any], archive: str, strict: bool) -> dict[str, Any]:
    shard: Shard = pickle.loads(row["shard"])
    # Only these use Dask, and Ray's part of it takes half a second to import.
    with engine.dask_on_cluster() if isinstance(shard, enso.EnsoShard) else nullcontext():
        regions, bad = shard.decode()
    quarantine = [{"series": b.series, "file": b.file, "reason": b.reason} for b in bad]
    if strict and bad:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    written = [
        store.region_record(r.group, r.region, store.write_region(archive, r.group, r.arrays, r.region))
        for r in regions
    ]
    store.write_record(archive, row["number"], {"regions": written, "quarantine": quarantine})
    return {"number": row["number"]}


def _bad_line(row: dict[str, str]) -> str:
    return f"{row['file']}, {row['series']}: {row['reason']}"


# ------------------------------------------------------------------------------------------ dry run


def estimate(
    kind: str,
    source: str,
    archive: str,
    *,
    modalities: Sequence[str] = ("vil",),
    variable: str | None = None,
    workers: int | None = None,
    shard_mb: int = 128,
) -> Estimate:
    """What `prepare` would do with the same arguments; reads one shard, and writes nothing to `archive`.

    Raises:
        InputError: the source is absent or unusable; the archive was written under another configuration.
    """
    plan = _plan(kind, source, archive, modalities, variable, shard_mb)
    place = engine.absolute(archive)
    begun = store.begun(place, plan.config)
    pending = _pending(place, plan) if begun else range(len(plan.shards))
    sample = next((plan.shards[n] for n in pending if not isinstance(plan.shards[n], BrokenFile)), None)
    raw, stored, seconds = _measure(plan, sample) if sample else (1, 0, 0.0)
    scale = plan.stored_bytes * len(pending) / len(plan.shards) / raw
    workers = min(workers or engine.cores(), max(1, len(pending)))
    return Estimate(
        archive, plan, len(pending), _windows(plan), stored * scale, seconds * scale / workers, workers
    )


def _measure(plan: Plan, shard: Shard) -> tuple[int, int, float]:
    """Bytes of a shard before and after compression, and the seconds that it takes."""
    fs, path = filesystem(_SCRATCH)
    start = time.perf_counter()
    regions, _ = shard.decode()
    seconds = time.perf_counter() - start
    try:
        groups = {region.group: plan.groups[region.group] for region in regions}
        store.create(_SCRATCH, groups, config={}, shards=1)
        template = fs.du(path)
        start = time.perf_counter()
        for region in regions:
            store.write_region(_SCRATCH, region.group, region.arrays, region.region)
        seconds += time.perf_counter() - start
        stored = fs.du(path) - template
    finally:
        fs.rm(path, recursive=True)
    return sum(v.nbytes for region in regions for v in region.arrays.values()), stored, seconds


def _windows(plan: Plan) -> str:
    """Windows of the default task of this kind of archive, in words; no pixel is read."""
    # Here and not above: these import PyTorch, which workers need not, and which is most of their start.
    from pipelines import tasks, windows

    task = tasks.TASKS[plan.kind]
    if plan.kind == "radar":
        return f"at most {_tiles(plan, task)} of task radar, before rain and coverage are looked at"
    if task.variable not in plan.groups[""]:
        return f"none of task {task.name}, which needs {task.variable}"
    planned = store.Archive("what is planned")
    # It is not written yet: what would be read from it is put in place.
    vars(planned).update(root=plan.groups[""], _record={"config": plan.config}, quarantine=frozenset())
    counts = []
    for split in windows.SPLITS:
        try:
            counts.append(f"{len(windows.enumerate_windows(task, planned, split))} {split}")
        except InputError:
            counts.append(f"0 {split}")
    return f"{', '.join(counts)} of task {task.name}"


def _tiles(plan: Plan, task: "Task") -> int:
    """Windows of radar, wet and covered or not."""
    tiles, root, total = task.tiles, plan.groups[""], 0
    assert tiles is not None
    for name, cadence in zip(root["sequence"].values, root["cadence_minutes"].values, strict=True):
        rate = plan.groups[str(name)][task.variable]
        step, rest = divmod(task.step_minutes or 0, int(cadence))
        if rest == 0:
            last = len(rate) - (task.frames - 1) * step
            starts = len(range(0, last, task.stride[0] * step))
            rows, columns = (max(0, (n - tiles.size) // tiles.stride + 1) for n in rate.shape[1:])
            total += starts * rows * columns
    return total


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e6:.1f} MB"
