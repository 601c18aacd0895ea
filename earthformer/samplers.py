"""The samplers of `diffusion`, and the noise that members begin with.

They are diffusers' schedulers. Each runs on the schedule that its few steps leave of the trained one (the
kept timesteps' ᾱ, in float64), so that any number of steps fits and the last one ends in clean latents; with
all steps `ddpm` is the published sampler.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from earthformer.config import FieldShape, need

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")
"""DDPM; DDIM without noise; DPM-Solver++, 2M; UniPC of order 2."""


def check_sampler(sampler: str) -> None:
    """
    Raises:
        ValueError: it is unknown; the nearest is named.
    """
    if sampler not in SAMPLERS:
        near = get_close_matches(sampler.lower(), SAMPLERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"sampler is {sampler!r}: needed one of {', '.join(SAMPLERS)} (the nearest is {near})"
        )


class Stepper:
    """The steps of one run of a sampler, first to last; it remembers what multistep samplers need."""

    def __init__(self, sampler: str, ascending: Sequence[int], betas: Tensor, variance: float) -> None:
        self.timesteps = tuple(reversed(ascending))
        """Trained timesteps at which the denoiser is called, descending."""
        self.steps = len(self.timesteps)
        self.stochastic = sampler == "ddpm"
        self._eta = {"ddpm": 1.0, "ddim": 0.0}.get(sampler)
        bars = torch.cumprod(1 - betas, 0)[list(ascending)]
        previous = torch.cat([torch.ones(1, dtype=bars.dtype), bars[:-1]])
        kept = 1 - bars / previous
        self._scheduler = _scheduler(sampler, kept)
        # Stock schedulers hold ᾱ in float32, by which the last steps are off by 5e-5.
        self._scheduler.alphas_cumprod = bars
        self._scheduler.set_timesteps(self.steps)
        if self._eta is None:
            sigmas = ((1 - bars) / bars).sqrt().flip(0)
            self._scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=sigmas.dtype)])
            self._scheduler.set_begin_index(0)
        # The scheduler's noise has the posterior's variance: another is the same noise, scaled.
        least, wanted = (step_variance(kept, bars, previous, v) for v in (0.0, variance))
        self._noise_scale = torch.cat([torch.zeros(1), (wanted[1:] / least[1:]).sqrt()])

    @torch.no_grad()
    def update(self, step: int, z: Tensor, z0: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents after a step, of z's shape, float32.

        Args:
            step: 0 to `steps` - 1; other samplers than `ddpm` and `ddim` need them in this order.
            z: latents before the step.
            z0: the clean latents predicted from them.
            noise: standard normal, of z's shape, for `ddpm`; the last step takes none.
        """
        level = self.steps - 1 - step
        options: dict[str, Any] = {}
        if self._eta is not None:
            scaled = torch.zeros(()) if noise is None else noise * self._noise_scale[level]
            options = {"eta": self._eta, "variance_noise": scaled}
        moved: Tensor = self._scheduler.step(z0, level, z, return_dict=False, **options)[0]
        return moved


def _scheduler(sampler: str, betas: Tensor) -> Any:
    # Importing diffusers takes seconds, which only those who sample should spend.
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    schedule = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
    }
    if sampler in ("ddpm", "ddim"):
        return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **schedule)
    multistep = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    return multistep(solver_order=2, timestep_spacing="trailing", **schedule)


def member_noise(shape: FieldShape, seeds: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Standard normal noise (N, T, H, W, C), float32, without end: each member's from its seed alone.

    It is drawn on the CPU, so that it is the same for any device.

    Raises:
        ValueError: impossible shape or seeds.
    """
    sizes = tuple(shape)
    need(len(sizes) == 4 and min(sizes) >= 1, "shape", sizes, "(T, H, W, C) of whole numbers from 1")
    known = seeds.dtype == torch.int64 and seeds.ndim == 1 and len(seeds) >= 1
    need(known, "seeds", f"{tuple(seeds.shape)} {seeds.dtype}", "(N,) int64, of at least one member")
    generators = [_generator(seed) for seed in seeds.tolist()]

    def draws() -> Iterator[Tensor]:
        while True:
            noise = torch.empty(len(generators), *sizes)
            for member, generator in zip(noise, generators, strict=True):
                member.normal_(generator=generator)
            yield noise.to(device)

    return draws()


def _generator(seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    # It keeps 32 bits of the seed; 16 of the others say how far into that stream the member begins.
    torch.empty(seed >> 32 & 0xFFFF, dtype=torch.int32).random_(generator=generator)
    return generator


def step_variance(betas: Tensor, bars: Tensor, previous: Tensor, fraction: float) -> Tensor:
    """Of a step's noise: `fraction` of the way from the posterior's to beta."""
    return (1 - fraction) * betas * (1 - previous) / (1 - bars) + fraction * betas


def spaced(steps: int, length: int) -> list[int]:
    """Timesteps kept of `length`, ascending: quadratic in the step from the noisiest, none left out near 0.

    Evenly spaced, the last step would begin at length / steps, where noise still outweighs small details: in
    20 steps `dpm++` then makes what should vary by 0.1 vary 28 % too little, and spaced like this 5 %.
    """
    return [max(i, round(length * ((i + 1) / steps) ** 2) - 1) for i in range(steps)]
