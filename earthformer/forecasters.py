"""One interface over all models: `loss(batch)` to train, `forecast(context, seeds)` to use.

Outside a forecaster every field is in the archive's own units; scaling, missing values and the device's
precision are its own affair. A uint8 field codes missing pixels as 255, a floating-point field as NaN.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from earthformer.config import EarthformerConfig, Scaling
from earthformer.transformer import Earthformer

MISSING_BYTE = 255


@dataclass(frozen=True)
class Members:
    """Some members of an ensemble forecast."""

    fields: Tensor
    """(B, M, T, H, W, C), float32 in the archive's own units; all NaN where a member failed."""
    achieved: Tensor | None = None
    """(B, M): the functional of each member, on the scaled fields, where knowledge alignment was asked."""
    requested: Tensor | None = None
    """(B,): what was asked of it."""


class Forecaster(Protocol):
    """What forecasting and serving need of a model."""

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, M, T_out, H, W, C), float32 in the units of `context` (B, T_in, H, W, C).

        `seeds` (B, M), int64, decides each member by itself, whatever it is batched with.
        """


@runtime_checkable
class EnsembleForecaster(Forecaster, Protocol):
    """A forecaster whose members share work."""

    def prepare(self, context: Tensor) -> dict[str, Tensor]:
        """What all members of one context (1, T_in, H, W, C) share, worked out once."""

    def draw(self, known: dict[str, Tensor], seeds: Tensor) -> Members:
        """Members of seeds (1, M) and of what `prepare` gave, all M of them at a time."""


def prepared(forecaster: Forecaster, context: Tensor) -> dict[str, Tensor]:
    """What `drawn` needs of one context (1, T_in, H, W, C)."""
    return forecaster.prepare(context) if isinstance(forecaster, EnsembleForecaster) else {"context": context}


def drawn(forecaster: Forecaster, known: dict[str, Tensor], seeds: Tensor) -> Members:
    """Members of seeds (1, M) and of what `prepared` gave."""
    if isinstance(forecaster, EnsembleForecaster):
        return forecaster.draw(known, seeds)
    return Members(forecaster.forecast(known["context"], seeds))


def members_of(forecaster: Forecaster, context: Tensor, seeds: Tensor, batch: int) -> Iterator[Members]:
    """The members of one context (1, T_in, H, W, C) and seeds (1, M), `batch` of them at a time.

    What they share is worked out once, and no more than a batch of them need be in memory.
    """
    known = prepared(forecaster, context)
    for some in torch.split(seeds, batch, 1):
        yield drawn(forecaster, known, some)


class Trainable(nn.Module, ABC):
    """What the training loop needs of a model."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        """Scalar loss of `context` (B, T_in, H, W, C) and `target` (B, T_out, H, W, C) at a step."""

    def forward(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        """The loss: data parallelism wraps a module's `forward`."""
        return self.loss(batch, step)

    def parts(self) -> list[nn.Module]:
        """What has its gradient clipped by itself."""
        return [self]

    def calibrate(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """What is to be measured on some training windows before the first step."""

    def after_step(self) -> None:
        """What is to be done after each optimiser step."""

    def validation_sums(self) -> list[Tensor]:
        """Buffers that a validation adds to: 0 before it, summed over all workers after it."""
        return []

    def after_validation(self) -> None:
        """What is to be done with those sums."""


class TrainableByLoss(Trainable):
    """One that is validated by its loss rather than by its forecasts."""

    @abstractmethod
    def validation_loss(self, batch: dict[str, Tensor], seeds: Tensor) -> Tensor:
        """Loss of each window (B,), whose random numbers follow from its seed; lower is better."""


def present(field: Tensor) -> Tensor:
    """True where a pixel was observed; the shape of `field`."""
    return torch.isfinite(field) if field.is_floating_point() else field != MISSING_BYTE


class Persistence(nn.Module):
    """The last frame of the context, repeated: the forecast that any model has to beat."""

    def __init__(self, target_frames: int, scaling: Scaling) -> None:
        super().__init__()
        self.target_frames = target_frames
        self.scaling = scaling

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, 1, T_out, H, W, C); NaN where the last frame is missing."""
        _one_member(seeds)
        last = torch.where(present(context[:, -1:]), context[:, -1:].float(), torch.nan)
        return last[:, None].expand(-1, -1, self.target_frames, -1, -1, -1)


class EarthformerForecaster(Trainable):
    """Earthformer (Gao et al., 2022): a deterministic forecast, trained by the MSE of the scaled fields."""

    def __init__(self, config: EarthformerConfig, scaling: Scaling) -> None:
        super().__init__()
        self.network = Earthformer(config)
        self.scaling = scaling

    def loss(self, batch: dict[str, Tensor], step: int = 0) -> Tensor:
        """Mean squared error on the scaled fields; missing targets count as zero error.

        The mean runs over all pixels, so that it splits exactly over workers and micro-batches.
        """
        return _squared_error(
            self.network(scaled(batch["context"], self.scaling)), batch["target"], self.scaling
        )

    @torch.inference_mode()
    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, 1, T_out, H, W, C), float32 in the units of `context`."""
        _one_member(seeds)
        return self.scaling.decode(self.network(scaled(context, self.scaling)).float())[:, None]


def scaled(field: Tensor, scaling: Scaling) -> Tensor:
    """What a network sees of a field in the archive's own units; missing pixels as if nothing were there."""
    # Missing is 0 in the field's own units, as in the published loaders: no rain, no anomaly.
    return scaling.encode(torch.where(present(field), field, 0))


def _squared_error(forecast: Tensor, target: Tensor, scaling: Scaling) -> Tensor:
    error = torch.where(present(target), forecast.float() - scaling.encode(target), 0.0)
    return error.square().mean()


def _one_member(seeds: Tensor) -> None:
    if seeds.shape[1] != 1:
        raise ValueError(f"{seeds.shape[1]} members asked of a deterministic forecaster: needed 1")
