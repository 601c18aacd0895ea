"""Knowledge alignment's constraint: what reads a functional off noisy latents, and what it is to be."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from earthformer.alignment import AlignmentNetwork, GaussianFunctional, functional
from earthformer.autoencoder import posterior_sample
from earthformer.config import Scaling, need
from earthformer.diffusion import Diffusion
from earthformer.forecasters import TrainableByLoss, scaled
from earthformer.latents import Batch, Latents, seeded
from earthformer.prediff_config import AlignmentConfig, AutoencoderConfig


class Constraint(TrainableByLoss):
    """The alignment network on noisy latents, and what a future after some context is expected to have.

    Trained side by side: the network reads the functional of each target frame off noisy latents (PreDiff,
    Sec. 3.3), the Gaussian model gives the functional's mean and spread given that of the context frames
    (Sec. 4.2).
    """

    def __init__(self, config: AlignmentConfig, autoencoder: AutoencoderConfig, scaling: Scaling) -> None:
        """
        Raises:
            ValueError: the network's latents are not the autoencoder's.
        """
        super().__init__()
        found, needed = config.target[1:], autoencoder.latent
        need(found == needed, "target (H, W, C)", found, f"{needed}, the autoencoder's latents")
        self.config = config
        self.latents = Latents(autoencoder, scaling, config.normalise)
        self.network = AlignmentNetwork(config)
        self.gaussian = GaussianFunctional(config.context_frames)
        self.diffusion = Diffusion(config.diffusion)

    def parts(self) -> list[nn.Module]:
        """What has its gradient clipped by itself."""
        return [self.network, self.gaussian]

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Give the Gaussian model the mean and spread of the contexts, before training."""
        self.gaussian.calibrate(torch.cat([self._seen(batch["context"]) for batch in batches]))

    def loss(self, batch: Batch, step: int = 0) -> Tensor:
        """Squared error of the network at random t, plus the Gaussian's negative log-likelihood."""
        frames = scaled(batch["target"], self.latents.scaling)
        latents = self.latents.of_target(frames)
        mean = latents["target_mean"]
        drawn = posterior_sample(mean, latents["target_logvar"], torch.randn_like(mean))
        z0 = self.latents.whiten(drawn)
        t = torch.randint(self.config.diffusion.timesteps, mean.shape[:1], device=mean.device)
        error = self._error(z0, t, torch.randn_like(mean), frames)
        wanted = functional(frames, self.config.functional).mean((1, 2))
        return error.mean() + self.gaussian.loss(self._seen(batch["context"]), wanted)

    @torch.no_grad()
    def validation_loss(self, batch: Batch, seeds: Tensor) -> Tensor:
        """Squared error of the network (B,), of t and noise that each window's seed decides."""
        frames = scaled(batch["target"], self.latents.scaling)
        latents = self.latents.of_target(frames)
        mean = latents["target_mean"]
        z0 = self.latents.whiten(mean)
        return self._error(z0, *seeded(seeds, self.config.diffusion.timesteps, mean), frames)

    @torch.no_grad()
    def request(self, context: Tensor, deviations: float) -> Tensor:
        """mu + n sigma (B,) of the functional, on scaled fields, after contexts (B, T_in, H, W, C)."""
        level: Tensor = self.gaussian.level(self._seen(context), deviations)
        return level

    def _error(self, z0: Tensor, t: Tensor, noise: Tensor, frames: Tensor) -> Tensor:
        read = self.network(self.diffusion.q_sample(z0, t, noise), t)
        wanted = functional(frames, self.config.functional)
        if not self.config.per_frame:
            wanted = wanted.mean(1)
        error: Tensor = (read - wanted).square().flatten(1).mean(1)
        return error

    def _seen(self, context: Tensor) -> Tensor:
        field = scaled(context[:, -self.config.context_frames :], self.latents.scaling)
        return functional(field, self.config.functional)[..., 0]
