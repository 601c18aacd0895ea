"""The denoiser against the original's numbers, and what holds of any."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from reference_config import put_bugs_back
from reference_prediff import reference_denoiser, weights_of

from earthformer.checkpoints import load_weights
from earthformer.config import Attention, FeedForward, GlobalVectors
from earthformer.denoiser import Denoiser, ResidualBlock, TimeEmbedding, sinusoid
from earthformer.prediff_config import DenoiserConfig
from earthformer.presets import DENOISERS

UNETS = (
    "unet_a_axial",
    "unet_b_axial_gn32",
    "unet_c_global_separate",
    "unet_d_global_shared_pad",
    "unet_e_zeros_pad_swin",
)
TOLERANCE = 2e-5
SMALL = DenoiserConfig(
    context=(3, 6, 5, 4),
    target=(2, 6, 5, 4),
    widths=(64, 96),
    depth=(2, 1),
    dropout=0.0,
    attention=Attention(dropout=0.0, projection_dropout=0.0),
    feed_forward=FeedForward(dropout=0.0),
)


def near(found, needed):
    np.testing.assert_allclose(found, needed, rtol=0, atol=TOLERANCE * abs(needed).max())


def near_sinusoid(t, width, needed):
    """The original's angles are in float32, which knows one of 1000 to 6.2e-5 and those below 320 to 2e-5."""
    error = abs(sinusoid(t, width).numpy() - needed).max(1)
    assert (error <= np.maximum(TOLERANCE, 6.2e-8 * t.numpy())).all()


def scrambled(model):
    """The same model, no parameter of it 0 any longer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(config, batch):
    """Latents, steps, context and, where it is configured, the aligned condition."""
    generator = torch.Generator().manual_seed(2)
    shapes = [config.target, config.context]
    if config.aligned_channels:
        shapes.append((*config.target[:3], config.aligned_channels))
    z, context, *condition = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return (z, torch.arange(batch) * 37 + 5, context, *condition)


@pytest.mark.parametrize("name", UNETS)
def test_noise_and_all_before_match_the_original(parity, name):
    numbers = np.load(parity / "prediff" / f"{name}.npz")
    model = Denoiser(reference_denoiser(json.loads(str(numbers["config"])))).eval()
    load_weights(model, weights_of(numbers))
    z, t, context = (torch.from_numpy(numbers[f"in/{key}"]) for key in ("x", "t", "cond"))
    with torch.no_grad():
        near_sinusoid(t, model.config.widths[0], numbers["out/sinusoid"])
        near(model.embed(t), numbers["out/time_embed"])
        near(model.first_proj(model.assemble(z, t, context, None)), numbers["out/first_proj"])
        if name == "unet_d_global_shared_pad":  # Padding and global vectors meet: see `put_bugs_back`.
            assert (model(z, t, context) - torch.from_numpy(numbers["out/eps"])).abs().max() > 1e-2
            put_bugs_back(model)
        near(model(z, t, context), numbers["out/eps"])


def test_time_embeddings_match_the_original(parity):
    numbers = np.load(parity / "prediff" / "time_embedding.npz")
    t = torch.from_numpy(numbers["in/t"])
    for width in (256, 128, 16, 7):
        near_sinusoid(t, width, numbers[f"out/emb_{width}"])
    near(sinusoid(torch.from_numpy(numbers["in/t_float"]), 256), numbers["out/emb_float_256"])
    layer = TimeEmbedding(16, 64)
    layer.load_state_dict(weights_of(numbers, "sd_layer/"))
    with torch.no_grad():
        near(layer(sinusoid(t, 16)), numbers["out/layer"])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("plain", ResidualBlock(64, 64, 64)),
        ("shift", ResidualBlock(32, 32, 64, scale_shift=True)),
        ("proj1x1", ResidualBlock(32, 64, 64)),
        ("proj3x3", ResidualBlock(32, 96, 64, wide_skip=True)),
        ("noembed", ResidualBlock(32, 20)),
    ],
)
def test_residual_blocks_match_the_original(parity, name, block):
    numbers = np.load(parity / "prediff" / "time_embedding.npz")
    block.load_state_dict(weights_of(numbers, f"sd_{name}/"))
    x = torch.from_numpy(numbers["in/res_x64" if name == "plain" else "in/res_x"])
    embedding = torch.from_numpy(numbers["in/res_emb"])
    with torch.no_grad():
        y = block.eval()(x.permute(0, 2, 3, 4, 1).contiguous(), embedding)
    near(y.permute(0, 4, 1, 2, 3), numbers[f"out/{name}"])


@pytest.mark.parametrize("aligned_channels", [0, 3])
def test_an_untrained_network_gives_nothing(aligned_channels):
    config = dataclasses.replace(SMALL, aligned_channels=aligned_channels)
    assert not Denoiser(config)(*inputs(config, 2)).any()


def test_what_each_stack_and_block_adds_starts_from_nothing():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, global_vectors=GlobalVectors(count=2, feed_forward=True))
    model = Denoiser(config)
    x, g = torch.randn(1, *config.level_shapes[0]), torch.randn(1, 2, 64)
    same, also = model.down_self_blocks[0][0](x, g)
    assert torch.equal(same, x)
    assert torch.equal(also, g)
    assert torch.equal(model.down_time_embed_blocks[0](x, torch.randn(1, 256)), x)
    qkv = model.up_self_blocks[1][0].attn_l[0].qkv.weight
    assert qkv.std().item() == pytest.approx(96**-0.5, rel=0.03)


@pytest.mark.parametrize("config", [DENOISERS["prediff_sevir_lr_tiny"].denoiser, SMALL])
def test_a_sample_is_the_same_whatever_its_batch(config):
    torch.manual_seed(0)
    model = scrambled(Denoiser(config))
    fields = inputs(config, 3)
    with torch.inference_mode():
        together = model(*fields)
        alone = torch.cat([model(*(x[i : i + 1] for x in fields)) for i in range(3)])
        order = [2, 0, 1]
        turned = model(*(x[order] for x in fields))
    near(together, alone)
    near(turned, together[order])


def test_one_step_may_stand_for_that_of_all_samples():
    torch.manual_seed(0)
    model = scrambled(Denoiser(SMALL))
    z, _, context = inputs(SMALL, 2)
    with torch.inference_mode():
        near(model(z, torch.tensor([7]), context), model(z, torch.tensor([7, 7]), context))


def test_step_context_and_condition_count():
    config = dataclasses.replace(SMALL, aligned_channels=2)
    torch.manual_seed(0)
    model = scrambled(Denoiser(config)).double()
    z, t, context, aligned = (x.double() if x.is_floating_point() else x for x in inputs(config, 2))
    with torch.inference_mode():
        base = model(z, t, context, aligned)
        for other in (
            model(z, t + 1, context, aligned),
            model(z, t, context.flip(1), aligned),
            model(z, t, context, aligned.flip(1)),
        ):
            assert ((other - base).abs().amax((1, 2, 3, 4)) > 1e-4 * base.abs().max()).all()


def test_the_condition_enters_as_channels_of_the_target_alone():
    config = dataclasses.replace(SMALL, aligned_channels=3)
    z, t, context, aligned = inputs(config, 2)
    x = Denoiser(config).assemble(z, t, context, aligned)
    assert x.shape == (2, 5, 6, 5, 8)
    assert torch.equal(x[:, :3, ..., :4], context)
    assert torch.equal(x[:, 3:, ..., :4], z)
    assert not x[:, :3, ..., 4:7].any()
    assert torch.equal(x[:, 3:, ..., 4:7], aligned)
    assert (x[:, :3, ..., 7] == 1).all()
    assert not x[:, 3:, ..., 7].any()


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}, {"aligned_channels": 2}])
def test_gradients_reach_every_parameter(options):
    config = dataclasses.replace(SMALL, **options)
    torch.manual_seed(0)
    model = scrambled(Denoiser(config)).train()
    exact = copy.deepcopy(model).double()
    fields = inputs(config, 2)
    model(*fields).square().sum().backward()
    exact(*(x.double() for x in fields)).square().sum().backward()
    needed = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        scale = needed[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), needed[name].grad, rtol=0, atol=1e-4 * scale)


def test_only_what_would_update_the_last_global_vectors_has_no_gradient():
    config = dataclasses.replace(SMALL, global_vectors=GlobalVectors(count=2, feed_forward=True))
    torch.manual_seed(0)
    model = scrambled(Denoiser(config))
    model(*inputs(config, 1)).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    last = "up_self_blocks.0.1."
    assert without
    assert all(name.startswith((last + "attn_l.2.g", last + "global_ffn_l.2.")) for name in without), without


def test_bfloat16_stays_near():
    config = DENOISERS["prediff_sevir_lr_tiny"].denoiser
    torch.manual_seed(0)
    model = scrambled(Denoiser(config))
    fields = inputs(config, 1)
    with torch.inference_mode():
        exact = model(*fields)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*fields)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_every_misshapen_argument_is_named():
    config = dataclasses.replace(SMALL, aligned_channels=2)
    model, plain = Denoiser(config), Denoiser(SMALL)
    z, t, context, aligned = inputs(config, 2)
    for arguments, message in (
        ((z[:, :1], t, context, aligned), r"z has shape \(2, 1, 6, 5, 4\): needed \(B, 2, 6, 5, 4\)"),
        ((z[0], t, context, aligned), r"z has shape \(2, 6, 5, 4\): needed \(B, 2, 6, 5, 4\)"),
        ((z, t.repeat(2), context, aligned), r"t has shape \(4,\): needed \(2\)"),
        ((z, t[0], context, aligned), r"t has shape \(\): needed \(2\)"),
        ((z, t, context[:1], aligned), r"context_latents has shape \(1, .*: needed \(2, 3, 6, 5, 4\)"),
        ((z, t, z, aligned), r"context_latents has shape \(2, 2, .*: needed \(2, 3, 6, 5, 4\)"),
        ((z, t, context, z), r"aligned has shape \(2, 2, 6, 5, 4\): needed \(2, 2, 6, 5, 2\)"),
        ((z, t, context), r"aligned is absent: needed 2 channels of it"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="aligned is given: needed 0 channels of it"):
        plain(z, t, context, aligned)


@pytest.mark.parametrize("widths", [(32, 32), (48,), (16, 80)])
def test_widths_at_which_no_step_is_felt_are_refused(widths):
    options = {"widths": widths, "depth": (1,) * len(widths)}
    with pytest.raises(ValueError, match=r"widths is .*: needed a multiple of 32 above 32 .* or scale_shift"):
        dataclasses.replace(SMALL, **options)
    config = dataclasses.replace(SMALL, **options, scale_shift=True)
    model = scrambled(Denoiser(config))
    z, t, context = inputs(config, 1)
    with torch.inference_mode():
        assert (model(z, t, context) - model(z, t + 1, context)).abs().max() > 1e-4
