"""What samplers draw: the distribution itself, by the seeds alone, guided or not."""

import itertools
import math

import pytest
import torch
from tiny_diffusion import (
    COVARIANCE,
    MEAN,
    PUBLISHED,
    ROOT,
    assert_matches,
    beside,
    drawn,
    frames_of,
    gaussian,
)
from torch import Tensor

from earthformer.config import Attention
from earthformer.denoiser import Denoiser
from earthformer.diffusion import Diffusion, Samples
from earthformer.prediff_config import DenoiserConfig, DiffusionConfig
from earthformer.samplers import SAMPLERS, member_noise

# ------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("length", [2, 7, 20, 1000])
def test_any_number_of_steps_keeps_so_many_timesteps_and_the_noisiest(length):
    diffusion = Diffusion(DiffusionConfig(timesteps=length))
    for steps in {1, 2, 3, 6, 7, 13, 20, 333, 640, 999, 1000}:
        if steps > length:
            continue
        kept = diffusion.stepper("ddim", steps).timesteps
        assert len(kept) == steps
        assert kept[0] == length - 1
        assert kept[-1] >= 0
        assert all(later < earlier for earlier, later in itertools.pairwise(kept))
    assert diffusion.stepper("ddpm", length).timesteps == tuple(reversed(range(length)))


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 400])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_last_step_ends_in_the_clean_latents_then_predicted(sampler, steps):
    seen = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append((t.clone(), (made := torch.tanh(z))))
        assert t.dtype == torch.int64
        assert not torch.is_grad_enabled()
        return made

    diffusion = Diffusion(DiffusionConfig(prediction="sample"))
    found = drawn([1, 2], sampler, steps, diffusion=diffusion, denoise=denoise)
    assert len(seen) == steps
    assert all(t.tolist() == [t[0]] * 2 for t, _ in seen)
    torch.testing.assert_close(found.latents, seen[-1][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "velocity"])
@pytest.mark.parametrize(
    ("sampler", "steps", "within"),
    [
        ("ddpm", 50, 0.25),
        ("ddpm", 1000, 0.05),
        ("ddim", 50, 0.15),
        ("ddim", 1000, 0.05),
        ("dpm++", 20, 0.05),
        ("dpm++", 1000, 0.05),
        ("unipc", 20, 0.05),
        ("unipc", 1000, 0.05),
    ],
)
def test_normal_latents_come_out_with_their_mean_and_covariance(sampler, steps, within, prediction, schedule):
    diffusion = Diffusion(DiffusionConfig(prediction=prediction, schedule=schedule))
    assert_normal(frames_of(sampler, steps, diffusion), within)


@pytest.mark.parametrize("variance", [0.3, 1.0])
def test_larger_variances_of_ddpm_still_sample_the_target(variance):
    assert_normal(frames_of("ddpm", 1000, Diffusion(DiffusionConfig(variance=variance))), 0.05)


def assert_normal(frames: Tensor, within: float) -> None:
    """MEAN, and COVARIANCE in units of itself but for a fraction `within`, up to four standard errors."""
    error = 4 * math.sqrt(float(COVARIANCE.max()) / len(frames))
    torch.testing.assert_close(frames.mean(0), MEAN.double(), rtol=0, atol=error)
    whiten = torch.linalg.inv(ROOT.double())
    covariance = whiten @ frames.T.cov() @ whiten.T
    error = within + 4 * math.sqrt(2 / len(frames))
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=error)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 200), ("ddim", 50), ("dpm++", 20), ("unipc", 20)])
def test_two_kinds_of_future_come_out_as_often_as_they_are(sampler, steps):
    # One value, -1 ± 0.15 in seven cases of ten and 1.5 ± 0.3 in three, with its exact denoiser.
    weights, centres, spreads = torch.tensor([[0.7, 0.3], [-1, 1.5], [0.15, 0.3]])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        bar = PUBLISHED.alphas_cumprod[t][:, None]
        variance = bar * spreads**2 + 1 - bar
        off = z.reshape(-1, 1) - bar.sqrt() * centres
        shares = torch.softmax(weights.log() - off**2 / variance / 2 - variance.log() / 2, 1)
        clean = (shares * (centres + bar.sqrt() * spreads**2 / variance * off)).sum(1, keepdim=True)
        return ((z.reshape(-1, 1) - bar.sqrt() * clean) / (1 - bar).sqrt()).reshape(z.shape)

    made = PUBLISHED.sample(denoise, (1, 1, 1, 1), torch.arange(4000), sampler, steps).latents.flatten()
    low, high = made[made < 0.2], made[made >= 0.2]
    assert len(high) / 4000 == pytest.approx(0.3, abs=0.04)
    assert float(low.mean()) == pytest.approx(-1, abs=0.03)
    assert float(high.mean()) == pytest.approx(1.5, abs=0.05)
    assert float(low.std()) == pytest.approx(0.15, rel=0.15)
    assert float(high.std()) == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_more_steps_come_closer_to_where_the_noise_leads(sampler):
    exact = drawn(range(8), sampler, 1000).latents
    errors = [float((drawn(range(8), sampler, steps).latents - exact).abs().mean()) for steps in (5, 20, 80)]
    assert errors[2] < errors[1] / 2 < errors[0] / 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clamped_clean_latents_end_within_one(sampler):
    clipped = Diffusion(DiffusionConfig(clip=True))
    found = drawn(range(50), sampler, 20, diffusion=clipped).latents
    assert float(found.abs().max()) <= 1
    assert float(drawn(range(50), sampler, 20).latents.abs().max()) > 1.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_stay_float32_whatever_precision_the_denoiser_runs_in(sampler):
    exact = gaussian(PUBLISHED)

    def coarse(z: Tensor, t: Tensor) -> Tensor:
        assert z.dtype == torch.float32
        return exact(z, t).bfloat16()

    found = drawn(range(4), sampler, denoise=coarse).latents
    assert found.dtype == torch.float32
    plain = drawn(range(4), sampler).latents
    torch.testing.assert_close(found, plain, rtol=0, atol=0.05)
    # A caller's autocast is for its networks: the sampler's own sums do not take part in it.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drawn(range(4), sampler).latents, plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_but_scalars_and_the_drawing_happens_on_the_device_of_the_schedule(sampler):
    # `meta` computes nothing, and refuses tensors of other devices as an accelerator does.
    found = drawn([1, 2], sampler, diffusion=Diffusion(DiffusionConfig()).to("meta"), denoise=lambda z, t: -z)
    assert found.latents.device.type == found.diverged.device.type == "meta"


# ------------------------------------------------------------------------- seeds


@pytest.fixture(scope="module")
def network():
    """A denoiser that is not trivial in any layer, with its context: (z, t) -> noise."""
    torch.manual_seed(0)
    config = DenoiserConfig(
        context=(2, 4, 4, 2),
        target=(2, 4, 4, 2),
        widths=(64,),
        depth=(1,),
        attention=Attention(heads=2),
    )
    model = Denoiser(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    context = torch.randn(1, 2, 4, 4, 2)
    return lambda z, t: model(z, t, context.expand(len(z), *context.shape[1:]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_member_is_the_same_to_the_bit_in_any_place_and_company(network, sampler):
    shape = (2, 4, 4, 2)

    def members(*seeds: int) -> Tensor:
        return PUBLISHED.sample(network, shape, torch.tensor(seeds), sampler, 6).latents

    first = members(11, 12, 13, 14)
    assert torch.isfinite(first).all()
    assert torch.equal(first, members(11, 12, 13, 14))
    assert torch.equal(first.flip(0), members(14, 13, 12, 11))
    assert torch.equal(first[1], members(7, 8, 9, 12)[3])
    assert_matches(members(13), first[2:3], 1e-5)
    assert_matches(members(*range(8, 18))[3:7], first, 1e-5)
    assert len({member.numpy().tobytes() for member in first}) == 4


def test_noise_is_the_seeds_alone():
    state = torch.get_rng_state()
    first, second = (
        next(member_noise((2, 3, 3, 2), torch.tensor([5, 6]), torch.device("cpu"))) for _ in "ab"
    )
    assert torch.equal(first, second)
    torch.manual_seed(1)
    noises = member_noise((2, 3, 3, 2), torch.tensor([6]), torch.device("cpu"))
    assert torch.equal(next(noises)[0], first[1])
    assert not torch.equal(next(noises)[0], first[1])
    torch.set_rng_state(state)
    drawn([3], "ddpm")
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_that_share_their_low_bits_are_other_members():
    # A generator of torch keeps 32 of a seed's 64 bits.
    seeds = torch.tensor([7, 7 + 2**32, 7 + 2**47, -7, 2**63 - 1])
    noise = next(member_noise((4, 8, 8, 4), seeds, torch.device("cpu"))).flatten(1)
    alike = torch.corrcoef(noise) - torch.eye(len(seeds))
    assert float(alike.abs().max()) < 0.15


def test_noise_is_standard_normal():
    noise = next(member_noise((4, 16, 16, 8), torch.arange(64), torch.device("cpu")))
    assert float(noise.mean()) == pytest.approx(0, abs=0.006)
    assert float(noise.std()) == pytest.approx(1, abs=0.005)
    between = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert float(between.abs().max()) < 0.07


def test_all_samplers_and_step_counts_start_a_member_from_the_same_noise():
    starts = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        starts.append(z.clone())
        return torch.zeros_like(z)

    for sampler in SAMPLERS:
        for steps in (1, 3):
            before = len(starts)
            drawn([21], sampler, steps, denoise=denoise)
            assert torch.equal(starts[before], starts[0])


# ------------------------------------------------------------------------- guidance


def pull(scale: float, wanted: Tensor):
    """The guide that pulls the means of standard normal latents to those wanted (N,)."""

    def guide(z: Tensor, t: Tensor) -> Tensor:
        # Clean latents are expected at √ᾱ z.
        share = PUBLISHED.sqrt_alphas_cumprod[t]
        side = torch.sign(share * z.flatten(1).mean(1) - wanted)
        return beside(scale * side * share / z[0].numel(), z).expand_as(z)

    return guide


def standard(z: Tensor, t: Tensor) -> Tensor:
    """The exact denoiser of standard normal latents."""
    return beside(PUBLISHED.sqrt_one_minus_alphas_cumprod[t], z) * z


def guided(sampler: str, steps: int, scale: float, wanted: Tensor) -> Samples:
    seeds = torch.arange(len(wanted))
    return PUBLISHED.sample(standard, (2, 4, 4, 2), seeds, sampler, steps, guide=pull(scale, wanted))


def test_a_scale_moves_the_functional_alike_for_all_samplers_and_step_counts():
    wanted = torch.cat([torch.full((32,), 9.0), torch.full((32,), -9.0)])
    shifts = {}
    for sampler, steps in [(s, n) for s in SAMPLERS for n in (10, 20, 100)] + [("ddpm", 1000)]:
        means = guided(sampler, steps, 5.0, wanted).latents.flatten(1).mean(1)
        plain = guided(sampler, steps, 0.0, wanted).latents.flatten(1).mean(1)
        moved = (means - plain) * wanted.sign()
        assert float(moved.min()) > 0
        shifts[sampler, steps] = float(moved.mean())
    published = shifts["ddpm", 1000]
    assert all(0.7 < shift / published < 1.1 for shift in shifts.values()), shifts


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strong_guidance_ends_at_what_each_member_was_asked_for(sampler):
    wanted = torch.tensor([-1.0, -0.3, 0.0, 0.4, 2.0])
    found = guided(sampler, 50, 50.0, wanted)
    assert not found.diverged.any()
    torch.testing.assert_close(found.latents.flatten(1).mean(1), wanted, rtol=0, atol=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_of_a_member_leaves_the_others_as_they_are(sampler):
    def guide_first(z: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(z[:1]), torch.zeros_like(z[1:])])

    plain = drawn([1, 2, 3], sampler).latents
    found = drawn([1, 2, 3], sampler, guide=guide_first).latents
    assert torch.equal(found[1:], plain[1:])
    assert not torch.allclose(found[0], plain[0], atol=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, 1e6, 1e30])
@pytest.mark.parametrize("when", [999, 300])
def test_member_whose_guidance_diverges_is_marked_and_the_others_are_as_they_were(sampler, fault, when):
    def guide(z: Tensor, t: Tensor) -> Tensor:
        pushed = torch.zeros_like(z)
        if t[0] <= when:
            pushed[1, 0, 0, 0] = fault
        assert torch.isfinite(z).all()
        return pushed

    plain = drawn([1, 2, 3], sampler, 20)
    found = drawn([1, 2, 3], sampler, 20, guide=guide)
    assert found.diverged.tolist() == [False, True, False]
    assert torch.isnan(found.latents[1]).all()
    assert torch.equal(found.latents[[0, 2]], plain.latents[[0, 2]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_member_that_the_denoiser_makes_nan_at_the_last_step_is_marked(sampler):
    exact, calls = gaussian(PUBLISHED), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        made = exact(z, t)
        if len(calls) == 10:
            made[0, 0, 0, 0, 0] = math.nan
        return made

    found = drawn([1, 2], sampler, denoise=denoise)
    assert found.diverged.tolist() == [True, False]
    assert torch.isnan(found.latents[0]).all()
    assert torch.isfinite(found.latents[1]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_untrained_denoiser_does_not_count_as_diverged(sampler, schedule):
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    found = drawn(range(20), sampler, 10, diffusion=diffusion, denoise=lambda z, t: torch.zeros_like(z))
    assert not found.diverged.any()


def test_limit_of_the_latents_can_be_set():
    wanted = torch.tensor([0.0, 9.0])
    loose = PUBLISHED.sample(standard, (2, 4, 4, 2), torch.arange(2), "ddim", 50, guide=pull(80.0, wanted))
    assert not loose.diverged.any()
    tight = PUBLISHED.sample(
        standard, (2, 4, 4, 2), torch.arange(2), "ddim", 50, guide=pull(80.0, wanted), limit=8.0
    )
    assert tight.diverged.tolist() == [False, True]
