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

from pipelines import engine, telemetry
from pipelines.archives import BrokenFile, Decoded, Plan, Shard, checks, enso, radar, records, sevir, store
from pipelines.clusters import NODE_GROUP
from pipelines.costs import HOUR, Prices, Work, peak_memory, size
from pipelines.errors import InputError
from pipelines.storage import filesystem, join

if TYPE_CHECKING:
    from pipelines.tasks import Task

KINDS = ("sevir", "sevir-lr", "enso", "radar")
MOST_SHARDS, MOST_TASKS = 8, 20_000
"""Of a task, and of an archive, whose tasks hold more shards where that is needed."""
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
            speed = f"{size(raw)} at {raw / self.seconds / 1e6:.0f} MB/s"
            done = f"{self.written}/{total} shards written, {speed}"
        return (
            f"{self.archive}: {plan.kind}, {plan.frames} frames, configuration "
            f"{records.hash_of(plan.config, plan.contents)}{checks.left_out(plan.dropped)}\n"
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
    work: Work
    prices: Prices | None = None

    def __str__(self) -> str:
        plan, share = self.plan, self.pending / len(self.plan.shards)
        raw, kept = (size(count * share) for count in (plan.decoded_bytes, plan.stored_bytes))
        rows = {
            "series": f"{plan.series} ({plan.frames} frames){checks.left_out(plan.dropped)}",
            "windows": self.windows,
            "shards": f"{len(plan.shards)}, of which {self.pending} are to be written",
            "pixels": f"{raw}, of which {kept} are kept",
            **self.work.rows(self.prices),
        }
        digest = records.hash_of(plan.config, plan.contents)
        first = f"{self.archive}: would hold {plan.kind}, configuration {digest}"
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
    store.create(place, plan.groups, config=plan.config, shards=len(plan.shards), contents=plan.contents)
    pending, stale = _pending(place, plan)
    written, seconds = 0, 0.0
    if pending:
        records.reopen(place)
        for number in stale:
            records.remove(place, number)
        engine.connect(workers)
        _check_memory(memory_mb)
        start = time.perf_counter()
        written = _write_all(plan, place, pending, workers, memory_mb, strict, progress)
        seconds = time.perf_counter() - start
    finished = not pending and records.is_complete(place)
    done = {} if finished else records.read(place)
    quarantine = tuple(records.quarantined(place) if finished else records.quarantine_of(done))
    if strict and quarantine:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    if len(quarantine) >= plan.series:
        raise InputError(
            _bad_line(quarantine[0]) + f" (and so for all {plan.series} series): nothing was prepared"
        )
    if not finished:
        counts = {"series": plan.series, "frames": plan.frames, "dropped": dict(plan.dropped)}
        records.complete(place, {"counts": counts, "quarantine": quarantine}, done)
    return Prepared(archive, plan, written, seconds, quarantine)


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
    place, known = engine.absolute(source), tuple(records.series(engine.absolute(archive)))
    if kind == "enso":
        return enso.plan(place, known=known)
    if kind == "radar":
        return radar.plan(place, variable=variable, shard_mb=shard_mb, known=known)
    low = kind == "sevir-lr"
    return sevir.plan(place, modalities=modalities, low_resolution=low, shard_mb=shard_mb, known=known)


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
    # Ray would wait for ever for a machine that has as much, unless another may still come.
    alive = [node for node in ray.nodes() if node["Alive"]]
    grows = any(NODE_GROUP in node["Labels"] for node in alive)
    most = max(int(node["Resources"].get("memory", 0)) for node in alive) // 1_000_000
    if memory_mb is not None and (memory_mb < 1 or (memory_mb > most and not grows)):
        raise InputError(f"{memory_mb} MB of memory a worker: needed 1 to {most}")


def _pending(archive: str, plan: Plan) -> tuple[list[int], list[int]]:
    """Shards that are to be written, and those among them whose records are of no use.

    That is of other series than the shard has now, or, in an unfinished archive, with series that could not
    be read, which may have come back.
    """
    done, finished = records.read(archive), records.is_complete(archive)
    stale = [
        number
        for number, record in done.items()
        if number < len(plan.shards)
        and (
            _identity(plan.shards[number]) != record.get("identity")
            or (record["quarantine"] and not finished)
        )
    ]
    pending = sorted({*stale, *(n for n in range(len(plan.shards)) if n not in done)})
    return pending, stale


def _identity(shard: Shard) -> str:
    return records.config_hash(shard.identity)


# -------------------------------------------------------------------------------------------- tasks


def _write_all(
    plan: Plan,
    archive: str,
    pending: Sequence[int],
    workers: int | None,
    memory_mb: int | None,
    strict: bool,
    progress: bool,
) -> int:
    """Have all shards written that are not yet; how many of them by this call."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # None where a cluster is yet to grow.
    slots = workers or int(ray.cluster_resources().get("CPU", 0)) or 1
    rows = ray.data.from_arrow(list(_tables(plan, engine.from_anywhere(pending), slots))).map(
        partial(_write_shard, archive=archive, strict=strict),
        num_cpus=1,
        memory=memory_mb * 1_000_000 if memory_mb else None,
        concurrency=workers,
    )
    return sum(row["written"] for row in engine.track(rows, len(pending), "prepare", progress))


def _tables(plan: Plan, pending: Sequence[int], workers: int) -> Iterator[pa.Table]:
    """What each task is given: a shard travels with its row, and not all of them with the function."""
    for numbers in _tasks(pending, workers):
        yield pa.table({"number": numbers, "shard": [pickle.dumps(plan.shards[n]) for n in numbers]})


def _tasks(pending: Sequence[int], workers: int) -> Iterator[Sequence[int]]:
    """Shards task by task: several at first, since Ray Data looks for free workers ten times a second only,
    and single ones at last, so that all workers end at about the same time."""
    most = max(MOST_SHARDS, len(pending) // MOST_TASKS)
    first = 0
    while first < len(pending):
        size = min(most, -(-(len(pending) - first) // (2 * workers)))
        yield pending[first : first + size]
        first += size


def _write_shard(row: dict[str, Any], archive: str, strict: bool) -> dict[str, Any]:
    shard: Shard = pickle.loads(row["shard"])
    # Only these use Dask, and Ray's part of it takes half a second to import.
    with engine.dask_on_cluster() if isinstance(shard, enso.EnsoShard) else nullcontext():
        return write_shard(row["number"], shard, archive, strict)


def write_shard(number: int, shard: Shard, archive: str, strict: bool = False) -> dict[str, Any]:
    """Write a shard, and the record of it last; nothing where it is there.

    Returns whether it was `written`, `items` (series) that it holds, and their `bytes` before compression.

    Raises:
        InputError: a series cannot be read, and `strict`.
    """
    identity = _identity(shard)
    if records.is_written(archive, number, identity):
        # By the task that this one is the retry of, or by another command.
        return {"written": False, "items": 0, "bytes": 0}
    began = time.perf_counter()
    regions, bad, sources, folder = shard.decode()
    quarantine = [{"series": b.series, "file": b.file, "reason": b.reason} for b in bad]
    if strict and bad:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    written = [
        store.region_record(r.group, r.region, store.write_region(archive, r.group, r.arrays, r.region))
        for r in regions
    ]
    record = {
        "identity": identity,
        "regions": written,
        "quarantine": quarantine,
        "sources": sources,
        "source": folder,
    }
    records.write(archive, number, record)
    size = sum(values.nbytes for region in regions for values in region.arrays.values())
    ranges = (each for of in sources.values() for source in of for each in source.ranges)
    telemetry.shard_done(
        "prepare",
        archive,
        number,
        seconds=time.perf_counter() - began,
        items=len(sources),
        read_bytes=sum(n for _, n in ranges),
        written_bytes=size,
        quarantined=len(bad),
    )
    return {"written": True, "items": len(sources), "bytes": size}


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
    prices: Prices | None = None,
) -> Estimate:
    """What `prepare` would do with the same arguments; reads one shard, and writes nothing to `archive`.

    Raises:
        InputError: the source is absent or unusable; the archive was written under another configuration.
    """
    plan = _plan(kind, source, archive, modalities, variable, shard_mb)
    place = engine.absolute(archive)
    begun = records.begun(place, plan.config, plan.contents)
    pending = _pending(place, plan)[0] if begun else range(len(plan.shards))
    sample = next((plan.shards[n] for n in pending if not isinstance(plan.shards[n], BrokenFile)), None)
    workers = min(workers or engine.cores(), max(1, len(pending)))
    work = _measure(plan, sample, len(pending), workers) if sample else Work(0, 0, 0, 0, 0, 0)
    return Estimate(archive, plan, len(pending), _windows(plan), work, prices)


def _measure(plan: Plan, shard: Shard, shards: int, workers: int) -> Work:
    """The work of so many shards, judging by this one, which is read, and written to memory."""
    fs, path = filesystem(_SCRATCH)
    start = time.perf_counter()
    decoded = shard.decode()
    seconds = time.perf_counter() - start
    try:
        groups = {region.group: plan.groups[region.group] for region in decoded.regions}
        store.create(_SCRATCH, groups, config={}, shards=1)
        template, objects = fs.du(path), len(fs.find(path))
        start = time.perf_counter()
        for region in decoded.regions:
            store.write_region(_SCRATCH, region.group, region.arrays, region.region)
        seconds += time.perf_counter() - start
        stored, objects = fs.du(path) - template, len(fs.find(path)) - objects
    finally:
        fs.rm(path, recursive=True)
    raw = sum(v.nbytes for region in decoded.regions for v in region.arrays.values())
    # By its pixels: the last shard of an archive is smaller than the others.
    scale = plan.stored_bytes * shards / len(plan.shards) / raw
    read, gets = _source(decoded)
    return Work(
        tasks=shards,
        read_bytes=read * scale,
        written_bytes=stored * scale,
        gets=gets * scale,
        # With the record of each.
        puts=objects * scale + shards,
        memory_bytes=peak_memory(),
        cpu_hours=seconds * scale / HOUR,
        hours=seconds * scale / HOUR / workers,
        workers=workers,
    )


def _source(decoded: Decoded) -> tuple[int, int]:
    """Bytes that a shard was read from, and in how many pieces."""
    pieces = {(file, *each) for of in decoded.sources.values() for file, ranges in of for each in ranges}
    whole = {file for of in decoded.sources.values() for file, ranges in of if not ranges}
    sizes = [filesystem(join(decoded.folder, file)) for file in whole]
    return sum(n for *_, n in pieces) + sum(fs.du(path) for fs, path in sizes), len(pieces) + len(whole)


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
