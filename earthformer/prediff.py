"""PreDiff: an ensemble by latent diffusion, with knowledge alignment if asked (Gao et al., 2023).

Frames become latents by a trained autoencoder, the denoiser makes latents of the future out of noise and
the context's latents, and the autoencoder makes frames of them. Fields outside are in the archive's own
units, as for every forecaster.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from earthformer.alignment import functional, guidance
from earthformer.autoencoder import posterior_sample
from earthformer.config import Scaling, need
from earthformer.constraint import Constraint
from earthformer.denoiser import Denoiser
from earthformer.diffusion import Diffusion, Ema, LossTerms
from earthformer.forecasters import Members, TrainableByLoss, present, scaled
from earthformer.latents import Batch, Latents, seeded
from earthformer.prediff_config import AutoencoderConfig, PreDiffConfig

DRIFT = 0x5EED_0D21F7
"""Keeps a member's drift apart from its noise, which follows from the same seed."""


@dataclass(frozen=True)
class Sampling:
    """How members are drawn."""

    sampler: str = "ddpm"
    steps: int = 1000
    precision: str = "float32"


@dataclass(frozen=True)
class Guide:
    """Knowledge alignment: a trained constraint, and how far from its mean the forecast is asked to be."""

    constraint: Constraint
    deviations: float
    """n of mu + n sigma (PreDiff, Sec. 4.2)."""
    strength: float
    """What the gradient is multiplied by; published: 50."""


class PreDiff(TrainableByLoss):
    """The denoiser on a trained autoencoder's latents: its training objective, and its ensembles."""

    def __init__(self, config: PreDiffConfig, autoencoder: AutoencoderConfig, scaling: Scaling) -> None:
        """
        Raises:
            ValueError: the denoiser's latents are not the autoencoder's.
        """
        super().__init__()
        found, needed = config.denoiser.target[1:], autoencoder.latent
        need(found == needed, "denoiser.target (H, W, C)", found, f"{needed}, the autoencoder's latents")
        aligned = config.denoiser.aligned_channels
        whole = aligned in (0, autoencoder.latent_channels)
        need(whole, "denoiser.aligned_channels", aligned, f"0 or {autoencoder.latent_channels}")
        self.config = config
        self.latents = Latents(autoencoder, scaling, config.normalise)
        self.denoiser = Denoiser(config.denoiser)
        self.ema = Ema(self.denoiser, config.ema_decay)
        self.diffusion = Diffusion(config.diffusion)
        self.logvar = nn.Parameter(
            torch.zeros(config.diffusion.timesteps), requires_grad=config.diffusion.learn_logvar
        )
        frames, _, _, channels = config.denoiser.target
        self.residual_std: Tensor
        self.register_buffer("residual_std", torch.ones(frames, 1, 1, channels))
        self.detail_cross: Tensor
        self.detail_power: Tensor
        self.register_buffer("detail_cross", torch.zeros(frames, dtype=torch.float64))
        self.register_buffer("detail_power", torch.zeros(frames, dtype=torch.float64))
        self.sampling = Sampling()
        self.guide: Guide | None = None

    # ------------------------------------------------------------------------------------- training

    def encode(self, batch: Batch, seeds: Tensor) -> Batch:
        """A batch of fields as latents, whose drift follows from seeds (B,); one of latents as it is."""
        if "target_mean" in batch:
            return {name: latents.float() for name, latents in batch.items()}
        target = self.latents.of_target(scaled(batch["target"], self.latents.scaling))
        return {**target, **self.condition(batch["context"], self.drift(seeds))}

    def drift(self, seeds: Tensor) -> Tensor:
        """Velocities (B, 2) in pixels a frame that follow from seeds (B,) alone."""
        generators = [torch.Generator().manual_seed(seed ^ DRIFT) for seed in seeds.tolist()]
        drawn = torch.stack([torch.randn(2, generator=generator) for generator in generators])
        return self.config.drift * drawn.to(seeds.device)

    @torch.no_grad()
    def condition(self, context: Tensor, drift: Tensor) -> Batch:
        """`context_latents` and, if configured, `aligned` (B, T, h, w, C) of a context (B, T, H, W, C)."""
        shape = self.config.denoiser
        found = {"context_latents": self.latents.of_context(context, shape.context[0])}
        if shape.aligned_channels:
            moved = self.latents.moved(context, shape.target[0], drift)
            found["aligned"], _ = self.latents.autoencoder.encode(moved)
        return found

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Measure by how much the target's latents differ from the moved context's, before training."""
        if self.config.residual:
            latents = [self.encode(batch, _drawn(batch)) for batch in batches]
            squares = [(each["target_mean"] - each["aligned"]).square().mean((2, 3)) for each in latents]
            spread = torch.cat(squares).mean(0).sqrt().clamp_min(1e-6)  # (T, C)
            self.residual_std.copy_(spread[:, None, None])

    def loss(self, batch: Batch, step: int = 0) -> Tensor:
        """The loss (PreDiff, Eq. 4; Ho et al., 2020), a scalar, with t and noise drawn anew."""
        latents = self.encode(batch, _drawn(batch))
        mean = latents["target_mean"]
        t = torch.randint(self.config.diffusion.timesteps, mean.shape[:1], device=mean.device)
        posterior, noise = torch.randn_like(mean), torch.randn_like(mean)
        return self._terms(self.denoiser, latents, t, posterior, noise).total.mean()

    def after_step(self) -> None:
        """Follow the denoiser's weights, once an optimiser step."""
        self.ema.update(self.denoiser)

    def validation_sums(self) -> list[Tensor]:
        """What the weights of the detail are quotients of."""
        return [self.detail_cross, self.detail_power]

    @torch.no_grad()
    def validation_loss(self, batch: Batch, seeds: Tensor) -> Tensor:
        """Error of the EMA weights' prediction (B,), of t and noise that each window's seed decides."""
        latents = self.encode(batch, seeds)
        mean = latents["target_mean"]
        if self.config.detail:
            self._weigh_detail(batch, latents, seeds)
        t, noise = seeded(seeds, self.config.diffusion.timesteps, mean)
        return self._terms(self.ema.module, latents, t, torch.zeros_like(mean), noise).simple

    def _terms(
        self, denoiser: nn.Module, latents: Batch, t: Tensor, posterior: Tensor, noise: Tensor
    ) -> LossTerms:
        z = posterior_sample(latents["target_mean"], latents["target_logvar"], posterior)
        if self.config.residual:
            z0 = (z - latents["aligned"]) / self.residual_std
        else:
            z0 = self.latents.whiten(z)
        predicted = denoiser(
            self.diffusion.q_sample(z0, t, noise), t, latents["context_latents"], latents.get("aligned")
        )
        return self.diffusion.loss_terms(predicted, z0, noise, t, self.logvar)

    def _weigh_detail(self, batch: Batch, latents: Batch, seeds: Tensor) -> None:
        """Take in how much of the detail lost of the moved context is found in what is lost of the target."""
        lost = self.latents.lost(scaled(batch["target"], self.latents.scaling), latents["target_mean"])
        moved = self.latents.moved(batch["context"], lost.shape[1], self.drift(seeds))
        detail = self.latents.lost(moved, latents["aligned"])
        self.detail_cross += (lost * detail).double().sum((0, 2, 3, 4))
        self.detail_power += detail.double().square().sum((0, 2, 3, 4))

    def _moving(self, context: Tensor, seeds: Tensor) -> Batch:
        """Of the context (1, T, H, W, C) moved for each member: `aligned`, `detail` and `like`."""
        found: Batch = {}
        if self.config.denoiser.aligned_channels:
            moved = self.latents.moved(context, len(self.detail_power), self.drift(seeds))
            found["aligned"], _ = self.latents.autoencoder.encode(moved)
            if self.config.detail:
                weight = (self.detail_cross / self.detail_power.clamp_min(1e-12)).clamp(0, 1)
                lost = self.latents.lost(moved, found["aligned"])
                found["detail"] = weight.float()[:, None, None, None] * lost
            if self.config.match:
                found["like"] = moved
        return found

    # ------------------------------------------------------------------------------------- forecasts

    @torch.no_grad()
    def prepare(self, context: Tensor) -> Batch:
        """What all members of one context (1, T_in, H, W, C) share: above all its latents."""
        known = {"context": context}
        if present(context).any():
            known["context_latents"] = self.latents.of_context(context, self.config.denoiser.context[0])
            if self.guide is not None:
                known["requested"] = self.guide.constraint.request(context, self.guide.deviations)
            if not self.config.drift:
                known |= self._moving(context, torch.zeros(1, dtype=torch.int64))
        return known

    def draw(self, known: Batch, seeds: Tensor) -> Members:
        """Members of seeds (1, M) and of what `prepare` gave.

        A member is the same whatever it is batched with, up to float rounding. Missing pixels are as if
        nothing were there; all members of a context without any pixel are NaN.
        """
        context = known["context"]
        if "context_latents" not in known:
            return self._nothing(context, seeds)
        moved = self._moving(context, seeds[0]) if self.config.drift else {}
        condition = {name: each for name, each in known.items() if name not in ("context", "requested")}
        return self._some(condition | moved, seeds, known.get("requested"))

    def _nothing(self, context: Tensor, seeds: Tensor) -> Members:
        """What members of a context without any pixel are."""
        shape = (self.config.denoiser.target[0], *context.shape[2:])
        fields = torch.full((*seeds.shape, *shape), torch.nan, device=context.device)
        unknown = None if self.guide is None else fields[..., 0, 0, 0, 0]
        return Members(fields, unknown, None if unknown is None else unknown[:, 0])

    @torch.no_grad()
    def _some(self, condition: Batch, seeds: Tensor, requested: Tensor | None) -> Members:
        m = seeds.shape[1]
        # What is the same for all members has one row.
        repeated = {name: each.expand(m, *each.shape[1:]) for name, each in condition.items()}
        autocast = torch.autocast(
            condition["context_latents"].device.type,
            dtype=torch.bfloat16,
            enabled=self.sampling.precision == "bf16",
        )

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            with autocast:
                # One step for all: a linear layer rounds a row by where it stands in a batch.
                made: Tensor = self.ema.module(z, t[:1], repeated["context_latents"], repeated.get("aligned"))
            return made.float()

        guide = None
        if requested is not None:
            guide = partial(self._guidance, repeated.get("aligned"), requested.expand(m))
        drawn = self.diffusion.sample(
            denoise,
            self.config.denoiser.target,
            seeds.flatten(),
            self.sampling.sampler,
            self.sampling.steps,
            guide=guide,
        )
        if self.config.residual:
            made = drawn.latents * self.residual_std + repeated["aligned"]
        else:
            made = self.latents.restore(drawn.latents)
        fields = torch.cat([self._decoded(made, repeated, one) for one in range(m)])
        achieved = None
        if self.guide is not None:
            seen = self.latents.scaling.encode(fields)
            achieved = functional(seen, self.guide.constraint.config.functional).mean((1, 2))
            achieved = achieved[None]
        return Members(fields[None], achieved, requested)

    def _guidance(self, aligned: Tensor | None, requested: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What members `z` (m, T, h, w, C), all at one step t (m,), descend to have the `requested` (m,)."""
        assert self.guide is not None
        one, bars = t[:1], self.diffusion.alphas_cumprod
        seen, read_at, scale = z, one, torch.ones_like(z[:1])
        if self.config.residual:
            assert aligned is not None
            # Latents are those of the moved context plus `ratio` times the residual, and so is the noise in
            # them: as much as there is at an earlier step, at which the network reads them.
            ratio = self.latents.whiten(self.residual_std)
            noise = ratio.square().mean() * (1 / bars[one] - 1)
            read_at = torch.searchsorted(1 / bars - 1, noise).clamp(max=len(bars) - 1)
            signal = bars[read_at].sqrt()
            scale = ratio * signal / bars[one].sqrt()
            seen = scale * z + signal * self.latents.whiten(aligned)
        gradient, gap = guidance(self.guide.constraint.network, seen, read_at, requested)
        gradient = scale * gradient
        # No further than where the functional would be, to first order, what is requested: a sampler of few
        # steps takes the first of them a hundred times as far as one of a thousand.
        slope = gradient.square().flatten(1).sum(1) * self.diffusion.guidance_coef[t] * bars[t].sqrt()
        strength = (gap / slope.clamp_min(1e-30)).clamp(max=self.guide.strength)
        return strength[:, None, None, None, None] * gradient

    def _decoded(self, latents: Tensor, condition: Batch, member: int) -> Tensor:
        """Fields (1, T, H, W, C) of one member: decoding many at once would take much memory."""
        one = slice(member, member + 1)
        detail, like = (condition[name][one] if name in condition else None for name in ("detail", "like"))
        return self.latents.decode(latents[one], 0.0 if detail is None else detail, like)

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, M, T_out, H, W, C), float32 in the units of `context` (B, T_in, H, W, C)."""
        each = [
            self.draw(self.prepare(one[None]), s[None]).fields for one, s in zip(context, seeds, strict=True)
        ]
        return torch.cat(each)


def _drawn(batch: Batch) -> Tensor:
    """Seeds (B,) from the generator that training seeds at every step."""
    return torch.randint(2**31, (len(next(iter(batch.values()))),))
