"""Forecasters that nobody trains: persistence, optical flow, flow with displacement, and the STEPS ensemble.

Persistence and extrapolation are deterministic (one member); displaced and steps are ensembles, in which a
seed decides its member by itself. All but persistence need a task whose fields move; extrapolation and steps
need pysteps as well, an optional extra.

Pixels that are missing in the context's last frame are NaN in every forecast frame; elsewhere what is
missing counts as 0, as for the networks. What flows in over the border is the border's nearest pixel.
"""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from earthformer import motion
from earthformer.forecasters import Forecaster, present
from pipelines import runs
from pipelines.errors import InputError
from pipelines.tasks import TASKS, Task

FRAMES = 3
"""Last frames of the context that flow and autoregression see, as pysteps' own examples take."""
SPREAD = 1.0
"""Pixels a frame: standard deviation, in x and in y, of how fast a displaced member drifts off."""


@dataclass(frozen=True)
class _Field:
    """What pysteps must know of a field."""

    threshold: float
    """Least value that is rain, in the archive's own units."""
    km_per_pixel: float
    decibels: bool
    """Rates become 10 log10, dry pixels lying 5 dB under the threshold; an encoded field stays as it is."""

    def transform(self, values: np.ndarray) -> np.ndarray:
        wet = values >= self.threshold
        if not self.decibels:
            return np.where(wet, values, 0.0)
        return np.where(wet, 10 * np.log10(np.maximum(values, self.threshold)), self.floor - 5)

    def invert(self, transformed: np.ndarray) -> np.ndarray:
        values = 10 ** (transformed / 10) if self.decibels else transformed
        # A dry pixel is not a little rain; half a millionth of slack, for the way there and back.
        return np.where(transformed >= self.floor - 1e-6, values, 0.0)

    @property
    def floor(self) -> float:
        """The threshold, transformed."""
        return float(10 * np.log10(self.threshold)) if self.decibels else self.threshold


# SEVIR's byte is a VIL of 0 up to 5, and nearly the logarithm of VIL from 18 on. National composites have
# pixels of 1 km.
_FIELDS = {
    "radar": _Field(threshold=0.1, km_per_pixel=1.0, decibels=True),
    "sevir": _Field(threshold=6.0, km_per_pixel=1.0, decibels=False),
    "sevir-lr": _Field(threshold=6.0, km_per_pixel=3.0, decibels=False),
}


class _Moving(nn.Module, ABC):
    """What the three forecasters along the optical flow share."""

    needs: tuple[tuple[str, str], ...] = (("pysteps", "pysteps"), ("cv2", "OpenCV"))
    """Modules, and what they are called."""

    def __init__(self, task: Task) -> None:
        """Bind a task.

        Raises:
            InputError: the task's fields do not move, or its context is too short; pysteps or OpenCV is not
                installed.
        """
        super().__init__()
        if task.archive not in _FIELDS:
            moving = sorted(name for name, known in TASKS.items() if known.archive in _FIELDS)
            raise InputError(f"task {task.name} has no optical flow: needed one of {', '.join(moving)}")
        if task.context < FRAMES:
            raise InputError(f"task.context is {task.context}: optical flow needs {FRAMES} frames")
        for module, name in self.needs:
            if find_spec(module) is None:
                raise InputError(f"{name} is not installed: needed `pip install earthformer-ray[steps]`")
        self.task = task
        self.field = _FIELDS[task.archive]

    def forecast(self, context: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, M, T_out, H, W, C), float32 in the units of `context` (B, T_in, H, W, C).

        NaN where the last frame is missing.

        Raises:
            ValueError: several members asked of a deterministic forecaster.
        """
        observed = present(context[:, -FRAMES:, ..., 0])
        frames = torch.where(observed, context[:, -FRAMES:, ..., 0].float(), torch.nan).cpu()
        members = self._members(frames, seeds.cpu())
        missing = ~observed[:, -1].cpu()[:, None, None]
        return members.masked_fill(missing, torch.nan)[..., None].to(context.device)

    @abstractmethod
    def _members(self, frames: Tensor, seeds: Tensor) -> Tensor:
        """Members (B, M, T_out, H, W) of frames (B, FRAMES, H, W), both in the archive's own units.

        What is missing is NaN.
        """

    def _flow(self, frames: Tensor) -> Tensor:
        """Motion (B, 2, H, W) in pixels a frame, by pysteps' Lucas-Kanade on the transformed frames."""
        pysteps = _pysteps()
        transformed = self.field.transform(frames.nan_to_num().double().numpy())
        with _silence():
            found = [pysteps.motion.get_method("LK")(one) for one in transformed]
        return torch.from_numpy(np.stack(found)).float()


class Extrapolation(_Moving):
    """The last frame, carried along the optical flow. Deterministic."""

    def _members(self, frames: Tensor, seeds: Tensor) -> Tensor:
        if seeds.shape[1] != 1:
            raise ValueError(f"{seeds.shape[1]} members asked of a deterministic forecaster: needed 1")
        return motion.advect(frames[:, -1].nan_to_num(), self._flow(frames), self.task.target)[:, None]


class Displaced(_Moving):
    """The last frame carried along the flow of `motion`, each member drifting off at a velocity of its own.

    Frame k of a member is shifted by k times one draw, Gaussian with a deviation of SPREAD pixels in x and
    in y: an error of the motion, which grows in proportion to lead time.
    """

    needs = ()

    def _flow(self, frames: Tensor) -> Tensor:
        seen = torch.isfinite(frames)
        scaled = self.task.scaling.encode(frames.nan_to_num())
        return motion.flow(scaled.masked_fill(~seen, torch.nan))

    def _members(self, frames: Tensor, seeds: Tensor) -> Tensor:
        paths = motion.trajectories(self._flow(frames), self.task.target)
        drift = np.array([[_generator(seed).normal(0, SPREAD, 2) for seed in row] for row in seeds.tolist()])
        last = frames[:, -1].nan_to_num()
        each = torch.from_numpy(drift).float().unbind(1)
        return torch.stack([motion.warp(last, motion.drifting(paths, one)) for one in each], 1)


class Steps(_Moving):
    """The STEPS ensemble (Bowler et al., 2006) as pysteps makes it, with its standard settings.

    pysteps draws an ensemble from one seed; here each member is an ensemble of one, from its own seed, so
    that it depends on no other. That costs about a tenth more time.

    As pysteps has it, every member is dry when either of the last two frames is, or has rain only at its
    very edge. Where the autoregression has no solution (frames that repeat each other, a field without
    contrast) every member is the extrapolation.
    """

    def _members(self, frames: Tensor, seeds: Tensor) -> Tensor:
        frames = frames.nan_to_num()
        flows = self._flow(frames)
        fallen_back = motion.advect(frames[:, -1], flows, self.task.target)
        windows = []
        for one, velocity, otherwise, row in zip(frames, flows, fallen_back, seeds.tolist(), strict=True):
            transformed = self.field.transform(one.double().numpy())
            found = [self._member(transformed, velocity.double().numpy(), seed) for seed in row]
            windows.append(torch.stack([otherwise if member is None else member for member in found]))
        return torch.stack(windows)

    def _member(self, frames: np.ndarray, velocity: np.ndarray, seed: int) -> Tensor | None:
        steps = _pysteps().nowcasts.get_method("steps")
        try:
            with _silence():
                member = steps(
                    frames,
                    velocity,
                    self.task.target,
                    n_ens_members=1,
                    n_cascade_levels=6,
                    precip_thr=self.field.floor,
                    kmperpixel=self.field.km_per_pixel,
                    timestep=self.task.step_minutes,
                    noise_method="nonparametric",
                    probmatching_method="cdf",
                    mask_method="incremental",
                    seed=int(_generator(seed).integers(2**32)),
                    extrap_kwargs={"map_coordinates_mode": "nearest"},
                )[0]
        except np.linalg.LinAlgError:
            return None
        except ValueError as error:
            # The minimum of what differs, where nothing does; any other would be our mistake.
            if "zero-size array" not in str(error):
                raise
            return None
        rain = torch.from_numpy(self.field.invert(member)).float()
        return rain if bool(torch.isfinite(rain).all()) else None


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed % 2**64)


def _pysteps() -> ModuleType:
    """pysteps, imported when first used: it takes seconds.

    Raises:
        InputError: it or OpenCV is damaged.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import cv2  # noqa: F401
            import pysteps
    except ImportError as error:
        raise InputError(
            f"pysteps or OpenCV cannot be imported: {error}; needed `pip install earthformer-ray[steps]`"
        ) from error
    return pysteps


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress on stdout, no warnings of divisions by zero on dry fields, no trace in the global state."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


ENSEMBLES = ("displaced", "steps")
"""Baselines whose members differ."""
BASELINES: dict[str, Callable[[Task], Forecaster]] = {
    "persistence": runs.persistence,
    "extrapolation": Extrapolation,
    "displaced": Displaced,
    "steps": Steps,
}
