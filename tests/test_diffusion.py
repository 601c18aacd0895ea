"""Diffusion against published numbers and closed forms; and what each sampler, seed and guide promises."""

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from reference_prediff import reference_alignment, reference_denoiser, weights_of
from torch import Tensor, nn

from earthformer.alignment import AlignmentNetwork
from earthformer.autoencoder import Autoencoder
from earthformer.checkpoints import load_weights
from earthformer.config import Attention
from earthformer.denoiser import Denoiser
from earthformer.diffusion import Diffusion, Ema, Samples
from earthformer.prediff_config import AutoencoderConfig, DenoiserConfig, DiffusionConfig
from earthformer.samplers import SAMPLERS, Stepper, member_noise

TOLERANCE = 2e-5
SCHEDULES = {
    "linear1000": DiffusionConfig(),
    "linear20": DiffusionConfig(timesteps=20),
    "linear1000_v0.3": DiffusionConfig(variance=0.3),
    "x0_linear1000": DiffusionConfig(prediction="sample"),
    "cosine1000": DiffusionConfig(schedule="cosine"),
    "sqrt_linear1000": DiffusionConfig(schedule="sqrt_linear"),
    "sqrt50": DiffusionConfig(schedule="sqrt", timesteps=50),
}
PUBLISHED = Diffusion(DiffusionConfig())
SHAPE = (1, 2, 2, 1)
MEAN = torch.tensor([0.5, -0.3, 0.2, 0.1])
ROOT = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.7, 0, 0], [-0.2, 0.3, 0.5, 0], [0.1, 0.1, -0.1, 0.2]])
COVARIANCE = ROOT @ ROOT.T


def assert_matches(found, expected, tolerance=TOLERANCE):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def beside(values: Tensor, z: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (z.ndim - 1))


def gaussian(diffusion: Diffusion):
    """The exact denoiser of latents whose frames are each normal with MEAN and COVARIANCE."""
    spread, axes = torch.linalg.eigh(COVARIANCE.double())

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        bar = diffusion.alphas_cumprod[t].double()[:, None, None]
        frames = z.flatten(2).double()
        along = (frames - bar.sqrt() * MEAN) @ axes
        made = bar.sqrt() * spread / (bar * spread + 1 - bar) * along @ axes.T + MEAN
        noise = (frames - bar.sqrt() * made) / (1 - bar).sqrt()
        if diffusion.config.prediction == "epsilon":
            made = noise
        elif diffusion.config.prediction == "velocity":
            made = bar.sqrt() * noise - (1 - bar).sqrt() * made
        return made.reshape(z.shape).float()

    return denoise


def drawn(seeds, sampler="dpm++", steps=10, *, diffusion=PUBLISHED, denoise=None, **options) -> Samples:
    seeds = torch.as_tensor(seeds, dtype=torch.int64)
    return diffusion.sample(denoise or gaussian(diffusion), SHAPE, seeds, sampler, steps, **options)


def frames_of(sampler: str, steps: int, diffusion: Diffusion) -> Tensor:
    """4000 frames (4000, 4), float64, of 20 members of normal latents."""
    denoise, seeds = gaussian(diffusion), torch.arange(20)
    members = diffusion.sample(denoise, (200, 2, 2, 1), seeds, sampler, steps).latents
    return members.reshape(4000, 4).double()


def given(*noises: Tensor) -> Iterator[Tensor]:
    return iter(noises)


# ------------------------------------------------------------------------- the published numbers


@pytest.mark.parametrize("name", SCHEDULES)
def test_buffers_are_the_published_ones(parity, name):
    numbers = np.load(parity / "prediff" / "schedules.npz")
    diffusion = Diffusion(SCHEDULES[name])
    buffers = dict(diffusion.named_buffers())
    # Ours beside theirs: how far a guide moves ẑ0, for which see the single steps.
    del buffers["guidance_coef"]
    for key, values in buffers.items():
        expected = numbers[f"{name}/{key}"]
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values, expected, rtol=2e-7, err_msg=key)
    assert not diffusion.state_dict()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_noise_of_skipping_steps_is_that_of_the_published_ddim_helper(parity, sampler):
    # Of the helpers only these have a counterpart: there is no published DDIM sampler, our timesteps are
    # spaced in another way, and the helper's quadratic ones take some twice.
    numbers = np.load(parity / "prediff" / "schedules.npz")
    kept = [0, *numbers["ddim_uniform50/timesteps"].tolist()]
    stepper = Stepper(sampler, kept, torch.from_numpy(numbers["linear1000/betas_f64"]), 0.0)
    zero, one = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    found = [float(stepper.update(step, zero, zero, one)) for step in range(50)]
    eta = {"ddpm": 1.0, "ddim": 0.0}[sampler]
    np.testing.assert_allclose(found[::-1], numbers[f"ddim_uniform50/sigmas_eta{eta}"], rtol=1e-6)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("eps", DiffusionConfig()),
        ("eps_clip", DiffusionConfig(clip=True)),
        ("x0", DiffusionConfig(prediction="sample")),
        ("eps_v0.5", DiffusionConfig(variance=0.5)),
    ],
)
def test_single_steps(parity, name, config, t):
    numbers = np.load(parity / "prediff" / "single_steps_T1000.npz")
    diffusion = Diffusion(config)
    z, noise = (torch.from_numpy(numbers[f"in/{key}"]) for key in ("zt", "noise"))
    predicted = torch.from_numpy(numbers[f"out/eps_t{t}/model_out"])
    gradient = torch.from_numpy(numbers[f"out/{name}_t{t}/align_grad_x50"])
    times = torch.full((2,), t)
    plain = diffusion.clean(lambda z, t: predicted, z, times)
    guided = diffusion.clean(lambda z, t: predicted, z, times, lambda z, t: gradient)
    stepper, step = diffusion.stepper("ddpm", 1000), 999 - t
    found = {
        "z0": plain,
        "mean": stepper.update(step, z, plain),
        "next": stepper.update(step, z, plain, noise),
        "next_aligned": stepper.update(step, z, guided, noise),
        "var": diffusion.posterior_variance[times].reshape(2, 1, 1, 1, 1),
        "logvar": diffusion.posterior_log_variance_clipped[times].reshape(2, 1, 1, 1, 1),
    }
    for key, values in found.items():
        assert_matches(values, numbers[f"out/{name}_t{t}/{key}"], 2e-6)


def test_training_loss(parity):
    numbers = np.load(parity / "prediff" / "train_loss_T1000.npz")
    z0, t, noise, logvar, context = (
        torch.from_numpy(numbers[f"in/{key}"]) for key in ("z0", "t", "noise", "logvar", "zc")
    )
    diffusion = Diffusion(DiffusionConfig(elbo_weight=0.1))
    noisy = diffusion.q_sample(z0, t, noise)
    assert_matches(noisy, numbers["out/zt"], 1e-6)
    denoiser = published_denoiser(numbers)
    with torch.no_grad():
        terms = diffusion.loss_terms(denoiser(noisy, t, context), z0, noise, t, logvar)
    for key in ("simple", "gamma", "vlb"):
        values = getattr(terms, key)
        assert values.shape == (2,)
        assert_matches(values.mean(), numbers[f"out/loss_{key}"])
    assert_matches(terms.total.mean(), numbers["out/loss"])


def published_denoiser(numbers) -> Denoiser:
    kwargs = json.loads(str(numbers["config"]))["unet"]
    unsaid = {
        "global_dim_ratio": 1,
        "separate_global_qkv": False,
        "use_global_self_attn": False,
        "use_global_vector_ffn": True,
        "unet_res_connect": True,
        "gated_ffn": False,
        "use_relative_pos": True,
        "self_attn_use_final_proj": True,
        "pos_embed_type": "t+h+w",
        "time_embed_use_scale_shift_norm": False,
        "time_embed_channels_mult": 4,
    }
    denoiser = Denoiser(reference_denoiser(unsaid | kwargs)).eval()
    load_weights(denoiser, weights_of(numbers, "sd_unet/"))
    return denoiser


def published_alignment(numbers) -> AlignmentNetwork:
    network = AlignmentNetwork(reference_alignment(json.loads(str(numbers["config"]))["align"])).eval()
    load_weights(network, weights_of(numbers, "sd_align/"))
    return network


def published_autoencoder(numbers) -> Autoencoder:
    kwargs = json.loads(str(numbers["config"]))["vae"]
    config = AutoencoderConfig(
        frame=(8, 8, 1),
        widths=tuple(kwargs["block_out_channels"]),
        layers=kwargs["layers_per_block"],
        latent_channels=kwargs["latent_channels"],
        groups=kwargs["norm_num_groups"],
    )
    autoencoder = Autoencoder(config).eval()
    load_weights(autoencoder, weights_of(numbers, "sd_vae/"))
    return autoencoder


@pytest.mark.parametrize("name", ["plain", "aligned"])
def test_published_sampler_from_pixels_to_pixels(parity, name):
    numbers = np.load(parity / "prediff" / "sampling_T20.npz")
    autoencoder, denoiser = published_autoencoder(numbers), published_denoiser(numbers)
    alignment, wanted = published_alignment(numbers), torch.from_numpy(numbers["in/avg_x_gt"])
    with torch.no_grad():
        context = autoencoder.encode(torch.from_numpy(numbers["in/y_pixels"]))[0]
    assert_matches(context, numbers["out/zc"])

    def guide(z: Tensor, t: Tensor) -> Tensor:
        # As published, one norm over the whole batch, which ours has for each member.
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            error = torch.linalg.vector_norm(alignment(z, t).mean(1) - wanted)
            return 50 * torch.autograd.grad(error, z)[0]

    noises = torch.from_numpy(np.concatenate([numbers["in/x_T"][None], numbers["in/noise_by_draw"]]))
    states = Diffusion(DiffusionConfig(timesteps=20)).states(
        lambda z, t: denoiser(z, t, context),
        given(*noises),
        "ddpm",
        20,
        guide=guide if name == "aligned" else None,
    )
    trajectory = torch.stack([samples.latents for samples in states])
    assert_matches(trajectory, numbers[f"out/{name}_trajectory"])
    assert_matches(trajectory[-1], numbers[f"out/{name}_z0"])
    with torch.no_grad():
        assert_matches(autoencoder.decode(trajectory[-1]), numbers[f"out/{name}_decoded"])


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


# ------------------------------------------------------------------------- training


def test_loss_of_each_sample_is_its_own():
    diffusion = Diffusion(DiffusionConfig(prediction="sample", simple_weight=2.0, elbo_weight=0.5))
    z0, noise, predicted = torch.randn(3, 4, 2, 3, 3, 1, generator=torch.Generator().manual_seed(0))[:, :4]
    t = torch.tensor([0, 1, 500, 999])
    terms = diffusion.loss_terms(predicted, z0, noise, t)
    torch.testing.assert_close(terms.simple, (predicted - z0).square().mean((1, 2, 3, 4)))
    assert torch.equal(terms.gamma, terms.simple)
    torch.testing.assert_close(terms.total, 2 * terms.simple + 0.5 * terms.vlb)
    alone = diffusion.loss_terms(predicted[2:3], z0[2:3], noise[2:3], t[2:3])
    torch.testing.assert_close(alone.total, terms.total[2:3])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "velocity"])
def test_the_target_of_each_prediction_gives_the_clean_latents_back(prediction):
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    z0, noise = torch.randn(2, 3, 2, 3, 3, 1, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 300, 900])
    z = diffusion.q_sample(z0, t, noise)
    bar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": z0,
        "velocity": bar.sqrt() * noise - (1 - bar).sqrt() * z0,
    }[prediction]
    assert (diffusion.loss_terms(target, z0, noise, t).simple < 1e-10).all()
    torch.testing.assert_close(diffusion.clean(lambda *_: target, z, t), z0, rtol=1e-3, atol=1e-3)


def test_learned_log_variance_is_best_at_the_log_of_the_loss():
    t, target = torch.tensor([3, 3]), torch.zeros(2, 1, 2, 2, 1)
    logvar = torch.zeros(1000, requires_grad=True)
    predicted = torch.full_like(target, 0.5)
    optimiser = torch.optim.SGD([logvar], lr=0.2)
    for _ in range(200):
        optimiser.zero_grad()
        PUBLISHED.loss_terms(predicted, target, target, t, logvar).total.mean().backward()
        optimiser.step()
    assert float(logvar[3].detach()) == pytest.approx(math.log(0.25), abs=1e-3)
    assert float(logvar.detach().abs().sum()) == pytest.approx(math.log(4), abs=1e-3)


def test_average_of_weights_is_the_published_one(parity):
    numbers = np.load(parity / "prediff" / "ema_lr.npz")
    model = nn.Linear(5, 4, bias=False)
    model.weight.data = torch.from_numpy(numbers["in/weights"][0])
    ema = Ema(model)
    for weights, expected in zip(numbers["in/weights"][1:], numbers["out/ema"][1:], strict=True):
        model.weight.data = torch.from_numpy(weights)
        ema.update(model)
        assert_matches(ema.module.weight, expected, 1e-6)


def test_average_resumes_from_its_state_and_takes_no_part_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    ema = Ema(model, decay=0.3)

    def step(*averages: Ema) -> None:
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        model(torch.randn(4, 3))
        for average in averages:
            average.update(model)

    step(ema)
    again = Ema(model, decay=0.3)
    again.load_state_dict(ema.state_dict())
    for _ in range(5):
        step(ema, again)
    for one, other in zip(ema.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert int(ema.updates) == 6
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    holder = nn.ModuleList([model, ema]).train()
    assert holder[0][2].training
    assert not ema.module[2].training


def test_average_follows_at_its_decay_once_warmed_up():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    ema = Ema(model, decay=0.5)
    for _ in range(20):
        ema.update(model)
    model.weight.data.fill_(1.0)
    for n in range(1, 6):
        ema.update(model)
        assert float(ema.module.weight) == pytest.approx(1 - 0.5**n)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": "dpm+"},
            r"sampler is 'dpm\+': needed one of ddpm, ddim, dpm\+\+, unipc \(.* dpm\+\+\)",
        ),
        ({"sampler": "DDIM"}, r"sampler is 'DDIM': needed .* \(the nearest is ddim\)"),
        ({"steps": 0}, "steps is 0: needed a whole number from 1 to 1000"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 1001}, "steps is 1001: needed .* to 1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"shape": (2, 4, 4)}, r"shape is \(2, 4, 4\): needed \(T, H, W, C\)"),
        ({"shape": (2, 0, 4, 1)}, r"shape is \(2, 0, 4, 1\)"),
        ({"seeds": torch.zeros(0, dtype=torch.int64)}, r"seeds is '\(0,\) torch.int64'"),
        ({"seeds": torch.zeros(2)}, "torch.float32': needed"),
        ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, r"seeds is '\(2, 2\)"),
        ({"limit": 0.0}, "limit is 0.0: needed"),
        ({"limit": math.nan}, "limit is nan"),
        (
            {"denoise": lambda z, t: z[:, :1]},
            r"prediction of shape \(2, 1, 4, 4, 1\): needed \(2, 2, 4, 4, 1\)",
        ),
        ({"guide": lambda z, t: z[:1]}, r"guidance of shape \(1, 2, 4, 4, 1\)"),
    ],
)
def test_bad_sampling_is_refused_by_what_was_found_and_needed(changes, message):
    arguments = {
        "denoise": lambda z, t: z,
        "shape": (2, 4, 4, 1),
        "seeds": torch.arange(2),
        "sampler": "ddim",
        "steps": 2,
    }
    with pytest.raises(ValueError, match=message):
        PUBLISHED.sample(**(arguments | changes))


def test_bad_steps_are_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="steps is 21"):
        Diffusion(DiffusionConfig(timesteps=20)).states(lambda z, t: z, given(), "ddpm", 21)


def test_prediction_of_another_shape_has_no_loss():
    z0 = torch.zeros(2, 1, 2, 2, 1)
    with pytest.raises(ValueError, match=r"prediction of shape \(2, 1, 2, 2, 2\): needed \(2, 1, 2, 2, 1\)"):
        PUBLISHED.loss_terms(z0.repeat(1, 1, 1, 1, 2), z0, z0, torch.zeros(2, dtype=torch.int64))


def test_two_timesteps_are_a_schedule_and_one_is_not():
    shortest = Diffusion(DiffusionConfig(timesteps=2))
    for sampler in SAMPLERS:
        assert torch.isfinite(drawn([1], sampler, 2, diffusion=shortest).latents).all()
    z0 = torch.zeros(2, *SHAPE)
    terms = shortest.loss_terms(z0 + 0.1, z0, z0, torch.tensor([0, 1]))
    assert torch.isfinite(terms.vlb).all()
    with pytest.raises(ValueError, match="timesteps is 1: needed at least 2"):
        DiffusionConfig(timesteps=1)
