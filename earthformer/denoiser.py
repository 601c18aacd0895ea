"""The denoiser of PreDiff: a time-conditioned U-Net of cuboid attention over context and target latents."""

from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthformer.config import GlobalVectors
from earthformer.cuboid import CuboidSelfAttention, self_pattern
from earthformer.layers import Dropout, PatchMerging, PositionEmbedding, PositionwiseFeedForward, Upsample
from earthformer.prediff_config import AlignmentConfig, DenoiserConfig, norm_groups
from earthformer.stacks import SelfStack, of_level

M = TypeVar("M", bound=nn.Module)


def zeroed(module: M) -> M:
    """The same module, with all its parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


# ---------------------------------------------------------------------------- time


def sinusoid(t: Tensor, width: int) -> Tensor:
    """(B, width) of steps `t` (B,): cosines, then sines, of frequencies from 1 down to nearly 1 / 10000.

    In float64: an angle of 1000 is only known to 6e-5 in float32, and differs with the processor's `exp`.
    """
    half = width // 2
    frequencies = 10000 ** (-torch.arange(half, device=t.device, dtype=torch.float64) / half)
    angles = t[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1).float(), (0, width % 2))


class TimeEmbedding(nn.Module):
    """(B, width) -> (B, out): two linear layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, out)."""
        y: Tensor = self.layer(x)
        return y


# ---------------------------------------------------------------------------- residual block


def _seen(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W), channels-last


def _field(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions beside a skip, conditioned on an embedding if asked; (B, T, H, W, C).

    The embedding is added between the convolutions or, with `scale_shift`, scales and shifts the normalised
    field there. Norms take their statistics over (T, H, W).
    """

    def __init__(
        self,
        dim: int,
        out: int,
        embedding: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        wide_skip: bool = False,
    ) -> None:
        """`embedding` is its width; `wide_skip`: the skip to another width is 3x3x3 rather than 1x1x1."""
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups(dim), dim), nn.SiLU(), nn.Conv3d(dim, out, 3, padding=1)
        )
        self.emb_layers = (
            None
            if embedding is None
            else nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups(out), out),
            nn.SiLU(),
            Dropout(dropout),
            zeroed(nn.Conv3d(out, out, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if dim == out else nn.Conv3d(dim, out, 3 if wide_skip else 1, padding="same")
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, T, H, W, dim) and, if the block is conditioned, (B, embedding) -> (B, T, H, W, out)."""
        if torch.is_grad_enabled() and not x.requires_grad:
            # In backward, PyTorch's norm of a channels-last field crashes on a CPU unless the field has one.
            x = x.detach().requires_grad_()
        x = _seen(x)
        y = self.in_layers(x)
        if self.emb_layers is not None:
            e = torch.unflatten(self.emb_layers(embedding), 1, (-1, 1, 1, 1))
            if self.scale_shift:
                scale, shift = e.chunk(2, 1)
                y = self.out_layers[0](y) * (1 + scale) + shift
                return _field(self.skip_connection(x) + self.out_layers[1:](y))
            y = y + e
        return _field(self.skip_connection(x) + self.out_layers(y))


# ---------------------------------------------------------------------------- networks


class DownPath(nn.Module):
    """What denoiser and alignment network share: a field and a step in, levels of tokens out.

    A level has one residual block, conditioned on the step, which goes before each of its stacks.
    """

    def __init__(
        self,
        config: DenoiserConfig | AlignmentConfig,
        channels: int,
        shared: GlobalVectors = GlobalVectors(),  # noqa: B008
    ) -> None:
        """`channels` are those of the field; `shared`, the global vectors, of which a `count` of 0 is none.

        Raises:
            ValueError: unknown attention pattern.
        """
        super().__init__()
        self.config = config
        finest, embedding = config.level_shapes[0], config.time_width * config.widths[0]
        self.first_proj = ResidualBlock(channels, finest[3], dropout=config.dropout)
        self.pos_embed = PositionEmbedding(finest, config.positions)
        self.time_embed = TimeEmbedding(finest[3], embedding)
        scale = (1, config.downsample, config.downsample)
        self.downsample_layers = nn.ModuleList(
            PatchMerging(dim, scale, out, config.attention.padding) for dim, out in pairwise(config.widths)
        )
        wide = pairwise(shared.ratio * dim for dim in (config.widths if shared.count else ()))
        self.down_layer_global_proj = nn.ModuleList(nn.Linear(dim, out) for dim, out in wide)
        self.down_self_blocks = self._stacks(shared)
        self.down_time_embed_blocks = self._time_blocks()

    def _stacks(self, shared: GlobalVectors) -> nn.ModuleList:
        config = self.config
        levels = []
        for level, shape in enumerate(config.level_shapes):
            cuboids = self_pattern(of_level(config.patterns, level), shape[:3])
            levels.append(
                nn.ModuleList(
                    SelfStack(
                        cuboids,
                        shape,
                        config.attention,
                        config.feed_forward,
                        config.inter_ffn,
                        shared if shared.count else None,
                    )
                    for _ in range(config.depth[level])
                )
            )
        return nn.ModuleList(levels)

    def _time_blocks(self) -> nn.ModuleList:
        embedding, scale_shift = self.config.time_width * self.config.widths[0], self.config.scale_shift
        return nn.ModuleList(
            ResidualBlock(dim, dim, embedding, scale_shift=scale_shift) for dim in self.config.widths
        )

    def initialise(self) -> None:
        """What each stack adds to its input starts from zero."""
        for module in self.modules():
            if isinstance(module, PositionwiseFeedForward):
                zeroed(module.ffn_2)
            elif isinstance(module, CuboidSelfAttention):
                for projection in (module.proj, getattr(module, "global_proj", None)):
                    if projection is not None:
                        zeroed(projection)
            elif isinstance(module, Upsample):
                module.conv.reset_parameters()

    def embed(self, t: Tensor) -> Tensor:
        """(B, time_width * widths[0]) of steps `t` (B,)."""
        frequencies = sinusoid(t, self.config.widths[0])
        y: Tensor = self.time_embed(frequencies.to(self.pos_embed.T_embed.weight.dtype))
        return y

    def down(
        self, x: Tensor, embedding: Tensor, g: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Tokens of each level, finest first, of a field (B, T, H, W, channels); the last global vectors."""
        x = self.pos_embed(self.first_proj(x))
        levels: list[Tensor] = []
        for level in range(len(self.down_self_blocks)):
            if level > 0:
                x = self.downsample_layers[level - 1](x)
                g = g if g is None else self.down_layer_global_proj[level - 1](g)
            x, g = run_level(
                self.down_self_blocks[level], self.down_time_embed_blocks[level], x, embedding, g
            )
            levels.append(x)
        return levels, g


def run_level(
    stacks: nn.Module, block: nn.Module, x: Tensor, embedding: Tensor, g: Tensor | None, last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Each stack after the level's one residual block; `last`: nothing reads the global vectors after it."""
    assert isinstance(stacks, nn.ModuleList)
    for i, stack in enumerate(stacks):
        x, g = stack(block(x, embedding), g, not last or i < len(stacks) - 1)
    return x, g


class Denoiser(DownPath):
    """The noise in noisy target latents, given the step and the context's latents (PreDiff, Sec. 3.2).

    Context and target go through one U-Net together, one after the other in time. An untrained network
    gives 0.
    """

    config: DenoiserConfig

    def __init__(self, config: DenoiserConfig) -> None:
        """
        Raises:
            ValueError: unknown attention pattern.
        """
        channels = config.target[3]
        shared, shapes = config.global_vectors, config.level_shapes
        super().__init__(config, channels + config.aligned_channels + 1, shared)
        if shared.count:
            self.init_global_vectors = nn.Parameter(
                torch.empty(shared.count, shared.ratio * config.widths[0])
            )
            nn.init.trunc_normal_(self.init_global_vectors, std=0.02)
        wide = pairwise(shared.ratio * dim for dim in (config.widths if shared.count else ()))
        self.up_layer_global_proj = nn.ModuleList(nn.Linear(out, dim) for dim, out in wide)
        self.upsample_layers = nn.ModuleList(
            Upsample(low[3], high[3], high[1:3]) for high, low in pairwise(shapes)
        )
        self.up_self_blocks = self._stacks(shared)
        self.up_time_embed_blocks = self._time_blocks()
        self.final_proj = zeroed(nn.Linear(config.widths[0], channels))
        self.initialise()

    def forward(self, z: Tensor, t: Tensor, context_latents: Tensor, aligned: Tensor | None = None) -> Tensor:
        """(B, T_out, H, W, C) predicted of noisy latents `z` of that shape.

        Args:
            z: noisy latents of the target, (B, T_out, H, W, C).
            t: steps of the noise schedule, (B,), or (1,) of all samples; 0 the least noisy.
            context_latents: (B, T_in, H, W, C).
            aligned: a condition on the target's frames, (B, T_out, H, W, aligned_channels), if configured.

        Raises:
            ValueError: an argument is not of the configured shape, by name.
        """
        x = self.assemble(z, t, context_latents, aligned)
        embedding = self.embed(t)
        count = self.config.global_vectors.count
        g = self.init_global_vectors.expand(len(x), -1, -1) if count else None
        skips, g = self.down(x, embedding, g)
        x = skips.pop()
        for level in reversed(range(len(self.up_self_blocks))):
            if level < len(self.up_self_blocks) - 1:
                x = self.upsample_layers[level](x)
                g = g if g is None else self.up_layer_global_proj[level](g)
                skip = skips.pop()
                x = x + skip if self.config.skips else x
            stacks, block = self.up_self_blocks[level], self.up_time_embed_blocks[level]
            x, g = run_level(stacks, block, x, embedding, g, last=level == 0)
        y: Tensor = self.final_proj(x[:, self.config.context[0] :])
        return y

    def assemble(self, z: Tensor, t: Tensor, context_latents: Tensor, aligned: Tensor | None) -> Tensor:
        """Latents, aligned condition (0 in the context) and indicator of the context, along the channels.

        Raises:
            ValueError: an argument is not of the configured shape, by name.
        """
        config = self.config
        batch, channels = z.shape[0], config.aligned_channels
        check_shape("z", z, config.target)
        check_shape("t", t, (), 1 if t.shape == (1,) else batch)
        check_shape("context_latents", context_latents, config.context, batch)
        condition = [] if aligned is None else [aligned]
        if (aligned is None) != (channels == 0):
            found = "absent" if aligned is None else "given"
            raise ValueError(f"aligned is {found}: needed {channels} channels of it")
        if aligned is not None:
            check_shape("aligned", aligned, (*config.target[:3], channels), batch)
        mark = context_latents.new_ones(*context_latents.shape[:4], 1)
        absent = mark.new_zeros(1).expand(*mark.shape[:4], channels)
        known = torch.cat([context_latents, absent, mark], -1)
        unknown = torch.cat([z, *condition, z.new_zeros(*z.shape[:4], 1)], -1)
        return torch.cat([known, unknown], 1)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], batch: int | None = None) -> None:
    """
    Raises:
        ValueError: `x` is not of `shape` after its batch axis, of `batch` where that is given.
    """
    if x.ndim == 0 or tuple(x.shape[1:]) != shape or batch not in (None, x.shape[0]):
        needed = ("B" if batch is None else str(batch), *map(str, shape))
        raise ValueError(f"{name} has shape {tuple(x.shape)}: needed ({', '.join(needed)})")
