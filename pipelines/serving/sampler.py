"""The model behind the service: replicas that draw members and give back sums."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch

from earthformer.forecasters import drawn, prepared
from pipelines import engine, plans, runs
from pipelines.plans import Drawing
from pipelines.serving.tally import Job, Tally

LEAST = 19
"""The largest niceness."""
Known = dict[str, np.ndarray]
"""What all members of a context share."""


class Sampler:
    """One replica of the model."""

    def __init__(self, run: str, alignment: str | None, gpu: bool, threads: int) -> None:
        engine.quiet()
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if gpu else "cpu")
        self._forecaster = cast(Any, runs.open_run(run).forecaster()).to(self._device)
        module = cast(Any, runs.open_run(alignment).module()) if alignment else None
        self._constraint = module.to(self._device) if module is not None else None
        # One at a time, and not on the event loop: that answers health checks meanwhile.
        # On processors it gives way, with the threads of PyTorch that it starts, to whoever answers requests.
        self._one = ThreadPoolExecutor(1, initializer=os.nice, initargs=(0 if gpu else LEAST,))

    async def alive(self) -> bool:
        """Whether there is a replica."""
        return True

    async def prepare(self, pixels: np.ndarray, drawing: Drawing) -> Known:
        """What all members of a context (1, T_in, H, W, 1) share, above all its latents."""
        return await self._alone(self._prepare, pixels, drawing)

    async def draw(self, job: Job, known: Known, seeds: np.ndarray) -> dict[str, np.ndarray]:
        """Sums over the members of some seeds (m,), and if asked their `fields` (m, T, H, W).

        They follow from the arguments alone, so that a chunk may be drawn again anywhere.
        """
        return await self._alone(self._draw, job, known, seeds)

    async def _alone(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._one, work, *arguments)

    def _prepare(self, pixels: np.ndarray, drawing: Drawing) -> Known:
        plans.set_up(self._forecaster, drawing, self._constraint)
        known = prepared(self._forecaster, torch.tensor(pixels).to(self._device))
        return {name: tensor.cpu().numpy() for name, tensor in known.items()}

    def _draw(self, job: Job, known: Known, seeds: np.ndarray) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        plans.set_up(self._forecaster, job.drawing, self._constraint)
        on_device = {name: torch.tensor(values).to(self._device) for name, values in known.items()}
        tally = Tally(job)
        fields = tally.add(drawn(self._forecaster, on_device, torch.tensor(seeds)[None]))
        sums = tally.sums()
        if job.keep_members:
            sums["fields"] = fields
        return {**sums, "seconds": np.array(time.perf_counter() - began)}
