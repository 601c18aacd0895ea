"""Optical flow and what is carried along it: known motions, pysteps' own scheme, and real radar."""

import contextlib
import io

import h5py
import numpy as np
import pytest
import torch

from earthformer import motion

SIZE = 96


def blobs(velocity, count=4, size=SIZE, inside=lambda y, x: True, seed=0):
    """A log-scaled field (count, size, size) that moves by `velocity` (x, y) a frame, last frame as drawn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    frames = np.zeros((count, size, size))
    for _ in range(size):
        cy, cx = rng.uniform(-20, size + 20, 2)
        width, height = rng.uniform(2, 6, 2)
        top = rng.uniform(0.5, 2)
        if not inside(cy, cx):
            continue
        for k in range(count):
            dx, dy = (v * (k - count + 1) for v in velocity)
            frames[k] += top * np.exp(-(((x - cx - dx) / width) ** 2) - ((y - cy - dy) / height) ** 2)
    return torch.from_numpy(frames).float()


def middle(field, margin=16):
    return field[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize("velocity", [(0.0, 0.0), (1.0, -2.0), (-0.4, 0.3), (5.5, 3.0), (-7.0, 0.0)])
def test_a_translation_is_recovered(velocity):
    found = motion.flow(blobs(velocity)[None])[0]
    assert found.shape == (2, SIZE, SIZE)
    for component, expected in zip(middle(found), velocity, strict=True):
        assert (component - expected).abs().mean() < 0.02 + 0.01 * abs(expected)


@pytest.mark.parametrize("shape", [(17, 40), (33, 200), (64, 50)])
def test_grids_of_any_shape(shape):
    frames = blobs((1.0, 0.5), size=200)[:, : shape[0], : shape[1]]
    found = motion.flow(frames[None])[0]
    assert found.shape == (2, *shape)
    assert found[0].mean() == pytest.approx(1.0, abs=0.3)
    assert found[1].mean() == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 1)])
def test_grids_too_small_to_see_motion_stand_still(shape):
    found = motion.flow(torch.rand(2, 3, *shape))
    assert found.shape == (2, 2, *shape)
    assert (found == 0).all()


def test_two_currents_are_told_apart():
    left = blobs((2.0, 0.0), size=192, inside=lambda y, x: x < 80)
    right = blobs((0.0, -2.0), size=192, inside=lambda y, x: x > 112, seed=1)
    found = motion.flow((left + right)[None])[0][:, 32:-32]
    torch.testing.assert_close(found[..., 16:56].mean((1, 2)), torch.tensor([2.0, 0.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(found[..., 136:176].mean((1, 2)), torch.tensor([0.0, -2.0]), atol=0.15, rtol=0)


def test_where_nothing_rains_the_motion_is_that_of_the_rain_around():
    frames = blobs((2.0, 1.0), size=320, inside=lambda y, x: y < 60 and x < 60)
    found = motion.flow(frames[None])[0]
    torch.testing.assert_close(found[:, -1, -1], torch.tensor([2.0, 1.0]), atol=0.2, rtol=0)


@pytest.mark.parametrize("value", [0.0, 3.0, torch.nan])
def test_without_structure_nothing_moves(value):
    assert (motion.flow(torch.full((2, 3, 40, 40), value)) == 0).all()


def test_what_is_missing_drags_on_nothing():
    frames = blobs((3.0, -1.0), size=128)
    frames[:, :, :48] = torch.nan
    frames[:, 60:63, 70:73] = torch.nan
    found = motion.flow(frames[None])[0]
    assert found.isfinite().all()
    seen = found[:, 16:-16, 64:-16].mean((1, 2))
    torch.testing.assert_close(seen, torch.tensor([3.0, -1.0]), atol=0.1, rtol=0)


def test_a_lost_last_frame_leaves_the_motion_before():
    frames = blobs((2.0, 1.0), count=4)
    frames[-1] = torch.nan
    found = middle(motion.flow(frames[None])[0]).mean((1, 2))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0]), atol=0.1, rtol=0)


def test_each_window_is_solved_by_itself():
    batch = torch.stack([blobs((1.0, 0.0)), blobs((-2.0, 3.0), seed=1), torch.zeros(4, SIZE, SIZE)])
    together = motion.flow(batch)
    for window, found in zip(batch, together, strict=True):
        torch.testing.assert_close(motion.flow(window[None])[0], found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(motion.flow(batch), together, atol=0, rtol=0)


def test_one_frame_has_no_motion():
    with pytest.raises(ValueError, match="1 frame in the context"):
        motion.flow(torch.zeros(1, 1, 32, 32))


def test_trajectories_follow_a_rotation():
    angle, steps = 0.05, 8
    y, x = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    paths = motion.trajectories(angle * torch.stack([-y, x])[None], steps)[0]
    for k in range(steps):
        turned = torch.tensor(-(k + 1) * angle)
        exact = torch.stack([x * turned.cos() - y * turned.sin(), x * turned.sin() + y * turned.cos()])
        # Nearer to the corners, paths come from beyond the border, where the motion is another.
        torch.testing.assert_close(
            middle(torch.stack([x, y]) + paths[k], 24), middle(exact, 24), atol=0.02, rtol=0
        )


def test_advection_is_that_of_pysteps():
    with contextlib.redirect_stdout(io.StringIO()):
        from pysteps.extrapolation.semilagrangian import extrapolate
    rng = np.random.default_rng(3)
    coarse = torch.from_numpy(rng.normal(1, 2, (2, 2, 4, 5))).float()
    velocity = torch.nn.functional.interpolate(coarse, (40, 56), mode="bilinear")
    frame = torch.from_numpy(rng.gamma(0.5, 2, (2, 40, 56))).float()
    ours = motion.advect(frame, velocity, 6)
    for window in range(2):
        theirs = extrapolate(
            frame[window].numpy(), velocity[window].double().numpy(), 6, map_coordinates_mode="nearest"
        )
        np.testing.assert_allclose(ours[window], theirs, atol=2e-3)


def test_channels_are_carried_alike_and_what_flows_in_is_the_border():
    frame = torch.arange(5.0).expand(1, 4, 5)
    velocity = torch.zeros(1, 2, 4, 5)
    velocity[:, 0] = 2
    moved = motion.advect(torch.stack([frame, 10 * frame], -1), velocity, 2)
    assert moved.shape == (1, 2, 4, 5, 2)
    expected = torch.tensor([[0.0, 0, 0, 1, 2], [0, 0, 0, 0, 0]])[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(moved[0, ..., 0], expected)
    torch.testing.assert_close(moved[0, ..., 1], 10 * expected)
    torch.testing.assert_close(motion.advect(frame, velocity, 2)[0], expected)


@pytest.mark.real_data
def test_on_real_radar_the_extrapolation_is_as_good_as_that_of_pysteps(real_data):
    with contextlib.redirect_stdout(io.StringIO()):
        from pysteps.motion.lucaskanade import dense_lucaskanade
    errors = []
    for name in ("knmi_20100826", "mch_20150515", "mch_20170131", "fmi_20160928"):
        with h5py.File(real_data / "radar" / f"{name}.h5") as file:
            y, x = (int(n) + 64 for n in file.attrs["window384_row_col"])
            counts = file["rate"][:40, y : y + 256, x : x + 256]
        rates = torch.from_numpy(np.where(counts == 65535, 0, counts) * 0.01).float()
        for start in (0, 12, 24):
            context, target = rates[start : start + 3], rates[start + 3 : start + 15]
            decibels = 10 * torch.log10(context.clamp(min=0.1)) - 5 * (context < 0.1)
            theirs = torch.from_numpy(dense_lucaskanade(decibels.double().numpy())).float()
            ours = motion.flow(torch.log1p(context / 0.1)[None])[0]
            forecasts = [context[-1:], *(motion.advect(context[-1:], v[None], 12)[0] for v in (theirs, ours))]
            errors.append([float((forecast - target).abs().mean()) for forecast in forecasts])
    persistence, theirs, ours = np.mean(errors, 0)
    assert ours < 0.9 * persistence
    assert ours < 1.01 * theirs
