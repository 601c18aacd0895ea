"""Earthformer: an encoder-decoder of cuboid attention for space-time forecasting (Gao et al., 2022)."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from earthformer.config import CrossCuboid, EarthformerConfig, FieldShape
from earthformer.cuboid import CuboidCrossAttention, CuboidSelfAttention, cross_pattern, self_pattern
from earthformer.layers import (
    FinalDecoder,
    InitialEncoder,
    PatchMerging,
    PositionEmbedding,
    Projection,
    Upsample,
    nearest_resize,
)
from earthformer.stacks import SelfStack, feed_forwards, of_level


class CrossStack(nn.Module):
    """The cross-attention layers of a pattern, with feed-forwards as in `SelfStack`."""

    def __init__(
        self,
        config: EarthformerConfig,
        cuboids: tuple[CrossCuboid, ...],
        shape: FieldShape,
        memory_frames: int,
    ) -> None:
        super().__init__()
        *thw, dim = shape
        t, h, w = thw
        shared = config.global_vectors
        self.inter_ffn = config.decoder.inter_ffn
        self.attn_l = nn.ModuleList(
            CuboidCrossAttention(
                dim,
                cuboid,
                (t, h, w),
                memory_frames,
                memory_frames + t,
                config.attention,
                config.decoder.cross_last_frames,
                shared if shared.count and shared.in_decoder_cross else None,
                config.norm,
            )
            for cuboid in cuboids
        )
        count = len(cuboids) if self.inter_ffn else 1
        self.ffn_l = feed_forwards(dim, config.feed_forward, config.norm, count)

    def forward(self, x: Tensor, memory: Tensor, g: Tensor | None) -> Tensor:
        """`x` (B, T, H, W, C), the shape kept, after it has looked at the memory and its global vectors."""
        last = len(self.attn_l) - 1
        for i, attention in enumerate(self.attn_l):
            x = x + attention(x, memory, g)
            if self.inter_ffn or i == last:
                x = self.ffn_l[i if self.inter_ffn else 0](x)
        return x


class MemoryEncoder(nn.Module):
    """Levels of self-attention, each at half the resolution of the one before."""

    def __init__(self, config: EarthformerConfig) -> None:
        super().__init__()
        shapes, shared = config.memory_shapes, config.global_vectors
        scale = (1, config.downsample, config.downsample)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                SelfStack(
                    self_pattern(of_level(config.encoder.patterns, level), shape[:3]),
                    shape,
                    config.attention,
                    config.feed_forward,
                    config.encoder.inter_ffn,
                    shared if shared.count else None,
                    config.norm,
                )
                for _ in range(config.encoder.depth[level])
            )
            for level, shape in enumerate(shapes)
        )
        self.down_layers = nn.ModuleList(
            PatchMerging(dim, scale, out, config.attention.padding) for dim, out in pairwise(config.widths)
        )
        self.down_layer_global_proj = nn.ModuleList(
            nn.Linear(shared.ratio * dim, shared.ratio * out)
            for dim, out in pairwise(config.widths if shared.count else ())
        )

    def forward(
        self, x: Tensor, g: Tensor | None, last_update: bool = True
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Memory (B, T, H, W, C) and global vectors (B, G, ratio * C) of each level, finest first."""
        memories: list[Tensor] = []
        global_memories: list[Tensor | None] = []
        for level, stacks in enumerate(self.blocks):
            if level > 0:
                x = self.down_layers[level - 1](x)
                g = None if g is None else self.down_layer_global_proj[level - 1](g)
            assert isinstance(stacks, nn.ModuleList)
            for i, stack in enumerate(stacks):
                last = level == len(self.blocks) - 1 and i == len(stacks) - 1
                x, g = stack(x, g, last_update or not last)
            memories.append(x)
            global_memories.append(g)
        return memories, global_memories


class MemoryDecoder(nn.Module):
    """Levels of self- and cross-attention from the coarsest to the finest.

    Self-attention takes its cuboids from the shape of the memory, so the frames of a target longer than the
    context fall into several temporal cuboids.
    """

    def __init__(self, config: EarthformerConfig) -> None:
        super().__init__()
        options, shared = config.decoder, config.global_vectors
        frames, top = config.target[0], len(config.widths) - 1
        self.update_global, self.cross_start = shared.updated_in_decoder, options.cross_start
        self.cross_first = not options.first_self_attention and top >= options.cross_start
        self.self_blocks, self.cross_blocks = nn.ModuleList(), nn.ModuleList()
        for level, memory in enumerate(config.memory_shapes):
            shape = (frames, *memory[1:])
            depth = options.depth[level]
            cuboids = self_pattern(of_level(options.self_patterns, level), memory[:3])
            cross = cross_pattern(of_level(options.cross_patterns, level), memory[:3])
            self_global = shared if shared.count and shared.in_decoder_self else None
            self.self_blocks.append(
                nn.ModuleList(
                    SelfStack(
                        cuboids,
                        shape,
                        config.attention,
                        config.feed_forward,
                        options.inter_ffn,
                        self_global,
                        config.norm,
                    )
                    for _ in range(depth - (level == top and not options.first_self_attention))
                )
            )
            if level >= options.cross_start:
                self.cross_blocks.append(
                    nn.ModuleList(CrossStack(config, cross, shape, memory[0]) for _ in range(depth))
                )
        finer = list(pairwise(config.memory_shapes))
        self.upsample_layers = nn.ModuleList(Upsample(low[3], high[3], high[1:3]) for high, low in finer)
        self.hierarchical_pos_embed_l = nn.ModuleList(
            PositionEmbedding((frames, *high[1:]), config.positions)
            for high, _ in (finer if options.level_positions else ())
        )

    def forward(self, x: Tensor, memories: list[Tensor], global_memories: list[Tensor | None]) -> Tensor:
        """(B, T_out, H, W, C) at the coarsest level -> the same at the finest."""
        for level in reversed(range(len(memories))):
            x = self._level(x, level, memories[level], global_memories[level])
            if level > 0:
                x = self.upsample_layers[level - 1](x)
                if len(self.hierarchical_pos_embed_l):
                    x = self.hierarchical_pos_embed_l[level - 1](x)
        return x

    def _level(self, x: Tensor, level: int, memory: Tensor, g: Tensor | None) -> Tensor:
        stacks = self.self_blocks[level]
        crossed = self.cross_blocks[level - self.cross_start] if level >= self.cross_start else ()
        assert isinstance(stacks, nn.ModuleList)
        crossings = list(crossed) if isinstance(crossed, nn.ModuleList) else []
        if level == len(self.self_blocks) - 1 and self.cross_first:
            x = crossings.pop(0)(x, memory, g)
        for i, stack in enumerate(stacks):
            x, updated = stack(x, g, self.update_global)
            g = updated if self.update_global else g
            if crossings:
                x = crossings[i](x, memory, g)
        return x


class Earthformer(nn.Module):
    """The space-time transformer of Gao et al. (2022): context frames in, target frames out.

    Convolutions and patch merging shrink each frame to tokens; levels of cuboid self-attention make the
    memory; levels of self- and cross-attention draw the target's tokens from it; convolutions enlarge them.
    """

    def __init__(self, config: EarthformerConfig) -> None:
        """
        Raises:
            ValueError: unknown attention pattern.
        """
        super().__init__()
        self.config = config
        shapes, shared, frames = config.memory_shapes, config.global_vectors, config.target[0]
        finest, top = shapes[0], shapes[-1]
        if shared.count:
            self.init_global_vectors = nn.Parameter(torch.empty(shared.count, shared.ratio * finest[3]))
            nn.init.trunc_normal_(self.init_global_vectors, std=0.02)
        padding, activation = config.attention.padding, config.stem_activation
        self.initial_encoder = InitialEncoder(config.context[3], config.stem, activation, padding)
        self.final_decoder = FinalDecoder(config.stem, config.stem_shapes, activation)
        self.dec_final_proj = Projection(config.stem[0].width, config.target[3])
        if config.from_last_frame:
            nn.init.zeros_(self.dec_final_proj.weight)
        self.encoder = MemoryEncoder(config)
        self.enc_pos_embed = PositionEmbedding(finest, config.positions)
        self.z_proj = Projection(top[3], top[3])
        self.dec_pos_embed = PositionEmbedding((frames, *top[1:]), config.positions)
        self.decoder = MemoryDecoder(config)

    def forward(self, context: Tensor) -> Tensor:
        """(B, T_in, H, W, C) -> (B, T_out, H, W, C_out), both scaled.

        Raises:
            ValueError: `context` is not of the configured shape.
        """
        if context.ndim != 5 or tuple(context.shape[1:]) != self.config.context:
            raise ValueError(f"context has shape {tuple(context.shape)}: needed (B, *{self.config.context})")
        x = self.enc_pos_embed(self.initial_encoder(context))
        memories, global_memories = self.encode(x)
        x = self.decoder(self.initial(memories[-1]), memories, global_memories)
        y: Tensor = self.final_decoder(x, self.dec_final_proj)
        return y + context[:, -1:] if self.config.from_last_frame else y

    def encode(self, x: Tensor, last_update: bool = False) -> tuple[list[Tensor], list[Tensor | None]]:
        """Memory and global vectors of each level for tokens `x` (B, T, H, W, C) with their positions.

        Without `last_update` the coarsest global vectors may lack the last update, where nothing reads it.
        """
        shared = self.config.global_vectors
        g = self.init_global_vectors.expand(x.shape[0], -1, -1) if shared.count else None
        read = shared.in_decoder_self or shared.in_decoder_cross
        memories, global_memories = self.encoder(x, g, last_update or read)
        return memories, global_memories

    def initial(self, memory: Tensor) -> Tensor:
        """What the decoder starts from, (B, T_out, H, W, C), given the coarsest memory (B, T_in, H, W, C)."""
        b, _, h, w, c = memory.shape
        frames, kind = self.config.target[0], self.config.decoder.initial
        if kind == "zeros":
            start: Tensor = self.z_proj(self.dec_pos_embed(memory.new_zeros(1, frames, h, w, c)))
            return start.expand(b, -1, -1, -1, -1)
        if kind == "nearest_interp":
            memory = nearest_resize(memory, (frames, h, w))
        else:
            memory = memory[:, -1:] if kind == "last" else memory.mean(1, keepdim=True)
        start = self.z_proj(memory)
        return start.expand(-1, frames, -1, -1, -1)

    def fuse(self) -> "Earthformer":
        """A copy for inference, in eval mode: what depends on the weights alone is worked out once.

        The copy gives the same forecasts; its weights must not be changed.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        for module in fused.modules():
            if isinstance(module, CuboidSelfAttention | CuboidCrossAttention | FinalDecoder):
                module.fuse()
        return fused
