"""Raw archive to sharded Zarr, on Ray Data: one task a shard, records written last, resumable."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray.data

from pipelines import engine
from pipelines.archives import Plan, Shard, enso, radar, sevir, store
from pipelines.errors import InputError

KINDS = ("sevir", "sevir-lr", "enso", "radar")


@dataclass(frozen=True)
class Prepared:
    """What a finished (or, with `dry_run`, a planned) preparation reports."""

    archive: str
    plan: Plan
    dry_run: bool = False
    pending: int = 0
    seconds: float = 0.0
    quarantine: tuple[dict[str, str], ...] = field(default=())

    def __str__(self) -> str:
        plan = self.plan
        left_out = ", ".join(f"{n} rows {reason}" for reason, n in plan.dropped.items() if n)
        size = (
            f"{plan.series} series, {plan.frames} frames, {len(plan.shards)} shards, "
            f"{plan.stored_bytes / 1e6:.1f} MB before compression"
        )
        if self.dry_run:
            return (
                f"{self.archive}: would write {size}; {self.pending} shards to do, "
                f"about {self.seconds:.0f} s from decoding one of them"
                + (f"; left out: {left_out}" if left_out else "")
            )
        lines = [f"quarantined: {row['series']} ({row['file']}): {row['reason']}" for row in self.quarantine]
        done = plan.decoded_bytes * self.pending / max(1, len(plan.shards)) / 1e6
        speed = (
            f"{self.pending} written at {done / self.seconds:.0f} MB/s of raw pixels"
            if self.pending
            else "all there"
        )
        lines.append(
            f"{self.archive}: {size}, {speed}, {len(self.quarantine)} quarantined"
            + (f"; left out: {left_out}" if left_out else "")
        )
        return "\n".join(lines)


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
    dry_run: bool = False,
    progress: bool = True,
) -> Prepared:
    """Write the archive at `archive` from the raw one at `source`; the same call resumes.

    A series that cannot be read is filled with the missing value, listed in the quarantine and left out by
    every later stage; with `strict` it is an error.

    Args:
        kind: `sevir`, `sevir-lr`, `enso` or `radar`.
        source: URL of the raw archive: a folder.
        archive: URL of the Zarr store.
        modalities: SEVIR's image types.
        variable: name of the rain rate in radar files of other layouts.
        workers: parallel tasks at most.
        memory_mb: memory that a task claims from Ray.
        shard_mb: about the size of a shard before compression.
        strict: no quarantine.
        dry_run: only plan, and decode one shard for an estimate of time.
        progress: show a progress bar.

    Raises:
        InputError: the source is absent or unusable; the archive was written under another configuration;
            every series is bad, or any with `strict`.
    """
    plan = _plan(kind, source, modalities, variable, shard_mb)
    if dry_run:
        return _estimate(plan, archive, workers)
    store.create(archive, plan.groups, config=plan.config, shards=len(plan.shards))
    pending = store.pending(archive, len(plan.shards))
    began = time.perf_counter()
    if pending:
        engine.connect(workers)
        _write_all(plan, archive, pending, workers, memory_mb, strict, progress)
    seconds = time.perf_counter() - began
    quarantine = tuple(row for record in store.records(archive).values() for row in record["quarantine"])
    if strict and quarantine:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    if len(quarantine) >= plan.series:
        raise InputError(
            _bad_line(quarantine[0]) + f" (and so for all {plan.series} series): nothing was prepared"
        )
    if pending or not store.is_complete(archive):
        counts = {"series": plan.series, "frames": plan.frames, "dropped": dict(plan.dropped)}
        store.complete(archive, {"counts": counts, "quarantine": quarantine})
    return Prepared(archive, plan, pending=len(pending), seconds=seconds, quarantine=quarantine)


def _plan(kind: str, source: str, modalities: Sequence[str], variable: str | None, shard_mb: int) -> Plan:
    if kind in ("sevir", "sevir-lr"):
        return sevir.plan(source, modalities=modalities, low_resolution=kind == "sevir-lr", shard_mb=shard_mb)
    if kind == "enso":
        return enso.plan(source)
    if kind == "radar":
        return radar.plan(source, variable=variable, shard_mb=shard_mb)
    raise InputError(f"kind {kind!r} is unknown: needed one of {', '.join(KINDS)}")


def _write_all(
    plan: Plan,
    archive: str,
    pending: list[int],
    workers: int | None,
    memory_mb: int | None,
    strict: bool,
    progress: bool,
) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    work = ray.data.from_items([{"shard": i} for i in pending], override_num_blocks=len(pending))
    written = work.map(
        partial(_write_shard, shards=plan.shards, archive=archive, strict=strict),
        num_cpus=1,
        memory=memory_mb * 1_000_000 if memory_mb else None,
        concurrency=workers,
    )
    for _ in engine.track(written, len(pending), "prepare: shards", progress):
        pass


def _write_shard(
    row: dict[str, Any], shards: tuple[Shard, ...], archive: str, strict: bool
) -> dict[str, Any]:
    number = int(row["shard"])
    regions, bad = shards[number].decode()
    quarantine = [{"series": b.series, "file": b.file, "reason": b.reason} for b in bad]
    if strict and bad:
        raise InputError(_bad_line(quarantine[0]) + ": --strict takes no bad series")
    written = [
        store.region_record(r.group, r.region, store.write_region(archive, r.group, r.arrays, r.region))
        for r in regions
    ]
    store.write_record(archive, number, {"regions": written, "quarantine": quarantine})
    return {"shard": number}


def _bad_line(row: dict[str, str]) -> str:
    return f"{row['file']}, {row['series']}: {row['reason']}"


def _estimate(plan: Plan, archive: str, workers: int | None) -> Prepared:
    found = store.read_json(archive, "records/config.json")
    pending = len(plan.shards)
    if found is not None and found["config_hash"] == store.config_hash(plan.config):
        pending = len(store.pending(archive, len(plan.shards)))
    began = time.perf_counter()
    plan.shards[0].decode()
    each = time.perf_counter() - began
    return Prepared(
        archive, plan, dry_run=True, pending=pending, seconds=each * pending / (workers or engine.cores())
    )
