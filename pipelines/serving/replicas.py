"""The replicas of the model as the gateway sees them: asked for chunks, and asked again when one dies."""

import asyncio
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.handle import DeploymentHandle
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from pipelines.serving.metrics import Metrics
from pipelines.serving.tally import Job

ATTEMPTS = 8
"""At a chunk whose replica died."""


class Replicas:
    """The sampler deployment."""

    def __init__(self, handle: DeploymentHandle, metrics: Metrics) -> None:
        self._sampler, self._metrics = handle, metrics

    async def alive(self) -> bool:
        """Whether one answers within a second."""
        try:
            return bool(await asyncio.wait_for(self._once("alive"), 1.0))
        except (TimeoutError, RayActorError):
            return False

    async def prepared(self, pixels: np.ndarray, job: Job) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """The job, and what the members of a context share, where every replica finds them."""
        known = await self._called("prepare", pixels, job.drawing)
        return ray.put(job), ray.put(known)

    async def draw(
        self, job: ray.ObjectRef, known: ray.ObjectRef, seeds: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Sums over the members of some seeds, as `Sampler.draw`.

        Raises:
            RayActorError: replica after replica died.
        """
        began = time.perf_counter()
        sums: dict[str, np.ndarray] = await self._called("draw", job, known, seeds)
        self._metrics.chunk_seconds.observe(time.perf_counter() - began)
        self._metrics.members.inc(len(seeds))
        self._metrics.device_seconds.inc(float(sums["seconds"]))
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
        self._metrics.retries.inc()
