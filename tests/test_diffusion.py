"""The noise schedule, the training objective and the sampler against published numbers and known laws."""

import json
import math

import numpy as np
import pytest
import torch
from reference_prediff import reference_alignment, reference_denoiser, weights_of
from tiny_diffusion import PUBLISHED, SHAPE, assert_matches, drawn, given
from torch import Tensor, nn

from earthformer.alignment import AlignmentNetwork
from earthformer.autoencoder import Autoencoder
from earthformer.checkpoints import load_weights
from earthformer.denoiser import Denoiser
from earthformer.diffusion import Diffusion, Ema
from earthformer.prediff_config import AutoencoderConfig, DiffusionConfig
from earthformer.samplers import SAMPLERS, Stepper

SCHEDULES = {
    "linear1000": DiffusionConfig(),
    "linear20": DiffusionConfig(timesteps=20),
    "linear1000_v0.3": DiffusionConfig(variance=0.3),
    "x0_linear1000": DiffusionConfig(prediction="sample"),
    "cosine1000": DiffusionConfig(schedule="cosine"),
    "sqrt_linear1000": DiffusionConfig(schedule="sqrt_linear"),
    "sqrt50": DiffusionConfig(schedule="sqrt", timesteps=50),
}


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
