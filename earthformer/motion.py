"""Motion of rain: optical flow between frames, and what a frame becomes when it is carried along.

`flow` is Lucas and Kanade's least squares (1981) with wide Gaussian windows, from coarse to fine; `advect` is
the semi-Lagrangian backward scheme of Germann and Zawadzki (2002). Both are batched, deterministic and
without parameters to train: a network may take the moved frames as its condition.

Motion has two components, x (columns) then y (rows), in pixels a frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS = 2
"""Successive frame pairs, counted from the last, that share one motion."""
FINEST = 4
"""Pixels that are averaged to one in the last round; fewer on grids that would keep too few."""
BLUR = 0.8
"""Standard deviation, in pixels of the coarser grid, of the blur that comes before it."""
WHOLE = 0.98
"""A pixel of the coarser grid is observed from this part of its weight on."""
WINDOWS = ((1.5, 1.0), (4.0, 0.1), (16.0, 0.01))
"""Standard deviation, in cells of 2 × FINEST pixels, and weight of the Gaussian windows: the wide ones speak
where the narrow ones see no rain, and hardly elsewhere."""
EVERYWHERE = 1e-4
"""Weight of the mean over the whole field, for what lies far from all rain."""
ROUNDS = 2
"""Solutions at each scale, each about the last one's motion."""


def flow(frames: Tensor) -> Tensor:
    """Motion of (B, T, H, W), T ≥ 2, as (B, 2, H, W) float32 in pixels a frame, x then y.

    Every window is solved for by itself. Fields that span decades belong on a log scale. Missing pixels are
    NaN and count for nothing; the motion is finite everywhere, and 0 where no window sees any structure.

    Raises:
        ValueError: fewer than two frames.
    """
    if frames.shape[1] < 2:
        raise ValueError(f"{frames.shape[1]} frame in the context: motion needs 2")
    frames = frames[:, -(PAIRS + 1) :].float()
    height, width = frames.shape[-2:]
    seen = torch.isfinite(frames)
    filled = torch.where(seen, frames, 0.0)
    finest = min(FINEST, max(1, min(height, width) // 16))
    cells = (-(-height // (2 * finest)), -(-width // (2 * finest)))
    motion = frames.new_zeros(len(frames), 2, *cells)
    for scale in (4 * finest, 2 * finest, finest):
        size = (max(1, height // scale), max(1, width // scale))
        for _ in range(ROUNDS):
            motion = _solve(filled, seen.float(), motion, size)
    return _resize(motion, (height, width))


def _solve(frames: Tensor, seen: Tensor, motion: Tensor, size: tuple[int, int]) -> Tensor:
    """Motion on cells (B, 2, h, w), linearised about `motion`, on frames blurred to `size`."""
    # Each frame of a pair is carried half the way: the gradient of their mean is then of second order. It is
    # carried before it is blurred, as interpolation between coarse pixels would be an error of the motion.
    half = _resize(motion, (frames.shape[-2], frames.shape[-1])) / 2
    early, early_seen = _carried(frames[:, :-1], seen[:, :-1], -half, size)
    late, late_seen = _carried(frames[:, 1:], seen[:, 1:], half, size)
    usable = (early_seen > WHOLE) & (late_seen > WHOLE)
    x, y, inner = _gradient((early + late) / 2, usable)
    x, y = x * (size[1] / frames.shape[-1]), y * (size[0] / frames.shape[-2])
    change = torch.where(inner, late - early, 0.0)
    # x u + y v = x u₀ + y v₀ - change, by least squares over pairs, windows and pixels.
    about = _resize(motion, size)
    known = x * about[:, :1] + y * about[:, 1:] - change
    sums = torch.stack([x * x, x * y, y * y, x * known, y * known], 1).sum(2)
    sums = F.adaptive_avg_pool2d(sums, (motion.shape[-2], motion.shape[-1]))
    xx, xy, yy, xk, yk = _windowed(sums).unbind(1)
    # A little isotropy keeps the motion along an edge from what the edge cannot tell.
    ridge = 0.01 * (xx + yy) + 1e-15
    xx, yy = xx + ridge, yy + ridge
    before = motion * ridge[:, None]
    xk, yk = xk + before[:, 0], yk + before[:, 1]
    determinant = xx * yy - xy * xy
    return torch.stack([yy * xk - xy * yk, xx * yk - xy * xk], 1) / determinant[:, None]


def _carried(
    frames: Tensor, seen: Tensor, displacement: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Frames (B, T, H, W) at pixel + displacement (B, 2, H, W), blurred to `size`, and how much was seen."""
    both = torch.cat([frames, seen], 1)
    moved = F.grid_sample(both, _grid(displacement), padding_mode="zeros", align_corners=True)
    values, weight = _blurred(moved, size).chunk(2, 1)
    return values / weight.clamp(min=1e-6), weight


def _gradient(frames: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences in x and y, and where all their pixels are usable; 0 elsewhere."""
    inner = torch.zeros_like(usable)
    inner[..., 1:-1, 1:-1] = (
        usable[..., 1:-1, 1:-1]
        & usable[..., 1:-1, :-2]
        & usable[..., 1:-1, 2:]
        & usable[..., :-2, 1:-1]
        & usable[..., 2:, 1:-1]
    )
    x, y = torch.zeros_like(frames), torch.zeros_like(frames)
    x[..., 1:-1] = (frames[..., 2:] - frames[..., :-2]) / 2
    y[..., 1:-1, :] = (frames[..., 2:, :] - frames[..., :-2, :]) / 2
    return torch.where(inner, x, 0.0), torch.where(inner, y, 0.0), inner


def _windowed(sums: Tensor) -> Tensor:
    total = EVERYWHERE * sums.mean((-2, -1), keepdim=True).expand_as(sums)
    for sigma, weight in WINDOWS:
        rows, columns = (_gaussian(n, n, sigma).to(sums) for n in sums.shape[-2:])
        total = total + weight / sigma**2 * (rows @ sums @ columns.T)
    return total


def _blurred(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (..., H, W) on a coarser grid, smooth enough for its differences to be derivatives."""
    factors = []
    for coarse, fine in zip(size, frames.shape[-2:], strict=True):
        weights = _gaussian(coarse, fine, BLUR * fine / coarse).to(frames)
        factors.append(weights / weights.sum(1, keepdim=True))
    return factors[0] @ frames @ factors[1].T


def _gaussian(coarse: int, fine: int, sigma: float) -> Tensor:
    """Weights (coarse, fine) of a line's `fine` points about the centres of its `coarse` parts.

    On grids of this size a product with a matrix is the quickest blur.
    """
    centres = (torch.arange(coarse, dtype=torch.float32)[:, None] + 0.5) * (fine / coarse) - 0.5
    return torch.exp(-((torch.arange(fine) - centres) ** 2) / (2 * sigma**2))


def _resize(motion: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(motion, size, mode="bilinear", align_corners=False)


def trajectories(motion: Tensor, steps: int) -> Tensor:
    """Where each pixel's value comes from: displacements (B, steps, 2, H, W) in pixels, by (B, 2, H, W).

    Step by step with the midpoint rule, the motion held constant in time and, beyond the border, at what it
    is on the border.
    """
    displacement = torch.zeros_like(motion)
    velocity, found = motion, []
    for _ in range(steps):
        middle = _bordered(motion, displacement - velocity / 2)
        displacement = displacement - middle
        velocity = _bordered(motion, displacement)
        found.append(displacement)
    return torch.stack(found, 1)


def warp(frame: Tensor, displacement: Tensor) -> Tensor:
    """A frame (B, H, W[, C]) at pixel + displacement (B, K, 2, H, W), as (B, K, H, W[, C]).

    Bilinear; beyond the border is what is on the border. A missing (NaN) pixel makes those around it missing.
    """
    plain = frame.dim() == 3
    fields = frame[:, None] if plain else frame.movedim(-1, 1)
    count = displacement.shape[1]
    fields = fields[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
    moved = _bordered(fields, displacement.flatten(0, 1))
    moved = moved.view(-1, count, *moved.shape[1:])
    return moved[:, :, 0] if plain else moved.movedim(2, -1)


def drifting(paths: Tensor, drift: Tensor) -> Tensor:
    """Displacements (B, K, 2, H, W) of rain that also drifts off, by (B, 2) pixels a frame."""
    lead = torch.arange(1, paths.shape[1] + 1, device=paths.device)
    # The pixel comes from where the drift has not yet carried it.
    return paths - (drift.to(paths)[:, None] * lead[:, None])[..., None, None]


def advect(frame: Tensor, motion: Tensor, steps: int) -> Tensor:
    """A frame (B, H, W[, C]) carried along (B, 2, H, W) for 1 … `steps` frames: (B, steps, H, W[, C]).

    What flows in is the border's nearest pixel, see `warp`.
    """
    return warp(frame, trajectories(motion, steps))


def _bordered(fields: Tensor, displacement: Tensor) -> Tensor:
    return F.grid_sample(fields, _grid(displacement), padding_mode="border", align_corners=True)


def _grid(displacement: Tensor) -> Tensor:
    """Displacements (N, 2, H, W) in pixels as PyTorch's grid (N, H, W, 2)."""
    height, width = displacement.shape[-2:]
    columns = torch.arange(width, device=displacement.device)
    rows = torch.arange(height, device=displacement.device)[:, None]
    x = (displacement[:, 0] + columns) * (2 / max(1, width - 1)) - 1
    y = (displacement[:, 1] + rows) * (2 / max(1, height - 1)) - 1
    return torch.stack([x, y], -1)
