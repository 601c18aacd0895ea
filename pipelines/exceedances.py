"""How many members reach the standard thresholds, near each pixel and at each lead time.

From these counts the probability of any of them can be looked at without drawing a member again.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.ensembles import dilate, disk
from pipelines.tasks import Task

RADII_KM = (0.0, 6.0, 12.0)
SST_THRESHOLDS = (0.5, 1.0, 1.5, 2.0)
"""In K, as of warm episodes: the ENSO tasks have no thresholds to be scored at."""


@dataclass(frozen=True)
class Levels:
    """What is counted."""

    thresholds: tuple[float, ...]
    """Ascending, in the task's units: a value of at least so much."""
    radii: tuple[float, ...]
    """In km: at any pixel within so far."""

    @classmethod
    def of(cls, task: Task) -> "Levels":
        """The task's own thresholds, and a few radii where a pixel has one size."""
        if task.archive == "enso":
            return cls(SST_THRESHOLDS, RADII_KM[:1])
        return cls(task.thresholds, RADII_KM)


class Exceedances:
    """Counts of one window, added up as members arrive."""

    def __init__(self, levels: Levels, pixel_km: tuple[float, float], shape: tuple[int, int, int]) -> None:
        """
        Args:
            levels: what is counted.
            pixel_km: height and width of a pixel.
            shape: (T, H, W).
        """
        self._thresholds = np.asarray(levels.thresholds, dtype=np.float32)
        self._widths = [disk(radius, pixel_km) for radius in levels.radii]
        self.count = np.zeros((len(levels.radii), len(levels.thresholds), *shape), dtype=np.uint16)
        self.known = np.zeros(shape, dtype=np.uint16)
        """Members with a value at the pixel, (T, H, W)."""

    def add(self, members: np.ndarray) -> None:
        """Take members (m, T, H, W) in; NaN is missing, and reaches nothing."""
        self.known += (~np.isnan(members)).sum(axis=0, dtype=np.uint16)
        # The number of thresholds that are reached: what is widened is one byte a pixel, for all thresholds.
        reached = np.zeros(members.shape, dtype=np.uint8)
        for threshold in self._thresholds:
            reached += members >= threshold
        m, t, h, w = members.shape
        for counts, widths in zip(self.count, self._widths, strict=True):
            near = dilate(reached.reshape(m * t, h, w), widths).reshape(reached.shape)
            for number, count in enumerate(counts):
                count += (near > number).sum(axis=0, dtype=np.uint16)

    def merge(self, count: np.ndarray, known: np.ndarray) -> None:
        """Take in what was added up elsewhere."""
        self.count += count
        self.known += known
