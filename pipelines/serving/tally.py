"""All that is added up of a forecast's members: on a replica those of a chunk, on the gateway all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from earthformer.forecasters import Members
from pipelines.ensembles import Reduction
from pipelines.events import Bound
from pipelines.exceedances import Exceedances, Levels
from pipelines.forecast import filled
from pipelines.plans import Drawing


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be made of a forecast's members; the same for all of its chunks."""

    bound: Bound
    levels: Levels
    quantiles: tuple[float, ...]
    keep_members: bool
    drawing: Drawing


class Tally:
    """Sums over members: moments, events, exceedances, and what guidance came to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reduction = Reduction(job.bound, 0, job.quantiles)
        grid, shape = job.bound.grid, (len(job.bound.lead_times), *job.bound.grid.shape)
        self.exceedances = Exceedances(job.levels, grid.pixel_km(0), shape)
        self.achieved = np.zeros(0, np.float32)
        """The functional of each member, of a guided forecast."""
        self.requested = np.float32(np.nan)

    @property
    def drawn(self) -> int:
        """Members so far, those that failed among them."""
        return self.reduction.n + self.reduction.failed

    def add(self, some: Members) -> np.ndarray:
        """Take members of one context in; returns their fields, float32 (m, T, H, W)."""
        fields: np.ndarray = some.fields[0, ..., 0].cpu().numpy()
        self.reduction.add(fields)
        self.exceedances.add(fields)
        if some.achieved is not None and some.requested is not None:
            self.achieved = np.concatenate([self.achieved, some.achieved[0].cpu().numpy()])
            self.requested = np.float32(some.requested[0].item())
        return fields

    def sums(self) -> dict[str, np.ndarray]:
        """All of it by name, for `merge`."""
        return {
            **self.reduction.sums(),
            "exceedance": self.exceedances.count,
            "exceedance_known": self.exceedances.known,
            "achieved": self.achieved,
            "requested": np.asarray(self.requested),
        }

    def merge(self, sums: Mapping[str, np.ndarray]) -> None:
        """Take in the `sums` of other members, of those of this forecast the next."""
        self.reduction.merge(sums)
        self.exceedances.merge(sums["exceedance"], sums["exceedance_known"])
        self.achieved = np.concatenate([self.achieved, sums["achieved"]])
        if len(sums["achieved"]):
            self.requested = np.float32(sums["requested"])

    def result(self, members: int) -> dict[str, np.ndarray]:
        """What `forecast_store.layout` lays out, without the members and the window's dimension, by name."""
        found: dict[str, Any] = self.reduction.result()
        found["exceedance"] = self.exceedances.count
        found["exceedance_known"] = self.exceedances.known
        if self.job.drawing.alignment is not None:
            found["functional_achieved"] = filled(self.achieved, members)
            found["functional_requested"] = np.asarray(self.requested)
        return found
