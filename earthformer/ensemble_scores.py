"""Additive states of probabilistic verification: sums over pixels, samples and members, ratios at the end.

As in `scores`: `a + b` is the state of both samples together, counters are int64 and sums float64, and every
sum is kept for each lead time. A deterministic forecast is an ensemble of one.

Fields are (B, M, T, H, W, C) for the members and (B, T, H, W, C) for the truth. A member without a single
value in a sample is a failed one: it is left out of that sample. A pixel that is then missing in the truth or
in any member counts as nothing, since an ensemble of fewer members there would be another forecast.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from earthformer.scores import Contingency

PERCENT = 100
"""Forecast probabilities are binned by whole per cent, rounded down: 0 %, 1 %, …, 100 %."""
SORTED_VALUES = 1 << 22
"""Members' values in double precision at once."""


@dataclass(frozen=True)
class Sums:
    """What the states have in common: tensors are sums, all else says what they are of."""

    COUNTS: ClassVar[tuple[str, ...]] = ()
    """Tensors of int64; the others are float64."""

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def __add__(self, other: Self) -> Self:
        self.check_same(other)
        mine, theirs = self._tensors(), other._tensors()
        return replace(self, **{name: mine[name] + theirs[name] for name in mine})

    def check_same(self, other: Self) -> None:
        """Refuse to add or compare what was summed in different ways.

        Raises:
            ValueError: thresholds, scales, members or lead times differ; both are named.
        """
        what = type(self).__name__
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                mine, theirs = tuple(mine.shape), tuple(theirs.shape)
            if mine != theirs:
                raise ValueError(f"{what} of {field.name} {theirs} cannot be put beside {field.name} {mine}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {n: v.tolist() if isinstance(v, Tensor) else v for n, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        read: dict[str, Any] = {}
        for field in fields(cls):
            value = values[field.name]
            if field.type is Tensor:
                dtype = torch.int64 if field.name in cls.COUNTS else torch.float64
                read[field.name] = torch.tensor(value, dtype=dtype)
            else:
                read[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**read)


def surviving(members: Tensor) -> Tensor:
    """Which of (B, M, …) hold any value at all, bool (B, M); the others have failed."""
    # One by one: a mask of a large ensemble would take a quarter of its memory.
    alive = [[not bool(torch.isnan(member).all()) for member in sample] for sample in members]
    return torch.tensor(alive, dtype=torch.bool).reshape(members.shape[:2])


def _samples(members: Tensor, truth: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each sample its index, surviving members (m, T, P), truth (T, P) and valid pixels (T, P)."""
    check_shapes(members, truth)
    for b, alive in enumerate(surviving(members)):
        if alive.any():
            sample = members[b] if alive.all() else members[b, alive]
            sample, was = sample.flatten(2), truth[b].flatten(1)
            # A sum is missing wherever any of its terms is.
            yield b, sample, was, ~(torch.isnan(sample.sum(0)) | torch.isnan(was))


def check_shapes(members: Tensor, truth: Tensor) -> None:
    """Members (B, M, T, H, W, C) belong to truth (B, T, H, W, C).

    Raises:
        ValueError: they do not; both shapes are named.
    """
    if members.ndim != 6 or members[:, 0].shape != truth.shape:
        needed = f"(B, M, T, H, W, C) over a truth of shape {tuple(truth.shape)}"
        raise ValueError(f"members of shape {tuple(members.shape)}: needed {needed}")


def ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Float64 quotient; NaN where there is nothing to divide by."""
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-300), math.nan)


@dataclass(frozen=True)
class Crps(Sums):
    """Continuous ranked probability score E|X − y| − ½ E|X − X′|, lower is better; for one member the MAE.

    Plain takes X and X′ from the members as they are, so that few members score worse than many of the same
    distribution; fair (Ferro 2014) corrects for that, and needs two members or more.
    """

    plain: Tensor
    fair: Tensor
    count: Tensor
    """Pixels, (lead times,)."""
    fair_count: Tensor
    """Those with two members or more."""
    scale: float = 1.0
    """Values are multiplied by this before they are compared (SEVIR: 1/255)."""
    COUNTS: ClassVar[tuple[str, ...]] = ("count", "fair_count")

    @classmethod
    def of(cls, members: Tensor, truth: Tensor, *, scale: float = 1.0) -> Self:
        """Score members (B, M, T, H, W, C) against truth (B, T, H, W, C).

        Raises:
            ValueError: the shapes do not fit.
        """
        leads = truth.shape[1]
        plain, fair = torch.zeros(2, leads, dtype=torch.float64)
        count, fair_count = torch.zeros(2, leads, dtype=torch.int64)
        for _, sample, was, valid in _samples(members, truth):
            m = len(sample)
            for t in range(leads):
                error, pairs = _error_and_pairs(sample[:, t], was[t], valid[t])
                pixels = valid[t].sum()
                plain[t] += error / m - pairs / m**2
                count[t] += pixels
                if m > 1:
                    fair[t] += error / m - pairs / (m * (m - 1))
                    fair_count[t] += pixels
        return cls(plain * scale, fair * scale, count, fair_count, scale)

    def per_lead_time(self) -> dict[str, Tensor]:
        """CRPS and fair CRPS, each float64 (lead times,); NaN where there is none."""
        return {"CRPS": ratio(self.plain, self.count), "fair CRPS": ratio(self.fair, self.fair_count)}

    def result(self) -> dict[str, float]:
        """CRPS and, where there were ensembles, fair CRPS over all valid pixels of all lead times."""
        found = {"CRPS": float(ratio(self.plain.sum(), self.count.sum()))}
        if self.fair_count.any():
            found["fair CRPS"] = float(self.fair.sum() / self.fair_count.sum())
        return found


def _error_and_pairs(sample: Tensor, was: Tensor, valid: Tensor) -> tuple[float, float]:
    """Σ|X − y| over members and valid pixels of (m, P), and Σ|X − X′| over pairs, each pair once."""
    m, total = len(sample), sample.shape[1]
    # In the sorted members the i-th (from 0) is the larger of i pairs and the smaller of m − 1 − i.
    weights = 2.0 * torch.arange(m, dtype=torch.float64) - (m - 1)
    error = pairs = 0.0
    step = max(1, SORTED_VALUES // m)
    for first in range(0, total, step):
        here = slice(first, min(first + step, total))
        values = sample[:, here].T.contiguous()
        # NumPy sorts the short rows six times as fast as PyTorch.
        ordered = torch.from_numpy(np.sort(values.cpu().numpy(), axis=1)).double()
        keep = valid[here].cpu()
        ordered = ordered.masked_fill_(~keep[:, None], 0.0)
        truth = was[here].cpu().double().masked_fill(~keep, 0.0)
        pairs += float((ordered @ weights).sum())
        error += float(ordered.sub_(truth[:, None]).abs_().sum())
    return error, pairs


@dataclass(frozen=True)
class Brier(Sums):
    """Probabilities of `value >= threshold`, the fraction of members, against what happened.

    Bins are whole per cent (`PERCENT`): the probabilities of up to 100 members are told apart, and Murphy's
    decomposition adds up as it is. Where a bin holds several probabilities the differences within it belong
    to the resolution (Stephenson et al. 2008), so that it adds up always.
    """

    thresholds: tuple[float, ...]
    count: Tensor
    """Forecasts, (thresholds, lead times, bins)."""
    observed: Tensor
    """Those after which the event happened."""
    probability: Tensor
    """Sum of their probabilities."""
    squared: Tensor
    """Sum of (probability - happened)², (thresholds, lead times)."""
    COUNTS: ClassVar[tuple[str, ...]] = ("count", "observed")

    @classmethod
    def of(cls, members: Tensor, truth: Tensor, *, thresholds: Sequence[float]) -> Self:
        """Score members (B, M, T, H, W, C) against truth (B, T, H, W, C).

        Raises:
            ValueError: the shapes do not fit.
        """
        leads, bins = truth.shape[1], PERCENT + 1
        shape = (len(thresholds), leads, bins)
        count, observed = torch.zeros(2, *shape, dtype=torch.int64)
        probability, squared = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2]).double()
        for _, sample, was, valid in _samples(members, truth):
            m = len(sample)
            # In whole numbers, so that a probability of exactly 50 % never falls into the bin of 49 %.
            into = torch.arange(m + 1) * PERCENT // m
            p = torch.arange(m + 1, dtype=torch.float64) / m
            for i, threshold in enumerate(thresholds):
                no, yes = _tally(sample, was, valid, threshold)
                count[i].index_add_(1, into, no + yes)
                observed[i].index_add_(1, into, yes)
                probability[i].index_add_(1, into, (no + yes) * p)
                squared[i] += (no * p.square() + yes * (1 - p).square()).sum(1)
        return cls(tuple(map(float, thresholds)), count, observed, probability, squared)

    def per_lead_time(self) -> dict[str, Tensor]:
        """Brier, its three parts and ROC area, each float64 (thresholds, lead times); NaN where undefined."""
        return _brier(self.count, self.observed, self.probability, self.squared)

    def per_threshold(self) -> dict[str, Tensor]:
        """The same of all lead times together, each float64 (thresholds,)."""
        return _brier(self.count.sum(1), self.observed.sum(1), self.probability.sum(1), self.squared.sum(1))

    def result(self) -> dict[str, float]:
        """`per_threshold` by name, such as `Brier-74`."""
        return {
            f"{name}-{threshold:g}": value
            for name, values in self.per_threshold().items()
            for threshold, value in zip(self.thresholds, values.tolist(), strict=True)
        }

    def reliability(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean probability, observed frequency (NaN in empty bins) and forecasts, each (thresholds, bins)."""
        count = self.count.sum(1)
        mean, frequency = (ratio(s.sum(1).double(), count) for s in (self.probability, self.observed))
        return mean, frequency, count

    def roc(self) -> tuple[Tensor, Tensor]:
        """Rates of false alarms and of hits, (thresholds, bins + 1), from no warning to always warning."""
        return _roc(self.count.sum(1), self.observed.sum(1))

    def contingency(self, least: float = 0.5) -> Contingency:
        """The counts of the forecast "yes where the probability is `least` or more" (in whole per cent)."""
        yes = slice(round(least * PERCENT), None)
        hits = self.observed[..., yes].sum(-1)
        misses = self.observed.sum(-1) - hits
        return Contingency(self.thresholds, hits, misses, self.count[..., yes].sum(-1) - hits)


def _tally(sample: Tensor, was: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Pixels by whether the event happened and how many members said so, int64 (2, T, m + 1)."""
    m, leads = len(sample), len(was)
    said = torch.zeros(was.shape, dtype=torch.int64, device=was.device)
    for member in sample:
        said += member >= threshold
    place = said + (m + 1) * torch.arange(leads, device=was.device)[:, None]
    place += (m + 1) * leads * (was >= threshold)
    return torch.bincount(place[valid], minlength=2 * leads * (m + 1)).reshape(2, leads, m + 1).cpu()


def _brier(count: Tensor, observed: Tensor, probability: Tensor, squared: Tensor) -> dict[str, Tensor]:
    total = count.sum(-1)
    rate = ratio(observed.sum(-1).double(), total)
    uncertainty = rate * (1 - rate)
    gaps = ratio((probability - observed).square(), count.double()).nan_to_num(0.0)
    reliability, brier = ratio(gaps.sum(-1), total), ratio(squared, total)
    false_alarms, hits = _roc(count, observed)
    return {
        "Brier": brier,
        "reliability": reliability,
        "resolution": reliability + uncertainty - brier,
        "uncertainty": uncertainty,
        "ROC": torch.trapezoid(hits, false_alarms),
    }


def _roc(count: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    rates = []
    for events in (count - observed, observed):
        warned = events.flip(-1).cumsum(-1).double()
        rates.append(F.pad(ratio(warned, warned[..., -1:]), (1, 0)))
    return rates[0], rates[1]


@dataclass(frozen=True)
class Ranks(Sums):
    """How many members lie below the truth: flat where truth and members are of one distribution.

    Ties are broken at random. Where truth and all members are equal (no rain anywhere) any rank is as good:
    such pixels are counted apart, which leaves a flat histogram flat and a skewed one visible.
    """

    count: Tensor
    """Pixels of each rank 0 … M, (lead times, M + 1)."""
    tied: Tensor
    """Pixels where truth and all members are equal, (lead times,)."""
    COUNTS: ClassVar[tuple[str, ...]] = ("count", "tied")

    @classmethod
    def of(cls, members: Tensor, truth: Tensor, *, seeds: Tensor) -> Self:
        """Rank truth (B, T, H, W, C) among members (B, M, T, H, W, C).

        Where members have failed, the ranks among the others are spread at random over the M + 1.

        Args:
            members: (B, M, T, H, W, C).
            truth: (B, T, H, W, C).
            seeds: (B,) int64, of the random numbers that break a sample's ties.

        Raises:
            ValueError: the shapes do not fit.
        """
        leads, ranks = truth.shape[1], members.shape[1] + 1
        count = torch.zeros(leads, ranks, dtype=torch.int64)
        tied = torch.zeros(leads, dtype=torch.int64)
        for b, sample, was, valid in _samples(members, truth):
            below, equal = torch.zeros(2, *was.shape, dtype=torch.int16, device=was.device)
            for member in sample:
                below += member < was
                equal += member == was
            same = equal == len(sample)
            tied += (same & valid).sum(1).cpu()
            generator = torch.Generator().manual_seed(int(seeds[b]))
            u = torch.rand(was.shape, generator=generator, dtype=torch.float64).to(was.device)
            rank = (below + u * (equal + 1)).floor_()
            if len(sample) + 1 < ranks:
                u = torch.rand(was.shape, generator=generator, dtype=torch.float64).to(was.device)
                rank = ((rank + u) * ranks / (len(sample) + 1)).floor_()
            place = (
                rank.long().clamp_(max=ranks - 1) + ranks * torch.arange(leads, device=was.device)[:, None]
            )
            found = torch.bincount(place[valid & ~same], minlength=leads * ranks)
            count += found.reshape(leads, ranks).cpu()
        return cls(count, tied)

    def per_lead_time(self) -> dict[str, Tensor]:
        """Fraction of pixels at each rank, float64 (lead times, M + 1); NaN where none was ranked."""
        return {"ranks": ratio(self.count.double(), self.count.sum(1, keepdim=True))}

    def result(self) -> dict[str, float]:
        """`outside`: the share of truth outside of all members, in multiples of the expected 2/(M + 1)."""
        count = self.count.sum(0)
        outside = ratio((count[0] + count[-1]).double(), count.sum())
        return {"outside": float(outside) * len(count) / 2}


@dataclass(frozen=True)
class Spread(Sums):
    """Spread of the members against the error of their mean: the ratio is 1 where the spread says the error.

    The variance is the unbiased one times (M + 1)/M, which is what the squared error of the mean of M
    members is expected to be (Fortin et al. 2014). Samples of less than two members are left out.
    """

    variance: Tensor
    squared: Tensor
    count: Tensor
    scale: float = 1.0
    """Values are multiplied by this before they are compared (SEVIR: 1/255)."""
    COUNTS: ClassVar[tuple[str, ...]] = ("count",)

    @classmethod
    def of(cls, members: Tensor, truth: Tensor, *, scale: float = 1.0) -> Self:
        """Compare members (B, M, T, H, W, C) with truth (B, T, H, W, C).

        Raises:
            ValueError: the shapes do not fit.
        """
        leads = truth.shape[1]
        variance, squared = torch.zeros(2, leads, dtype=torch.float64)
        count = torch.zeros(leads, dtype=torch.int64)
        for _, sample, was, valid in _samples(members, truth):
            m = len(sample)
            if m < 2:
                continue
            # One by one: in float64 they take twice the memory.
            mean, deviations = torch.zeros(2, *was.shape, dtype=torch.float64, device=was.device)
            for member in sample:
                mean += member
            mean /= m
            for member in sample:
                deviations += (member - mean).square_()
            deviations *= (m + 1) / (m * (m - 1))
            variance += deviations.masked_fill_(~valid, 0.0).sum(1).cpu()
            squared += (mean - was).square_().masked_fill_(~valid, 0.0).sum(1).cpu()
            count += valid.sum(1).cpu()
        return cls(variance * scale**2, squared * scale**2, count, scale)

    def per_lead_time(self) -> dict[str, Tensor]:
        """Spread, RMSE of the mean and their ratio, each float64 (lead times,)."""
        return _spread(self.variance, self.squared, self.count)

    def result(self) -> dict[str, float]:
        """`spread`, `RMSE` and `spread-skill` over all valid pixels of all lead times."""
        found = _spread(self.variance.sum(), self.squared.sum(), self.count.sum())
        return {name: float(value) for name, value in found.items()}


def _spread(variance: Tensor, squared: Tensor, count: Tensor) -> dict[str, Tensor]:
    return {
        "spread": ratio(variance, count).sqrt(),
        "RMSE": ratio(squared, count).sqrt(),
        "spread-skill": ratio(variance, squared).sqrt(),
    }
