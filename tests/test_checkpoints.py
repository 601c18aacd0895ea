"""Published state dicts: the exact keys, and every fault by its name."""

import json

import pytest
import torch

from earthformer.checkpoints import PUBLISHED, load_published
from earthformer.cuboid import relative_position_index

PARAMETERS = {
    "earthformer_sevir": (8_659_677, 286, 11),
    "earthformer_enso": (1_394_325, 177, 11),
    "prediff_autoencoder": (84_499_393, 248, 0),
    "prediff_denoiser": (136_817_538, 688, 48),
    "prediff_alignment": (8_937_033, 125, 6),
}
"""Of each published network: parameters, keys, and how many of the keys are indices."""

_ATTENTION = "encoder.mid_block.attentions.0."
RENAMED = {
    "earthformer_enso": {
        "initial_encoder.conv_block_list.0.0.weight": "initial_encoder.conv_block.0.weight",
        "final_decoder.upsample_list.0.conv.bias": "final_decoder.upsample.conv.bias",
    },
    "prediff_autoencoder": {
        f"network.{_ATTENTION}{ours}.weight": f"{_ATTENTION}{theirs}.weight"
        for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    },
}
"""Some of the keys that we call otherwise; all others are the published ones."""


def pair(key, weight, bias=None):
    """A weight and its bias, by default as long as the weight's first axis."""
    return {f"{key}.weight": weight, f"{key}.bias": bias or weight[:1]}


def under(prefix, *parts):
    """All keys of the parts, with a prefix."""
    return {f"{prefix}.{key}": shape for part in parts for key, shape in part.items()}


def autoencoder_keys():
    """Keys and shapes of the published autoencoder."""

    def block(dim, out):
        keys = pair("norm1", (dim,)) | pair("conv1", (out, dim, 3, 3))
        keys |= pair("norm2", (out,)) | pair("conv2", (out, out, 3, 3))
        return keys if dim == out else keys | pair("conv_shortcut", (out, dim, 1, 1))

    linears = [pair(name, (512, 512)) for name in ("query", "key", "value", "proj_attn")]
    middle = under("attentions.0", pair("group_norm", (512,)), *linears)
    middle |= under("resnets.0", block(512, 512)) | under("resnets.1", block(512, 512))
    middle = under("mid_block", middle)
    encoder = [pair("conv_in", (128, 1, 3, 3)), middle]
    for i, (dim, out) in enumerate([(128, 128), (128, 256), (256, 512), (512, 512)]):
        encoder += [under(f"down_blocks.{i}.resnets.{j}", block(out if j else dim, out)) for j in range(2)]
        if i < 3:
            encoder.append(pair(f"down_blocks.{i}.downsamplers.0.conv", (out, out, 3, 3)))
    encoder += [pair("conv_norm_out", (512,)), pair("conv_out", (128, 512, 3, 3))]
    decoder = [pair("conv_in", (512, 64, 3, 3)), middle]
    for i, (dim, out) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        decoder += [under(f"up_blocks.{i}.resnets.{j}", block(out if j else dim, out)) for j in range(3)]
        if i < 3:
            decoder.append(pair(f"up_blocks.{i}.upsamplers.0.conv", (out, out, 3, 3)))
    decoder += [pair("conv_norm_out", (128,)), pair("conv_out", (1, 128, 3, 3))]
    both = under("encoder", *encoder) | under("decoder", *decoder)
    return both | pair("quant_conv", (128, 128, 1, 1)) | pair("post_quant_conv", (64, 64, 1, 1))


def residual_keys(dim, out, embedding=None):
    keys = pair("in_layers.0", (dim,)) | pair("in_layers.2", (out, dim, 3, 3, 3))
    keys |= pair("out_layers.0", (out,)) | pair("out_layers.3", (out, out, 3, 3, 3))
    if embedding is not None:
        keys |= pair("emb_layers.1", (out, embedding))
    return keys if dim == out else keys | pair("skip_connection", (out, dim, 1, 1, 1))


def stack_keys(dim, lengths):
    keys = {}
    for i, n in enumerate(lengths):
        keys |= under(
            f"ffn_l.{i}",
            pair("ffn_1", (4 * dim, dim)),
            pair("ffn_2", (dim, 4 * dim)),
            pair("layer_norm", (dim,)),
        )
        attention = {"relative_position_bias_table": (2 * n - 1, 4), "relative_position_index": (n, n)}
        attention |= {"qkv.weight": (3 * dim, dim)} | pair("proj", (dim, dim)) | pair("norm", (dim,))
        keys |= under(f"attn_l.{i}", attention)
    return keys


def down_keys(channels, base, frames, depth):
    """What the denoiser and the alignment network share, of two levels at 16 x 16 and 8 x 8."""
    keys = under("first_proj", residual_keys(channels, base))
    for axis, n in (("T", frames), ("H", 16), ("W", 16)):
        keys[f"pos_embed.{axis}_embed.weight"] = (n, base)
    keys |= pair("time_embed.layer.0", (4 * base, base)) | pair("time_embed.layer.2", (4 * base, 4 * base))
    keys |= {"downsample_layers.0.reduction.weight": (2 * base, 4 * base)}
    keys |= pair("downsample_layers.0.norm", (4 * base,))
    return keys | level_keys("down", base, frames, depth)


def level_keys(direction, base, frames, depth):
    keys = {}
    for level in range(2):
        dim, length = base << level, 16 >> level
        for d in range(depth):
            prefix = f"{direction}_self_blocks.{level}.{d}"
            keys |= under(prefix, stack_keys(dim, (frames, length, length)))
        keys |= under(f"{direction}_time_embed_blocks.{level}", residual_keys(dim, dim, 4 * base))
    return keys


def denoiser_keys():
    """Keys and shapes of the published denoiser."""
    keys = down_keys(65, 256, 13, 4) | level_keys("up", 256, 13, 4)
    return keys | pair("upsample_layers.0.conv", (256, 512, 3, 3)) | pair("final_proj", (64, 256))


def alignment_keys():
    """Keys and shapes of the published alignment network."""
    keys = down_keys(64, 128, 6, 1) | pair("out.0", (256,)) | {"out.2.positional_embedding": (256, 65)}
    return keys | pair("out.2.qkv_proj", (768, 256, 1)) | pair("out.2.c_proj", (1, 256, 1))


@pytest.fixture(scope="module", params=list(PUBLISHED))
def published(request, parity):
    """Name of a published network, and random weights (float64) under its keys, with the true indices."""
    name = request.param
    if name.startswith("earthformer"):
        return name, earthformer_weights(parity, name)
    keys = {"autoencoder": autoencoder_keys, "denoiser": denoiser_keys, "alignment": alignment_keys}
    return name, random_weights(keys[name.removeprefix("prediff_")]())


def earthformer_weights(parity, name):
    file = parity / "earthformer" / f"keys_{name.removeprefix('earthformer_')}.json"
    return random_weights({key: shape for key, (shape, _) in json.loads(file.read_text()).items()})


def random_weights(keys):
    """Every published cuboid is a row of tokens, so that its length alone tells the index."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: relative_position_index((shape[0], 1, 1))
        if key.endswith("relative_position_index")
        else 0.02 * torch.randn(shape, generator=generator)
        for key, shape in keys.items()
    }


def test_every_weight_arrives_under_its_published_key(published):
    name, weights = published
    model = load_published(name, {key: x.double() if "bias" in key else x for key, x in weights.items()})
    assert not model.training
    parameters, keys, indices = PARAMETERS[name]
    found = list(model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (len(weights), len(weights) - len(found)) == (keys, indices)
    assert all(x.dtype == torch.float32 for x in found)
    # Random weights have sums of their own, so that the two lists agree only if nothing is lost or doubled.
    arrived = sorted(x.double().sum().item() for x in found)
    sent = sorted(x.double().sum().item() for key, x in weights.items() if not key.endswith("_index"))
    assert arrived == sent
    for ours, theirs in RENAMED.get(name, {}).items():
        assert torch.equal(model.state_dict()[ours], weights[theirs])


def test_every_network_refuses_a_lost_a_surplus_and_a_misshapen_key(published):
    name, weights = published
    key = next(key for key in weights if key.endswith("norm.weight") or key.endswith("norm2.weight"))
    lost = {other: x for other, x in weights.items() if other != key}
    for changed, message in (
        (lost, f"{key} is missing"),
        ({**weights, f"{key}s": weights[key]}, f"{key}s is surplus"),
        ({**weights, key: weights[key][:-1]}, f"{key} has shape"),
    ):
        with pytest.raises(ValueError, match="does not fit: " + message.replace(".", r"\.")):
            load_published(name, changed)


def test_every_fault_is_named(parity):
    weights = earthformer_weights(parity, "earthformer_enso")
    index = "encoder.blocks.0.0.attn_l.0.relative_position_index"
    for change, message in (
        ({"z_proj.bias": None}, "z_proj.bias is missing"),
        ({"initial_encoder.conv_block.0.bias": None}, "initial_encoder.conv_block.0.bias is missing"),
        ({"z_proj.gain": torch.ones(1)}, "z_proj.gain is surplus"),
        ({"nowhere.relative_position_index": torch.ones(1)}, "nowhere.relative_position_index is surplus"),
        ({"z_proj.bias": torch.ones(3)}, r"z_proj.bias has shape \(3,\): needed \(128,\)"),
        ({index: weights[index][:2]}, r"relative_position_index has shape \(2, 12\): needed \(12, 12\)"),
        ({index: weights[index].float()}, "relative_position_index is torch.float32: needed whole numbers"),
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
