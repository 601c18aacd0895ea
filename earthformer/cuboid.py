"""Cuboid attention: a field is cut into cuboids, and tokens attend within each (Gao et al., 2022, Sec. 3.1).

Fields are (B, T, H, W, C), cuboids (B, N, V, C): N cuboids of V tokens, both numbered with T outermost.
Shapes are fixed when a layer is made, so that masks and relative positions are worked out once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthformer.config import Attention, CrossCuboid, Cuboid, GlobalVectors, Norm, Padding, Strategy
from earthformer.layers import Dropout, Projection, linear, make_norm, nearest_resize

Triple = tuple[int, int, int]
Strategies = tuple[Strategy, Strategy, Strategy]

# ---------------------------------------------------------------------------- geometry


def clip(cuboid: Cuboid, shape: Triple) -> Cuboid:
    """The cuboid a field of (T, H, W) allows: no longer than an axis, shifted only where it is shorter."""
    size, shift = list(cuboid.size), list(cuboid.shift)
    for axis, length in enumerate(shape):
        if cuboid.strategy[axis] == "d":
            shift[axis] = 0
        if length <= cuboid.size[axis]:
            size[axis], shift[axis] = length, 0
    return replace(cuboid, size=_triple(size), shift=_triple(shift))


def pad(x: Tensor, amount: Triple, padding: Padding, left: bool = False) -> Tensor:
    """`x` (B, T, H, W, C) grown by `amount` (T, H, W) at the end of each axis; T at its start if `left`.

    `nearest` resizes by the nearest token instead, `zeros` and `ignore` append zeros.
    """
    if not any(amount):
        return x
    t, h, w = amount
    if padding == "nearest":
        return nearest_resize(x, (x.shape[1] + t, x.shape[2] + h, x.shape[3] + w))
    return F.pad(x, (0, 0, 0, w, 0, h, t if left else 0, 0 if left else t))


def unpad(x: Tensor, amount: Triple, padding: Padding) -> Tensor:
    """The inverse of `pad` at the end of each axis (`nearest` resizes back)."""
    if not any(amount):
        return x
    t, h, w = (x.shape[axis + 1] - amount[axis] for axis in range(3))
    return nearest_resize(x, (t, h, w)) if padding == "nearest" else x[:, :t, :h, :w]


def decompose(x: Tensor, size: Triple, strategy: Strategies) -> Tensor:
    """Cuboids (B, N, V, C) of a field (B, T, H, W, C) whose axes are multiples of `size`."""
    return _to_heads(x, size, strategy, 1, 1)[0].squeeze(2)


def merge(cuboids: Tensor, size: Triple, strategy: Strategies, shape: Triple) -> Tensor:
    """The field (B, *shape, C) that `decompose` cut into `cuboids` (B, N, V, C)."""
    return _from_heads(cuboids.unsqueeze(2), size, strategy, shape)


def _split(shape: Triple, size: Triple, strategy: Strategies) -> tuple[list[int], list[int], list[int]]:
    # An axis of n cuboids of c tokens is (n, c) where they are local, (c, n) where they are dilated.
    lengths, blocks, tokens = [], [], []
    for axis in range(3):
        block, token = shape[axis] // size[axis], size[axis]
        local = strategy[axis] == "l"
        lengths += [block, token] if local else [token, block]
        blocks.append(1 + 2 * axis + (0 if local else 1))
        tokens.append(1 + 2 * axis + (1 if local else 0))
    return lengths, blocks, tokens


def _to_heads(x: Tensor, size: Triple, strategy: Strategies, parts: int, heads: int) -> Tensor:
    """(B, T, H, W, parts * heads * D) -> (parts, B, N, heads, V, D), in one copy."""
    t, h, w = x.shape[1:4]
    lengths, blocks, tokens = _split((t, h, w), size, strategy)
    x = x.reshape(x.shape[0], *lengths, parts, heads, -1).permute(7, 0, *blocks, 8, *tokens, 9)
    n, v = math.prod(x.shape[2:5]), math.prod(size)
    return x.reshape(parts, x.shape[1], n, heads, v, -1)


def _from_heads(x: Tensor, size: Triple, strategy: Strategies, shape: Triple) -> Tensor:
    """(B, N, heads, V, D) -> (B, T, H, W, heads * D), in one copy."""
    _, blocks, tokens = _split(shape, size, strategy)
    counts = [n // c for n, c in zip(shape, size, strict=True)]
    x = x.reshape(x.shape[0], *counts, x.shape[2], *size, -1)  # (B, nT, nH, nW, heads, cT, cH, cW, D)
    where = {axis: 1 + i for i, axis in enumerate(blocks)} | {axis: 5 + i for i, axis in enumerate(tokens)}
    x = x.permute(0, *(where[axis] for axis in range(1, 7)), 4, 8)
    return x.reshape(x.shape[0], *shape, -1)


def _roll(x: Tensor, shift: Triple, back: bool = False) -> Tensor:
    if not any(shift):
        return x
    sign = 1 if back else -1
    return x.roll(tuple(sign * s for s in shift), dims=(1, 2, 3))


def _triple(values: list[int]) -> Triple:
    t, h, w = values
    return t, h, w


def _padding_of(shape: Triple, size: Triple) -> Triple:
    return _triple([-n % c for n, c in zip(shape, size, strict=True)])


# ---------------------------------------------------------------------------- masks and relative positions


def _regions(shape: Triple, size: Triple, shift: Triple) -> Tensor:
    """Labels (1, T, H, W, 3) of the parts of a shifted field that were neighbours before the shift."""
    grid = torch.zeros(1, *shape, 3, dtype=torch.int64)
    for axis in range(3):
        length, label = shape[axis], torch.zeros(shape[axis], dtype=torch.int64)
        if shift[axis]:
            label[length - size[axis] : length - shift[axis]] = 1
            label[length - shift[axis] :] = 2
        grid[..., axis] += label.reshape([-1 if other == axis else 1 for other in range(3)])
    return grid


def _reality(shape: Triple, amount: Triple, left: bool = False) -> Tensor:
    """(1, T, H, W, 1) of a padded field: True where a token is real."""
    return pad(torch.ones(1, *shape, 1), amount, "ignore", left).bool()


def self_attention_mask(shape: Triple, cuboid: Cuboid, padding: Padding) -> Tensor:
    """(N, V, V), True where the first token attends to the second, for a field of `shape` (T, H, W).

    Tokens of a shifted cuboid attend to one another only if they were neighbours before the shift, and
    under `ignore` only real tokens attend and are attended to.
    """
    cuboid = clip(cuboid, shape)
    amount = _padding_of(shape, cuboid.size)
    padded = _triple([n + p for n, p in zip(shape, amount, strict=True)])
    labels = decompose(_regions(padded, cuboid.size, cuboid.shift), cuboid.size, cuboid.strategy)[0]
    mask = (labels[:, :, None] == labels[:, None, :]).all(-1)
    if padding == "ignore":
        real = _roll(_reality(shape, amount), cuboid.shift)
        real = decompose(real, cuboid.size, cuboid.strategy)[0, ..., 0]
        mask = mask & real[:, :, None] & real[:, None, :]
    return mask


@dataclass(frozen=True)
class CrossGeometry:
    """How a field of (T, H, W) and a memory of `memory_frames` frames are cut into as many cuboids."""

    query_size: Triple
    memory_size: Triple
    query_padding: Triple
    memory_padding: Triple
    shift: Triple

    @staticmethod
    def of(cuboid: CrossCuboid, shape: Triple, memory_frames: int) -> "CrossGeometry":
        """Frames are padded to a multiple of the temporal cuboids, the memory's at its start."""
        t, h, w = shape
        (kh, kw), n = cuboid.hw, cuboid.temporal
        space = (-h % kh, -w % kw)
        shift = [0 if s == "d" else k for k, s in zip(cuboid.shift_hw, cuboid.strategy[1:], strict=True)]
        return CrossGeometry(
            query_size=(-(-t // n), kh, kw),
            memory_size=(-(-memory_frames // n), kh, kw),
            query_padding=(-t % n, *space),
            memory_padding=(-memory_frames % n, *space),
            shift=(0, shift[0], shift[1]),
        )


def cross_attention_mask(shape: Triple, memory_frames: int, cuboid: CrossCuboid, padding: Padding) -> Tensor:
    """(N, Vx, Vm), True where a token of the field attends to one of the memory; time is unrestricted."""
    geometry = CrossGeometry.of(cuboid, shape, memory_frames)
    sides = []
    for frames, size, amount, left in (
        (shape[0], geometry.query_size, geometry.query_padding, False),
        (memory_frames, geometry.memory_size, geometry.memory_padding, True),
    ):
        real_shape = (frames, *shape[1:])
        padded = _triple([n + p for n, p in zip(real_shape, amount, strict=True)])
        labels = decompose(_regions(padded, size, geometry.shift), size, cuboid.strategy)[0]
        real = _roll(_reality(real_shape, amount, left), geometry.shift)
        sides.append((labels, decompose(real, size, cuboid.strategy)[0, ..., 0]))
    (labels, real), (memory_labels, memory_real) = sides
    mask = (labels[:, :, None] == memory_labels[:, None, :]).all(-1)
    return mask & real[:, :, None] & memory_real[:, None, :] if padding == "ignore" else mask


def relative_position_index(
    size: Triple, rows: Triple | None = None, columns: Triple | None = None
) -> Tensor:
    """(V_rows, V_columns): row of the bias table for each pair of tokens of a cuboid of `size` (T, H, W).

    The table has (2T - 1)(2H - 1)(2W - 1) rows, one a displacement. `rows` and `columns` are the sizes of
    the cuboids at hand where they are smaller than `size`. They are compared by their true displacement; the
    original code cuts the corner out of the index of the whole cuboid, which is another displacement once H
    or W is clipped behind a longer leading axis.
    """

    def positions(extent: Triple) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n) for n in extent)).reshape(-1, 3)

    offset = positions(rows or size)[:, None] - positions(columns or size)[None]
    t, h, w = (offset + torch.tensor(size) - 1).unbind(-1)
    return (t * (2 * size[1] - 1) + h) * (2 * size[2] - 1) + w


# ---------------------------------------------------------------------------- named patterns


def self_pattern(pattern: str | tuple[Cuboid, ...], shape: Triple) -> tuple[Cuboid, ...]:
    """The layers of a named self-attention pattern for a field of (T, H, W); layers pass through.

    Raises:
        ValueError: unknown name; the nearest are given.
    """
    if not isinstance(pattern, str):
        return pattern
    t, h, w = shape
    time = Cuboid((t, 1, 1))
    if pattern == "full":
        return (Cuboid((t, h, w)),)
    if pattern == "axial":
        return (time, Cuboid((1, h, 1)), Cuboid((1, 1, w)))
    if pattern == "divided_st":
        return (time, Cuboid((1, h, w)))
    name, _, sizes = pattern.rpartition("_")
    if pattern == "video_swin":
        name, sizes = "video_swin", "2x4"
    if pattern == "spatial_lg_v1":
        sizes = "4"
    if name == "video_swin" and pattern in (*_SWIN, "video_swin"):
        p, m = (int(n) for n in sizes.split("x"))
        p, m = min(p, t), min(m, h, w)
        size = (p, m, m)
        return (Cuboid(size), Cuboid(size, shift=(p // 2, m // 2, m // 2)))
    if name == "spatial_lg" and pattern in _SPATIAL:
        m = int(sizes)
        if h <= m and w <= m:
            return (time, Cuboid((1, h, w)))
        return (time, Cuboid((1, m, m)), Cuboid((1, m, m), ("d", "d", "d")))
    if name == "axial_space_dilate" and pattern in _DILATE:
        k = min(int(sizes), h, w)
        height, width = (1, h // k, 1), (1, 1, w // k)
        dilated: Strategies = ("d", "d", "d")
        return (time, Cuboid(height, dilated), Cuboid(height), Cuboid(width, dilated), Cuboid(width))
    raise ValueError(_unknown(pattern, SELF_PATTERNS))


def cross_pattern(pattern: str | tuple[CrossCuboid, ...], shape: Triple) -> tuple[CrossCuboid, ...]:
    """The layers of a named cross-attention pattern for a field of (T, H, W); layers pass through.

    Raises:
        ValueError: unknown name; the nearest are given.
    """
    if not isinstance(pattern, str):
        return pattern
    if pattern not in CROSS_PATTERNS:
        raise ValueError(_unknown(pattern, CROSS_PATTERNS))
    _, sizes, *kind = pattern.split("_")
    k = min(int(sizes.split("x")[0]), *shape[1:])
    local, dilated = CrossCuboid((k, k)), CrossCuboid((k, k), ("d", "d", "d"))
    if kind == ["lg"]:
        return (local, dilated)
    if kind == ["heter"]:
        return (local, dilated, replace(local, shift_hw=(k // 2, k // 2)))
    return (local,)


_SWIN = tuple(f"video_swin_{p}x{m}" for p in (1, 2, 4, 8, 10) for m in (1, 2, 4, 8, 16, 32))
_SPATIAL = ("spatial_lg_v1", *(f"spatial_lg_{m}" for m in (1, 2, 4, 8, 16, 32)))
_DILATE = tuple(f"axial_space_dilate_{k}" for k in (2, 4, 8))
SELF_PATTERNS = ("full", "axial", "divided_st", "video_swin", *_SWIN, *_SPATIAL, *_DILATE)
CROSS_PATTERNS = tuple(f"cross_{k}x{k}{kind}" for k in (1, 2, 4, 8) for kind in ("", "_lg", "_heter"))


def _unknown(pattern: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(pattern, known, n=3, cutoff=0.0)
    return f"attention pattern {pattern!r} is unknown: needed a known one, such as {', '.join(near)}"


# ---------------------------------------------------------------------------- attention


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    shared: tuple[Tensor, Tensor] | None,
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    """softmax(Q K' + bias | logits of the global vectors) (V | their values); tensors (B, N, heads, V, D).

    `shared` holds those logits (B, N, heads, V, G) and the values (B, heads, G, D). Global columns have no
    bias and no mask. Rows without any column left give 0.
    """
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores.add_(bias)
    if mask is not None:
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    if shared is None:
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask
        return dropout(weights) @ value
    weights = dropout(torch.cat([scores, shared[0]], -1).softmax(-1))
    tokens = key.shape[-2]
    return weights[..., :tokens] @ value + weights[..., tokens:] @ shared[1][:, None]


class _CuboidAttention(nn.Module):
    """What self- and cross-attention share: heads, the relative position bias and the mask."""

    _index: Tensor | None
    _mask: Tensor | None
    _fused_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        options: Attention,
        norm: Norm,
        table: Triple,
        rows: Triple,
        columns: Triple,
        mask: Tensor,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, options.heads
        self.scale = options.qk_scale if options.qk_scale is not None else (dim // options.heads) ** -0.5
        self.padding: Padding = options.padding
        self.table_size = table
        self.register_buffer("_mask", None if bool(mask.all()) else mask[:, None], persistent=False)
        self.register_buffer("_index", None, persistent=False)
        self.register_buffer("_fused_bias", None, persistent=False)
        if options.relative_position:
            entries = math.prod(2 * n - 1 for n in table)
            self.relative_position_bias_table = nn.Parameter(torch.empty(entries, options.heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            self._index = relative_position_index(table, rows, columns)
        self.norm = make_norm(norm, dim)
        self.attn_drop = Dropout(options.dropout)
        self.proj_drop = Dropout(options.projection_dropout)

    def _bias(self) -> Tensor | None:
        """(heads, V, V), shared by all cuboids; entry (i, j) depends on the displacement from j to i."""
        if self._fused_bias is not None or self._index is None:
            return self._fused_bias
        return self.relative_position_bias_table[self._index].permute(2, 0, 1)

    def fuse(self) -> None:
        """Look the bias up once and for all; for inference."""
        bias = self._bias()
        self._fused_bias = None if bias is None else bias.detach().contiguous()

    def _shared_logits(self, x: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, H, W, heads * G): scaled (x W' + b) . key of each head and global vector (B, G, heads, D).

        The key is taken through the projection first: heads * G columns instead of C.
        """
        heads = torch.unflatten(weight, 0, (self.heads, -1))  # (heads, D, C)
        columns = torch.einsum("bghd,hdc->bchg", keys * self.scale, heads).flatten(2)
        logits = torch.unflatten(x.flatten(1, 3) @ columns, 1, x.shape[1:4])
        if bias is None:
            return logits
        constant = torch.einsum("bghd,hd->bhg", keys * self.scale, torch.unflatten(bias, 0, (self.heads, -1)))
        return logits + constant.flatten(1)[:, None, None, None]

    def _scaled(self, projection: nn.Linear, parts: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a projection whose first of `parts` equal parts, the query, is scaled."""
        factor = torch.ones(parts, 1, 1, dtype=projection.weight.dtype, device=projection.weight.device)
        factor[0] = self.scale
        weight = (torch.unflatten(projection.weight, 0, (parts, -1)) * factor).flatten(0, 1)
        if projection.bias is None:
            return weight, None
        return weight, (torch.unflatten(projection.bias, 0, (parts, -1)) * factor[..., 0]).flatten()


class CuboidSelfAttention(_CuboidAttention):
    """Self-attention within cuboids, with global vectors if asked (Gao et al., 2022, Eq. 1-4).

    `forward(x (B, T, H, W, C), g (B, G, ratio * C) or None)` returns the increments of both (no residual).

    `zeros` padding is attended to: a padded token counts with its position bias alone. `ignore` padding is
    not, neither by tokens nor by global vectors (the original applies the global vectors' mask to tokens in
    another order).
    """

    _real: Tensor | None

    def __init__(
        self,
        dim: int,
        cuboid: Cuboid,
        shape: Triple,
        options: Attention,
        global_vectors: GlobalVectors | None = None,
        norm: Norm = "layer_norm",
    ) -> None:
        """`cuboid` need not fit the field's `shape` (T, H, W); `global_vectors`, None: the layer has none."""
        clipped = clip(cuboid, shape)
        mask = self_attention_mask(shape, cuboid, options.padding)
        super().__init__(dim, options, norm, cuboid.size, clipped.size, clipped.size, mask)
        self.size, self.strategy, self.shift = clipped.size, clipped.strategy, clipped.shift
        self.amount = _padding_of(shape, clipped.size)
        self.padded = _triple([n + p for n, p in zip(shape, self.amount, strict=True)])
        hidden = options.padding == "ignore" and any(self.amount)
        self.register_buffer(
            "_real", _reality(shape, self.amount).flatten() if hidden else None, persistent=False
        )
        self.global_vectors = global_vectors
        self.separate = global_vectors is not None and global_vectors.separate_projections
        biased = options.qkv_bias
        self.qkv = Projection(dim, 3 * dim, bias=biased)
        if global_vectors is not None:
            wide = global_vectors.ratio * dim
            if self.separate:
                self.l2g_q_net = Projection(dim, dim, bias=biased)
                self.l2g_global_kv_net = Projection(wide, 2 * dim, bias=biased)
                self.g2l_global_q_net = Projection(wide, dim, bias=biased)
                self.g2l_k_net = Projection(dim, dim, bias=biased)
                self.g2l_v_net = Projection(dim, wide, bias=biased)
                if global_vectors.attend_each_other:
                    self.g2g_global_qkv_net = Projection(wide, 3 * wide, bias=biased)
            else:
                self.global_qkv = Projection(dim, 3 * dim, bias=biased)
            if options.output_projection:
                self.global_proj = nn.Linear(wide, wide)
            self.global_vec_norm = make_norm(norm, wide)
        self.proj = Projection(dim, dim) if options.output_projection else None

    def forward(
        self, x: Tensor, g: Tensor | None = None, update_global: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Increments of `x` and of `g`; that of `g` is None without global vectors or `update_global`."""
        x = pad(self.norm(x), self.amount, self.padding)
        g = None if self.global_vectors is None else self.global_vec_norm(g)
        y = self._local(_roll(x, self.shift), g)
        if self.proj is not None:
            y = self.proj(y)
        y = unpad(_roll(self.proj_drop(y), self.shift, back=True), self.amount, self.padding)
        return y, self._global(x, g) if g is not None and update_global else None

    def _local(self, x: Tensor, g: Tensor | None) -> Tensor:
        qkv = linear(x, *self._scaled(self.qkv, 3))
        query, key, value = _to_heads(qkv, self.size, self.strategy, 3, self.heads)
        shared = None
        if g is not None:
            bias: Tensor | None
            if self.separate:
                weight, bias = self.l2g_q_net.weight, self.l2g_q_net.bias
                kv = self.l2g_global_kv_net(g)
            else:
                weight, bias = self._third(0)
                kv = self.global_qkv(g)[..., self.dim :]
            keys, values = torch.unflatten(kv, -1, (2, self.heads, -1)).unbind(2)  # (B, G, heads, D)
            logits = self._shared_logits(x, keys, weight, bias)
            logits = _to_heads(logits, self.size, self.strategy, 1, self.heads)[0]
            shared = logits, values.transpose(1, 2)
        y = _attend(query, key, value, self._bias(), self._mask, shared, self.attn_drop)
        t, h, w = x.shape[1:4]
        return _from_heads(y, self.size, self.strategy, (t, h, w))

    def _global(self, x: Tensor, g: Tensor) -> Tensor:
        """Increment of the global vectors, which attend to all tokens and to one another.

        As in `_shared_logits`, keys and values are projected on the side of the few global vectors.
        """
        assert self.global_vectors is not None
        tokens, heads = x.flatten(1, 3), self.heads
        key_bias: Tensor | None
        value_bias: Tensor | None
        if self.separate:
            query = self.g2l_global_q_net(g)
            key_weight, key_bias = self.g2l_k_net.weight, self.g2l_k_net.bias
            value_weight, value_bias = self.g2l_v_net.weight, self.g2l_v_net.bias
        else:
            query = self.global_qkv(g)[..., : self.dim]
            (key_weight, key_bias), (value_weight, value_bias) = self._third(1), self._third(2)
        query = torch.unflatten(query, -1, (heads, -1)) * self.scale  # (B, G, heads, D)
        rows = torch.einsum("bghd,hdc->bhgc", query, torch.unflatten(key_weight, 0, (heads, -1)))
        scores = torch.unflatten(
            rows.flatten(1, 2) @ tokens.transpose(1, 2), 1, (heads, -1)
        )  # (B, heads, G, P)
        if key_bias is not None:
            scores = (
                scores
                + torch.einsum("bghd,hd->bhg", query, torch.unflatten(key_bias, 0, (heads, -1)))[..., None]
            )
        if self._real is not None:
            scores = scores.masked_fill(~self._real, torch.finfo(scores.dtype).min)
        if self.global_vectors.attend_each_other:
            others = (self.g2g_global_qkv_net if self.separate else self.global_qkv)(g).chunk(3, -1)
            q, k, v = (
                torch.unflatten(z, -1, (heads, -1)).transpose(1, 2) for z in others
            )  # (B, heads, G, D)
            scores = torch.cat([scores, (q * self.scale) @ k.transpose(-1, -2)], -1)
        weights = self.attn_drop(scores.softmax(-1))
        local = weights[..., : tokens.shape[1]]
        pooled = torch.unflatten(local.flatten(1, 2) @ tokens, 1, (heads, -1))  # (B, heads, G, C)
        y = torch.einsum("bhgc,hdc->bhgd", pooled, torch.unflatten(value_weight, 0, (heads, -1)))
        if value_bias is not None:
            y = y + local.sum(-1, keepdim=True) * torch.unflatten(value_bias, 0, (heads, 1, -1))
        if self.global_vectors.attend_each_other:
            y = y + weights[..., tokens.shape[1] :] @ v
        y = y.transpose(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.global_proj(y) if self.proj is not None else y)
        return out

    def _third(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the query, key or value projection of the tokens."""
        rows = slice(part * self.dim, (part + 1) * self.dim)
        return self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows]


class CuboidCrossAttention(_CuboidAttention):
    """Attention of a field's cuboids to those of a memory (Gao et al., 2022, Sec. 3.2).

    `forward(x (B, Tx, H, W, C), memory (B, Tm, H, W, C), g (B, G, ratio * C) or None)` returns the increment
    of `x`. The memory and its global vectors are not normalised. Time offsets are counted from the first
    frame of either. Where cuboids do not divide the field, `zeros` and `nearest` pad both and attend to the
    padding, as in self-attention (the original fails there).
    """

    def __init__(
        self,
        dim: int,
        cuboid: CrossCuboid,
        shape: Triple,
        memory_frames: int,
        max_frames: int,
        options: Attention,
        last_frames: int | None = None,
        global_vectors: GlobalVectors | None = None,
        norm: Norm = "layer_norm",
    ) -> None:
        """`max_frames` is the extent of the table of relative times; both fields must be shorter."""
        self_frames = memory_frames if last_frames is None else min(last_frames, memory_frames)
        geometry = CrossGeometry.of(cuboid, shape, self_frames)
        longest = max(geometry.query_size[0], geometry.memory_size[0])
        if longest > max_frames:
            raise ValueError(f"a cuboid holds {longest} frames: needed at most max_frames, {max_frames}")
        mask = cross_attention_mask(shape, self_frames, cuboid, options.padding)
        table = (max_frames, *cuboid.hw)
        super().__init__(dim, options, norm, table, geometry.query_size, geometry.memory_size, mask)
        self.geometry, self.strategy, self.last_frames = geometry, cuboid.strategy, self_frames
        self.q_proj = Projection(dim, dim, bias=options.qkv_bias)
        self.kv_proj = Projection(dim, 2 * dim, bias=options.qkv_bias)
        self.proj = Projection(dim, dim)
        self.global_vectors = global_vectors
        if global_vectors is not None and global_vectors.separate_projections:
            self.l2g_q_net = Projection(dim, dim, bias=options.qkv_bias)
            self.l2g_global_kv_net = Projection(global_vectors.ratio * dim, 2 * dim, bias=options.qkv_bias)

    def forward(self, x: Tensor, memory: Tensor, g: Tensor | None = None) -> Tensor:
        """Increment of `x` (no residual)."""
        geometry, shift = self.geometry, self.geometry.shift
        x = _roll(pad(self.norm(x), geometry.query_padding, self.padding), shift)
        memory = pad(memory[:, -self.last_frames :], geometry.memory_padding, self.padding, left=True)
        query = linear(x, *self._scaled(self.q_proj, 1))
        query = _to_heads(query, geometry.query_size, self.strategy, 1, self.heads)[0]
        kv = self.kv_proj(_roll(memory, shift))
        key, value = _to_heads(kv, geometry.memory_size, self.strategy, 2, self.heads)
        shared = None
        if self.global_vectors is not None and g is not None:
            separate = self.global_vectors.separate_projections
            net = self.l2g_q_net if separate else self.q_proj
            kv = self.l2g_global_kv_net(g) if separate else self.kv_proj(g)
            keys, values = torch.unflatten(kv, -1, (2, self.heads, -1)).unbind(2)  # (B, G, heads, D)
            logits = self._shared_logits(x, keys, net.weight, net.bias)
            shared = (
                _to_heads(logits, geometry.query_size, self.strategy, 1, self.heads)[0],
                values.transpose(1, 2),
            )
        y = _attend(query, key, value, self._bias(), self._mask, shared, self.attn_drop)
        t, h, w = x.shape[1:4]
        y = self.proj(_from_heads(y, geometry.query_size, self.strategy, (t, h, w)))
        return unpad(_roll(self.proj_drop(y), shift, back=True), geometry.query_padding, self.padding)
