"""The state of one forecast of the service."""

import asyncio
import time

import xarray as xr

from pipelines.forecast import CHECKED, at_once
from pipelines.forecast_store import member_seeds
from pipelines.plans import Ensemble
from pipelines.serving.asked import ForecastRequest
from pipelines.serving.contexts import Context
from pipelines.serving.tally import Job, Tally

ENDED = ("complete", "partial", "failed", "cancelled")


class Forecast:
    """One forecast, from its acceptance to its end."""

    def __init__(
        self, number: str, asked: ForecastRequest, context: Context, job: Job, ensemble: Ensemble, chunk: int
    ) -> None:
        self.id, self.asked, self.context, self.job, self.ensemble = number, asked, context, job, ensemble
        self.status, self.error = "waiting", ""
        self.attached = False
        """It belongs to a connection, and ends with it."""
        self.stopped = False
        """The service is about to stop, and does not wait for it any longer."""
        self.timings: dict[str, float] = {"created": time.time()}
        self.sampling_seconds = 0.0
        self.chunk, self.chunks_done = at_once(ensemble, chunk), 0
        self.seeds = member_seeds(asked.seed, context.samples.keys, ensemble.members)[0].numpy()
        self.tally = Tally(job)
        self.lock = asyncio.Lock()
        """Held while sums change, and while they are read."""
        self.template: xr.Dataset | None = None
        """The store's, once it was laid out."""
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
