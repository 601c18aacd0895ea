"""Frozen configurations of PreDiff's networks (Gao et al., 2023) and of the diffusion that binds them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from earthformer.config import (
    Attention,
    Cuboid,
    FeedForward,
    FieldShape,
    GlobalVectors,
    Positions,
    need,
)

Schedule = Literal["linear", "sqrt_linear", "sqrt", "cosine"]
Prediction = Literal["epsilon", "sample", "velocity"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """The frame-wise autoencoder: each level but the last halves H and W.

    Raises:
        ValueError: an impossible value, with what was found and what is needed.
    """

    frame: tuple[int, int, int]
    """(H, W, C) of a frame."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    """Residual blocks a level; the decoder has one more."""
    latent_channels: int = 64
    groups: int = 32
    """Of every group norm."""
    frames_per_window: int = 4
    """Frames of a window that a training step takes, at random: those of a window are much alike."""
    crop: int | None = None
    """Side of the square, at random in the frame, that a training step takes of it; none: the whole frame."""
    kl_weight: float = 1e-6
    adversarial_weight: float = 0.5
    adversarial_start: int = 25000
    """Optimiser steps before the discriminator counts (published: `global_step` 50,001, which counts each
    step twice)."""
    perceptual_weight: float = 0.0
    """Of LPIPS, which needs torchvision and its weights."""
    discriminator_width: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        need(len(self.frame) == 3 and min(self.frame) >= 1, "frame", self.frame, "(H, W, C) from 1")
        need(len(self.widths) >= 1, "widths", self.widths, "at least one level")
        for name in (
            "layers",
            "latent_channels",
            "groups",
            "frames_per_window",
            "discriminator_width",
            "discriminator_layers",
        ):
            need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for width in self.widths:
            need(width % self.groups == 0, "width", width, f"a multiple of the {self.groups} groups")
        crop, reduction = self.crop, self.reduction
        fits = crop is None or (crop % reduction == 0 and 0 < crop <= min(self.frame[:2]))
        need(fits, "crop", crop, f"a multiple of {reduction}, no larger than the frame, {self.frame[:2]}")
        for name in ("kl_weight", "adversarial_weight", "perceptual_weight", "adversarial_start"):
            need(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for length in self.frame[:2]:
            need(length % self.reduction == 0, "frame", self.frame, f"H and W multiples of {self.reduction}")

    @property
    def reduction(self) -> int:
        """Pixels along H, and along W, of one latent pixel."""
        return 1 << (len(self.widths) - 1)

    @property
    def latent(self) -> tuple[int, int, int]:
        """(H, W, C) of a frame's latents."""
        h, w, _ = self.frame
        return h // self.reduction, w // self.reduction, self.latent_channels


@dataclass(frozen=True)
class DenoiserConfig:
    """The time-conditioned cuboid U-Net over context and target latents (PreDiff, Sec. 3.2 and App. B).

    Raises:
        ValueError: an impossible value, with what was found and what is needed.
    """

    context: FieldShape
    """(T, H, W, C) of the latents of the frames that are known."""
    target: FieldShape
    aligned_channels: int = 0
    """Channels of a condition that lies on the target's own frames, such as the context moved along its
    motion; not in the paper."""
    widths: tuple[int, ...] = (256, 512)
    depth: tuple[int, ...] = (4, 4)
    patterns: tuple[str | tuple[Cuboid, ...], ...] = ("axial",)
    downsample: int = 2
    attention: Attention = field(default_factory=Attention)
    feed_forward: FeedForward = field(default_factory=FeedForward)
    global_vectors: GlobalVectors = field(default_factory=GlobalVectors)
    positions: Positions = "t+h+w"
    inter_ffn: bool = True
    skips: bool = True
    """Add what each level made on the way down to what comes up."""
    scale_shift: bool = False
    """The time embedding scales and shifts the normalised field rather than being added before the norm."""
    time_width: int = 4
    """Width of the time embedding over `widths[0]`."""
    dropout: float = 0.1
    """Of the residual block that projects the input."""

    def __post_init__(self) -> None:
        _check_levels(self.target, self.widths, self.depth, self.patterns, self.attention, self.scale_shift)
        need(
            len(self.context) == 4 and min(self.context) >= 1, "context", self.context, "(T, H, W, C) from 1"
        )
        alike = self.context[1:] == self.target[1:]
        need(alike, "context (H, W, C)", self.context[1:], f"{self.target[1:]}, the target's")
        for name in ("downsample", "time_width"):
            need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        need(self.aligned_channels >= 0, "aligned_channels", self.aligned_channels, "at least 0")
        need(0 <= self.dropout < 1, "dropout", self.dropout, "a rate from 0 to below 1")

    @property
    def frames(self) -> int:
        """Context and target frames."""
        return self.context[0] + self.target[0]

    @property
    def level_shapes(self) -> tuple[FieldShape, ...]:
        """(T, H, W, C) of the tokens at each level, finest first."""
        return _level_shapes(self.frames, self.target, self.widths, self.downsample)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and what the denoiser predicts (PreDiff, Sec. 3.1; Ho et al., 2020)."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    schedule: Schedule = "linear"
    """`linear` is linear in the square root of beta, which diffusers calls `scaled_linear`."""
    prediction: Prediction = "epsilon"
    """What the denoiser predicts: the noise (published), the clean latents, or √ᾱ noise - √(1-ᾱ) clean
    latents (Salimans & Ho, 2022), which errs little at any noise level and so needs less training."""
    clip: bool = False
    """Clamp the predicted clean latents to -1..1."""
    variance: float = 0.0
    """0: the posterior's variance; 1: beta."""
    learn_logvar: bool = True
    simple_weight: float = 1.0
    elbo_weight: float = 0.0

    def __post_init__(self) -> None:
        need(self.timesteps >= 2, "timesteps", self.timesteps, "at least 2")
        need(0 < self.beta_start <= self.beta_end < 1, "beta_start", self.beta_start, "0 < start <= end < 1")
        known = ("linear", "sqrt_linear", "sqrt", "cosine")
        need(self.schedule in known, "schedule", self.schedule, "one of " + ", ".join(known))
        predictions = ("epsilon", "sample", "velocity")
        known_of = "one of " + ", ".join(predictions)
        need(self.prediction in predictions, "prediction", self.prediction, known_of)
        need(0 <= self.variance <= 1, "variance", self.variance, "a fraction from 0 to 1")


@dataclass(frozen=True)
class Functional:
    """A scalar functional of a future frame in the units that the network sees (0-1)."""

    kind: Literal["mean", "area", "maximum"] = "mean"
    """The mean intensity; the fraction of pixels at or above `threshold`; the maximum."""
    threshold: float = 0.0

    def __post_init__(self) -> None:
        need(self.kind in ("mean", "area", "maximum"), "functional", self.kind, "mean, area or maximum")


@dataclass(frozen=True)
class AlignmentConfig:
    """The network that reads a functional of the future off noisy latents (PreDiff, Sec. 3.3)."""

    target: FieldShape
    """(T, H, W, C) of the noisy latents."""
    widths: tuple[int, ...] = (128, 256)
    depth: tuple[int, ...] = (1, 1)
    patterns: tuple[str | tuple[Cuboid, ...], ...] = ("axial",)
    downsample: int = 2
    attention: Attention = field(default_factory=Attention)
    feed_forward: FeedForward = field(default_factory=FeedForward)
    positions: Positions = "t+h+w"
    inter_ffn: bool = True
    scale_shift: bool = False
    time_width: int = 4
    dropout: float = 0.1
    out_channels: int = 1
    per_frame: bool = True
    """One value for each frame, else one for all frames together."""
    functional: Functional = field(default_factory=Functional)
    context_frames: int = 7
    """Frames whose functional tells what the future's is to be expected."""
    normalise: bool = False
    """As the denoiser's, whose noisy latents it reads."""
    strength: float = 50.0
    """What the gradient is multiplied by in guidance, unless a forecast says otherwise. The published scale
    is of latents that are not normalised."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        _check_levels(self.target, self.widths, self.depth, self.patterns, self.attention, self.scale_shift)
        for name in ("downsample", "time_width", "out_channels", "context_frames"):
            need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        need(0 <= self.dropout < 1, "dropout", self.dropout, "a rate from 0 to below 1")
        strong = 0 <= self.strength < math.inf
        need(strong, "strength", self.strength, "a finite number from 0")
        last = self.widths[-1]
        need(last % min(last, 32) == 0, "last width", last, "a multiple of its 32 groups")

    @property
    def level_shapes(self) -> tuple[FieldShape, ...]:
        """(T, H, W, C) of the tokens at each level, finest first."""
        return _level_shapes(self.target[0], self.target, self.widths, self.downsample)


@dataclass(frozen=True)
class PreDiffConfig:
    """A latent diffusion model on the latents of a trained autoencoder."""

    denoiser: DenoiserConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ema_decay: float = 0.9999
    normalise: bool = False
    """Bring the target's latents to a standard deviation of 1 in each channel; published: as they are."""
    residual: bool = False
    """Draw the difference between the target's latents and those of the context moved along its motion, each
    lead time and channel brought to a standard deviation of 1; not in the paper. Where data are few, the
    spread is right from the start at every lead time. Knowledge alignment needs whole latents."""
    drift: float = 0.0
    """Standard deviation, in pixels a frame and along each axis, of a velocity added to the moved context's:
    another one for each member, and for each window in training. Not in the paper. Members then differ by an
    error of the motion even where training has not shown one."""
    detail: bool = False
    """Give members the detail back that the autoencoder loses of the context moved along its motion, at each
    lead time by the weight that validation finds best; not in the paper, whose autoencoder loses little."""
    match: bool = False
    """Give each frame of a member the values of the moved context, in its own order (probability matching;
    not in the paper). A model of few data makes rain too weak where it is unsure of the place; STEPS ends
    the same way. Knowledge alignment would be undone."""

    def __post_init__(self) -> None:
        need(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a fraction from 0 to below 1")
        need(0 <= self.drift < math.inf, "drift", self.drift, "at least 0 pixels a frame")
        for name in ("residual", "drift", "detail", "match"):
            moved = not getattr(self, name) or self.denoiser.aligned_channels > 0
            need(moved, name, getattr(self, name), "denoiser.aligned_channels beside it")


def norm_groups(width: int) -> int:
    """Groups of the norms of a residual block: one a channel unless `width` is a multiple of 32."""
    return 32 if width % 32 == 0 else width


def _check_levels(
    target: FieldShape,
    widths: tuple[int, ...],
    depth: tuple[int, ...],
    patterns: tuple[str | tuple[Cuboid, ...], ...],
    attention: Attention,
    scale_shift: bool,
) -> None:
    need(len(target) == 4 and min(target) >= 1, "target", target, "(T, H, W, C) of whole numbers from 1")
    levels, heads = len(widths), attention.heads
    need(levels >= 1, "widths", widths, "at least one level")
    for width in widths:
        need(width >= 1 and width % heads == 0, "width", width, f"a multiple of the {heads} heads")
    need(len(depth) == levels and min(depth) >= 1, "depth", depth, f"{levels} depths of at least 1")
    need(len(patterns) in (1, levels), "patterns", patterns, f"1 or {levels} patterns")
    # A norm of one channel takes away whatever constant was added to that channel.
    steps_count = scale_shift or any(norm_groups(width) < width for width in widths)
    need(steps_count, "widths", widths, "a multiple of 32 above 32 for the step to be felt, or scale_shift")


def _level_shapes(
    frames: int, target: FieldShape, widths: tuple[int, ...], downsample: int
) -> tuple[FieldShape, ...]:
    h, w = target[1:3]
    shapes: list[FieldShape] = []
    for width in widths:
        shapes.append((frames, h, w, width))
        h, w = -(-h // downsample), -(-w // downsample)
    return tuple(shapes)
