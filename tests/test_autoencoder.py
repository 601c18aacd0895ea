"""The autoencoder and its losses against the published numbers; and what its training promises."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from earthformer import autoencoder
from earthformer.autoencoder import (
    Autoencoder,
    AutoencoderTraining,
    Discriminator,
    losses,
    posterior_kl,
    posterior_sample,
)
from earthformer.checkpoints import published_key
from earthformer.prediff_config import AutoencoderConfig
from earthformer.presets import AUTOENCODERS

TOLERANCE = 2e-5
TINY = AutoencoderConfig(
    frame=(32, 24, 1),
    widths=(8, 16),
    layers=1,
    latent_channels=4,
    groups=4,
    discriminator_width=8,
    discriminator_layers=1,
    adversarial_start=10,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they give on maps this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fields(images: np.ndarray) -> torch.Tensor:
    """(N, C, H, W) as (N, 1, H, W, C)."""
    return torch.from_numpy(images).permute(0, 2, 3, 1)[:, None]


def images(fields: torch.Tensor) -> np.ndarray:
    return fields.detach()[:, 0].permute(0, 3, 1, 2).numpy()


def weights(numbers, prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): torch.from_numpy(numbers[key]) for key in numbers if key.startswith(prefix)
    }


def assert_matches(found, expected, name=""):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=name)


def published(numbers, channels: int, hw: tuple[int, int], parts: tuple[str, ...]) -> Autoencoder:
    """The fixture's weights in an autoencoder of so many channels, the parts that fit it."""
    kwargs = json.loads(str(numbers["config"]))
    config = AutoencoderConfig(
        frame=(*hw, channels),
        widths=tuple(kwargs["block_out_channels"]),
        layers=kwargs["layers_per_block"],
        latent_channels=kwargs["latent_channels"],
        groups=kwargs["norm_num_groups"],
    )
    model = Autoencoder(config).eval()
    theirs = {published_key(f"network.{key}", model): key for key in model.network.state_dict()}
    found = {theirs[key]: tensor for key, tensor in weights(numbers, "sd/").items()}
    for name in parts:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}
        model.network.get_submodule(name).load_state_dict(own)
    return model


@pytest.mark.parametrize("name", ["vae_a", "vae_b"])
def test_network_matches_published(parity, name):
    numbers = np.load(parity / "prediff" / f"{name}.npz")
    x, decoded = numbers["in/x"], numbers["out/decode_z"]
    hw = x.shape[2:]
    # `vae_b` makes 2 channels of 3: its halves are those of two of our autoencoders.
    encoder = published(numbers, x.shape[1], hw, ("encoder", "quant_conv"))
    decoder = published(numbers, decoded.shape[1], hw, ("decoder", "post_quant_conv"))
    with torch.inference_mode():
        h = encoder.network.encoder(torch.from_numpy(x))
        assert_matches(h, numbers["out/encoder_h"])
        assert_matches(encoder.network.quant_conv(h), numbers["out/moments"])
        mean, logvar = encoder.encode(fields(x))
        std = torch.exp(0.5 * logvar)
        sample = posterior_sample(mean, logvar, fields(numbers["in/eps"]))
        z = fields(numbers["in/z"])
        nll = 0.5 * (np.log(2 * np.pi) + logvar + (z - mean).square() / logvar.exp()).sum((1, 2, 3, 4))
        found = {"mean": mean, "logvar": logvar, "sample": sample, "std": std}
        for key, value in found.items():
            assert_matches(images(value), numbers[f"out/{key}"], key)
        # Where the clamp is active, sums of exponentials follow the last bit of the logarithm.
        np.testing.assert_allclose(posterior_kl(mean, logvar)[:, 0], numbers["out/kl"], rtol=TOLERANCE)
        np.testing.assert_allclose(nll, numbers["out/nll_of_z"], rtol=TOLERANCE)
        assert_matches(images(decoder.decode(z)), decoded)
        assert_matches(images(decoder.decode(mean)), numbers["out/recon_mode"])
    if name == "vae_b":
        assert logvar.min() == -30
        assert logvar.max() == 20


class Scene:
    """What `vae_gan_loss` was computed from."""

    def __init__(self, numbers, training: bool) -> None:
        settings = json.loads(str(numbers["config"]))
        self.config = AutoencoderConfig(
            frame=(32, 32, 1),
            latent_channels=4,
            kl_weight=settings["kl_weight"],
            adversarial_weight=settings["disc_weight"],
            adversarial_start=settings["disc_start"],
        )
        self.frames = fields(numbers["in/x"])
        self.last = nn.Parameter(torch.from_numpy(numbers["in/last_w"]))
        made = nn.functional.conv2d(torch.from_numpy(numbers["in/h"]), self.last, padding=1)
        self.reconstruction = made.permute(0, 2, 3, 1)[:, None]
        self.mean, logvar = fields(numbers["in/moments"]).chunk(2, dim=-1)
        self.logvar = logvar.clamp(*autoencoder.LOGVAR_RANGE)
        self.discriminator = Discriminator(1, settings["ndf"], settings["disc_num_layers"])
        self.discriminator.load_state_dict(weights(numbers, "sd_disc/"))
        self.discriminator.train(training)

    def losses(self, adversarial: bool) -> autoencoder.Losses:
        return losses(
            self.frames,
            self.reconstruction,
            self.mean,
            self.logvar,
            self.config,
            self.discriminator if adversarial else None,
            self.last,
        )


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("step", [9, 10])
def test_losses_match_published(parity, mode, step):
    numbers = np.load(parity / "prediff" / "vae_gan_loss.npz")
    scene = Scene(numbers, mode == "train")
    adversarial = step >= scene.config.adversarial_start
    found = scene.losses(adversarial)
    terms = {
        "total_loss": found.generator,
        "kl_loss": found.kl,
        "nll_loss": found.nll,
        "rec_loss": found.rec,
        "disc_loss": found.discriminator,
    }
    if adversarial:
        terms |= {
            "d_weight": found.d_weight,
            "g_loss": found.g_loss,
            "logits_real": found.logits_real,
            "logits_fake": found.logits_fake,
        }
    for name, value in terms.items():
        expected = float(numbers[f"out/{mode}_step{step}/{name}"])
        assert value.item() == pytest.approx(expected, rel=TOLERANCE, abs=1e-8), name
    found.generator.backward()
    assert_matches(scene.last.grad, numbers[f"out/{mode}_step{step}/gen_grad_last_w"])


def test_one_backward_gives_each_network_the_gradient_of_its_own_loss(parity):
    numbers = np.load(parity / "prediff" / "vae_gan_loss.npz")

    def gradients(loss) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        scene = Scene(numbers, training=True)
        loss(scene.losses(adversarial=True)).backward()
        return scene.last.grad, [p.grad for p in scene.discriminator.parameters()]

    last, discriminator = gradients(lambda found: found.total)
    generator_last, untouched = gradients(lambda found: found.generator)
    no_last, own = gradients(lambda found: found.discriminator)
    assert untouched == [None] * len(own)
    assert no_last is None
    torch.testing.assert_close(last, generator_last, rtol=1e-6, atol=0)
    for ours, expected in zip(discriminator, own, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def storms(count: int, hw: tuple[int, int] = TINY.frame[:2], seed: int = 0) -> torch.Tensor:
    """Frames (1, count, H, W, 1) from 0 to 1, mostly dry, with a few round cells."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in hw), indexing="ij")
    frames = torch.zeros(count, *hw)
    for frame in frames:
        for cy, cx, top, size in torch.rand(3, 4, generator=generator):
            distance = (y - cy * hw[0]).square() + (x - cx * hw[1]).square()
            frame += (0.3 + 0.7 * top) * torch.exp(-distance / (2 * (2 + 4 * size) ** 2))
    return frames.clamp(max=1)[None, ..., None]


def tiny(seed: int = 0, config: AutoencoderConfig = TINY) -> AutoencoderTraining:
    torch.manual_seed(seed)
    return AutoencoderTraining(config)


@pytest.fixture(scope="module")
def trained():
    """A tiny module after some dozens of steps on 8 frames, and its losses; adversarial from step 10."""
    module, frames = tiny(), storms(8)
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-3, betas=(0.5, 0.9))
    history = []
    for step in range(60):
        loss = module.loss({"frames": frames}, step)
        loss.backward()
        for part in module.parts():
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        history.append(loss.item())
    return module.eval(), frames, history


def test_overfits_a_few_storms_with_the_adversarial_term_on(trained):
    module, frames, history = trained
    assert np.isfinite(history).all()
    with torch.inference_mode():
        mean, _ = module.autoencoder.encode(frames)
        error = (module.autoencoder.decode(mean) - frames).abs().mean()
    # The best constant is the median.
    assert error < 0.4 * (frames - frames.median()).abs().mean()


def test_discriminator_learns_only_once_it_counts(trained):
    module, frames, _ = trained
    assert module.discriminator.main[3].num_batches_tracked == 3 * (60 - TINY.adversarial_start)
    fresh = tiny()
    before = {key: value.clone() for key, value in fresh.discriminator.state_dict().items()}
    fresh.loss({"frames": frames}, TINY.adversarial_start - 1).backward()
    assert all(p.grad is None for p in fresh.discriminator.parameters())
    assert all(torch.equal(value, before[key]) for key, value in fresh.discriminator.state_dict().items())
    fresh.loss({"frames": frames}, TINY.adversarial_start).backward()
    assert all(p.grad.any() for name, p in fresh.discriminator.named_parameters() if "weight" in name)


def test_no_adversarial_weight_leaves_the_discriminator_alone():
    module = tiny(config=replace(TINY, adversarial_weight=0.0))
    module.loss({"frames": storms(2)}, 10**6).backward()
    assert all(p.grad is None for p in module.discriminator.parameters())


def test_adversarial_weight_is_0_without_gradients():
    module, frames = tiny().eval(), storms(2)
    with torch.no_grad():
        found = module.losses(frames, TINY.adversarial_start)
    assert found.d_weight == 0
    assert found.g_loss == -found.logits_fake
    torch.testing.assert_close(found.generator, found.nll + TINY.kl_weight * found.kl)
    torch.manual_seed(1)
    assert module.losses(frames, TINY.adversarial_start).d_weight > 0


def test_frames_are_coded_each_by_itself_in_the_shape_of_fields(trained):
    module, frames, _ = trained
    model = module.autoencoder
    batch = frames.reshape(2, 4, *TINY.frame)
    with torch.inference_mode():
        mean, logvar = model.encode(batch)
        assert mean.shape == logvar.shape == (2, 4, *TINY.latent)
        decoded = model.decode(mean)
        assert decoded.shape == batch.shape
        for b, t in ((0, 3), (1, 0)):
            alone = model.encode(batch[b : b + 1, t : t + 1])
            torch.testing.assert_close(alone[0][0, 0], mean[b, t])
            torch.testing.assert_close(alone[1][0, 0], logvar[b, t])
            torch.testing.assert_close(model.decode(alone[0])[0, 0], decoded[b, t])


@pytest.mark.parametrize("frames_a_chunk", [1, 3, 8])
def test_chunks_do_not_change_the_numbers(trained, monkeypatch, frames_a_chunk):
    module, frames, _ = trained
    model = module.autoencoder
    mean, logvar = model.encode(frames)
    decoded = model.decode(mean)
    seen = []
    hook = model.network.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setitem(autoencoder.CHUNK_NUMBERS, "cpu", frames_a_chunk * 32 * 24 * TINY.widths[0])
    with torch.inference_mode():
        again, again_logvar = model.encode(frames)
        again_decoded = model.decode(again)
    hook.remove()
    assert max(seen) == frames_a_chunk
    assert sum(seen) == 8
    for ours, expected in ((again, mean), (again_logvar, logvar), (again_decoded, decoded)):
        assert_matches(ours.numpy(), expected.detach().numpy())


@pytest.mark.parametrize(
    ("call", "shape", "message"),
    [
        (
            "encode",
            (1, 2, 24, 31, 1),
            r"frames has shape \(1, 2, 24, 31, 1\): needed \(B, T, H, W, 1\), H and W mult",
        ),
        ("encode", (2, 32, 24, 1), r"frames has shape \(2, 32, 24, 1\)"),
        ("encode", (1, 2, 32, 24, 2), r"frames has shape"),
        ("decode", (1, 2, 16, 12, 3), r"latents has shape .*: needed \(B, T, H, W, 4\)"),
        ("decode", (1, 2, 32, 24, 1), r"latents has shape"),
    ],
)
def test_wrong_shapes_are_refused_by_name(trained, call, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(trained[0].autoencoder, call)(torch.zeros(shape))


def test_too_small_frames_are_refused_before_training():
    with pytest.raises(ValueError, match="needed H and W from 24 for a discriminator of 3 layers"):
        AutoencoderTraining(replace(TINY, frame=(32, 16, 1), discriminator_layers=3))
    smallest = tiny(config=replace(TINY, frame=(24, 24, 1), discriminator_layers=3))
    frames = storms(1, (24, 24))
    assert smallest.discriminator(frames).shape == (1, 1, 1, 1, 1)
    assert torch.isfinite(smallest.loss({"frames": frames}, TINY.adversarial_start))


def test_perceptual_loss_without_its_weights_is_refused():
    with pytest.raises(ValueError, match="needed the packages lpips and torchvision"):
        AutoencoderTraining(replace(TINY, perceptual_weight=0.1))
    with pytest.raises(ValueError, match="frame channels is 2: needed 1 or 3"):
        AutoencoderTraining(replace(TINY, frame=(32, 24, 2), perceptual_weight=0.1))


def test_perceptual_distance_counts_for_each_pixel():
    frames = storms(3)
    mean = torch.zeros(1, 3, *TINY.latent)
    distance = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1, 1)
    config = replace(TINY, perceptual_weight=0.5)
    found = losses(frames, frames + 0.25, mean, mean, config, None, mean, lambda x, y: distance)
    assert found.nll.item() == pytest.approx((0.25 + 0.5 * 3) * 32 * 24, rel=1e-5)
    assert found.rec.item() == pytest.approx(0.25, rel=1e-5)


def test_published_sizes():
    config = AUTOENCODERS["prediff_sevir_lr"]
    discriminator = Discriminator(1, config.discriminator_width, config.discriminator_layers)
    assert sum(p.numel() for p in discriminator.parameters()) == 2_763_585
    with torch.device("meta"):
        model = Autoencoder(config)
    assert sum(p.numel() for p in model.parameters()) == 84_499_393
    assert len(model.network.state_dict()) == 248
    assert discriminator(torch.zeros(1, 2, 128, 128, 1)).shape == (1, 2, 14, 14, 1)


def test_discriminator_starts_from_the_published_distribution():
    torch.manual_seed(0)
    discriminator = Discriminator(1, 64, 3)
    for module in discriminator.main:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_bfloat16_autocast_follows_float32():
    frames = storms(4)

    def run(enabled: bool) -> tuple[float, torch.Tensor]:
        module = tiny()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(1)
            loss = module.loss({"frames": frames}, TINY.adversarial_start)
        loss.backward()
        gradients = [p.grad.flatten() for p in module.parameters()]
        assert loss.dtype == torch.float32
        return loss.item(), torch.cat(gradients)

    (half, half_gradient), (full, gradient) = run(True), run(False)
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    assert torch.cosine_similarity(half_gradient, gradient, dim=0) > 0.98


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallelism_keeps_the_gradients(process_group):
    alone, module = tiny(), tiny()
    model = DistributedDataParallel(module, find_unused_parameters=True)
    for step in range(TINY.adversarial_start - 1, TINY.adversarial_start + 2):
        for wrapped in (model, alone):
            torch.manual_seed(step)
            wrapped.zero_grad()
            with wrapped.no_sync() if wrapped is model else contextlib.nullcontext():
                wrapped({"frames": storms(2, seed=0)}, step).backward()
            wrapped({"frames": storms(2, seed=1)}, step).backward()
        for (name, ours), expected in zip(module.named_parameters(), alone.parameters(), strict=True):
            if expected.grad is None:
                # A process group fills in zeros where no rank had a gradient in the last micro-batch.
                assert ours.grad is None or not ours.grad.any(), name
            else:
                torch.testing.assert_close(ours.grad, expected.grad, msg=name)
