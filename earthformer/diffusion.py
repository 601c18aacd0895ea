"""Gaussian diffusion over latents: noise schedule, training objective and samplers (PreDiff, Sec. 3.1).

Samplers are given ẑ0, the predicted clean latents, so that clamping and guidance act alike in all of them.

Guidance. PreDiff shifts the mean of each DDPM step by -σ_t G, with σ_t the step's standard deviation. That
mean is c1_t ẑ0 + c2_t z_t, so the shift is the same as ẑ0 ← ẑ0 - (σ_t / c1_t) G, which for the predicted
noise is ε̂ ← ε̂ + √(ᾱ_t / (1-ᾱ_t)) (σ_t / c1_t) G: classifier guidance, with σ_t where that has σ_t². Written
so it belongs to the trained timestep t rather than to a step, and other samplers and fewer steps take it over
as it is. Shifting the means of fewer, longer steps by their σ would weaken it by the root of that length.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from earthformer.config import FieldShape, need
from earthformer.prediff_config import DiffusionConfig
from earthformer.samplers import Stepper, check_sampler, member_noise, spaced, step_variance

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z (N, T, H, W, C), t (N,) int64) -> what the denoiser predicts, of z's shape."""
Guide = Callable[[Tensor, Tensor], Tensor]
"""(z (N, T, H, W, C), t (N,) int64) -> the gradient to descend, scale included, of z's shape."""


@dataclass(frozen=True)
class LossTerms:
    """Losses of each sample, (B,)."""

    simple: Tensor
    """Mean squared error over T, H, W and C."""
    gamma: Tensor
    """The same under the learned log-variance λ of its timestep: simple / exp(λ) + λ."""
    vlb: Tensor
    """The same as it counts in the variational bound."""
    total: Tensor
    """`simple_weight` gamma + `elbo_weight` vlb."""


@dataclass(frozen=True)
class Samples:
    """Members of an ensemble."""

    latents: Tensor
    """(N, T, H, W, C), float32; NaN throughout a member that diverged."""
    diverged: Tensor
    """(N,), bool: the member was not finite, or larger than any latents, at some step."""


class Diffusion(nn.Module):
    """The schedule of `config.timesteps` noise levels, and training and sampling on it.

    Float32 buffers (timesteps,), each rounded once from float64 and none of them part of a checkpoint.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    lvlb_weights: Tensor
    guidance_coef: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self._betas = _betas(config)
        alphas = 1 - self._betas
        bars = torch.cumprod(alphas, 0)
        previous = torch.cat([torch.ones(1, dtype=bars.dtype), bars[:-1]])
        variance = step_variance(self._betas, bars, previous, config.variance)
        log_variance = variance.clamp(min=1e-20).log()
        coef1 = self._betas * previous.sqrt() / (1 - bars)
        derived = {
            "betas": self._betas,
            "alphas_cumprod": bars,
            "sqrt_alphas_cumprod": bars.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bars).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / bars).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bars - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": log_variance,
            "posterior_mean_coef1": coef1,
            "lvlb_weights": _vlb_weights(config, self._betas, bars, variance),
            "guidance_coef": (log_variance / 2).exp() / coef1,
        }
        for name, values in derived.items():
            self.register_buffer(name, values.to(torch.float32), persistent=False)

    # ------------------------------------------------------------------------ training

    def q_sample(self, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents with the noise of their timestep, √ᾱ_t z0 + √(1-ᾱ_t) noise.

        Args:
            z0: clean latents (B, T, H, W, C).
            t: (B,), int64, 0 to timesteps - 1.
            noise: standard normal, of z0's shape.
        """
        signal, scatter = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        return _over(signal, z0) * z0 + _over(scatter, z0) * noise

    def loss_terms(
        self, predicted: Tensor, z0: Tensor, noise: Tensor, t: Tensor, logvar: Tensor | None = None
    ) -> LossTerms:
        """Losses of what the denoiser made of `q_sample(z0, t, noise)`.

        Args:
            predicted: (B, T, H, W, C), what `config.prediction` says.
            z0: clean latents, of that shape.
            noise: of that shape.
            t: (B,), int64.
            logvar: λ (timesteps,), learned; none stands for 0.

        Raises:
            ValueError: the shapes differ.
        """
        if self.config.prediction == "velocity":
            target = self.q_sample(noise, t, -z0)
        else:
            target = noise if self.config.prediction == "epsilon" else z0
        _same_shape("prediction", predicted, target)
        simple = (predicted.float() - target).square().flatten(1).mean(1)
        gamma = simple if logvar is None else simple / logvar[t].exp() + logvar[t]
        vlb = self.lvlb_weights[t] * simple
        total = self.config.simple_weight * gamma + self.config.elbo_weight * vlb
        return LossTerms(simple, gamma, vlb, total)

    # ------------------------------------------------------------------------ sampling

    def sample(
        self,
        denoise: Denoise,
        shape: FieldShape,
        seeds: Tensor,
        sampler: str,
        steps: int,
        *,
        guide: Guide | None = None,
        limit: float | None = None,
    ) -> Samples:
        """Latents drawn from noise, one member a seed, on the device of this module.

        A member follows from its seed alone: to the bit for batches of equal size, whatever else is in them
        and wherever it stands, and within rounding for others, as far as `denoise` and `guide` keep to that.
        Both are called without gradients (a guide enables them itself).

        Args:
            denoise: what predicts what `config.prediction` says.
            shape: (T, H, W, C) of a member.
            seeds: (N,), int64.
            sampler: a name of `SAMPLERS`.
            steps: calls of `denoise`, 1 to `config.timesteps`.
            guide: gradient to descend, for knowledge alignment.
            limit: magnitude of latents beyond which a member counts as diverged; by default one that only a
                sampler out of hand reaches.

        Raises:
            ValueError: unknown sampler; impossible steps, shape, seeds or limit; a prediction or gradient of
                another shape.
        """
        noises = member_noise(shape, seeds, self.betas.device)
        for samples in self.states(denoise, noises, sampler, steps, guide=guide, limit=limit):
            last = samples
        latents = last.latents.masked_fill(_over(last.diverged, last.latents), math.nan)
        return Samples(latents, last.diverged)

    def states(
        self,
        denoise: Denoise,
        noises: Iterator[Tensor],
        sampler: str,
        steps: int,
        *,
        guide: Guide | None = None,
        limit: float | None = None,
    ) -> Iterator[Samples]:
        """The members after each step of `sample`; those that diverged are 0 from then on.

        Args:
            noises: standard normal (N, T, H, W, C): what to start from, and then one for each step of `ddpm`
                but the last.

        Raises:
            ValueError: as `sample`.
        """
        if limit is None:
            # A denoiser that predicts no noise at all, as an untrained one, lets z_T grow by 1 / √ᾱ_T.
            limit = max(1000.0, 10 / math.sqrt(float(torch.prod(1 - self._betas))))
        need(limit > 0, "limit", limit, "a magnitude above 0")
        stepper = self.stepper(sampler, steps)
        return self._states(denoise, noises, stepper, guide, limit)

    def _states(
        self,
        denoise: Denoise,
        noises: Iterator[Tensor],
        stepper: "Stepper",
        guide: Guide | None,
        limit: float,
    ) -> Iterator[Samples]:
        z = next(noises)
        diverged = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for step, timestep in enumerate(stepper.timesteps):
            t = torch.full((len(z),), timestep, device=z.device)
            z0, bad = _contained(self.clean(denoise, z, t, guide), math.inf)
            noise = next(noises) if stepper.stochastic and step + 1 < stepper.steps else None
            z, large = _contained(stepper.update(step, z, z0, noise), limit)
            diverged = diverged | bad | large
            z = z.masked_fill(_over(diverged, z), 0.0)
            yield Samples(z, diverged)

    @torch.no_grad()
    def clean(self, denoise: Denoise, z: Tensor, t: Tensor, guide: Guide | None = None) -> Tensor:
        """Clean latents ẑ0 (N, T, H, W, C), as the denoiser and the guide see them in z at timesteps t (N,).

        Raises:
            ValueError: a prediction or gradient of another shape.
        """
        predicted = denoise(z, t)
        _same_shape("prediction", predicted, z)
        z0 = predicted.float()
        if self.config.prediction == "epsilon":
            signal, scatter = self.sqrt_recip_alphas_cumprod[t], self.sqrt_recipm1_alphas_cumprod[t]
            z0 = _over(signal, z) * z - _over(scatter, z) * z0
        elif self.config.prediction == "velocity":
            z0 = self.q_sample(z, t, -z0)
        if self.config.clip:
            z0 = z0.clamp(-1, 1)
        if guide is None:
            return z0
        gradient = guide(z, t)
        _same_shape("guidance", gradient, z)
        return z0 - _over(self.guidance_coef[t], z) * gradient.float()

    def stepper(self, sampler: str, steps: int) -> "Stepper":
        """One run of a sampler.

        Raises:
            ValueError: unknown sampler; steps below 1 or above the schedule's.
        """
        check_sampler(sampler)
        length = self.config.timesteps
        needed = f"a whole number from 1 to {length}, the timesteps of the schedule"
        need(isinstance(steps, int) and 1 <= steps <= length, "steps", steps, needed)
        return Stepper(sampler, spaced(steps, length), self._betas, self.config.variance)


# ---------------------------------------------------------------------------- exponential moving average


class Ema(nn.Module):
    """A module whose parameters are the exponential moving average of another's.

    After n updates the decay is min(decay, (1 + n) / (10 + n)); an update is an optimiser step, and n part of
    the state dict. The average is there to be used: it stays in eval mode.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        need(0 <= decay <= 1, "decay", decay, "a fraction from 0 to 1")
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> Self:
        """No training mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the parameters of `module`, and take over its buffers."""
        self.updates += 1
        weight = (9 / (10 + self.updates)).clamp(min=1 - self.decay)
        for average, parameter in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(parameter, weight)
        for own, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(buffer)


# ---------------------------------------------------------------------------- the schedule


def _betas(config: DiffusionConfig) -> Tensor:
    """(timesteps,), float64."""
    steps, double = config.timesteps, torch.float64
    start, end = config.beta_start, config.beta_end
    if config.schedule == "linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=double).square()
    if config.schedule == "cosine":
        s = 8e-3
        angles = (torch.arange(steps + 1, dtype=double) / steps + s) / (1 + s) * (math.pi / 2)
        levels = angles.cos().square()
        return (1 - levels[1:] / levels[:-1]).clamp(0, 0.999)
    betas = torch.linspace(start, end, steps, dtype=double)
    return betas.sqrt() if config.schedule == "sqrt" else betas


def _vlb_weights(config: DiffusionConfig, betas: Tensor, bars: Tensor, variance: Tensor) -> Tensor:
    # As published, of values already rounded: 1 - ᾱ loses up to four digits by that.
    alphas, betas, bars, variance = (values.float() for values in (1 - betas, betas, bars, variance))
    if config.prediction == "sample":
        weights = 0.5 * bars.sqrt() / (2 - bars)
    else:
        weights = betas.square() / (2 * variance * alphas * (1 - bars))
        if config.prediction == "velocity":
            # The error of the noise that it implies is √ᾱ times its own.
            weights = weights * bars
    # The posterior at t = 0 has no variance: it counts as t = 1.
    return torch.cat([weights[1:2], weights[1:]])


# ---------------------------------------------------------------------------- tensors


def _over(values: Tensor, field: Tensor) -> Tensor:
    """(N,) values beside an (N, ...) field."""
    return values.reshape(-1, *[1] * (field.ndim - 1))


def _contained(field: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The field, 0 where a member is not finite or beyond the limit, and which members (N,) those are."""
    beyond = ~(field.isfinite() & (field.abs() <= limit)).flatten(1).all(1)
    return field.masked_fill(_over(beyond, field), 0.0), beyond


def _same_shape(name: str, found: Tensor, needed: Tensor) -> None:
    if found.shape != needed.shape:
        raise ValueError(f"{name} of shape {tuple(found.shape)}: needed {tuple(needed.shape)}")
