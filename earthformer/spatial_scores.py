"""Additive states of whole frames: fractions skill score and power spectrum, of one forecast or of members.

Built like those of `ensemble_scores`, which see a pixel at a time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from earthformer.ensemble_scores import Sums, check_shapes, ratio, surviving


@dataclass(frozen=True)
class Fractions(Sums):
    """Fractions skill score (Roberts & Lean 2008): fractions of squares above a threshold; 1 is best.

    Squares reach beyond the grid, where there are no events, as in pysteps. Each member is a forecast by
    itself; give the mean of the ensemble as one member to score the mean. A pixel
    that is missing in one member is no event in that member and its truth, and counts with the others.
    """

    thresholds: tuple[float, ...]
    scales: tuple[int, ...]
    """Sides of the squares in pixels."""
    forecast: Tensor
    """Sum of squared fractions of the forecast, (scales, thresholds, lead times)."""
    truth: Tensor
    both: Tensor
    """Sum of the products of both fractions."""

    @classmethod
    def of(
        cls, members: Tensor, truth: Tensor, *, thresholds: Sequence[float], scales: Sequence[int]
    ) -> Self:
        """Score members (B, M, T, H, W, C) against truth (B, T, H, W, C).

        Raises:
            ValueError: the shapes do not fit.
        """
        check_shapes(members, truth)
        leads = truth.shape[1]
        sums = torch.zeros(3, len(scales), len(thresholds), leads, dtype=torch.float64)
        frames, were = members.movedim(-1, -3), truth.movedim(-1, -3)
        for b, alive in enumerate(surviving(members)):
            chosen = [int(m) for m in alive.nonzero()]
            for t, c in itertools.product(range(leads), range(were.shape[2])):
                was = were[b, t, c]
                happened = [_box_sums(was >= threshold, scales) for threshold in thresholds]
                for m in chosen:
                    sums[..., t] += _fraction_sums(frames[b, m, t, c], was, thresholds, scales, happened)
        area = torch.tensor(scales, dtype=torch.float64)[:, None, None] ** 4
        return cls(tuple(map(float, thresholds)), tuple(scales), *(sums / area))

    def per_lead_time(self) -> dict[str, Tensor]:
        """FSS, float64 (scales, thresholds, lead times); NaN where there was no event at all."""
        return {"FSS": ratio(2 * self.both, self.forecast + self.truth)}

    def per_threshold(self) -> dict[str, Tensor]:
        """FSS of all lead times together, float64 (scales, thresholds)."""
        return {"FSS": ratio(2 * self.both.sum(2), (self.forecast + self.truth).sum(2))}

    def result(self) -> dict[str, float]:
        """`per_threshold` by name, such as `FSS 16 px-74`."""
        return {
            f"FSS {scale} px-{threshold:g}": float(value)
            for scale, row in zip(self.scales, self.per_threshold()["FSS"], strict=True)
            for threshold, value in zip(self.thresholds, row, strict=True)
        }


def _fraction_sums(
    frame: Tensor,
    was: Tensor,
    thresholds: Sequence[float],
    scales: Sequence[int],
    happened: list[list[Tensor]],
) -> Tensor:
    """Sums over pixels of squared events in squares, of forecast (H, W) and truth, and of their product.

    `happened` are the truth's own events in squares by threshold and scale, which serve all members. Returns
    float64 (3, scales, thresholds).
    """
    missing = torch.isnan(frame) | torch.isnan(was)
    whole = not bool(missing.any())
    sums = []
    for threshold, boxes in zip(thresholds, happened, strict=True):
        events = frame >= threshold
        if not whole:
            events &= ~missing
            boxes = _box_sums((was >= threshold) & ~missing, scales)
        # Most frames hold no event at the high thresholds.
        found = _box_sums(events, scales) if bool(events.any()) else [torch.zeros_like(box) for box in boxes]
        sums.append([[_dot(f, f), _dot(o, o), _dot(f, o)] for f, o in zip(found, boxes, strict=True)])
    return torch.tensor(sums, dtype=torch.float64).permute(2, 1, 0)


def _box_sums(events: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Events (H, W) in the squares around each pixel, one float64 (H, W) a scale."""
    (height, width), reach = events.shape, max(scales) // 2
    # The square of pixel i begins at i - scale // 2, as that of scipy's uniform_filter does.
    padded = F.pad(events, (reach + 1, reach, reach + 1, reach))
    total = padded.cumsum(0, dtype=torch.int32).cumsum_(1)
    found = []
    for scale in scales:
        first = reach - scale // 2
        strips = total[first + scale :][:height] - total[first:][:height]
        box = strips[:, first + scale :][:, :width] - strips[:, first:][:, :width]
        # By way of float32, which holds these integers, the conversion is five times as fast.
        found.append(box.float().double())
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


@dataclass(frozen=True)
class Spectrum(Sums):
    """Radially averaged power spectrum of fields: |FFT|² / pixels, mean over the ring of each wavenumber.

    Wavenumbers are cycles over the longer side of the grid, 0 up to half its pixels, as in pysteps. Frames
    with a missing pixel have no spectrum and are left out.
    """

    power: Tensor
    """Sum over frames, (lead times, wavenumbers)."""
    count: Tensor
    """Frames, (lead times,)."""
    COUNTS: ClassVar[tuple[str, ...]] = ("count",)

    @classmethod
    def of(cls, frames: Tensor) -> Self:
        """Spectra of (B, T, H, W, C), or of members (B, M, T, H, W, C), each a field by itself."""
        *_, leads, height, width, _ = frames.shape
        samples = frames.movedim(-1, -3).flatten(0, -5)
        ring, weight, rings = _rings(height, width)
        inside = ring < rings
        size = torch.zeros(rings, dtype=torch.float64).index_add_(0, ring[inside], weight[inside])
        power = torch.zeros(leads, rings, dtype=torch.float64)
        count = torch.zeros(leads, dtype=torch.int64)
        for sample in samples:
            complete = ~torch.isnan(sample).flatten(2).any(-1)
            count += complete.sum(1).cpu()
            # A member at a time keeps the transforms small.
            each = torch.fft.rfft2(sample.nan_to_num(0.0)).abs().double().square().flatten(2).cpu()
            each = (each * complete[..., None].cpu()).sum(1)[:, inside] * weight[inside]
            power.index_add_(1, ring[inside], each)
        return cls(power / size / (height * width), count)

    def per_lead_time(self) -> dict[str, Tensor]:
        """Mean power, float64 (lead times, wavenumbers); NaN where no frame was complete."""
        return {"power": ratio(self.power, self.count[:, None])}


def _rings(height: int, width: int) -> tuple[Tensor, Tensor, int]:
    """Ring and weight of each coefficient of `rfft2`, and the number of rings."""
    longer = max(height, width)
    fy, fx = torch.fft.fftfreq(height).double(), torch.fft.rfftfreq(width).double()
    ring = (torch.hypot(fy[:, None], fx) * longer).round().long()
    # The real transform keeps one of each two mirrored columns.
    weight = torch.full((len(fx),), 2.0, dtype=torch.float64)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    return ring.flatten(), weight.expand(height, -1).flatten(), longer // 2 + longer % 2
