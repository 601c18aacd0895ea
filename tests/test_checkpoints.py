"""Published state dicts: the exact keys, and every fault by its name."""

import json

import pytest
import torch

from earthformer.checkpoints import load_published, our_key, published_key
from earthformer.cuboid import relative_position_index
from earthformer.presets import EARTHFORMERS
from earthformer.transformer import Earthformer


@pytest.fixture(params=["sevir", "enso"])
def published(request, parity):
    """Name of a published model, and the shape and type of each key of its state dict."""
    keys = json.loads((parity / "earthformer" / f"keys_{request.param}.json").read_text())
    return f"earthformer_{request.param}", keys


def state_dict_like(model, keys):
    """Random weights under the published keys, and the true relative indices."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: getattr(module, "table_size", None) for name, module in model.named_modules()}
    weights = {}
    for key, (shape, dtype) in keys.items():
        if key.endswith("relative_position_index"):
            weights[key] = relative_position_index(sizes[key.rsplit(".", 1)[0]])
            assert "int64" in dtype
        else:
            weights[key] = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return weights


def test_keys_and_sizes_are_the_published_ones(published):
    name, keys = published
    model = Earthformer(EARTHFORMERS[name])
    single = len(model.config.stem) == 1
    ours = {published_key(key, single): list(p.shape) for key, p in model.state_dict().items()}
    theirs = {key: shape for key, (shape, _) in keys.items() if not key.endswith("relative_position_index")}
    assert ours == theirs
    indices = sum(key.endswith("relative_position_index") for key in keys)
    assert indices == 11
    count = {"earthformer_sevir": (8_659_677, 286), "earthformer_enso": (1_394_325, 177)}[name]
    assert (sum(p.numel() for p in model.parameters()), len(ours) + indices) == count


def test_weights_arrive_in_float32(published):
    name, keys = published
    weights = state_dict_like(Earthformer(EARTHFORMERS[name]), keys)
    model = load_published(name, weights)
    assert not model.training
    for key, parameter in model.state_dict().items():
        published = published_key(key, single_stage=name == "earthformer_enso")
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, weights[published].float(), rtol=0, atol=0)
        assert our_key(published) == key


def test_every_fault_is_named(parity):
    keys = json.loads((parity / "earthformer" / "keys_enso.json").read_text())
    weights = state_dict_like(Earthformer(EARTHFORMERS["earthformer_enso"]), keys)
    index = "encoder.blocks.0.0.attn_l.0.relative_position_index"
    for change, message in (
        ({"z_proj.bias": None}, "z_proj.bias is missing"),
        ({"initial_encoder.conv_block.0.bias": None}, "initial_encoder.conv_block.0.bias is missing"),
        ({"z_proj.gain": torch.ones(1)}, "z_proj.gain is surplus"),
        ({"nowhere.relative_position_index": torch.ones(1)}, "nowhere.relative_position_index is surplus"),
        ({"z_proj.bias": torch.ones(3)}, r"z_proj.bias has shape \(3,\): needed \(128,\)"),
        ({index: weights[index][:2]}, r"relative_position_index has shape \(2, 12\): needed \(12, 12\)"),
        ({index: weights[index].flip(0)}, "relative_position_index holds another order"),
        ({index: None}, "encoder.blocks.0.0.attn_l.0.relative_position_index is missing"),
    ):
        changed = {key: tensor for key, tensor in {**weights, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            load_published("earthformer_enso", changed)
    load_published("earthformer_enso", weights)


def test_an_unknown_name_is_named():
    with pytest.raises(
        ValueError, match="'earthformer_mars' is not published: needed one of earthformer_sevir"
    ):
        load_published("earthformer_mars", {})
