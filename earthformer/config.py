"""Frozen configurations: what all networks share, and Earthformer's. A field's shape is (T, H, W, C)."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

FieldShape = tuple[int, int, int, int]
Strategy = Literal["l", "d"]
Padding = Literal["zeros", "ignore", "nearest"]
Activation = Literal["leaky", "gelu", "relu"]
Norm = Literal["layer_norm", "rms_norm"]
Positions = Literal["t+h+w", "t+hw"]

_STRATEGIES = ("l", "d")
_ACTIVATIONS = ("leaky", "gelu", "relu")


def need(holds: bool, name: str, found: object, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {found!r}: needed {needed}")


@dataclass(frozen=True)
class Scaling:
    """How a field in its own units is mapped to what a network sees, and back.

    `linear`: scale * (x + offset). `log`, for rain rates in mm/h: log1p(max(x, 0) / r0) / log1p(rmax / r0),
    so that 0 mm/h is 0 and `rmax` is 1.
    """

    kind: Literal["linear", "log"] = "linear"
    scale: float = 1.0
    offset: float = 0.0
    r0: float = 0.1
    rmax: float = 100.0

    def __post_init__(self) -> None:
        need(self.kind in ("linear", "log"), "kind", self.kind, "linear or log")
        need(self.scale != 0, "scale", self.scale, "a number other than 0")
        need(self.r0 > 0, "r0", self.r0, "a rate above 0 mm/h")
        need(self.rmax > 0, "rmax", self.rmax, "a rate above 0 mm/h")

    def encode(self, field: Tensor) -> Tensor:
        """Scaled field, float32, of any field of numbers (uint8 too); the shape is kept."""
        values = field.to(torch.float32)
        if self.kind == "linear":
            return self.scale * (values + self.offset)
        return torch.log1p(values.clamp(min=0) / self.r0) / self._top

    def decode(self, scaled: Tensor) -> Tensor:
        """Field in its own units, float32: the inverse of `encode` (a `log` field is never below 0)."""
        values = scaled.to(torch.float32)
        if self.kind == "linear":
            return values / self.scale - self.offset
        return (torch.expm1(values * self._top) * self.r0).clamp(min=0)

    @property
    def _top(self) -> float:
        return math.log1p(self.rmax / self.r0)


@dataclass(frozen=True)
class Cuboid:
    """One self-attention layer of a pattern; every triple runs over (T, H, W)."""

    size: tuple[int, int, int]
    strategy: tuple[Strategy, Strategy, Strategy] = ("l", "l", "l")
    """Per axis: `l`, neighbouring tokens; `d`, dilated: tokens a stride apart."""
    shift: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        need(all(n >= 1 for n in self.size), "cuboid size", self.size, "lengths of at least 1")
        need(all(s in _STRATEGIES for s in self.strategy), "cuboid strategy", self.strategy, "l or d")
        within = all(0 <= s < n for s, n in zip(self.shift, self.size, strict=True))
        need(within, "cuboid shift", self.shift, f"shifts from 0 to less than the size {self.size}")


@dataclass(frozen=True)
class CrossCuboid:
    """One cross-attention layer: cuboids of `hw` tokens in space and 1/`temporal` of the frames in time."""

    hw: tuple[int, int]
    strategy: tuple[Strategy, Strategy, Strategy] = ("l", "l", "l")
    shift_hw: tuple[int, int] = (0, 0)
    temporal: int = 1

    def __post_init__(self) -> None:
        need(all(n >= 1 for n in self.hw), "cross cuboid hw", self.hw, "lengths of at least 1")
        need(all(s in _STRATEGIES for s in self.strategy), "cross cuboid strategy", self.strategy, "l or d")
        within = all(0 <= s < n for s, n in zip(self.shift_hw, self.hw, strict=True))
        need(within, "cross cuboid shift", self.shift_hw, f"shifts from 0 to less than {self.hw}")
        need(self.temporal >= 1, "temporal", self.temporal, "at least 1")


@dataclass(frozen=True)
class Attention:
    """What every attention layer shares."""

    heads: int = 4
    padding: Padding = "zeros"
    """Where cuboids do not divide the field: `zeros` are attended to, `ignore` masks them."""
    relative_position: bool = True
    output_projection: bool = True
    """Of self-attention; cross-attention always has one."""
    qkv_bias: bool = False
    qk_scale: float | None = None
    """Factor of the queries; 1 / sqrt(width / heads) unless given."""
    dropout: float = 0.1
    projection_dropout: float = 0.1


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with four times the width between them."""

    activation: Activation = "gelu"
    gated: bool = False
    dropout: float = 0.1


@dataclass(frozen=True)
class GlobalVectors:
    """Vectors that every cuboid reads from and writes to (Gao et al., 2022, Sec. 3.1)."""

    count: int = 0
    ratio: int = 1
    """Their width over that of the tokens."""
    separate_projections: bool = True
    attend_each_other: bool = True
    feed_forward: bool = False
    in_decoder_self: bool = False
    in_decoder_cross: bool = False
    updated_in_decoder: bool = False


@dataclass(frozen=True)
class StemStage:
    """One stage of the stem: convolutions, then patch merging; undone in the final decoder."""

    width: int
    scale: tuple[int, int, int] = (1, 1, 1)
    """Tokens merged over (T, H, W)."""
    convs: int = 2
    groups: int | None = None
    """Of the group norm; a quarter of the width unless given."""
    final_convs: int | None = None
    """Convolutions of the final decoder's stage; as many as `convs` unless given."""

    @property
    def norm_groups(self) -> int:
        """Groups of the group norm."""
        return self.groups if self.groups is not None else max(1, self.width // 4)

    @property
    def final_convolutions(self) -> int:
        """Convolutions of the final decoder's stage."""
        return self.convs if self.final_convs is None else self.final_convs


@dataclass(frozen=True)
class Encoder:
    """Stacks a level, and the pattern of each (one for all levels, or one a level)."""

    depth: tuple[int, ...] = (1, 1)
    patterns: tuple[str | tuple[Cuboid, ...], ...] = ("axial",)
    inter_ffn: bool = True
    """A feed-forward after each attention layer; else one after all of a stack."""


@dataclass(frozen=True)
class Decoder:
    """Stacks a level, from the finest level on, and how they look at the memory."""

    depth: tuple[int, ...] = (1, 1)
    self_patterns: tuple[str | tuple[Cuboid, ...], ...] = ("axial",)
    cross_patterns: tuple[str | tuple[CrossCuboid, ...], ...] = ("cross_1x1",)
    inter_ffn: bool = True
    first_self_attention: bool = False
    """Whether the coarsest level begins with self-attention rather than with cross-attention."""
    cross_start: int = 0
    """First level with cross-attention."""
    cross_last_frames: int | None = None
    """Only so many of the memory's last frames are looked at."""
    initial: Literal["zeros", "nearest_interp", "last", "mean"] = "zeros"
    """What the decoder starts from: position embeddings alone, or frames of the memory."""
    level_positions: bool = False
    """A position embedding after each upsampling."""


@dataclass(frozen=True)
class EarthformerConfig:
    """Everything that shapes an `Earthformer`.

    Raises:
        ValueError: an impossible value, with what was found and what is needed.
    """

    context: FieldShape
    target: FieldShape
    widths: tuple[int, ...]
    """Width of the tokens at each level, finest first."""
    stem: tuple[StemStage, ...]
    downsample: int = 2
    """Tokens merged along H and along W from one level to the next."""
    stem_activation: Activation = "leaky"
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    attention: Attention = field(default_factory=Attention)
    feed_forward: FeedForward = field(default_factory=FeedForward)
    global_vectors: GlobalVectors = field(default_factory=GlobalVectors)
    norm: Norm = "layer_norm"
    positions: Positions = "t+h+w"
    from_last_frame: bool = False
    """Add what the network makes to the context's last frame, which an untrained network then repeats. Not
    in the paper: where data and steps are few, little is left to learn but change."""

    def __post_init__(self) -> None:
        for name, shape in (("context", self.context), ("target", self.target)):
            whole = len(shape) == 4 and all(isinstance(n, int) and n >= 1 for n in shape)
            need(whole, name, shape, "(T, H, W, C) of whole numbers from 1")
        need(self.target[1:3] == self.context[1:3], "target (H, W)", self.target[1:3], f"{self.context[1:3]}")
        heads, levels = self.attention.heads, len(self.widths)
        need(levels >= 1, "widths", self.widths, "at least one level")
        need(heads >= 1, "heads", heads, "at least 1")
        for width in self.widths:
            need(width >= 1 and width % heads == 0, "width", width, f"a multiple of the {heads} heads")
        need(self.downsample >= 1, "downsample", self.downsample, "at least 1")
        for name, depth in (("encoder.depth", self.encoder.depth), ("decoder.depth", self.decoder.depth)):
            need(len(depth) == levels and min(depth) >= 1, name, depth, f"{levels} depths of at least 1")
        for name, patterns in (
            ("encoder.patterns", self.encoder.patterns),
            ("decoder.self_patterns", self.decoder.self_patterns),
            ("decoder.cross_patterns", self.decoder.cross_patterns),
        ):
            need(len(patterns) in (1, levels), name, patterns, f"1 or {levels} patterns")
            need(all(len(p) > 0 for p in patterns), name, patterns, "patterns of at least one layer")
        self._check_stem()
        self._check_choices()

    def _check_stem(self) -> None:
        need(len(self.stem) >= 1, "stem", self.stem, "at least one stage")
        for stage in self.stem:
            need(stage.width >= 1, "stem width", stage.width, "at least 1")
            even = stage.norm_groups >= 1 and stage.width % stage.norm_groups == 0
            need(even, "stem width", stage.width, f"a multiple of its {stage.norm_groups} groups")
            need(min(stage.scale) >= 1, "stem scale", stage.scale, "merges of at least 1")
            need(stage.convs >= 1, "stem convs", stage.convs, "at least 1")
        last = self.stem[-1].width
        need(last == self.widths[0], "last stem width", last, f"{self.widths[0]}, that of the first level")
        for finer, coarser in pairwise(self.stem):
            kept = finer.final_convolutions >= 1 or finer.width == coarser.width
            need(kept, "final_convs", finer.final_convs, f"at least 1 to go from {coarser.width} channels")

    def _check_choices(self) -> None:
        for name, found, known in (
            ("attention.padding", self.attention.padding, ("zeros", "ignore", "nearest")),
            ("feed_forward.activation", self.feed_forward.activation, _ACTIVATIONS),
            ("stem_activation", self.stem_activation, _ACTIVATIONS),
            ("norm", self.norm, ("layer_norm", "rms_norm")),
            ("positions", self.positions, ("t+h+w", "t+hw")),
            ("decoder.initial", self.decoder.initial, ("zeros", "nearest_interp", "last", "mean")),
        ):
            need(found in known, name, found, "one of " + ", ".join(known))
        for name, rate in (
            ("attention.dropout", self.attention.dropout),
            ("attention.projection_dropout", self.attention.projection_dropout),
            ("feed_forward.dropout", self.feed_forward.dropout),
        ):
            need(0 <= rate < 1, name, rate, "a rate from 0 to below 1")
        alike = not self.from_last_frame or self.target[3] == self.context[3]
        need(alike, "target channels", self.target[3], f"{self.context[3]}, as from_last_frame adds to them")
        start, levels = self.decoder.cross_start, len(self.widths)
        need(0 <= start < levels, "decoder.cross_start", start, f"a level from 0 to {levels - 1}")
        last = self.decoder.cross_last_frames
        need(last is None or last >= 1, "decoder.cross_last_frames", last, "at least 1, or None")
        shared = self.global_vectors
        need(shared.count >= 0, "global_vectors.count", shared.count, "at least 0")
        alike = shared.ratio == 1 or (shared.ratio > 1 and shared.separate_projections)
        need(alike, "global_vectors.ratio", shared.ratio, "1, or more with separate_projections")

    @property
    def stem_shapes(self) -> tuple[FieldShape, ...]:
        """(T, H, W, C) before the stem and after each of its stages."""
        shapes = [self.context]
        for stage in self.stem:
            t, h, w = (-(-n // s) for n, s in zip(shapes[-1][:3], stage.scale, strict=True))
            shapes.append((t, h, w, stage.width))
        return tuple(shapes)

    @property
    def memory_shapes(self) -> tuple[FieldShape, ...]:
        """(T, H, W, C) of the tokens at each level, finest first."""
        t, h, w, _ = self.stem_shapes[-1]
        shapes: list[FieldShape] = []
        for width in self.widths:
            shapes.append((t, h, w, width))
            h, w = -(-h // self.downsample), -(-w // self.downsample)
        return tuple(shapes)
