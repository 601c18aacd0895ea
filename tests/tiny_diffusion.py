"""Latents whose distribution is known, and members drawn of them by their exact denoiser."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from earthformer.diffusion import Diffusion, Samples
from earthformer.prediff_config import DiffusionConfig

TOLERANCE = 2e-5
PUBLISHED = Diffusion(DiffusionConfig())
SHAPE = (1, 2, 2, 1)
MEAN = torch.tensor([0.5, -0.3, 0.2, 0.1])
ROOT = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.7, 0, 0], [-0.2, 0.3, 0.5, 0], [0.1, 0.1, -0.1, 0.2]])
COVARIANCE = ROOT @ ROOT.T


def assert_matches(found, expected, tolerance=TOLERANCE):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def beside(values: Tensor, z: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (z.ndim - 1))


def gaussian(diffusion: Diffusion):
    """The exact denoiser of latents whose frames are each normal with MEAN and COVARIANCE."""
    spread, axes = torch.linalg.eigh(COVARIANCE.double())

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        bar = diffusion.alphas_cumprod[t].double()[:, None, None]
        frames = z.flatten(2).double()
        along = (frames - bar.sqrt() * MEAN) @ axes
        made = bar.sqrt() * spread / (bar * spread + 1 - bar) * along @ axes.T + MEAN
        noise = (frames - bar.sqrt() * made) / (1 - bar).sqrt()
        if diffusion.config.prediction == "epsilon":
            made = noise
        elif diffusion.config.prediction == "velocity":
            made = bar.sqrt() * noise - (1 - bar).sqrt() * made
        return made.reshape(z.shape).float()

    return denoise


def drawn(seeds, sampler="dpm++", steps=10, *, diffusion=PUBLISHED, denoise=None, **options) -> Samples:
    seeds = torch.as_tensor(seeds, dtype=torch.int64)
    return diffusion.sample(denoise or gaussian(diffusion), SHAPE, seeds, sampler, steps, **options)


def frames_of(sampler: str, steps: int, diffusion: Diffusion) -> Tensor:
    """4000 frames (4000, 4), float64, of 20 members of normal latents."""
    denoise, seeds = gaussian(diffusion), torch.arange(20)
    members = diffusion.sample(denoise, (200, 2, 2, 1), seeds, sampler, steps).latents
    return members.reshape(4000, 4).double()


def given(*noises: Tensor) -> Iterator[Tensor]:
    return iter(noises)
