"""Forecasts on demand: accepted, drawn chunk by chunk over the replicas, folded in order, kept.

Chunks are drawn in parallel and folded in their order, so that the sums over the first k of them are the same
to the bit whoever drew them, after a replica's death and after a restart.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import xarray as xr
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.handle import DeploymentHandle
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from pipelines import configs, engine, forecast_store, plans, runs
from pipelines.archives import store
from pipelines.archives.store import Archive
from pipelines.errors import InputError, boundary_error
from pipelines.events import parse_events
from pipelines.exceedances import Levels
from pipelines.forecast import CHECKED, at_once
from pipelines.forecast_store import member_seeds
from pipelines.plans import Drawing, Ensemble
from pipelines.serving import summaries
from pipelines.serving.asked import EventsRequest, ForecastRequest, Inline, Referenced
from pipelines.serving.contexts import Context, Refused, read_context, refusing
from pipelines.serving.metrics import Metrics
from pipelines.serving.results import ID, Results, new_id
from pipelines.serving.settings import Settings
from pipelines.serving.tally import Job, Tally

ENDED = ("complete", "partial", "failed", "cancelled")
AHEAD = 2
"""Chunks that a forecast has under way for each replica: one is drawn while another waits there.

Replicas draw first what came first, so that forecasts with as many chunks under way share them fairly.
"""
ATTEMPTS = 8
"""At a chunk whose replica died."""
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


class Forecast:
    """One forecast, from its acceptance to its end."""

    def __init__(
        self, number: str, asked: ForecastRequest, context: Context, job: Job, ensemble: Ensemble, chunk: int
    ) -> None:
        self.id, self.asked, self.context, self.job, self.ensemble = number, asked, context, job, ensemble
        self.status, self.error = "waiting", ""
        self.attached = False
        """It belongs to a connection, and ends with it."""
        self.timings: dict[str, float] = {"created": time.time()}
        self.sampling_seconds = 0.0
        self.chunk, self.chunks_done = at_once(ensemble, chunk), 0
        self.seeds = member_seeds(asked.seed, context.samples.keys, ensemble.members)[0].numpy()
        self.tally = Tally(job)
        self.lock = asyncio.Lock()
        """Held while sums change, and while they are read."""
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def chunks(self) -> int:
        """Of all members."""
        return -(-len(self.seeds) // self.chunk)

    def members_of(self, chunk: int) -> slice:
        """Members of a chunk."""
        return slice(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.seeds)))

    @property
    def enough(self) -> bool:
        """Whether the intervals are as narrow as was asked."""
        until = self.ensemble.until_ci
        due = self.tally.drawn % CHECKED == 0 and self.tally.drawn > 0
        return until is not None and due and self.tally.reduction.half_width() <= until

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDED

    def notify(self) -> None:
        """Wake those who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait for the next change."""
        if not self.ended:
            await self._changed.wait()


def opened(settings: Settings) -> tuple[runs.Run, Drawing, dict[str, Archive]]:
    """The run, its sampling with the alignment network's hash and strength, and the archives by name.

    Raises:
        InputError: the run, the alignment's run or an archive is absent, unfinished or of another kind.
    """
    run = runs.open_run(settings.run)
    if run.config.trainable != "denoiser":
        raise InputError(
            f"{settings.run} is a run of {run.config.trainable}: needed a denoiser's, whose members differ"
        )
    guiding = plans.checked(Drawing(alignment=settings.alignment), run)
    archives = {name: store.open_archive(url) for name, url in settings.archives.items()}
    task = run.config.task
    for name, archive in archives.items():
        if archive.kind != task.archive:
            raise InputError(f"archive {name} is of {archive.kind}: task {task.name} needs {task.archive}")
    return run, guiding, archives


class Service:
    """Everything behind the HTTP API; one a process."""

    def __init__(self, settings: Settings, sampler: DeploymentHandle) -> None:
        """
        Raises:
            InputError: the run, the alignment's run or an archive is absent, unfinished or of another kind.
        """
        self.settings = settings
        self.run, self.guiding, self.archives = opened(settings)
        self.task = self.run.config.task
        _, *grid, _ = configs.fields(self.run.config)["context"]
        self.grid: tuple[int, int] = (grid[0], grid[1])
        self.results = Results(settings.results, settings.keep_hours)
        self.metrics = Metrics()
        self.draining = False
        self._sampler = sampler
        self._running: dict[str, Forecast] = {}
        self._unkept: dict[str, dict[str, Any]] = {}
        """How those ended that could not be written down."""
        self._turns = asyncio.Semaphore(settings.max_running)
        self._mean_seconds = 5.0
        self._sweeper: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------- its own life

    async def ready(self) -> bool:
        """Whether a replica answers within a second, or would be started when there is something to draw."""
        if self.settings.min_replicas == 0:
            return True
        try:
            return bool(await asyncio.wait_for(self._once("alive"), 1.0))
        except (TimeoutError, RayActorError):
            return False

    async def start(self) -> None:
        """Go on with what a stopped or killed service left unfinished; delete what has expired."""
        for number in await asyncio.to_thread(self.results.unfinished):
            await self._resume(number)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Take no more forecasts, let those under way end, and leave what does not for the next start."""
        self.draining = True
        tasks = [f.task for f in self._running.values() if f.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain_seconds)
        for forecast in list(self._running.values()):
            if forecast.task is not None and not forecast.attached:
                forecast.status = "left"
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
        lost = {"id": number, "status": "failed", "error": "the service was stopped before it was finished"}
        if request["attached"] or request["run_hash"] != self.run.hash:
            # Whoever waited for it has gone, or another model would finish it.
            await asyncio.to_thread(self.results.end, number, lost)
            return
        try:
            asked = ForecastRequest.model_validate(request["asked"])
            forecast = await asyncio.to_thread(self._forecast, number, asked, int(request["chunk"]))
        except (ValueError, InputError) as error:
            await asyncio.to_thread(self.results.end, number, {**lost, "error": str(error)})
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
        forecast = await asyncio.to_thread(self._forecast, new_id(), asked, self.settings.chunk)
        self._check_room()
        forecast.attached = attached
        # Counted from here on, so that no more are let in while this one is written down.
        self._running[forecast.id] = forecast
        request = {
            "asked": asked.model_dump(mode="json"),
            "created": forecast.timings["created"],
            "attached": attached,
            "chunk": forecast.chunk,
            "run_hash": self.run.hash,
        }
        try:
            await asyncio.to_thread(self.results.accept, forecast.id, request)
        except BaseException:
            del self._running[forecast.id]
            raise
        self._begin(forecast)
        return forecast

    def _check_room(self) -> None:
        most = self.settings.max_running + self.settings.max_waiting
        if self.draining or len(self._running) >= most:
            self.metrics.rejected.inc()
            turns = max(1, len(self._running) // self.settings.max_running)
            raise Overloaded(min(600, max(1, round(self._mean_seconds * turns))))

    def _forecast(self, number: str, asked: ForecastRequest, chunk: int) -> Forecast:
        """What is asked, checked against model, archives and limits."""
        limits = self.settings
        members = asked.members or (limits.max_members if asked.until_ci else 32)
        for name, found, most in (
            ("members", members, limits.max_members),
            ("steps", asked.steps, limits.max_steps),
            ("events", len(asked.events), limits.max_events),
            ("quantiles", len(asked.quantiles), limits.max_quantiles),
        ):
            if found > most:
                raise Refused(name, f"is {found}: this service allows {most}")
        drawing = replace(self.guiding, sampler=asked.sampler, steps=asked.steps)
        with refusing("steps"):
            plans.check_sampling(drawing, self.run)
        if asked.guidance is None:
            drawing = replace(drawing, alignment=None, alignment_hash=None, strength=None)
        elif self.guiding.alignment is None:
            raise Refused("guidance", "this service has no alignment network: needed none")
        else:
            strength = asked.guidance.strength
            drawing = replace(
                drawing,
                deviations=asked.guidance.deviations,
                strength=self.guiding.strength if strength is None else strength,
            )
        with refusing("events"):
            events = parse_events(asked.events, "events") if asked.events else ()
            ensemble = Ensemble(members, asked.until_ci, events, tuple(asked.quantiles), asked.keep_members)
        context = self.context(asked.context)
        with refusing("events"):
            bound = context.samples.bind(events)
        job = Job(bound, Levels.of(self.task), ensemble.quantiles, ensemble.keep_members, drawing)
        return Forecast(number, asked, context, job, ensemble, chunk)

    def context(self, asked: Referenced | Inline) -> Context:
        """The context that is asked for.

        Raises:
            Refused: it is unknown, malformed or does not fit.
        """
        most = int(self.settings.max_body_mb * 1e6)
        return read_context(asked, self.task, self.grid, self.archives, most)

    def validate(self, asked: EventsRequest) -> list[str]:
        """Names of the events, if all of them can be asked.

        Raises:
            Refused: an event does not fit.
        """
        with refusing("events"):
            events = parse_events(asked.events, "events")
        if asked.context is not None:
            with refusing("events"):
                self.context(asked.context).samples.bind(events)
        return [event.name for event in events]

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
        while forecast is not None and not forecast.ended:
            changed = asyncio.ensure_future(forecast.change())
            try:
                yield await self._live(forecast)
                await changed
            finally:
                changed.cancel()
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
            Unknown: there is none of this id, or no more, or it has no members.
        """
        forecast = self._running.get(number)
        if forecast is not None:
            async with forecast.lock:
                return await asyncio.to_thread(self._laid_out, forecast)
        await self.status(number)
        try:
            found = await asyncio.to_thread(store.open_store, self.results.store(number))
        except InputError as error:
            raise Unknown(number, False) from error
        return found.isel(window=0)

    async def redrawn(self, number: str, member: int) -> np.ndarray:
        """A member (T, H, W) drawn again by its seed, with those it was drawn with: the same to the bit."""
        request = await asyncio.to_thread(self.results.request, number)
        assert request is not None
        asked = ForecastRequest.model_validate({**request["asked"], "keep_members": True})
        forecast = await asyncio.to_thread(self._forecast, number, asked, int(request["chunk"]))
        some = member // forecast.chunk
        job, known = await self._prepared(forecast)
        sums = await self._draw(job, known, forecast.seeds[forecast.members_of(some)])
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
            outcome, error = ("partial" if some else "failed"), "the deadline has passed"
        except asyncio.CancelledError:
            outcome, error = ("left" if forecast.status == "left" else "cancelled"), "it was cancelled"
        except Exception as problem:
            log.exception("forecast %s failed", forecast.id)
            outcome, error = "failed", _said(problem)
        finally:
            if not started:
                self.metrics.waiting.dec()
        await self._end(forecast, outcome, error)

    async def _sample(self, forecast: Forecast) -> None:
        if forecast.ensemble.keep_members:
            await asyncio.to_thread(self._create, forecast)
        job, known = await self._prepared(forecast)
        waiting = iter(range(forecast.chunks_done, forecast.chunks))
        under_way: deque[asyncio.Task[dict[str, np.ndarray]]] = deque()
        saved = time.monotonic()
        try:
            while not forecast.enough:
                for chunk in waiting:
                    seeds = forecast.seeds[forecast.members_of(chunk)]
                    under_way.append(asyncio.create_task(self._draw(job, known, seeds)))
                    if len(under_way) >= AHEAD * self.settings.replicas:
                        break
                if not under_way:
                    return
                sums = await under_way.popleft()
                async with forecast.lock:
                    await _whole(self._fold, forecast, sums)
                if time.monotonic() - saved > CHECKPOINT_SECONDS and not forecast.asked.quantiles:
                    await asyncio.to_thread(
                        self.results.checkpoint, forecast.id, forecast.chunks_done, forecast.tally.sums()
                    )
                    saved = time.monotonic()
                forecast.notify()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _prepared(self, forecast: Forecast) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """The job, and what the members of a context share, where every replica finds them."""
        known = await self._called("prepare", forecast.context.pixels, forecast.job.drawing)
        return ray.put(forecast.job), ray.put(known)

    async def _draw(
        self, job: ray.ObjectRef, known: ray.ObjectRef, seeds: np.ndarray
    ) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        sums: dict[str, np.ndarray] = await self._called("draw", job, known, seeds)
        self.metrics.chunk_seconds.observe(time.perf_counter() - began)
        self.metrics.members.inc(len(seeds))
        self.metrics.device_seconds.inc(float(sums["seconds"]))
        return sums

    async def _called(self, method: str, *arguments: Any) -> Any:
        """What a replica answers; another is asked where it dies meanwhile."""
        died = retry_if_exception_type((RayActorError, ObjectLostError))
        pause = wait_exponential(multiplier=0.1, max=5)
        retrying = AsyncRetrying(
            retry=died, stop=stop_after_attempt(ATTEMPTS), wait=pause, after=self._died, reraise=True
        )
        return await retrying(self._once, method, *arguments)

    async def _once(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._sampler, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _died(self, state: RetryCallState) -> None:
        self.metrics.retries.inc()

    def _fold(self, forecast: Forecast, sums: Mapping[str, np.ndarray]) -> None:
        """Take the next chunk in."""
        if forecast.ensemble.keep_members:
            region = {"window": slice(0, 1), "member": forecast.members_of(forecast.chunks_done)}
            url, kept = self.results.store(forecast.id), {self.task.variable: sums["fields"][None]}
            record = store.region_record("", region, store.write_region(url, "", kept, region))
            store.write_record(url, 1 + forecast.chunks_done, {"regions": [record]})
        forecast.tally.merge(sums)
        forecast.chunks_done += 1
        forecast.sampling_seconds += float(sums["seconds"])
        forecast.timings.setdefault("first_probability", time.time())

    # -------------------------------------------------------------------------------------- the end

    async def _end(self, forecast: Forecast, outcome: str, error: str) -> None:
        seconds = time.time() - forecast.timings.get("started", time.time())
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        forecast.timings["ended"] = time.time()
        forecast.error = "" if outcome == "complete" else error
        try:
            if outcome == "left":
                await asyncio.to_thread(
                    self.results.checkpoint, forecast.id, forecast.chunks_done, forecast.tally.sums()
                )
            else:
                if outcome in ("complete", "partial"):
                    await asyncio.to_thread(self._write, forecast)
                forecast.status = outcome
                status = await self._live(forecast)
                await asyncio.to_thread(self.results.end, forecast.id, status)
        except Exception as problem:
            # The disk is full, the store is gone: the client is told, and after a restart it is tried again.
            log.exception("forecast %s could not be kept", forecast.id)
            forecast.error, forecast.status = _said(problem), "failed"
            self._unkept[forecast.id] = await self._live(forecast)
        self.metrics.ended.labels(forecast.status).inc()
        self._running.pop(forecast.id, None)
        forecast.notify()

    def _layout(self, forecast: Forecast) -> xr.Dataset:
        said = f"prediff forecast of {self.task.variable}, {self.task.name}, on demand"
        return forecast_store.layout(
            forecast.context.samples,
            forecast.ensemble,
            seed=forecast.asked.seed,
            drawing=forecast.job.drawing,
            attrs={
                "title": said,
                "task": self.task.name,
                "forecaster": "prediff",
                "run": self.run.url,
                "run_hash": self.run.hash,
                "context": str(forecast.context.said),
                "seed": forecast.asked.seed,
            },
            shard_members=forecast.chunk,
            levels=forecast.job.levels,
        )

    def _create(self, forecast: Forecast) -> None:
        config = {
            "kind": "forecast",
            "id": forecast.id,
            "run_hash": self.run.hash,
            "asked": forecast.asked.model_dump(mode="json", exclude={"context"}),
            "context": forecast.context.said,
        }
        shards = 1 + (forecast.chunks if forecast.ensemble.keep_members else 0)
        url = self.results.store(forecast.id)
        store.create(url, {"": self._layout(forecast)}, config=config, shards=shards)

    def _write(self, forecast: Forecast) -> None:
        """The whole result; its completion record last."""
        self._create(forecast)
        url, whole = self.results.store(forecast.id), {"window": slice(0, 1)}
        values = {name: each[None] for name, each in forecast.tally.result(forecast.ensemble.members).items()}
        regions = [store.region_record("", whole, store.write_region(url, "", values, whole))]
        store.write_record(url, 0, {"regions": regions})
        if forecast.ensemble.keep_members:
            for chunk in range(forecast.chunks_done, forecast.chunks):
                # What was not needed any more is missing, and not to be waited for.
                store.write_record(url, 1 + chunk, {"regions": []})
        store.complete(url, {"counts": {"windows": 1, "members": forecast.tally.reduction.n}})

    def _laid_out(self, forecast: Forecast) -> xr.Dataset:
        """What the store would hold by now, but for members."""
        laid_out = self._layout(forecast).isel(window=0)
        values = forecast.tally.result(forecast.ensemble.members)
        return laid_out.drop_vars(set(laid_out.data_vars) - set(values)).assign(
            {name: laid_out[name].copy(data=values[name].copy()) for name in values}
        )

    async def _live(self, forecast: Forecast) -> dict[str, Any]:
        async with forecast.lock:
            return await asyncio.to_thread(summaries.status, forecast, self)


async def _whole(work: Callable[..., None], *arguments: Any) -> None:
    """Do some work in a thread, and wait for its end even when cancelled meanwhile."""
    done = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await done
        raise


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
