"""Knowledge alignment: a functional of the future, the network that reads it off noisy latents, guidance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthformer.denoiser import DownPath, check_shape, zeroed
from earthformer.prediff_config import AlignmentConfig, Functional

# ---------------------------------------------------------------------------- the functional


def functional(frames: Tensor, functional: Functional) -> Tensor:
    """(B, T, 1): the functional of each frame of `frames` (B, T, H, W, C), over H, W and C."""
    if functional.kind == "maximum":
        return frames.amax((2, 3, 4)).unsqueeze(-1)
    if functional.kind == "area":
        frames = (frames >= functional.threshold).to(torch.float32)
    return frames.mean((2, 3, 4)).unsqueeze(-1)


# ---------------------------------------------------------------------------- the network


class AttentionPool(nn.Module):
    """(N, C, L) -> (N, out): what the mean of L tokens draws from them and from itself, by attention."""

    def __init__(self, tokens: int, dim: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(dim, tokens + 1) * dim**-0.5)
        self.qkv_proj = nn.Conv1d(dim, 3 * dim, 1)
        self.c_proj = nn.Conv1d(dim, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, out)."""
        x = torch.cat([x.mean(-1, keepdim=True), x], -1) + self.positional_embedding
        query, key, value = (
            torch.unflatten(part, 1, (self.heads, -1)).transpose(2, 3)
            for part in self.qkv_proj(x).chunk(3, 1)
        )  # (N, heads, 1 + L, D)
        y = F.scaled_dot_product_attention(query[:, :, :1], key, value)
        out: Tensor = self.c_proj(y.flatten(1).unsqueeze(-1))
        return out.squeeze(-1)


class AlignmentNetwork(DownPath):
    """A functional of the future read off its noisy latents (PreDiff, Sec. 3.3).

    The way down is the denoiser's; each frame's coarsest tokens, or those of all frames, are then pooled.
    """

    config: AlignmentConfig

    def __init__(self, config: AlignmentConfig) -> None:
        """
        Raises:
            ValueError: unknown attention pattern.
        """
        super().__init__(config, config.target[3])
        t, h, w, dim = config.level_shapes[-1]
        tokens = h * w if config.per_frame else t * h * w
        pool = AttentionPool(tokens, dim, config.attention.heads, config.out_channels)
        self.out = nn.Sequential(nn.GroupNorm(min(dim, 32), dim), nn.SiLU(), pool)
        self.initialise()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """(B, T, out_channels), or (B, out_channels) unless `per_frame`.

        Args:
            z: noisy latents of the target, (B, T, H, W, C).
            t: steps of the noise schedule, (B,), or (1,) of all samples; 0 the least noisy.

        Raises:
            ValueError: an argument is not of the configured shape, by name.
        """
        check_shape("z", z, self.config.target)
        check_shape("t", t, (), 1 if t.shape == (1,) else z.shape[0])
        levels, _ = self.down(z, self.embed(t))
        if not self.config.per_frame:
            out: Tensor = self.out(levels[-1].flatten(1, 3).transpose(1, 2))
            return out
        tokens = levels[-1].flatten(0, 1).flatten(1, 2).transpose(1, 2)
        return torch.unflatten(self.out(tokens), 0, z.shape[:2])


def guidance(network: AlignmentNetwork, z: Tensor, t: Tensor, requested: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of |U - requested|, of each sample with respect to its own `z`, (B, T, H, W, C); then itself.

    U is the mean over frames of what `network` (in eval mode) makes of `z` (B, T, H, W, C) at steps `t`
    (B,); `requested` is (B,). A sample's gradient is the same whatever else is in the batch: the original
    takes one norm over the whole batch. Gradients pass through `network` alone, also where the caller
    has switched them off.

    Raises:
        ValueError: an argument is not of the configured shape, by name.
    """
    check_shape("requested", requested, (), z.shape[0])
    with torch.inference_mode(False), torch.enable_grad():
        z, t, requested = (x.clone() for x in (z.detach(), t, requested))
        z.requires_grad_()
        gap = (network(z, t).flatten(1).mean(1) - requested).abs()
        (gradient,) = torch.autograd.grad(gap.sum(), z)
    return gradient, gap.detach()


# ---------------------------------------------------------------------------- what is to be expected


class GaussianFunctional(nn.Module):
    """Mean and spread of a functional of the future, given that of each context frame.

    A small network (ours: the original's is not published) corrects the last context value. It works on
    values that are normalised by the mean and standard deviation of those that `calibrate` was given.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, context_frames: int, hidden: int = 64) -> None:
        super().__init__()
        self.context_frames = context_frames
        self.layers = nn.Sequential(
            nn.Linear(context_frames, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            zeroed(nn.Linear(hidden, 2)),
        )
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("spread", torch.ones((), dtype=torch.float64))

    def forward(self, context_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation, (B,) each, given values (B, T_in).

        Raises:
            ValueError: `context_values` is of another shape.
        """
        check_shape("context_values", context_values, (self.context_frames,))
        values = context_values.to(self.layers[0].weight.dtype)  # type: ignore[arg-type]
        mean, spread = (x.to(values) for x in (self.mean, self.spread.clamp(min=1e-6)))
        change, widening = self.layers((values - mean) / spread).unbind(-1)
        return values[:, -1] + spread * change, spread.log() + widening.clamp(-7, 7)

    def loss(self, context_values: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-likelihood of `target` (B,) after values (B, T_in).

        Raises:
            ValueError: an argument is of another shape.
        """
        check_shape("target", target, (), context_values.shape[0])
        mu, log_sigma = self(context_values)
        error = (target - mu) * torch.exp(-log_sigma)
        nll: Tensor = (0.5 * error.square() + log_sigma).mean() + 0.5 * math.log(2 * math.pi)
        return nll

    def level(self, context_values: Tensor, n: float | Tensor) -> Tensor:
        """mu + n sigma, (B,), after values (B, T_in); `n` is a number or (B,)."""
        mu, log_sigma = self(context_values)
        level: Tensor = mu + n * log_sigma.exp()
        return level

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Take mean and spread from the context values (N, T_in) of some training windows."""
        self.mean.copy_(values.double().mean())
        self.spread.copy_(values.double().std(correction=0))
