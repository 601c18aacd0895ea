"""One interface over all forecasters: `loss(batch)` to train, `forecast(context, seeds)` to use.

Outside a forecaster every field is in the archive's own units; scaling, missing values and the device's
precision are its own affair. A uint8 field codes missing pixels as 255, a floating-point field as NaN.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from earthformer.config import EarthformerConfig, Scaling
from earthformer.transformer import Earthformer

MISSING_BYTE = 255


class Forecaster(Protocol):
    """What training, forecasting and serving need of a model."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Scalar training loss of `context` (B, T_in, H, W, C) and `target` (B, T_out, H, W, C)."""

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, M, T_out, H, W, C), float32 in the units of `context` (B, T_in, H, W, C).

        `seeds` (B, M), int64, decides each member by itself, whatever it is batched with.
        """


def present(field: Tensor) -> Tensor:
    """True where a pixel was observed; the shape of `field`."""
    return torch.isfinite(field) if field.is_floating_point() else field != MISSING_BYTE


class Persistence(nn.Module):
    """The last frame of the context, repeated: the forecast that any model has to beat."""

    def __init__(self, target_frames: int, scaling: Scaling) -> None:
        super().__init__()
        self.target_frames = target_frames
        self.scaling = scaling

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error on the scaled fields; missing targets count as zero error."""
        last = _scaled(batch["context"][:, -1:], self.scaling)
        return _squared_error(last, batch["target"], self.scaling)

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, 1, T_out, H, W, C); NaN where the last frame is missing."""
        _one_member(seeds)
        last = torch.where(present(context[:, -1:]), context[:, -1:].float(), torch.nan)
        return last[:, None].expand(-1, -1, self.target_frames, -1, -1, -1)


class EarthformerForecaster(nn.Module):
    """Earthformer (Gao et al., 2022): a deterministic forecast, trained by the MSE of the scaled fields."""

    def __init__(self, config: EarthformerConfig, scaling: Scaling) -> None:
        super().__init__()
        self.network = Earthformer(config)
        self.scaling = scaling

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss: data parallelism wraps a module's `forward`."""
        return self.loss(batch)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error on the scaled fields; missing targets count as zero error.

        The mean runs over all pixels, so that it splits exactly over workers and micro-batches.
        """
        return _squared_error(
            self.network(_scaled(batch["context"], self.scaling)), batch["target"], self.scaling
        )

    @torch.inference_mode()
    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, 1, T_out, H, W, C), float32 in the units of `context`."""
        _one_member(seeds)
        return self.scaling.decode(self.network(_scaled(context, self.scaling)).float())[:, None]


def _scaled(context: Tensor, scaling: Scaling) -> Tensor:
    # Missing is 0 in the field's own units, as in the published loaders: no rain, no anomaly.
    return scaling.encode(torch.where(present(context), context, 0))


def _squared_error(forecast: Tensor, target: Tensor, scaling: Scaling) -> Tensor:
    error = torch.where(present(target), forecast.float() - scaling.encode(target), 0.0)
    return error.square().mean()


def _one_member(seeds: Tensor) -> None:
    if seeds.shape[1] != 1:
        raise ValueError(f"{seeds.shape[1]} members asked of a deterministic forecaster: needed 1")
