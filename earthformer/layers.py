"""Everything that is not attention: feed-forward, patch merging, position embedding, convolution stems.

Fields are (B, T, H, W, C). Convolutions see each frame as (N, C, H, W) in channels-last memory, which is the
field itself, seen through a permutation.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from earthformer.config import Activation, FeedForward, FieldShape, Norm, Padding, Positions, StemStage

LEAKY_SLOPE = 0.1
CHUNK_PIXELS = 2**17
"""Without gradients, so many pixels of frames go through a stem at a time on a CPU."""
RECOMPUTED_MAPS = 2**23
"""With gradients, norms and activations of maps of so many numbers are done again in backward, not kept."""
_CONVOLUTION_ROWS = 256


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b over the last axis.

    On a CPU, many rows go as a 1x1 convolution: oneDNN's kernels are faster than the BLAS on some CPUs.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype == torch.float64 or rows < _CONVOLUTION_ROWS:
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, rows, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Projection(nn.Linear):
    """A linear layer that starts from N(0, 1 / fan_in) and a bias of 0."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(ctx.scale), None, None


class Dropout(nn.Module):
    """Dropout that keeps one byte a number for its gradient, where PyTorch's on a CPU keeps eight.

    One draw of 64 bits decides four numbers, so that the rate is a multiple of 1 / 65536.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 2**16)

    def forward(self, x: Tensor) -> Tensor:
        """The shape kept; the identity in eval mode."""
        if not self.training or self.threshold == 0:
            return x
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].reshape(x.shape) >= self.threshold - 2**15
        y: Tensor = _Drop.apply(x, kept, 2**16 / (2**16 - self.threshold))  # type: ignore[no-untyped-call]
        return y


class RMSNorm(nn.Module):
    """scale * x / (root mean square of x over its last axis + eps)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim), the shape kept."""
        size = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        y: Tensor = self.scale * x / (size + self.eps)
        return y


def make_norm(norm: Norm, dim: int) -> nn.Module:
    """The norm layer of attention and feed-forward."""
    return RMSNorm(dim) if norm == "rms_norm" else nn.LayerNorm(dim)


def make_activation(name: Activation, inplace: bool = False) -> nn.Module:
    """The activation of that name: leaky ReLU of slope 0.1, exact GELU or ReLU."""
    if name == "gelu":
        return nn.GELU()
    return nn.LeakyReLU(LEAKY_SLOPE, inplace) if name == "leaky" else nn.ReLU(inplace)


def nearest_resize(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`x` (B, T, H, W, C) at another (T, H, W): token j of an axis is token floor(j * found / wanted)."""
    for axis, wanted in enumerate(shape, start=1):
        found = x.shape[axis]
        if found != wanted:
            ratio = torch.tensor(found, dtype=torch.float32) / wanted
            source = (torch.arange(wanted, dtype=torch.float32) * ratio).floor().long().clamp(max=found - 1)
            x = x.index_select(axis, source.to(x.device))
    return x


class PositionwiseFeedForward(nn.Module):
    """x + W2 act(W1 LN(x)), or with act(Wg LN(x)) * (W1 LN(x)) inside; (..., C), the shape kept."""

    def __init__(
        self,
        dim: int,
        options: FeedForward,
        norm: Norm = "layer_norm",
        hidden: int | None = None,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden if hidden is not None else 4 * dim
        self.pre_norm = pre_norm
        self.ffn_1 = Projection(dim, hidden)
        self.ffn_1_gate = Projection(dim, hidden) if options.gated else None
        self.ffn_2 = Projection(hidden, dim)
        self.activation = make_activation(options.activation)
        self.dropout = Dropout(options.dropout)
        self.layer_norm = make_norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), the shape kept; with `pre_norm` False, LN(x + f(x))."""
        y = self.layer_norm(x) if self.pre_norm else x
        if self.ffn_1_gate is None:
            y = self.activation(self.ffn_1(y))
        else:
            y = self.activation(self.ffn_1_gate(y)) * self.ffn_1(y)
        y = x + self.dropout(self.ffn_2(self.dropout(y)))
        out: Tensor = y if self.pre_norm else self.layer_norm(y)
        return out


class PatchMerging(nn.Module):
    """Blocks of (dt, dh, dw) tokens become one: (B, T, H, W, C) -> (B, T/dt, H/dh, W/dw, out), rounded up."""

    def __init__(
        self, dim: int, scale: tuple[int, int, int], out: int | None = None, padding: Padding = "zeros"
    ) -> None:
        super().__init__()
        self.scale, self.padding = scale, padding
        merged = math.prod(scale) * dim
        self.norm = nn.LayerNorm(merged)
        self.reduction = Projection(merged, out if out is not None else max(scale) * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Fields that do not divide are padded at the end of each axis."""
        dt, dh, dw = self.scale
        b, t, h, w, c = x.shape
        wanted = (t + -t % dt, h + -h % dh, w + -w % dw)
        if wanted != (t, h, w):
            if self.padding == "nearest":
                x = nearest_resize(x, wanted)
            else:
                x = F.pad(x, (0, 0, 0, wanted[2] - w, 0, wanted[1] - h, 0, wanted[0] - t))
        t, h, w = wanted[0] // dt, wanted[1] // dh, wanted[2] // dw
        x = x.reshape(b, t, dt, h, dh, w, dw, c).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t, h, w, -1)
        y: Tensor = self.reduction(self.norm(x))
        return y


class PositionEmbedding(nn.Module):
    """x + learned positions: T[t] + H[h] + W[w], or T[t] + HW[h, w]."""

    def __init__(self, shape: FieldShape, positions: Positions) -> None:
        super().__init__()
        t, h, w, dim = shape
        self.width = w
        self.T_embed = nn.Embedding(t, dim)
        if positions == "t+h+w":
            self.H_embed, self.W_embed = nn.Embedding(h, dim), nn.Embedding(w, dim)
        else:
            self.HW_embed = nn.Embedding(h * w, dim)
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C), the shape kept; no axis may be longer than its table."""
        _, t, h, w, _ = x.shape
        time = self.T_embed.weight[:t, None, None]
        if hasattr(self, "HW_embed"):
            table = torch.unflatten(self.HW_embed.weight, 0, (-1, self.width))
            return x + (time + table[:h, :w])
        return x + (time + (self.H_embed.weight[:h, None] + self.W_embed.weight[:w]))


# ---------------------------------------------------------------------------- upsampling and convolution


def _frames(x: Tensor) -> Tensor:
    return x.flatten(0, 1).permute(0, 3, 1, 2)  # (B, T, H, W, C) -> (B * T, C, H, W), channels-last


def _fields(frames: Tensor, batch: int) -> Tensor:
    return torch.unflatten(frames.permute(0, 2, 3, 1), 0, (batch, -1))


class Upsample(nn.Module):
    """Each frame resized to (H, W) by its nearest pixels, then a 3x3 convolution."""

    def __init__(self, dim: int, out: int, hw: tuple[int, int]) -> None:
        super().__init__()
        self.hw = hw
        self.conv = nn.Conv2d(dim, out, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / (1.01 * 9 * out)))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def frames(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, *hw)."""
        if x.shape[2:] != self.hw:
            x = F.interpolate(x, size=self.hw, mode="nearest")
        y: Tensor = self.conv(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, *hw, out)."""
        return _fields(self.frames(_frames(x)), x.shape[0])


def _phases(scale: int, like: Tensor) -> Tensor:
    """(scale, low, 3, 3): 1 where pixel p of an enlarged pixel reads a coarse pixel through two taps.

    Through tap `a` of the second convolution and tap `c` of the first, pixel p sees the enlarged image's
    pixel p + (a - 1) + (c - 1); the coarse pixels are counted from the middle of the `low`.
    """
    low = 2 * -(-2 // scale) + 1
    table = torch.zeros(scale, low, 3, 3)
    for p, a, c in product(range(scale), range(3), range(3)):
        table[p, (p + a + c - 2) // scale + low // 2, a, c] = 1
    return table.to(like)


def composed_kernel(first: nn.Conv2d, second: nn.Conv2d, scale: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Kernel (sh * sw * out, in, kh, kw) and bias of enlarging by `scale`, then `first`, then `second`.

    Nothing non-linear stands between the two, so that few coarse pixels hold all it takes to work out
    sh * sw pixels of the result; the enlarged image and what `first` makes of it are never formed.
    """
    assert first.bias is not None
    assert second.bias is not None
    taps = torch.einsum("oeab,eicd->acbdoi", second.weight, first.weight)
    rows, columns = _phases(scale[0], taps), _phases(scale[1], taps)
    kernel = torch.einsum("plac,qmbd,acbdoi->pqoilm", rows, columns, taps).flatten(0, 2)
    bias = second.bias + second.weight.sum((2, 3)) @ first.bias
    return kernel, bias.repeat(math.prod(scale))


class _SubtractBorder(torch.autograd.Function):
    """y[top row] -= top, and so on round the frame, in place; slices would copy all of y in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        y[:, :, :1] -= top
        y[:, :, -1:] -= bottom
        y[:, :, :, :1] -= left
        y[:, :, :, -1:] -= right
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (g,) = grads
        return g, -g[:, :, :1], -g[:, :, -1:], -g[:, :, :, :1], -g[:, :, :, -1:]


def composed_upsample(
    x: Tensor, first: nn.Conv2d, second: nn.Conv2d, scale: tuple[int, int], kernel: Tensor, bias: Tensor
) -> Tensor:
    """(N, C, H, W) -> (N, out, sh * H, sw * W): enlarging and both convolutions as one at low resolution.

    `kernel` and `bias` are `composed_kernel`'s. `second` pads the image that `first` makes with zeros; the
    composed kernel sees there what `first` would have made beyond the border, which is taken off again.
    """
    sh, sw = scale
    n, _, h, w = x.shape
    y = F.conv2d(x, kernel, bias, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))
    y = y.permute(0, 2, 3, 1).reshape(n, h, w, sh, sw, -1).transpose(2, 3).reshape(n, sh * h, sw * w, -1)
    y = y.permute(0, 3, 1, 2)
    one, two, b = first.weight, second.weight, first.bias
    edges = []
    for edge, near, far in ((x[:, :, :1], 2, 0), (x[:, :, -1:], 0, 2)):
        beyond = F.conv2d(edge.repeat_interleave(sw, 3), one[:, :, near : near + 1], b, padding=(0, 2))
        edges.append(F.conv2d(beyond, two[:, :, far : far + 1]))
    for edge, near, far in ((x[:, :, :, :1], 2, 0), (x[:, :, :, -1:], 0, 2)):
        beyond = F.conv2d(edge.repeat_interleave(sh, 2), one[:, :, :, near : near + 1], b, padding=(1, 0))
        edges.append(F.conv2d(beyond, two[:, :, :, far : far + 1], padding=(1, 0)))
    bordered: Tensor = _SubtractBorder.apply(y, *edges)  # type: ignore[no-untyped-call]
    return bordered


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`; for a large `x` with gradients, only `x` is kept and the rest done again in backward.

    What ends `function` costs nothing: it is stopped where all that backward needs is there again.
    """
    if not torch.is_grad_enabled() or x.numel() < RECOMPUTED_MAPS:
        return function(x)
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return y


class ConvBlock(nn.Sequential):
    """`count` times a 3x3 convolution, group norm and activation, on (N, C, H, W)."""

    def __init__(self, dim: int, out: int, count: int, groups: int, activation: Activation) -> None:
        layers: list[nn.Module] = []
        for i in range(count):
            layers += [nn.Conv2d(dim if i == 0 else out, out, 3, padding=1), nn.GroupNorm(groups, out)]
            layers.append(make_activation(activation, inplace=True))
        super().__init__(*layers)

    def after_first(self, x: Tensor, last: Callable[[Tensor], Tensor]) -> Tensor:
        """All but the first convolution, and `last`; `x` is what that made.

        Norm, activation and the convolution that follows are one step, of which a large map is kept once.
        """
        layers = list(self)[1:]
        for i in range(0, len(layers) - 2, 3):
            x = recomputed(nn.Sequential(*layers[i : i + 3]), x)
        return recomputed(lambda y: last(nn.Sequential(*layers[-2:])(y)), x)


def _merged(frames: Tensor, merging: nn.Module, batch: int) -> Tensor:
    y: Tensor = merging(_fields(frames, batch))
    return y


class InitialEncoder(nn.Module):
    """Stages of convolutions and patch merging: (B, T, H, W, C) -> (B, T', H', W', width of the last)."""

    def __init__(
        self, channels: int, stages: tuple[StemStage, ...], activation: Activation, padding: Padding
    ) -> None:
        super().__init__()
        widths = [channels, *(stage.width for stage in stages)]
        self.frame_wise = all(stage.scale[0] == 1 for stage in stages)
        self.conv_block_list = nn.ModuleList(
            ConvBlock(dim, stage.width, stage.convs, stage.norm_groups, activation)
            for dim, stage in zip(widths, stages, strict=False)
        )
        self.patch_merge_list = nn.ModuleList(
            PatchMerging(stage.width, stage.scale, stage.width, padding) for stage in stages
        )

    def forward(self, x: Tensor) -> Tensor:
        """Frames are taken a few at a time where no gradient is wanted."""
        return in_chunks(self._all, x, math.prod(x.shape[2:4])) if self.frame_wise else self._all(x)

    def _all(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        for block, merging in zip(self.conv_block_list, self.patch_merge_list, strict=True):
            assert isinstance(block, ConvBlock)
            x = block.after_first(block[0](_frames(x)), partial(_merged, merging=merging, batch=batch))
        return x


class FinalDecoder(nn.Module):
    """The initial encoder's stages in reverse: (B, T, H', W', C') -> (B, T, H, W, width of the first).

    Each stage enlarges, convolves, and goes on with a block of convolutions. The first two convolutions are
    done as one, before enlarging (`composed_upsample`), wherever the sizes are whole multiples.
    """

    def __init__(
        self, stages: tuple[StemStage, ...], shapes: tuple[FieldShape, ...], activation: Activation
    ) -> None:
        """`shapes` are those before the stem and after each stage (T and C do not matter)."""
        super().__init__()
        self.hw = shapes[0][1:3]
        self.scales: list[tuple[int, int] | None] = []
        ups, blocks = [], []
        width = stages[-1].width
        for i in reversed(range(len(stages))):
            (h, w), (low_h, low_w) = shapes[i][1:3], shapes[i + 1][1:3]
            stage, whole = stages[i], h % low_h == 0 and w % low_w == 0 and (h, w) != (low_h, low_w)
            count = stage.final_convolutions
            self.scales.append((h // low_h, w // low_w) if whole and count > 0 else None)
            ups.append(Upsample(width, width, (h, w)))
            blocks.append(ConvBlock(width, stage.width, count, stage.norm_groups, activation))
            width = stage.width
        self.upsample_list, self.conv_block_list = nn.ModuleList(ups), nn.ModuleList(blocks)
        self._composed: list[tuple[Tensor, Tensor] | None] = [None] * len(stages)

    def fuse(self) -> None:
        """Compose the kernels once and for all, in float64; for inference."""
        for i, scale in enumerate(self.scales):
            if scale is not None:
                first, second = self._convolutions(i)
                dtype = first.weight.dtype
                first, second = copy.deepcopy(first).double(), copy.deepcopy(second).double()
                kernel, bias = (tensor.detach().to(dtype) for tensor in composed_kernel(first, second, scale))
                self._composed[i] = kernel.contiguous(memory_format=torch.channels_last), bias

    def forward(self, x: Tensor, last: Callable[[Tensor], Tensor] = nn.Identity()) -> Tensor:  # noqa: B008
        """Enlarge all the way, and apply `last`; a few frames at a time where no gradient is wanted."""
        with torch.autocast(x.device.type, enabled=False):
            kernels = [
                composed_kernel(*self._convolutions(i), scale)
                if scale is not None and kernel is None
                else kernel
                for i, (scale, kernel) in enumerate(zip(self.scales, self._composed, strict=True))
            ]
        h, w = self.hw
        return in_chunks(lambda y: last(self._enlarged(y, kernels)), x, h * w)

    def _enlarged(self, x: Tensor, kernels: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        frames = _frames(x)
        stages = zip(self.upsample_list, self.conv_block_list, self.scales, kernels, strict=True)
        for up, block, scale, composed in stages:
            assert isinstance(up, Upsample)
            assert isinstance(block, ConvBlock)
            if scale is None or composed is None:
                frames = block(up.frames(frames))
                continue
            second = block[0]
            assert isinstance(second, nn.Conv2d)
            frames = composed_upsample(frames, up.conv, second, scale, *composed)
            frames = block.after_first(frames, nn.Identity())
        return _fields(frames, x.shape[0])

    def _convolutions(self, stage: int) -> tuple[nn.Conv2d, nn.Conv2d]:
        up, block = self.upsample_list[stage], self.conv_block_list[stage]
        assert isinstance(up, Upsample)
        assert isinstance(block, ConvBlock)
        second = block[0]
        assert isinstance(second, nn.Conv2d)
        return up.conv, second


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """`function` of each frame of `x` (B, T, H, W, C), which has `pixels` pixels where it is largest.

    Without gradients, a CPU takes a few frames at a time: the largest maps then stay in its cache, and
    never exist for all frames at once.
    """
    count = max(1, CHUNK_PIXELS // pixels)
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[0] * x.shape[1] <= count:
        return function(x)
    frames = x.flatten(0, 1).unsqueeze(1)
    parts = [function(frames[i : i + count]) for i in range(0, len(frames), count)]
    return torch.unflatten(torch.cat(parts).squeeze(1), 0, x.shape[:2])
