"""Ensembles reduced as their members arrive: moments, quantiles, and probabilities of events.

Nothing that is kept grows with the number of members, but for a temporary file where quantiles are asked.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv

from earthformer.scores import nino34
from pipelines.events import NINO34, Bound, BoundEvent, vil_kg_m2

LEVEL = 0.95
"""Of confidence intervals."""
BLOCK_BYTES = 8 << 20
"""Values worked on at once, as float64."""

_COMPARE = {">=": np.greater_equal, ">": np.greater, "<=": np.less_equal, "<": np.less}


def interval(k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval (95 %) of a probability of which k of n independent members speak.

    Jeffreys' as modified by Brown, Cai and DasGupta (2001), which is Clopper and Pearson's exact one where
    no or all members have the event: it holds the truth in 91 % of cases at least and 95 % on average, where
    Wilson's falls to 84 % for rare events, those that matter, and Jeffreys' own to 88 %.

    Args:
        k: members with the event, integers of any shape.
        n: members that were asked, of the same shape; NaN where there are none.

    Returns:
        Lower and upper ends, float64 of the same shape.
    """
    # Few pairs differ, and the inverse of the incomplete beta function is slow.
    scale = int(n.max(initial=0)) + 1
    pairs, inverse = np.unique(k.astype(np.int64) * scale + n, return_inverse=True)
    yes, of = np.divmod(pairs, scale)
    tail = (1 - LEVEL) / 2
    low, high = (betaincinv(yes + 0.5, of - yes + 0.5, p) for p in (tail, 1 - tail))
    exact = tail ** (1 / np.maximum(of, 1))
    low = np.select([yes <= 1, yes == of], [0.0, exact], low)
    high = np.select([yes >= of - 1, yes == 0], [1.0, 1 - exact], high)
    low, high = (np.where(of == 0, np.nan, end) for end in (low, high))
    return low[inverse].reshape(k.shape), high[inverse].reshape(k.shape)


class Reduction:
    """The ensemble of one window, reduced as members arrive.

    Members in any order and any chunking give the same, to rounding.
    """

    def __init__(self, bound: Bound, window: int, quantiles: Sequence[float] = ()) -> None:
        """Start without members.

        Args:
            bound: what is asked.
            window: index of the window among those that `bound` was made for.
            quantiles: from 0 to 1, each exact.
        """
        self.bound = bound
        self.n = 0
        """Members that count: independent, so this is the effective number as well."""
        self.failed = 0
        """Members without one finite value, left out."""
        self._shape = (len(bound.lead_times), *bound.grid.shape)
        self._moments = _Moments(int(np.prod(self._shape)))
        self._counters = [_Counter(event, bound, window) for event in bound.events]
        self._spill = _Spill(quantiles) if len(quantiles) else None

    def add(self, members: np.ndarray) -> None:
        """Take members in.

        Args:
            members: float32 (m, T, H, W) in the task's units; what is not finite is missing.

        Raises:
            ValueError: they are of another shape.
        """
        if members.shape[1:] != self._shape:
            raise ValueError(f"members of shape {members.shape[1:]}: needed {self._shape}")
        finite = np.isfinite(members)
        whole = bool(finite.all())
        if not whole:
            alive = finite.any(axis=(1, 2, 3))
            self.failed += int((~alive).sum())
            members = np.where(finite, members, np.float32(np.nan))[alive]
        del finite
        self.n += len(members)
        if not len(members):
            return
        self._moments.add(members.reshape(len(members), -1), whole)
        for counter in self._counters:
            counter.add(members, whole)
        if self._spill is not None:
            self._spill.add(members)

    def sums(self) -> dict[str, np.ndarray]:
        """All that was added up, by name: what `merge` takes. Without quantiles of a size that stays."""
        found: dict[str, Any] = {"n": self.n, "failed": self.failed}
        found |= {name: getattr(self._moments, name) for name in ("count", "mean", "squares")}
        for i, counter in enumerate(self._counters):
            found |= {f"k{i}": counter.k, f"n{i}": counter.n}
        if self._spill is not None:
            found["members"] = self._spill.members()
        return {name: np.asarray(values) for name, values in found.items()}

    def merge(self, sums: Mapping[str, np.ndarray]) -> None:
        """Take in the `sums` of other members.

        Those of one `add` give, to the bit, what adding its members here would have given.
        """
        self.n += int(sums["n"])
        self.failed += int(sums["failed"])
        everything = slice(None)
        self._moments.merge(everything, sums["count"], sums["mean"], sums["squares"])
        for i, counter in enumerate(self._counters):
            counter.k += sums[f"k{i}"]
            counter.n += sums[f"n{i}"]
        if self._spill is not None and sums["members"].size:
            self._spill.add(sums["members"])

    def half_width(self) -> float:
        """Half the width of the widest interval of any event, over all pixels that any member speaks of.

        Infinite before the first member; 0 where no event can be asked of this window.
        """
        asked = [counter for counter in self._counters if counter.here]
        if not asked or self.n == 0:
            return np.inf if asked else 0.0
        widest = 0.0
        for counter in asked:
            low, high = interval(counter.k[counter.n > 0], counter.n[counter.n > 0])
            widest = max(widest, float((high - low).max(initial=0.0)) / 2)
        return widest

    def result(self) -> dict[str, np.ndarray]:
        """What `forecast_store.reductions` lays out, of this window and without its dimension, by name."""
        name, (mean, stdev) = self.bound.task.variable, self._moments.result()
        found = {
            f"{name}_mean": mean.reshape(self._shape),
            f"{name}_stdev": stdev.reshape(self._shape),
            "n_members": np.int32(self.n),
            "failed_members": np.int32(self.failed),
            "smallest_resolvable": np.float32(1 / self.n if self.n else np.nan),
        }
        if self._spill is not None:
            found[f"{name}_quantile"] = self._spill.result(self._shape)
        return _float32(found) | self.probabilities()

    def probabilities(self) -> dict[str, np.ndarray]:
        """Those of `result` that speak of events."""
        found: dict[str, Any] = {}
        for prefix, scalar in (("", False), ("regional_", True)):
            asked = [counter for counter in self._counters if counter.event.scalar == scalar]
            if asked:
                k, n = (np.stack([getattr(counter, of) for counter in asked]) for of in ("k", "n"))
                found[f"{prefix}probability"] = k / np.where(n > 0, n, np.nan)
                found[f"{prefix}ci_low"], found[f"{prefix}ci_high"] = interval(k, n)
        return _float32(found)


def _float32(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        key: np.asarray(value, np.float32) if np.asarray(value).dtype.kind == "f" else np.asarray(value)
        for key, value in found.items()
    }


class _Moments:
    """Mean and central second moment of each pixel, merged by Chan et al. (1983)."""

    def __init__(self, size: int) -> None:
        self.count = np.zeros(size, dtype=np.int64)
        self.mean, self.squares = np.zeros(size), np.zeros(size)

    def add(self, values: np.ndarray, whole: bool) -> None:
        """Take (m, P) in; `whole`: nothing is NaN."""
        for block in _blocks(values.shape[1], len(values)):
            part = values[:, block].astype(np.float64)
            count: Any = len(part)
            if not whole:
                known = ~np.isnan(part)
                count = known.sum(axis=0)
                part[~known] = 0
            mean = part.sum(axis=0) / np.maximum(count, 1)
            part -= mean
            if not whole:
                part *= known
            self.merge(block, count, mean, np.einsum("mp,mp->p", part, part))

    def merge(self, block: slice, count: Any, mean: np.ndarray, squares: np.ndarray) -> None:
        """Take in the moments of other members at some pixels."""
        before = self.count[block]
        total = before + count
        share = count / np.maximum(total, 1)
        difference = mean - self.mean[block]
        self.mean[block] += difference * share
        self.squares[block] += squares + difference**2 * before * share
        self.count[block] = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean, and standard deviation of the population that members are a sample of; NaN of too few."""
        mean = np.where(self.count > 0, self.mean, np.nan)
        variance = self.squares / np.where(self.count > 1, self.count - 1, np.nan)
        return mean, np.sqrt(variance)


class _Spill:
    """Members in a temporary file without a name, for quantiles."""

    def __init__(self, quantiles: Sequence[float]) -> None:
        self.quantiles, self.count, self.size = np.asarray(quantiles, dtype=np.float64), 0, 0
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed with the object

    def add(self, members: np.ndarray) -> None:
        members = np.ascontiguousarray(members, dtype=np.float32)
        self.count, self.size = self.count + len(members), members[0].size
        self.file.write(members.data)

    def members(self) -> np.ndarray:
        """Those that were added, float32 (m, P)."""
        self.file.seek(0)
        values = np.frombuffer(self.file.read(), dtype=np.float32)
        return values.reshape(self.count, -1) if self.count else values

    def result(self, shape: tuple[int, ...]) -> np.ndarray:
        """Each quantile of what is known, float32 (quantiles, *shape); NaN where nothing is."""
        found = np.full((len(self.quantiles), int(np.prod(shape))), np.nan, dtype=np.float32)
        for block in _blocks(self.size, self.count):
            part = np.empty((self.count, block.stop - block.start), dtype=np.float32)
            for member, row in enumerate(part):
                self.file.seek((member * self.size + block.start) * 4)
                self.file.readinto(row.data)  # type: ignore[attr-defined]
            found[:, block] = _quantiles(part.T.copy(), self.quantiles)
        self.file.seek(0, 2)
        return found.reshape(-1, *shape)


def _quantiles(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Of (P, m) without NaN, as `numpy.quantile`: (quantiles, P). Sorts in place."""
    values.sort(axis=1)  # NaN goes last
    known = values.shape[1] - np.isnan(values).sum(axis=1)
    at = quantiles[:, None] * np.maximum(known - 1, 0)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(known - 1, 0))
    rows = np.arange(len(values))
    low, high = (values[rows, index].astype(np.float64) for index in (below, above))
    return low + (high - low) * (at - below)


class _Counter:
    """Members with one event and members asked, of each pixel or of the window."""

    def __init__(self, event: BoundEvent, bound: Bound, window: int) -> None:
        self.event = event
        self.here = event.windows is None or bool(event.windows[bound.grid.of_window(window)])
        region = event.event.region
        self.pixels = bound.grid.pixels(region, window) if region is not None and self.here else None
        self.widths = disk(event.event.radius, bound.grid.pixel_km(window))
        shape = () if event.scalar else bound.grid.shape
        self.k, self.n = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)

    def add(self, members: np.ndarray, whole: bool) -> None:
        """Take (m, T, H, W) in; `whole`: nothing is NaN."""
        if self.here:
            happened, known = self._happened(members, whole)
            self.k += happened.sum(axis=0, dtype=np.int32)
            self.n += known.sum(axis=0, dtype=np.int32)

    def _happened(self, members: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of each member, and each pixel of a field, whether it has the event, and whether that is known."""
        event, region = self.event.event, self.event.event.region
        if event.variable == NINO34:
            index = nino34(torch.tensor(members).double()).float().numpy()
            return self._in_time(index[:, self.event.frames], whole)
        values = members[:, self.event.frames]
        if self.pixels is not None and not event.radius:
            values = values[:, :, *self.pixels]
        if region is not None and region.reduce == "mean":
            return self._in_time(_mean(vil_kg_m2(values) if self.event.kg_m2 else values), False, False)
        happened, known = self._in_time(values, whole, self.event.kg_m2)
        if event.radius:
            happened = dilate(happened, self.widths) & known
            if self.pixels is not None:
                happened, known = (each[:, *self.pixels] for each in (happened, known))
        if region is None:
            return happened, known
        pixels, hits = known.sum(axis=-1), happened.sum(axis=-1)
        # A tenth of 30 pixels is 3 of them, whatever floats say.
        enough = hits >= (region.fraction or 0.0) * pixels - 1e-9
        return enough & (hits > 0), pixels > 0

    def _in_time(self, values: np.ndarray, whole: bool, kg_m2: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The same of (m, t, ...) values, of whatever the dimensions after t are.

        What misses a frame of the lead-time range knows nothing.
        """
        event, compare = self.event.event, _COMPARE[self.event.event.comparison]
        # Python floats are compared as float32, so that 0.7 mm/h reaches 0.7.
        threshold = float(self.event.threshold)
        if event.accumulated:
            happened = compare(values.sum(axis=1), threshold)
        else:
            happened = np.zeros(values[:, 0].shape, dtype=bool)
            run = np.zeros(happened.shape, dtype=np.int16)
            for frame in np.moveaxis(values, 1, 0):
                hit = compare(vil_kg_m2(frame) if kg_m2 else frame, threshold)
                if event.duration > 1:
                    run += 1
                    run *= hit
                    hit = run >= event.duration
                happened |= hit
        known = np.ones(happened.shape, dtype=bool) if whole else ~np.isnan(values).any(axis=1)
        return happened & known, known


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is known, float32; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0).sum(axis=-1, dtype=np.float64)
    return (total / np.where(count > 0, count, np.nan)).astype(np.float32)


def disk(radius_km: float, pixel_km: tuple[float, float]) -> list[int]:
    """Half-widths in pixels of a disk's rows, from its middle row on."""
    # Producers round pixel sizes: 5 km are 5 pixels of 1.0003 km.
    radius, (height, width) = radius_km * (1 + 1e-3), pixel_km
    rows = np.arange(int(radius / height) + 1) * height
    return [int(half) for half in np.sqrt(radius**2 - rows**2) / width]


def dilate(hits: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """The largest value in the disk around each pixel, of hits (m, H, W), bool or uint8."""
    found, wide, reached = np.zeros_like(hits), hits.copy(), 0
    if not hits.any():
        return found
    # From the disk's narrow top row to its middle: each row widens the one before.
    for row, half in reversed(list(enumerate(widths))):
        while reached < min(half, hits.shape[2] - 1):
            reached += 1
            _raise(wide[..., reached:], hits[..., :-reached])
            _raise(wide[..., :-reached], hits[..., reached:])
        if row == 0:
            _raise(found, wide)
        elif row < hits.shape[1]:
            _raise(found[:, row:], wide[:, :-row])
            _raise(found[:, :-row], wide[:, row:])
    return found


def _raise(values: np.ndarray, least: np.ndarray) -> None:
    np.maximum(values, least, out=values)


def _blocks(size: int, members: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (8 * max(members, 1)))
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
