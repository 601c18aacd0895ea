"""Additive score states: sums over pixels and samples, and ratios only at the very end.

`a + b` is the state of both samples together, so that any sharding gives the same score. States of
different protocols, thresholds, pools or scales do not add up, and say so. Counters are int64 and sums
float64; every state is plain tensors, so that ranks can also `all_reduce` them.

Fields are in the archive's own units. For SEVIR that is encoded VIL, 0-254: observed integers are exact,
and a network's [0, 1] output becomes `x / float32(1 / 255)`, the very division of the published scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Protocol = Literal["pooled", "frame-averaged"]
EPS = 1e-4
"""In every denominator of the published SEVIR scores: a threshold that never occurs scores 0."""
PROTOCOLS: tuple[Protocol, ...] = ("pooled", "frame-averaged")


def max_pool(field: Tensor, size: int) -> Tensor:
    """Maximum of size × size pixels, stride `size`, of (B, T, H, W, C); NaN if any pixel is missing."""
    if size == 1:
        return field
    b, t, h, w, c = field.shape
    frames = field.permute(0, 1, 4, 2, 3).reshape(b * t * c, 1, h, w)
    missing = F.max_pool2d(torch.isnan(frames).to(frames.dtype), size, size)
    pooled = F.max_pool2d(frames.nan_to_num(-math.inf), size, size).masked_fill(missing > 0, math.nan)
    return pooled.reshape(b, t, c, *pooled.shape[-2:]).permute(0, 1, 3, 4, 2)


@dataclass(frozen=True)
class Contingency:
    """Hits, misses and false alarms of `value >= threshold`, each int64 (thresholds, lead times).

    The protocol says how lead times become one score (Earthformer, Sec. 4.2, and its code's modes 0 and 2):
    `pooled` adds the counts of all lead times first, `frame-averaged` takes the mean of the lead times'
    scores. The two differ by several points where rain is rare and are never to be mixed up.
    """

    thresholds: tuple[float, ...]
    hits: Tensor
    misses: Tensor
    false_alarms: Tensor
    protocol: Protocol = "pooled"
    pool: int = 1

    @classmethod
    def of(
        cls,
        forecast: Tensor,
        truth: Tensor,
        *,
        thresholds: Sequence[float],
        protocol: Protocol = "pooled",
        pool: int = 1,
    ) -> "Contingency":
        """Count events.

        Args:
            forecast: (B, T, H, W, C) in the units of the thresholds.
            truth: the same shape. Where either is NaN the pixel counts as nothing.
            thresholds: an event is a value at or above.
            protocol: `pooled` or `frame-averaged`.
            pool: count on the maxima of pool × pool pixels.

        Raises:
            ValueError: the shapes differ.
        """
        if forecast.shape != truth.shape:
            raise ValueError(f"forecast of shape {tuple(forecast.shape)}: needed {tuple(truth.shape)}")
        forecast, truth = max_pool(forecast, pool), max_pool(truth, pool)
        missing = torch.isnan(forecast) | torch.isnan(truth)
        # What is missing reaches no threshold: neither forecast nor observed.
        forecast, truth = (field.masked_fill(missing, -math.inf) for field in (forecast, truth))
        counts = []
        for threshold in thresholds:
            yes, was = forecast >= threshold, truth >= threshold
            counts.append(torch.stack([_per_lead(yes & was), _per_lead(yes), _per_lead(was)]))
        hits, forecasts, observations = torch.stack(counts, dim=1)
        misses, false_alarms = observations - hits, forecasts - hits
        return cls(tuple(map(float, thresholds)), hits, misses, false_alarms, protocol, pool)

    def __add__(self, other: "Contingency") -> "Contingency":
        self.check_same(other)
        return Contingency(
            self.thresholds,
            self.hits + other.hits,
            self.misses + other.misses,
            self.false_alarms + other.false_alarms,
            self.protocol,
            self.pool,
        )

    def check_same(self, other: "Contingency") -> None:
        """Refuse to add or compare what was counted in different ways.

        Raises:
            ValueError: protocol, pool, thresholds or lead times differ; both are named.
        """
        for name in ("protocol", "pool", "thresholds"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"scores of {name} {theirs} cannot be put beside {name} {mine}")
        if self.hits.shape != other.hits.shape:
            raise ValueError(
                f"scores of {other.hits.shape[1]} lead times cannot be put beside {self.hits.shape[1]}"
            )

    def under(self, protocol: Protocol) -> "Contingency":
        """The same counts under another protocol."""
        counts = (self.hits, self.misses, self.false_alarms)
        return Contingency(self.thresholds, *counts, protocol, self.pool)

    def per_lead_time(self) -> dict[str, Tensor]:
        """CSI, POD, SUCR and bias, each float64 (thresholds, lead times)."""
        return _skill(self.hits, self.misses, self.false_alarms)

    def per_threshold(self) -> dict[str, Tensor]:
        """CSI, POD, SUCR and bias by the protocol, each float64 (thresholds,)."""
        if self.protocol == "pooled":
            return _skill(self.hits.sum(1), self.misses.sum(1), self.false_alarms.sum(1))
        return {name: values.mean(1) for name, values in self.per_lead_time().items()}

    def result(self) -> dict[str, float]:
        """`CSI-M` (the mean over thresholds), and `CSI`, `POD`, `SUCR`, `bias` at each, such as `CSI-74`."""
        scores = self.per_threshold()
        named = {f"{score}-M": float(values.mean()) for score, values in scores.items()}
        for score, values in scores.items():
            for threshold, value in zip(self.thresholds, values.tolist(), strict=True):
                named[f"{score}-{threshold:g}"] = value
        return named

    def events(self) -> list[int]:
        """Observed or forecast events at each threshold, of all lead times."""
        return (self.hits + self.misses + self.false_alarms).sum(1).tolist()

    def defined(self) -> dict[str, Tensor]:
        """Where CSI, POD, SUCR and bias say anything, each bool (thresholds,).

        Without events in a score's denominator the score is whatever EPS makes of it: 0, or for the bias of
        false alarms alone some millions, which a mean over lead times would not survive.
        """
        h, m, f = self.hits, self.misses, self.false_alarms
        if self.protocol == "pooled":
            h, m, f = (counts.sum(1, keepdim=True) for counts in (h, m, f))
        observed, forecast = h + m > 0, h + f > 0
        return {
            "CSI": (observed | forecast).any(1),
            "POD": observed.any(1),
            "SUCR": forecast.any(1),
            "bias": observed.any(1) & (observed | ~forecast).all(1),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "thresholds": list(self.thresholds),
            "hits": self.hits.tolist(),
            "misses": self.misses.tolist(),
            "false_alarms": self.false_alarms.tolist(),
            "protocol": self.protocol,
            "pool": self.pool,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Contingency":
        """The inverse of `to_dict`."""
        names = ("hits", "misses", "false_alarms")
        hits, misses, false_alarms = (torch.tensor(values[name], dtype=torch.int64) for name in names)
        return cls(
            tuple(values["thresholds"]), hits, misses, false_alarms, values["protocol"], values["pool"]
        )


def _per_lead(events: Tensor) -> Tensor:
    # A frame's pixels fit int32, which is counted twice as fast; their sum over samples may not.
    return events.flatten(2).sum(-1, dtype=torch.int32).sum(0)


def _skill(hits: Tensor, misses: Tensor, false_alarms: Tensor) -> dict[str, Tensor]:
    h, m, f = hits.double(), misses.double(), false_alarms.double()
    return {
        "CSI": h / (h + m + f + EPS),
        "POD": h / (h + m + EPS),
        "SUCR": h / (h + f + EPS),
        # The published code squares this after dividing by ln 2, which makes no frequency bias of it.
        "bias": (h + f) / (h + m + EPS),
    }


@dataclass(frozen=True)
class Errors:
    """Squared and absolute errors, float64 (lead times,), and the pixels they are of, int64."""

    squared: Tensor
    absolute: Tensor
    count: Tensor
    scale: float = 1.0
    """Values are multiplied by this before they are compared (SEVIR: 1/255)."""

    @classmethod
    def of(cls, forecast: Tensor, truth: Tensor, *, scale: float = 1.0) -> "Errors":
        """Errors of (B, T, H, W, C) against truth of the same shape; NaN in either is left out.

        Raises:
            ValueError: the shapes differ.
        """
        if forecast.shape != truth.shape:
            raise ValueError(f"forecast of shape {tuple(forecast.shape)}: needed {tuple(truth.shape)}")
        difference = (forecast.double() - truth).flatten(2)
        missing = torch.isnan(difference)
        difference = difference.masked_fill_(missing, 0.0)
        return cls(
            torch.linalg.vecdot(difference, difference).sum(0) * scale**2,
            torch.linalg.vector_norm(difference, 1, -1).sum(0) * scale,
            (~missing).sum((0, 2)),
            scale,
        )

    def __add__(self, other: "Errors") -> "Errors":
        self.check_same(other)
        return Errors(
            self.squared + other.squared, self.absolute + other.absolute, self.count + other.count, self.scale
        )

    def check_same(self, other: "Errors") -> None:
        """Refuse to add or compare errors in different units or of different lead times.

        Raises:
            ValueError: scale or number of lead times differ; both are named.
        """
        if self.scale != other.scale:
            raise ValueError(f"errors of scale {other.scale} cannot be put beside scale {self.scale}")
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"errors of {len(other.count)} lead times cannot be put beside {len(self.count)}"
            )

    def per_lead_time(self) -> dict[str, Tensor]:
        """MSE and MAE, each float64 (lead times,)."""
        return {"MSE": self.squared / self.count, "MAE": self.absolute / self.count}

    def result(self) -> dict[str, float]:
        """MSE and MAE over all valid pixels of all lead times."""
        count = self.count.sum()
        return {"MSE": float(self.squared.sum() / count), "MAE": float(self.absolute.sum() / count)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sums = {name: getattr(self, name).tolist() for name in ("squared", "absolute", "count")}
        return {**sums, "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Errors":
        """The inverse of `to_dict`."""
        squared, absolute = (torch.tensor(values[n], dtype=torch.float64) for n in ("squared", "absolute"))
        return cls(squared, absolute, torch.tensor(values["count"], dtype=torch.int64), values["scale"])


NINO34_LAT, NINO34_LON = slice(10, 13), slice(19, 30)
"""5°S-5°N, 170°-120°W on the 24 × 48 grid of ICAR-ENSO cut to 95-330°E."""


def nino34(sst: Tensor) -> Tensor:
    """Niño3.4 index (B, T - 2) in K of SST anomalies (B, T, 24, 48) in K: box mean, 3-month running mean."""
    box = sst[:, :, NINO34_LAT, NINO34_LON].mean(dim=(2, 3))
    return box.unfold(1, 3, 1).mean(-1)


@dataclass(frozen=True)
class Nino:
    """Moments of forecast and observed Niño3.4, float64 (lead times,), and the samples they are of, int64.

    Means and central moments, merged by Chan et al. (1983): sums of squares would cancel digits.
    """

    count: Tensor
    mean_forecast: Tensor
    mean_truth: Tensor
    var_forecast: Tensor
    var_truth: Tensor
    covariance: Tensor
    squared: Tensor

    @classmethod
    def of(cls, sst: Tensor, labels: Tensor) -> "Nino":
        """Score SST forecasts (B, T, 24, 48) in K against labels (B, T - 2) in K.

        Raises:
            ValueError: the numbers of leads differ.
        """
        return cls.of_index(nino34(sst.double()), labels)

    @classmethod
    def of_index(cls, forecast: Tensor, truth: Tensor) -> "Nino":
        """Score indices (B, leads) in K against indices of the same shape; NaN in either is left out.

        Raises:
            ValueError: the shapes differ.
        """
        if forecast.shape != truth.shape:
            raise ValueError(f"Niño3.4 of shape {tuple(forecast.shape)}: needed {tuple(truth.shape)}")
        p, t = forecast.double(), truth.double()
        valid = ~(torch.isnan(p) | torch.isnan(t))
        count = valid.sum(0)

        def total(values: Tensor) -> Tensor:
            return values.masked_fill(~valid, 0.0).sum(0)

        mean_p, mean_t = total(p) / count.clamp_min(1), total(t) / count.clamp_min(1)
        dp, dt = p - mean_p, t - mean_t
        moments = total(dp.square()), total(dt.square()), total(dp * dt), total((p - t).square())
        return cls(count, mean_p, mean_t, *moments)

    def __add__(self, other: "Nino") -> "Nino":
        self.check_same(other)
        total = self.count + other.count
        dp, dt = other.mean_forecast - self.mean_forecast, other.mean_truth - self.mean_truth
        share = other.count.double() / total.clamp_min(1)
        between = self.count * share
        return Nino(
            total,
            self.mean_forecast + dp * share,
            self.mean_truth + dt * share,
            self.var_forecast + other.var_forecast + dp.square() * between,
            self.var_truth + other.var_truth + dt.square() * between,
            self.covariance + other.covariance + dp * dt * between,
            self.squared + other.squared,
        )

    def check_same(self, other: "Nino") -> None:
        """Refuse to add or compare scores of different lead times.

        Raises:
            ValueError: the numbers of lead times differ; both are named.
        """
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"Niño3.4 of {len(other.count)} lead times cannot be put beside {len(self.count)}"
            )

    def per_lead_time(self) -> dict[str, Tensor]:
        """Correlation and RMSE (K), each float64 (leads,)."""
        norm = (self.var_forecast * self.var_truth).sqrt() + 1e-6
        return {"C-Nino3.4": self.covariance / norm, "RMSE": (self.squared / self.count).sqrt()}

    def result(self) -> dict[str, float]:
        """C-Nino3.4-M, C-Nino3.4-WM (Earthformer, Sec. 4.3) and RMSE, the mean of the leads' RMSE in K."""
        leads = self.per_lead_time()
        correlation = leads["C-Nino3.4"]
        weights = nino_weights(len(correlation))
        return {
            "C-Nino3.4-M": float(correlation.mean()),
            "C-Nino3.4-WM": float((weights * correlation).mean()),
            "RMSE": float(leads["RMSE"].mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Nino":
        """The inverse of `to_dict`."""
        kinds = {name: torch.int64 if name == "count" else torch.float64 for name in values}
        return cls(**{name: torch.tensor(v, dtype=kinds[name]) for name, v in values.items()})


def nino_weights(leads: int) -> Tensor:
    """Weights a_k ln k of the lead months k = 1, 2, …: a is 1.5 for 4 leads, 2 and 3 for 7 each, then 4."""
    a = torch.tensor(([1.5] * 4 + [2.0] * 7 + [3.0] * 7 + [4.0] * max(0, leads - 18))[:leads])
    return a.double() * torch.arange(1, leads + 1, dtype=torch.float64).log()
