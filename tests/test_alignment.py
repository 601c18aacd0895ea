"""Knowledge alignment: the network against the original's numbers, guidance, and the Gaussian's training."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from reference_prediff import reference_alignment, weights_of

from earthformer.alignment import AlignmentNetwork, GaussianFunctional, functional, guidance
from earthformer.checkpoints import load_weights
from earthformer.prediff_config import AlignmentConfig, Functional
from earthformer.presets import ALIGNMENTS

TOLERANCE = 2e-5
SMALL = dataclasses.replace(ALIGNMENTS["prediff_sevir_lr_tiny"], target=(3, 6, 5, 4), depth=(1, 2))


def near(found, needed):
    np.testing.assert_allclose(found, needed, rtol=0, atol=TOLERANCE * abs(needed).max())


def from_fixture(parity, name):
    """The original's numbers, and our network with its weights.

    `align_b_outlen_global` is not among them: its network reads only the last frames of its input and
    pools global vectors tiled in another order than the tokens, a bug wherever a batch holds more than one.
    """
    numbers = np.load(parity / "prediff" / f"{name}.npz")
    network = AlignmentNetwork(reference_alignment(json.loads(str(numbers["config"])))).eval()
    load_weights(network, weights_of(numbers))
    return numbers, network, torch.from_numpy(numbers["in/zt"]), torch.from_numpy(numbers["in/t"])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    network = AlignmentNetwork(SMALL).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return network, torch.randn(3, *SMALL.target), torch.tensor([3, 500, 999])


@pytest.mark.parametrize("name", ["align_a", "align_c_noseq"])
def test_what_is_read_off_matches_the_original(parity, name):
    numbers, network, z, t = from_fixture(parity, name)
    with torch.no_grad():
        near(network(z, t), numbers["out/pred"])


def test_guidance_is_what_the_original_gives_each_sample_alone(parity):
    numbers, network, z, t = from_fixture(parity, "align_a")
    requested = torch.from_numpy(numbers["in/avg_x_gt"])[:, 0]
    gradient = 50 * guidance(network, z, t, requested)[0]
    for i in range(2):
        near(gradient[i : i + 1], numbers[f"out/shift_single{i}"])


def test_the_batch_norm_of_the_original_follows_from_ours(parity):
    # There |U - requested| is one norm over the batch, so that a sample's guidance shrinks as others err.
    numbers, network, z, t = from_fixture(parity, "align_a")
    requested = torch.from_numpy(numbers["in/avg_x_gt"])[:, 0]
    with torch.no_grad():
        deviation = network(z, t).mean((1, 2)) - requested
    assert deviation.norm().item() == pytest.approx(numbers["out/U_batch2"].item(), rel=TOLERANCE)
    share = (deviation.abs() / deviation.norm())[:, None, None, None, None]
    near(share * 50 * guidance(network, z, t, requested)[0], numbers["out/shift_batch2"])


def test_the_mean_matches_the_original(parity):
    numbers = np.load(parity / "prediff" / "align_a.npz")
    pixels = torch.from_numpy(numbers["in/x_pixels"])
    near(functional(pixels, Functional("mean")), numbers["out/objective_of_x_pixels"])


def test_functionals_of_a_frame():
    frames = torch.zeros(2, 3, 4, 5, 1)
    frames[1, 2, :2, :, 0] = 0.5
    frames[1, 2, 0, 0, 0] = 0.9
    for kind, threshold, needed in (
        ("mean", 0.0, (9 * 0.5 + 0.9) / 20),
        ("area", 0.5, 0.5),
        ("area", 0.51, 0.05),
        ("maximum", 0.0, 0.9),
    ):
        found = functional(frames, Functional(kind, threshold))
        assert found.shape == (2, 3, 1)
        assert found[1, 2, 0].item() == pytest.approx(needed)
        assert not found[0].any()


def test_a_sample_is_the_same_whatever_its_batch(small):
    network, z, t = small
    requested = torch.tensor([-1.0, 5.0, 0.2])
    with torch.no_grad():
        together = network(z, t)
        near(together, torch.cat([network(z[i : i + 1], t[i : i + 1]) for i in range(3)]))
    gradient, gap = guidance(network, z, t, requested)
    alone = [guidance(network, *(x[i : i + 1] for x in (z, t, requested))) for i in range(3)]
    near(gradient, torch.cat([each for each, _ in alone]))
    near(gap, torch.cat([each for _, each in alone]))
    near(gap, (together.mean((1, 2)) - requested).abs())
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_guidance_is_a_gradient_of_the_deviation(small):
    network, z, t = small
    network = AlignmentNetwork(SMALL).eval().double()
    network.load_state_dict(small[0].state_dict())
    z, requested = z.double(), torch.tensor([-1.0, 5.0, 0.2], dtype=torch.float64)
    gradient, _ = guidance(network, z, t, requested)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def deviation(step):
        with torch.no_grad():
            return (network(z + step * direction, t).mean((1, 2)) - requested).abs()

    slope = (deviation(1e-5) - deviation(-1e-5)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3, 4)), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_guidance_works_where_gradients_are_switched_off(small, switched_off):
    network, z, t = small
    requested = torch.zeros(3)
    needed, _ = guidance(network, z, t, requested)
    with switched_off():
        found, _ = guidance(network, z * 1, t * 1, requested * 1)
        assert not found.requires_grad
    assert torch.equal(found, needed)
    # Nothing that was made there is in the way later, and no weight has gathered a gradient.
    assert torch.equal(guidance(network, z, t, requested)[0], needed)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("per_frame", [True, False])
def test_gradients_reach_every_parameter(per_frame):
    config = dataclasses.replace(SMALL, per_frame=per_frame, out_channels=2)
    torch.manual_seed(0)
    network = AlignmentNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    read = network(torch.randn(2, *config.target), torch.tensor([1, 2]))
    assert read.shape == ((2, 3, 2) if per_frame else (2, 2))
    read.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bfloat16_stays_near(small):
    network, z, t = small
    with torch.inference_mode():
        exact = network(z, t)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(z, t)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_every_misshapen_argument_is_named(small):
    network, z, t = small
    for call, message in (
        (lambda: network(z[..., :3], t), r"z has shape \(3, 3, 6, 5, 3\): needed \(B, 3, 6, 5, 4\)"),
        (lambda: network(z, t[:2]), r"t has shape \(2,\): needed \(3\)"),
        (lambda: guidance(network, z, t, torch.zeros(3, 1)), r"requested has shape \(3, 1\): needed \(3\)"),
        (lambda: GaussianFunctional(7)(torch.zeros(2, 6)), r"context_values has .* needed \(B, 7\)"),
        (lambda: GaussianFunctional(7).loss(torch.zeros(2, 7), t), r"target has shape \(3,\): needed \(2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_widths_at_which_no_step_is_felt_are_refused():
    with pytest.raises(ValueError, match=r"widths is .*: needed a multiple of 32 above 32"):
        AlignmentConfig(target=(3, 6, 5, 4), widths=(32, 32))
    with pytest.raises(ValueError, match="last width is 48: needed a multiple of its 32 groups"):
        AlignmentConfig(target=(3, 6, 5, 4), widths=(64, 48))


def storms(count, seed, size=1.0, base=0.0):
    """Context values (B, 7) of a level that grows or decays by chance, and the mean of what follows."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.05 + 0.1 * torch.rand(count, 1, generator=generator)
    growth = 0.1 * torch.randn(count, 1, generator=generator)
    values = level * torch.exp(growth * torch.arange(7))
    noise = torch.randn(count, generator=generator)
    future = level[:, 0] * torch.exp(9.5 * growth[:, 0]) + 0.02 * noise
    return base + size * values, base + size * future


@pytest.mark.parametrize(("size", "base"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 0.7)])
def test_the_gaussian_learns_mean_and_spread_in_few_steps_whatever_the_scale(size, base):
    torch.manual_seed(0)
    model = GaussianFunctional(7)
    model.calibrate(storms(64, 0, size, base)[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(300):
        optimizer.zero_grad()
        model.loss(*storms(64, step, size, base)).backward()
        optimizer.step()
    model.eval()
    values, future = storms(2000, 10_000, size, base)
    with torch.no_grad():
        mu, log_sigma = model(values)
        z = (future - mu) / log_sigma.exp()
        known = 0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.02 * size)  # The noise's own likelihood.
        assert model.loss(values, future).item() < known + 0.15
    assert abs(z.mean().item()) < 0.2
    assert z.std().item() == pytest.approx(1, abs=0.15)
    assert (model.level(values, 0) - mu).abs().max() == 0
    torch.testing.assert_close(model.level(values, -4.0), mu - 4 * log_sigma.exp())
    per_sample = torch.linspace(-4, 4, 2000)
    torch.testing.assert_close(model.level(values, per_sample), mu + per_sample * log_sigma.exp())


def test_an_untrained_gaussian_expects_the_last_value():
    values = torch.rand(4, 7)
    assert torch.equal(GaussianFunctional(7)(values)[0], values[:, -1])


def test_the_gaussian_normalises_by_what_it_was_calibrated_with_and_training_leaves_that():
    model, seen = GaussianFunctional(7), storms(9, 1)[0]
    model.calibrate(seen)
    model.loss(torch.full((2, 7), 9.0), torch.zeros(2))
    torch.testing.assert_close(model.mean, seen.double().mean())
    torch.testing.assert_close(model.spread, seen.double().std(correction=0))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_gaussian_of_values_that_never_change_stays_finite(value):
    torch.manual_seed(0)
    model = GaussianFunctional(7)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values, future = torch.full((8, 7), value), torch.full((8,), value)
    model.calibrate(values)
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.loss(values, future)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert torch.allclose(model.level(values, 4.0), future, atol=1e-3)
