"""Probabilistic scores of a forecast's windows, deterministic forecasts among them as ensembles of one.

Members are read as few times as memory allows: once, where those of a window fit into `WINDOW_BYTES`, else
again for each strip of rows that does.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor

from earthformer.ensemble_scores import Brier, Crps, Ranks, Spread, Sums, surviving
from earthformer.scores import Contingency, Errors, Nino, nino34
from earthformer.spatial_scores import Fractions, Spectrum
from pipelines.tasks import Task

POOLS = (1, 4, 16)
"""Sides in pixels of the squares whose maxima are scored, as in PreDiff: 1 is every pixel."""
SCALES = (1, 4, 16, 64)
"""Sides in pixels of the squares in which events are counted for the fractions skill score."""
WINDOW_BYTES = 1 << 30
"""Members' values held at once: 340 members of 12 frames of 256 × 256."""
GROUP = 8
"""Members worked on at once where whole frames are needed."""

Read = Callable[[slice, slice], Tensor]
"""Members (B, m, T, h, W, 1) by the slices of members and rows."""


@dataclass(frozen=True)
class Verification:
    """What there is beside the counts and errors of one forecast (or of an ensemble's mean)."""

    crps: Crps
    mean_spectrum: Spectrum
    truth_spectrum: Spectrum
    brier: Brier | None = None
    """None without thresholds, as `fss`."""
    fss: Fractions | None = None
    """Of the mean."""
    nino_crps: Crps | None = None
    """Of the Niño3.4 index in K; ENSO alone."""
    member_counts: tuple[Contingency, ...] = ()
    """Every member a forecast by itself, for each of `POOLS` that fits the grid; of ensembles alone, as what
    follows."""
    member_fss: Fractions | None = None
    member_spectrum: Spectrum | None = None
    ranks: Ranks | None = None
    spread: Spread | None = None
    failed: int = 0
    """Members without a single value, over all windows; they are left out."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: _add(mine, getattr(other, name)) for name, mine in vars(self).items()})

    def result(self) -> dict[str, dict[str, float]]:
        """All scores by kind."""
        named = {"CRPS": self.crps.result()}
        for name, state in (
            ("probabilities", self.brier),
            ("FSS", self.fss),
            ("FSS of members", self.member_fss),
            ("CRPS of Nino3.4", self.nino_crps),
            ("ranks", self.ranks),
            ("spread-skill", self.spread),
        ):
            if state is not None:
                named[name] = state.result()
        for counts in self.member_counts:
            pool = f", {counts.pool}x{counts.pool} maxima" if counts.pool > 1 else ""
            named[f"each member, {counts.protocol}{pool}"] = counts.result()
        return named

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        read: dict[str, Any] = {"failed": values["failed"]}
        read["member_counts"] = tuple(map(Contingency.from_dict, values["member_counts"]))
        for name, kind in _KINDS.items():
            read[name] = kind.from_dict(values[name]) if values[name] is not None else None
        return cls(**read)


_KINDS: dict[str, type[Sums]] = {
    "crps": Crps,
    "nino_crps": Crps,
    "brier": Brier,
    "ranks": Ranks,
    "spread": Spread,
    "fss": Fractions,
    "member_fss": Fractions,
    "mean_spectrum": Spectrum,
    "member_spectrum": Spectrum,
    "truth_spectrum": Spectrum,
}


def _add(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    return tuple(_add(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a + b


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [each.to_dict() for each in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


@dataclass(frozen=True)
class Scored:
    """All states of some windows."""

    counts: tuple[Contingency, ...]
    """Of the mean."""
    errors: Errors
    nino: Nino | None
    probabilistic: Verification


def count(task: Task, forecast: Tensor, truth: Tensor) -> tuple[Contingency, ...]:
    """Events of (B, T, H, W, 1) at the task's thresholds, for each of `POOLS` that fits the grid."""
    pools = [pool for pool in POOLS if pool <= min(truth.shape[2:4])] if task.thresholds else []
    return tuple(Contingency.of(forecast, truth, thresholds=task.thresholds, pool=pool) for pool in pools)


def groups(read: Read, members: int) -> Iterator[Tensor]:
    """Members (B, m, T, H, W, 1), a few at a time."""
    for first in range(0, members, GROUP):
        yield read(slice(first, min(first + GROUP, members)), slice(None))


def mean(parts: Iterator[Tensor]) -> Tensor:
    """Mean (B, T, H, W, 1) over members that have not failed; NaN where any of these is missing."""
    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    for part in parts:
        alive = surviving(part)[:, :, None, None, None, None]
        total = total + part.masked_fill(~alive, 0.0).sum(1, dtype=torch.float64)
        count = count + alive.sum(1)
    return torch.as_tensor(total / count).float()


def verify(
    task: Task,
    read: Read,
    members: int,
    truth: Tensor,
    *,
    seeds: Tensor,
    labels: Tensor | None = None,
) -> Scored:
    """Score some windows.

    Args:
        task: says thresholds and scale.
        read: gives the members.
        members: how many there are.
        truth: (B, T, H, W, 1), NaN where missing.
        seeds: (B,) int64, of the windows' random numbers.
        labels: Niño3.4 (B, T - 2) in K, for ENSO.
    """
    many, (_, _, rows, *_) = members > 1, truth.shape
    strip = max(1, WINDOW_BYTES // max(1, truth[:, :, :1].numel() * members * 4))
    if strip >= rows:
        held = read(slice(None), slice(None))
        read = lambda which, here: held[:, which, :, here]  # noqa: E731
    middle = mean(groups(read, members))
    # What any member misses is nobody's: said for the whole window, as a strip does not see who has failed.
    known = truth.masked_fill(torch.isnan(middle), math.nan) if many else truth
    strips = [slice(first, min(first + strip, rows)) for first in range(0, rows, strip)]
    pixels = [
        _pixels(task, read(slice(None), here), known[:, :, here], seeds + here.start) for here in strips
    ]
    crps, brier, ranks, spread = reduce(_add, pixels)
    frames: Any = (), None, None, 0
    if many:
        frames = reduce(_add, (_frames(task, part, truth) for part in groups(read, members)))
    member_counts, member_fss, member_spectrum, failed = frames
    return Scored(
        counts=count(task, middle, truth),
        errors=Errors.of(middle, truth, scale=task.error_scale),
        nino=Nino.of(middle[..., 0], labels) if labels is not None else None,
        probabilistic=Verification(
            crps=crps,
            brier=brier,
            ranks=ranks,
            spread=spread,
            fss=_fss(task, middle[:, None], truth),
            mean_spectrum=Spectrum.of(middle),
            truth_spectrum=Spectrum.of(truth),
            nino_crps=_nino_crps(read(slice(None), slice(None)), labels) if labels is not None else None,
            member_counts=member_counts,
            member_fss=member_fss,
            member_spectrum=member_spectrum,
            failed=failed,
        ),
    )


def _pixels(
    task: Task, members: Tensor, truth: Tensor, seeds: Tensor
) -> tuple[Crps, Brier | None, Ranks | None, Spread | None]:
    """What is summed over pixels, so over strips of rows."""
    many, scale = members.shape[1] > 1, task.error_scale
    return (
        Crps.of(members, truth, scale=scale),
        Brier.of(members, truth, thresholds=task.thresholds) if task.thresholds else None,
        Ranks.of(members, truth, seeds=seeds) if many else None,
        Spread.of(members, truth, scale=scale) if many else None,
    )


def _frames(
    task: Task, members: Tensor, truth: Tensor
) -> tuple[tuple[Contingency, ...], Fractions | None, Spectrum, int]:
    """What is summed over members."""
    each = truth[:, None].expand(members.shape).flatten(0, 1)
    return (
        count(task, members.flatten(0, 1), each),
        _fss(task, members, truth),
        Spectrum.of(members),
        int((~surviving(members)).sum()),
    )


def _fss(task: Task, members: Tensor, truth: Tensor) -> Fractions | None:
    if not task.thresholds:
        return None
    scales = [scale for scale in SCALES if scale <= min(truth.shape[2:4])]
    return Fractions.of(members, truth, thresholds=task.thresholds, scales=scales)


def _nino_crps(sst: Tensor, labels: Tensor) -> Crps:
    batch, members = sst.shape[:2]
    index = nino34(sst[..., 0].flatten(0, 1).double()).unflatten(0, (batch, members))
    return Crps.of(index[..., None, None, None], labels.double()[..., None, None, None])
