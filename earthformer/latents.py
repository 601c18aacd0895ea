"""Frames as latents, by an autoencoder: its training, and what diffusion and alignment have of it."""

import torch
from torch import Tensor, nn

from earthformer import motion
from earthformer.autoencoder import Autoencoder, AutoencoderTraining
from earthformer.config import Scaling
from earthformer.forecasters import TrainableByLoss, present, scaled
from earthformer.prediff_config import AutoencoderConfig

Batch = dict[str, Tensor]
HIGHEST = 1.2
"""Scaled log-rate that no forecast exceeds: 250 mm/h by the radar task's scaling."""


class FrameAutoencoder(TrainableByLoss):
    """Trains the autoencoder on frames of context and target alike (PreDiff, App. B.1)."""

    def __init__(self, config: AutoencoderConfig, scaling: Scaling) -> None:
        super().__init__()
        self.objective = AutoencoderTraining(config)
        self.scaling = scaling
        self.latent_std: Tensor
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.latent_sums: Tensor
        sums = torch.zeros(3, config.latent_channels, dtype=torch.float64)
        self.register_buffer("latent_sums", sums, persistent=False)

    @property
    def autoencoder(self) -> Autoencoder:
        """The network that training is for."""
        return self.objective.autoencoder

    def parts(self) -> list[nn.Module]:
        """Autoencoder and discriminator."""
        return list(self.objective.parts())

    def loss(self, batch: Batch, step: int = 0) -> Tensor:
        """The loss of optimiser step `step`, scalar: its gradient is right for both networks at once."""
        frames = self._frames(batch)
        config = self.objective.config
        frames = frames[:, torch.randperm(frames.shape[1])[: config.frames_per_window].to(frames.device)]
        if config.crop is not None:
            y, x = (int(torch.randint(n - config.crop + 1, ())) for n in frames.shape[2:4])
            frames = frames[:, :, y : y + config.crop, x : x + config.crop]
        return self.objective.loss({"frames": frames}, step)

    def validation_sums(self) -> list[Tensor]:
        """Number, sum and sum of squares of the latents of each channel."""
        return [self.latent_sums]

    def after_validation(self) -> None:
        """Keep the scale by which a diffusion model brings the latents to a standard deviation of 1."""
        count, total, squares = self.latent_sums
        variance = squares / count - (total / count).square()
        self.latent_std.copy_(variance.clamp_min(1e-12).sqrt())

    @torch.no_grad()
    def validation_loss(self, batch: Batch, seeds: Tensor) -> Tensor:
        """Mean absolute error of the reconstruction from the posterior's mode, scaled, (B,)."""
        frames = self._frames(batch)
        mean, _ = self.objective.autoencoder.encode(frames)
        latents = mean.double().flatten(0, 3)
        ones = torch.ones_like(latents[0])
        self.latent_sums += torch.stack([len(latents) * ones, latents.sum(0), latents.square().sum(0)])
        return (self.objective.autoencoder.decode(mean) - frames).abs().flatten(1).mean(1)

    def _frames(self, batch: Batch) -> Tensor:
        return scaled(torch.cat([batch["context"], batch["target"]], 1), self.scaling)


class Latents(nn.Module):
    """From fields to latents and back, by a trained autoencoder that is trained no further.

    With `normalise` the target's latents are brought to a standard deviation of 1 in each channel; the
    published model leaves them (a scale of 1), and never scales those of the context.
    """

    def __init__(self, config: AutoencoderConfig, scaling: Scaling, normalise: bool) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(config).requires_grad_(False)
        self.scaling, self.normalise = scaling, normalise
        self.latent_std: Tensor
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @torch.no_grad()
    def of_target(self, frames: Tensor) -> Batch:
        """`target_mean` and `target_logvar` (B, T, h, w, C) of scaled frames (B, T, H, W, C)."""
        mean, logvar = self.autoencoder.encode(frames)
        return {"target_mean": mean, "target_logvar": logvar}

    @torch.no_grad()
    def of_context(self, context: Tensor, frames: int) -> Tensor:
        """Latents (B, frames, h, w, C) of the last frames of a context (B, T, H, W, C)."""
        mean, _ = self.autoencoder.encode(scaled(context[:, -frames:], self.scaling))
        return mean

    @torch.no_grad()
    def moved(self, context: Tensor, frames: int, drift: Tensor) -> Tensor:
        """The last frame of a context (B, T, H, W, C), scaled, along its motion: (B, frames, H, W, C).

        It also drifts, by (B, 2) pixels a frame; one context may be given for many drifts.
        """
        field = scaled(context, self.scaling)
        # The edge of what was observed stands still, and is no motion.
        seen = field.masked_fill(~present(context), torch.nan)
        paths = motion.trajectories(motion.flow(seen[..., 0]), frames)
        return motion.warp(field[:, -1].expand(len(drift), -1, -1, -1), motion.drifting(paths, drift))

    @torch.no_grad()
    def lost(self, frames: Tensor, latents: Tensor) -> Tensor:
        """What their latents (B, T, h, w, C) do not tell of scaled frames (B, T, H, W, C)."""
        return frames - self.autoencoder.decode(latents).float()

    def whiten(self, latents: Tensor) -> Tensor:
        """Latents (B, T, h, w, C) as diffusion sees them."""
        return latents / self.latent_std if self.normalise else latents

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return z * self.latent_std if self.normalise else z

    def decode(self, latents: Tensor, detail: Tensor | float = 0.0, like: Tensor | None = None) -> Tensor:
        """Fields (B, T, H, W, C), float32 in the archive's own units, of latents (B, T, h, w, C).

        On the scaled fields, `detail` is added, and they get the values of `like`, if given, by `matched`.
        """
        scaled_fields = self.autoencoder.decode(latents).float() + detail
        if like is not None:
            scaled_fields = matched(scaled_fields, like)
        if self.scaling.kind == "log":
            # The exponential would make hundreds of millimetres of what overshoots by a little.
            scaled_fields = scaled_fields.clamp(max=HIGHEST)
        return self.scaling.decode(scaled_fields)


def matched(fields: Tensor, like: Tensor) -> Tensor:
    """The values of `like` in the order of those of `fields`, each frame of (B, T, H, W, C) by itself.

    Probability matching (Ebert, 2001), with which STEPS ends too.
    """
    places = fields.flatten(2, 3).sort(dim=2, stable=True).indices
    values = like.flatten(2, 3).sort(2).values
    return torch.empty_like(values).scatter_(2, places, values).view_as(like)


def seeded(seeds: Tensor, timesteps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """t (B,) and noise of the shape of `like` (B, ...), of which each row follows from its seed alone."""
    t, noise = [], []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        t.append(torch.randint(timesteps, (), generator=generator))
        noise.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(t).to(like.device), torch.stack(noise).to(like.device, like.dtype)
