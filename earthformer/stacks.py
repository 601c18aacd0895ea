"""Stacks of self-attention, of which every transformer here is built."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from earthformer.config import Attention, Cuboid, FeedForward, FieldShape, GlobalVectors, Norm
from earthformer.cuboid import CuboidSelfAttention
from earthformer.layers import PositionwiseFeedForward

P = TypeVar("P")


def of_level(patterns: Sequence[P], level: int) -> P:
    """The pattern of a level, where one alone is that of all levels."""
    return patterns[0 if len(patterns) == 1 else level]


def feed_forwards(dim: int, options: FeedForward, norm: Norm, count: int) -> nn.ModuleList:
    """`count` feed-forwards of width `dim`."""
    return nn.ModuleList(PositionwiseFeedForward(dim, options, norm) for _ in range(count))


class SelfStack(nn.Module):
    """The self-attention layers of a pattern, each with its feed-forward, or one feed-forward after all."""

    def __init__(
        self,
        cuboids: tuple[Cuboid, ...],
        shape: FieldShape,
        attention: Attention,
        feed_forward: FeedForward,
        inter_ffn: bool = True,
        global_vectors: GlobalVectors | None = None,
        norm: Norm = "layer_norm",
    ) -> None:
        """`shape` is the field's; `global_vectors` None: the stack has none."""
        super().__init__()
        t, h, w, dim = shape
        self.inter_ffn = inter_ffn
        self.attn_l = nn.ModuleList(
            CuboidSelfAttention(dim, cuboid, (t, h, w), attention, global_vectors, norm) for cuboid in cuboids
        )
        count = len(cuboids) if inter_ffn else 1
        self.ffn_l = feed_forwards(dim, feed_forward, norm, count)
        self.global_ffn_l = nn.ModuleList()
        if global_vectors is not None and global_vectors.feed_forward:
            self.global_ffn_l = feed_forwards(global_vectors.ratio * dim, feed_forward, norm, count)

    def forward(
        self, x: Tensor, g: Tensor | None = None, last_update: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """`x` (B, T, H, W, C) and `g` (B, G, ratio * C) after the stack.

        Without `last_update` the global vectors are not brought up to date after the last layer.
        """
        last = len(self.attn_l) - 1
        for i, attention in enumerate(self.attn_l):
            dx, dg = attention(x, g, last_update or i < last)
            x = x + dx
            if g is not None and dg is not None:
                g = g + dg
            if self.inter_ffn or i == last:
                place = i if self.inter_ffn else 0
                x = self.ffn_l[place](x)
                if g is not None and dg is not None and len(self.global_ffn_l):
                    g = self.global_ffn_l[place](g)
        return x, g
