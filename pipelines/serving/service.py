"""Forecasts on demand: accepted, drawn chunk by chunk over the replicas, folded in order, kept.

Chunks are drawn in parallel and folded in their order, so that the sums over the first k of them are the same
to the bit whoever drew them, after a replica's death and after a restart.
"""

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np
import xarray as xr
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from pipelines import engine
from pipelines.archives import store
from pipelines.errors import InputError, boundary_error
from pipelines.serving import keeping, summaries
from pipelines.serving.asked import ForecastRequest
from pipelines.serving.forecast import Forecast
from pipelines.serving.metrics import Metrics
from pipelines.serving.model import Model
from pipelines.serving.replicas import Replicas
from pipelines.serving.results import ID, Results, new_id
from pipelines.serving.settings import Settings

AHEAD = 2
"""Chunks that a forecast has under way for each replica: one is drawn while another waits there.

Replicas draw first what came first, so that forecasts with as many chunks under way share them fairly.
"""
WITH_RESULT = ("complete", "partial")
LATE = "the deadline has passed"
STOPPED = "the service was stopped before it was finished"
CHECKPOINT_SECONDS = 2.0
SWEEP_SECONDS = 60.0

log = logging.getLogger("ray.serve")


class Overloaded(Exception):
    """No room for one more forecast."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"as many forecasts wait as may: try again in {retry_after} s")
        self.retry_after = retry_after


class Unknown(Exception):
    """There is no such forecast, or no more."""

    def __init__(self, number: str, expired: bool) -> None:
        what = "has expired" if expired else "is unknown"
        super().__init__(f"forecast {number!r:.40} {what}")
        self.expired = expired


class WithoutResult(Exception):
    """A forecast has no result, or none yet, or one that cannot be had again."""


class Service:
    """Everything behind the HTTP API; one a process."""

    def __init__(self, settings: Settings, sampler: DeploymentHandle) -> None:
        """
        Raises:
            InputError: the run, the alignment's run or an archive is absent, unfinished or of another kind.
        """
        self.settings, self.model = settings, Model.open(settings)
        self.results = Results(settings.results, settings.keep_hours)
        self.metrics = Metrics()
        self.draining = False
        self.answering = 0
        """HTTP requests that have yet to be answered."""
        self._replicas = Replicas(sampler, self.metrics)
        self._running: dict[str, Forecast] = {}
        self._arriving = 0
        self._unkept: dict[str, dict[str, Any]] = {}
        """How those ended that could not be written down."""
        self._turns = asyncio.Semaphore(settings.max_running)
        self._mean_seconds = 5.0
        self._sweeper: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------- its own life

    async def ready(self) -> bool:
        """Whether a replica answers within a second, or would be started when there is something to draw."""
        return self.settings.min_replicas == 0 or await self._replicas.alive()

    async def start(self) -> None:
        """Go on with what a stopped or killed service left unfinished; delete what has expired."""
        for number in await asyncio.to_thread(self.results.unfinished):
            await self._resume(number)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Take no more forecasts, let those under way end, and leave what does not for the next start."""
        self.draining = True
        while self._arriving:
            # Within moments they are turned away, or under way.
            await asyncio.sleep(0.05)
        tasks = [f.task for f in self._running.values() if f.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain_seconds)
        for forecast in list(self._running.values()):
            forecast.stopped = True
            if forecast.task is not None:
                forecast.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.results.sweep)
            except Exception:
                log.exception("expired forecasts could not be deleted")
            await asyncio.sleep(SWEEP_SECONDS)

    async def _resume(self, number: str) -> None:
        request = await asyncio.to_thread(self.results.request, number)
        assert request is not None
        try:
            asked = ForecastRequest.model_validate(request["asked"])
            forecast = await asyncio.to_thread(self.model.forecast, number, asked, int(request["chunk"]))
        except Exception as problem:
            # One that cannot be gone on with is no reason not to start.
            log.exception("forecast %s could not be resumed", number)
            lost = {"id": number, "status": "failed", "error": f"{STOPPED}: {_said(problem)}"}
            await asyncio.to_thread(self.results.end, number, lost)
            return
        if request["attached"] or request.get("identity") != self.model.identity(asked.context):
            # Whoever waited for it has gone, or another model or context would finish it.
            await self._end(forecast, "failed", STOPPED)
            return
        found = await asyncio.to_thread(self.results.progress, number)
        if found is not None and not asked.quantiles:
            forecast.chunks_done, sums = found
            forecast.tally.merge(sums)
        forecast.timings["created"] = request["created"]
        self._begin(forecast)

    # ------------------------------------------------------------------------------------- requests

    async def submit(self, asked: ForecastRequest, attached: bool) -> Forecast:
        """Accept a forecast; it is under way when this returns.

        Raises:
            Refused: it asks for what does not fit.
            Overloaded: too many wait already, or the service is about to stop.
        """
        self._check_room()
        # Counted from here on: of many who come at once no more are looked into than there is room for.
        self._arriving += 1
        try:
            forecast = await asyncio.to_thread(self.model.forecast, new_id(), asked, self.settings.chunk)
            if self.draining:
                raise self._no_room()
            forecast.attached = attached
            request = {
                "asked": asked.model_dump(mode="json"),
                "created": forecast.timings["created"],
                "attached": attached,
                "chunk": forecast.chunk,
                "identity": self.model.identity(asked.context),
            }
            await asyncio.to_thread(self.results.accept, forecast.id, request)
            self._begin(forecast)
        finally:
            self._arriving -= 1
        return forecast

    def _check_room(self) -> None:
        most = self.settings.max_running + self.settings.max_waiting
        if self.draining or len(self._running) + self._arriving >= most:
            raise self._no_room()

    def _no_room(self) -> Overloaded:
        self.metrics.rejected.inc()
        turns = max(1, len(self._running) // self.settings.max_running)
        # Not all at the same time, or they would be turned away again.
        seconds = self._mean_seconds * turns * random.uniform(1, 2)
        return Overloaded(min(600, max(1, math.ceil(seconds))))

    async def cancel(self, number: str) -> None:
        """End a forecast; nothing happens to one that has ended.

        Raises:
            Unknown: there is none of this id.
        """
        forecast = self._running.get(number)
        if forecast is None:
            await self.status(number)
            return
        await self.drop(forecast)

    async def drop(self, forecast: Forecast) -> None:
        """End a forecast that may be under way."""
        if forecast.task is not None and not forecast.ended:
            forecast.task.cancel()
            await asyncio.wait([forecast.task])

    async def follow(self, number: str) -> AsyncIterator[dict[str, Any]]:
        """The status of a forecast now, and after every change until it has ended."""
        forecast = self._running.get(number)
        while number in self._running and forecast is not None and not forecast.ended:
            changed = asyncio.ensure_future(forecast.change())
            try:
                yield await self._live(forecast)
                await changed
            finally:
                changed.cancel()
        if forecast is None or forecast.ended:
            yield await self.status(number)

    async def status(self, number: str) -> dict[str, Any]:
        """How a forecast stands, or how it ended.

        Raises:
            Unknown: there is none of this id, or no more.
        """
        if number in self._running:
            return await self._live(self._running[number])
        if number in self._unkept:
            return self._unkept[number]
        if not ID.fullmatch(number):
            raise Unknown(number, False)
        expired = await asyncio.to_thread(self.results.expired, number)
        found = await asyncio.to_thread(self.results.status, number)
        if found is None or expired:
            raise Unknown(number, expired)
        return found

    async def dataset(self, number: str) -> xr.Dataset:
        """A forecast's result so far, or as it ended, without the dimension of windows; read lazily.

        Raises:
            Unknown: there is none of this id, or no more.
            WithoutResult: it has failed, or was cancelled.
        """
        forecast = self._running.get(number)
        if forecast is not None:
            async with forecast.lock:
                return await asyncio.to_thread(keeping.so_far, forecast, self.model)
        await self.finished(number)
        return await self.stored(number)

    async def finished(self, number: str) -> dict[str, Any]:
        """How a forecast ended that has a result.

        Raises:
            Unknown: there is none of this id, or no more.
            WithoutResult: it has none, or none yet.
        """
        status = await self.status(number)
        if status["status"] not in WITH_RESULT:
            raise WithoutResult(f"is {status['status']}: needed a forecast that is complete or partial")
        return status

    async def stored(self, number: str) -> xr.Dataset:
        """The result of a finished forecast, without the dimension of windows; read lazily."""
        found = await asyncio.to_thread(store.open_store, self.results.store(number))
        return found.isel(window=0)

    async def redrawn(self, number: str, member: int) -> np.ndarray:
        """A member (T, H, W) drawn again by its seed, with those it was drawn with: the same to the bit.

        Raises:
            WithoutResult: the service has another model now, or another archive of this name.
        """
        request = await asyncio.to_thread(self.results.request, number)
        assert request is not None
        asked = ForecastRequest.model_validate({**request["asked"], "keep_members": True})
        if request.get("identity") != self.model.identity(asked.context):
            raise WithoutResult(
                "was made by another model or archive than is served now: its members are gone"
            )
        forecast = await asyncio.to_thread(self.model.forecast, number, asked, int(request["chunk"]))
        some = member // forecast.chunk
        job, known = await self._replicas.prepared(forecast.context.pixels, forecast.job)
        sums = await self._replicas.draw(job, known, forecast.seeds[forecast.members_of(some)])
        fields: np.ndarray = sums["fields"][member % forecast.chunk]
        return fields

    # -------------------------------------------------------------------------------------- drawing

    def _begin(self, forecast: Forecast) -> None:
        self._running[forecast.id] = forecast
        self.metrics.waiting.inc()
        forecast.task = asyncio.create_task(self._life(forecast))

    async def _life(self, forecast: Forecast) -> None:
        """From waiting to the end, whatever it is."""
        started = False
        try:
            deadline = forecast.asked.deadline or self.settings.max_seconds
            left = forecast.timings["created"] + min(deadline, self.settings.max_seconds) - time.time()
            async with asyncio.timeout(max(0.0, left)), self._turns:
                self.metrics.waiting.dec()
                started = True
                with self.metrics.running.track_inprogress():
                    forecast.timings["started"] = time.time()
                    forecast.status = "running"
                    forecast.notify()
                    await self._sample(forecast)
            outcome, error = "complete", ""
        except TimeoutError:
            some = forecast.tally.reduction.n > 0
            outcome, error = ("partial" if some else "failed"), LATE
        except asyncio.CancelledError:
            outcome, error = "cancelled", "it was cancelled"
            if forecast.stopped:
                outcome, error = ("failed" if forecast.attached else "left"), STOPPED
        except Exception as problem:
            log.exception("forecast %s failed", forecast.id)
            outcome, error = "failed", _said(problem)
        finally:
            if not started:
                self.metrics.waiting.dec()
        await _whole(self._end(forecast, outcome, error))

    async def _sample(self, forecast: Forecast) -> None:
        """Draw its members chunk by chunk, until there are enough."""
        url = self.results.store(forecast.id)
        if forecast.ensemble.keep_members:
            await asyncio.to_thread(keeping.create, forecast, self.model, url)
        job, known = await self._replicas.prepared(forecast.context.pixels, forecast.job)
        waiting = iter(range(forecast.chunks_done, forecast.chunks))
        under_way: deque[asyncio.Task[dict[str, np.ndarray]]] = deque()
        due = time.monotonic() + CHECKPOINT_SECONDS
        try:
            while not forecast.enough:
                for chunk in waiting:
                    seeds = forecast.seeds[forecast.members_of(chunk)]
                    under_way.append(asyncio.create_task(self._replicas.draw(job, known, seeds)))
                    if len(under_way) >= AHEAD * self.settings.replicas:
                        break
                if not under_way:
                    return
                sums = await under_way.popleft()
                async with forecast.lock:
                    await _whole(asyncio.to_thread(keeping.fold, forecast, self.model, url, sums))
                forecast.notify()
                began = time.monotonic()
                if began > due:
                    await self._checkpoint(forecast)
                    # Large fields, or a slow store: a twentieth of the time at most.
                    took = time.monotonic() - began
                    due = began + max(CHECKPOINT_SECONDS, 20 * took)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _checkpoint(self, forecast: Forecast) -> None:
        """Remember how far it is; with quantiles, which need all members, it would begin anew."""
        if not forecast.asked.quantiles:
            sums = forecast.tally.sums()
            await asyncio.to_thread(self.results.checkpoint, forecast.id, forecast.chunks_done, sums)

    # -------------------------------------------------------------------------------------- the end

    async def _end(self, forecast: Forecast, outcome: str, error: str) -> None:
        seconds = time.time() - forecast.timings.get("started", time.time())
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        forecast.timings["ended"] = time.time()
        forecast.error = "" if outcome == "complete" else error
        try:
            if outcome == "left":
                await self._checkpoint(forecast)
            else:
                if outcome in ("complete", "partial"):
                    url = self.results.store(forecast.id)
                    await asyncio.to_thread(keeping.write, forecast, self.model, url)
                forecast.status = outcome
                status = await self._live(forecast)
                await asyncio.to_thread(self.results.end, forecast.id, status)
        except Exception as problem:
            # The disk is full, the store is gone: the client is told, and after a restart it is tried again.
            log.exception("forecast %s could not be kept", forecast.id)
            outcome = "failed"
            forecast.error, forecast.status = _said(problem), outcome
            self._unkept[forecast.id] = await self._live(forecast)
        self.metrics.ended.labels(outcome).inc()
        self._running.pop(forecast.id, None)
        forecast.notify()

    async def _live(self, forecast: Forecast) -> dict[str, Any]:
        async with forecast.lock:
            return await asyncio.to_thread(summaries.status, forecast, self.model)


async def _whole(work: Awaitable[None]) -> None:
    """Wait for the end of some work even when cancelled meanwhile."""
    done, cancelled = asyncio.ensure_future(work), False
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            cancelled = True
    done.result()
    if cancelled:
        raise asyncio.CancelledError


def _said(problem: BaseException) -> str:
    """What a client may know of a failure: our own words, or none."""
    known = boundary_error(problem)
    if isinstance(known, InputError):
        return str(known)
    if isinstance(problem, RayActorError):
        return "the replicas of the model died again and again"
    return "an internal error; the service's log has more"


def threads(settings: Settings) -> int:
    """Of a replica: the replicas share the processors."""
    return max(1, engine.cores() // settings.replicas)
