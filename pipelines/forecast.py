"""Forecasts of a split of an archive: replicas of a forecaster on Ray Data, into a Forecast Zarr."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from earthformer.forecasters import Members, members_of
from pipelines import engine, telemetry, windows
from pipelines.archives import records, store
from pipelines.costs import HOUR, Work, peak_memory
from pipelines.ensembles import Reduction
from pipelines.errors import InputError
from pipelines.forecast_store import member_seeds, template
from pipelines.plans import Ensemble, Plan, need
from pipelines.series import Window

CHECKED = 16
"""With `until_ci`, intervals are looked at whenever so many members more have been drawn."""


@dataclass(frozen=True)
class Forecasted:
    """What a finished forecast reports."""

    url: str
    forecaster: str
    windows: int
    written: int
    """Windows that this call wrote; the others were there."""
    seconds: float
    """Without starting Ray."""
    drawn: tuple[int, ...] = ()
    """Members of each window that this call wrote, of an ensemble."""
    failed: int = 0
    """Members that diverged, or had nothing to go on, and are left out."""
    requested: tuple[float, ...] = ()
    """Of a guided forecast, the functional's value asked of each window that this call wrote."""
    achieved: tuple[float, ...] = ()
    """Beside it, what its members have, on average."""

    def __str__(self) -> str:
        total = f"{self.url}: {self.windows} windows by {self.forecaster}"
        if not self.written:
            return f"{total}, all there before"
        some = "" if self.written == self.windows else f", {self.written} of them now,"
        speed = f"{total}{some} at {self.written / self.seconds:.3g} windows/s"
        if not self.drawn:
            return speed
        low, high = min(self.drawn), max(self.drawn)
        lost = f", {self.failed} more failed and are left out" if self.failed else ""
        said = f"{speed}, {low if low == high else f'{low} to {high}'} members each{lost}"
        if not self.requested:
            return said
        asked, came = (float(np.nanmean(values)) for values in (self.requested, self.achieved))
        return f"{said}; of the functional {asked:.4g} was requested and {came:.4g} achieved, on average"


def forecast(
    planned: Plan,
    out: str,
    *,
    workers: int = 1,
    gpu: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Forecasted:
    """Write the Forecast Zarr `(window, member, lead_time, y, x)` at `out`; the same call resumes.

    Args:
        planned: what `plan` gave.
        out: URL of the forecast.
        workers: replicas of the forecaster, which share the processors.
        gpu: one GPU a replica.
        batch_size: windows a forward pass, or of an ensemble members.
        progress: show a progress bar.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration; the run's weights
            are damaged; an impossible number; no GPU.
    """
    for what, value in (("workers", workers), ("batch size", batch_size)):
        need(value >= 1, what, value, "1 or more")
    if gpu and not os.environ.get("RAY_ADDRESS") and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that PyTorch can use: needed one, or no --gpu")
    todo, place = pending(planned, out), engine.absolute(out)
    if todo:
        # What is wrong with the weights is said here, before anything is written, rather than by a replica.
        planned.check_weights()
    store.create(place, {"": template(planned)}, config=planned.config, shards=planned.shards)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if todo:
        engine.connect(workers)
        began = time.perf_counter()
        replica = {"planned": planned, "out": place, "batch_size": batch_size}
        todo = engine.from_anywhere(todo)
        rows = engine.replicate(_Replica, replica, todo, "forecast", workers, gpu, progress)
    seconds = time.perf_counter() - began
    if not records.is_complete(place):
        records.complete(
            place, {"counts": {"windows": len(planned.keys), "members": planned.ensemble.members}}
        )
    written = sum(row["written"] for row in rows)
    drawn, failed = (tuple(int(n) for row in rows for n in row[what]) for what in ("drawn", "failed"))
    requested, achieved = (tuple(v for row in rows for v in row[what]) for what in ("requested", "achieved"))
    return Forecasted(
        out, planned.forecaster, len(planned.keys), written, seconds, drawn, sum(failed), requested, achieved
    )


def pending(planned: Plan, out: str) -> list[int]:
    """Shards that are still to be made; reads records only.

    Raises:
        InputError: `out` holds something else, or a forecast under another configuration.
    """
    place = engine.absolute(out)
    if records.begun(place, planned.config):
        return records.pending(place, planned.shards)
    return list(range(planned.shards))


def estimate(planned: Plan, out: str, *, workers: int = 1, gpu: bool = False, batch_size: int = 8) -> Work:
    """What `forecast` would take with the same arguments: one batch is made here, and nothing written.

    A diffusion model's batch is made in two and in three steps; the others take as long as the third.

    Raises:
        InputError: as `forecast`.
    """
    todo = pending(planned, out)
    windows_left = sum(len(planned.keys[planned.shard(index)]) for index in todo)
    threads = max(1, engine.cores() // workers)
    members = at_once(planned.ensemble, batch_size) if planned.ensemble.reduced else 1
    steps = planned.drawing.steps if planned.drawing is not None else 0
    if steps > 3:
        two, three = (_batch_seconds(planned, members, batch_size, threads, gpu, k) for k in (2, 3))
        seconds = two + (steps - 2) * max(0.0, three - two)
    else:
        seconds = _batch_seconds(planned, members, batch_size, threads, gpu, steps)
    each = min(batch_size, len(planned.keys))
    batches = windows_left * (planned.ensemble.members / members if planned.ensemble.reduced else 1 / each)
    hours = seconds * batches / HOUR
    whole, share = template(planned), windows_left / len(planned.keys)
    pixels = windows.read(planned.task, planned.archive, planned.keys[:1])
    return Work(
        tasks=len(todo),
        read_bytes=windows_left * float(sum(values.nbytes for values in pixels.values())),
        written_bytes=whole.nbytes * share,
        gets=windows_left,
        puts=len(todo) * (1 + len(whole.data_vars)),
        memory_bytes=peak_memory(),
        cpu_hours=0.0 if gpu else hours * threads,
        gpu_hours=hours if gpu else 0.0,
        hours=hours / workers,
        workers=workers,
    )


def _batch_seconds(
    planned: Plan, members: int, batch_size: int, threads: int, gpu: bool, steps: int
) -> float:
    """Of one batch, the quickest of three: the first warms the device up."""
    some = replace(planned, ensemble=replace(planned.ensemble, members=max(members, 2), until_ci=None))
    if not planned.ensemble.reduced:
        some = planned
    if planned.drawing is not None:
        some = replace(some, drawing=replace(planned.drawing, steps=steps))
    replica = _Replica(some, "", batch_size, threads, "cuda" if gpu else "cpu")
    places = range(1 if some.ensemble.reduced else min(batch_size, len(planned.keys)))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        replica.make(places)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class _Replica:
    """One replica of the forecaster: makes and writes whole shards."""

    def __init__(self, planned: Plan, out: str, batch_size: int, threads: int, device: str) -> None:
        engine.quiet()
        self.planned, self.out, self.batch_size = planned, out, batch_size
        self.device = torch.device(device)
        torch.set_num_threads(min(threads, engine.cores()))
        self.forecaster = cast(Any, planned.load()).to(self.device)
        self.bound = planned.bound() if planned.ensemble.reduced else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        planned, shard, began = self.planned, int(row["shard"]), time.perf_counter()
        place = planned.shard(shard)
        nothing: dict[str, Any] = {"written": 0, "drawn": [], "failed": [], "requested": [], "achieved": []}
        if records.is_written(self.out, shard):
            # By the replica that this one stands in for, or by another command.
            return nothing
        values = self.make(range(place.start, place.stop))
        region = {"window": place}
        crc32 = store.write_region(self.out, "", values, region)
        records.write(self.out, shard, {"regions": [store.region_record("", region, crc32)]})
        reduced = planned.ensemble.reduced
        drawn, failed = (values[n].tolist() if reduced else [] for n in ("n_members", "failed_members"))
        requested, achieved = [], []
        if "functional_requested" in values:
            requested = values["functional_requested"].tolist()
            each = np.ma.masked_invalid(values["functional_achieved"])
            achieved = each.mean(1).filled(np.nan).tolist()
        size, count = sum(each.nbytes for each in values.values()), place.stop - place.start
        seconds = time.perf_counter() - began
        telemetry.shard_done("forecast", self.out, shard, seconds=seconds, items=count, written_bytes=size)
        return {
            "written": count,
            "items": count,
            "bytes": size,
            "drawn": drawn,
            "failed": failed,
            "requested": requested,
            "achieved": achieved,
        }

    def make(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """What is stored of some windows."""
        return self._ensembles(places) if self.planned.ensemble.reduced else self._fields(places)

    def _fields(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Deterministic forecasts of some windows."""
        planned, parts = self.planned, []
        for first in range(0, len(places), self.batch_size):
            keys = [planned.keys[i] for i in places[first : first + self.batch_size]]
            fields = self.forecaster.forecast(self._context(keys), member_seeds(planned.seed, keys, 1))
            parts.append(fields[..., 0].cpu().numpy())
        return {planned.task.variable: np.concatenate(parts)}

    def _ensembles(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Ensembles of some windows, reduced as their members arrive."""
        each = [self._ensemble(i) for i in places]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    def _ensemble(self, place: int) -> dict[str, np.ndarray]:
        planned, ensemble = self.planned, self.planned.ensemble
        assert self.bound is not None
        reduction = Reduction(self.bound, place, ensemble.quantiles)
        kept: list[np.ndarray] = []
        until = ensemble.until_ci
        achieved, requested = [], np.float32(np.nan)
        for some in self._members([planned.keys[place]]):
            fields = some.fields[0, ..., 0].cpu().numpy()
            reduction.add(fields)
            if ensemble.kept:
                kept.append(fields)
            if some.achieved is not None and some.requested is not None:
                achieved.append(some.achieved[0].cpu().numpy())
                requested = np.float32(some.requested[0].item())
            due = (reduction.n + reduction.failed) % CHECKED == 0
            if until is not None and due and reduction.half_width() <= until:
                break
        found = reduction.result()
        if ensemble.kept:
            found[planned.task.variable] = filled(np.concatenate(kept), ensemble.members)
        if achieved:
            found["functional_achieved"] = filled(np.concatenate(achieved), ensemble.members)
            found["functional_requested"] = np.asarray(requested)
        return found

    def _members(self, keys: Sequence[Window]) -> Iterator[Members]:
        planned = self.planned
        seeds = member_seeds(planned.seed, keys, planned.ensemble.members)
        batch = at_once(planned.ensemble, self.batch_size)
        return members_of(self.forecaster, self._context(keys), seeds, batch)

    def _context(self, keys: Sequence[Window]) -> torch.Tensor:
        pixels = windows.read(self.planned.task, self.planned.archive, keys)["context"]
        return torch.from_numpy(pixels).to(self.device)


def at_once(ensemble: Ensemble, batch_size: int) -> int:
    """Members that are drawn together."""
    if ensemble.until_ci is None:
        return batch_size
    # A power of two, which ends where the intervals are looked at.
    return 1 << (min(batch_size, CHECKED).bit_length() - 1)


def filled(members: np.ndarray, count: int) -> np.ndarray:
    """Members (m, ...) as (count, ...), NaN for those that were not drawn."""
    missing = np.full((count - len(members), *members.shape[1:]), np.nan, members.dtype)
    return np.concatenate([members, missing])
