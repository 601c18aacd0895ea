"""The whole model against the original's numbers, its fused form, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from reference_config import put_bugs_back, reference_config

from earthformer.checkpoints import load_weights
from earthformer.presets import EARTHFORMERS
from earthformer.transformer import Earthformer

MODELS = (
    "m01_axial_enso_like",
    "m02_axial_global_sevir_like",
    "m03_global_shared_qkv_gated",
    "m04_swin_ignore_global_ratio2",
    "m05_swin_zeros_norelpos",
    "m06_spatial_lg_nearest_nointerffn",
    "m07_cross_heter_lastn_firstself",
    "m08_explicit_cuboids_ntemporal",
    "m09_dilate_rms_noproj_crossstart",
    "m10_three_levels",
)
BUGGY = ("m04", "m06", "m08")


@pytest.fixture(params=MODELS)
def case(request, parity):
    """Numbers of one model of the original, and ours with its weights, in float64."""
    numbers = np.load(parity / "earthformer" / f"{request.param}.npz")
    model = Earthformer(reference_config(json.loads(str(numbers["config"]))["kwargs"])).double()
    load_weights(model, {k[3:]: torch.from_numpy(numbers[k]) for k in numbers.files if k.startswith("sd/")})
    if request.param[:3] in BUGGY:
        put_bugs_back(model)
    return numbers, model.eval()


def test_forecast_gradients_and_all_between_match_the_original(case):
    numbers, model = case
    x = torch.from_numpy(numbers["input/x"]).double()
    with torch.no_grad():
        mids = {"initial_encoder": model.initial_encoder(x)}
        mids["enc_pos_embed"] = model.enc_pos_embed(mids["initial_encoder"])
        memories, global_memories = model.encode(mids["enc_pos_embed"], last_update=True)
        mids["initial_z"] = model.initial(memories[-1])
        mids["decoder"] = model.decoder(mids["initial_z"], memories, global_memories)
        mids |= {f"mem_{i}": memory for i, memory in enumerate(memories)}
        mids |= {f"mem_global_{i}": g for i, g in enumerate(global_memories) if g is not None}
    theirs = {key[4:] for key in numbers.files if key.startswith("mid/")}
    assert theirs == set(mids)
    for name, found in mids.items():
        needed = numbers[f"mid/{name}"]  # float32
        np.testing.assert_allclose(found, needed, rtol=0, atol=5e-6 * abs(needed).max(), err_msg=name)
    forecast = model(x)
    np.testing.assert_allclose(forecast.detach(), numbers["output_f64"], rtol=0, atol=1e-9)

    loss = (forecast - torch.from_numpy(numbers["target"]).double()).square().mean()
    assert loss.item() == pytest.approx(numbers["loss"].item(), rel=1e-5)
    loss.backward()
    published = dict(zip(numbers["param_names"].tolist(), numbers["grad_norms"].tolist(), strict=True))
    norms = {name: -1.0 if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    one_stage = len(model.config.stem) == 1 and "initial_encoder.conv_block.0.weight" in published
    for name, found in norms.items():
        key = name.replace("_list.0.", ".") if one_stage and name.startswith(("initial_", "final_")) else name
        assert found == pytest.approx(published.pop(key), rel=2e-4, abs=1e-7), name
    assert not published


def test_fused_forecasts_are_the_same(case):
    numbers, model = case
    x = torch.from_numpy(numbers["input/x"]).double()
    fused = model.fuse()
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS[:1] + MODELS[1:2])
def test_without_the_bugs_nothing_changes_where_they_do_not_come_in(parity, name):
    numbers = np.load(parity / "earthformer" / f"{name}.npz")
    config = reference_config(json.loads(str(numbers["config"]))["kwargs"])
    torch.manual_seed(0)
    model = Earthformer(config).double().eval()
    x = torch.from_numpy(numbers["input/x"]).double()
    with torch.no_grad():
        torch.testing.assert_close(put_bugs_back(model)(x), model(x), rtol=0, atol=0)


def test_frames_in_chunks_give_what_all_give_at_once(monkeypatch):
    torch.manual_seed(0)
    model = Earthformer(EARTHFORMERS["earthformer_enso_tiny"]).double().eval()
    x = torch.randn(2, *model.config.context, dtype=torch.float64)
    whole = model(x).detach()
    monkeypatch.setattr("earthformer.layers.CHUNK_PIXELS", 1)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), whole, rtol=0, atol=1e-12)


def test_recomputed_maps_give_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    model = Earthformer(EARTHFORMERS["earthformer_enso_tiny"]).double().eval()
    x = torch.randn(1, *model.config.context, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    kept = gradients()
    monkeypatch.setattr("earthformer.layers.RECOMPUTED_MAPS", 1)
    torch.testing.assert_close(gradients(), kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 12, 24, 24, 1), (12, 24, 48, 1), (1, 11, 24, 48, 1)])
def test_a_wrong_context_is_named(shape):
    model = Earthformer(EARTHFORMERS["earthformer_enso_tiny"])
    with pytest.raises(ValueError, match=r"context has shape .*: needed \(B, \*\(12, 24, 48, 1\)\)"):
        model(torch.zeros(shape))


def test_what_is_added_to_the_last_frame_is_nothing_at_first():
    torch.manual_seed(0)
    config = dataclasses.replace(EARTHFORMERS["earthformer_enso_tiny"], from_last_frame=True)
    model, x = Earthformer(config), torch.randn(2, *config.context)
    assert torch.equal(model(x), x[:, -1:].expand(-1, config.target[0], -1, -1, -1))
    torch.nn.init.ones_(model.dec_final_proj.bias)
    assert torch.equal(model.fuse()(x), x[:, -1:].expand(-1, config.target[0], -1, -1, -1) + 1)
    with pytest.raises(ValueError, match="target channels is 2: needed 1, as from_last_frame"):
        dataclasses.replace(config, target=(14, 24, 48, 2))


def test_initialisation():
    torch.manual_seed(0)
    model = Earthformer(EARTHFORMERS["earthformer_enso"])
    ffn = model.encoder.blocks[1][0].ffn_l[0]
    assert ffn.ffn_1.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert not ffn.ffn_1.bias.any()
    up = model.decoder.upsample_layers[0].conv
    assert up.weight.std().item() == pytest.approx((2 / (1.01 * 9 * 64)) ** 0.5, rel=0.03)
    conv = model.initial_encoder.conv_block_list[0][3]
    assert conv.weight.abs().max().item() <= (9 * 64) ** -0.5
    assert model.enc_pos_embed.T_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_bfloat16_stays_near():
    torch.manual_seed(0)
    model = Earthformer(EARTHFORMERS["earthformer_sevir_lr_tiny"]).eval()
    x = torch.rand(1, *model.config.context)
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
