"""Feed-forward, patch merging, positions and stems against the original's numbers and plain formulas."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from earthformer import layers
from earthformer.config import FeedForward, StemStage
from earthformer.layers import (
    Dropout,
    FinalDecoder,
    InitialEncoder,
    PatchMerging,
    PositionEmbedding,
    PositionwiseFeedForward,
    RMSNorm,
    Upsample,
    composed_kernel,
    composed_upsample,
    in_chunks,
    linear,
    nearest_resize,
)


def layer_of(case, x):
    """Our layer for the original's class and arguments."""
    match case["cls"]:
        case "PatchMerging3D":
            return PatchMerging(
                case["dim"], tuple(case["downsample"]), case.get("out_dim"), case["padding_type"]
            )
        case "Upsample3DLayer":
            return Upsample(case["dim"], case["out_dim"], tuple(case["target_size"][1:]))
        case "PosEmbed":
            return PositionEmbedding(
                (case["maxT"], case["maxH"], case["maxW"], case["embed_dim"]), case["typ"]
            )
        case "PositionwiseFFN":
            options = FeedForward(case["activation"], case.get("gated_proj", False), 0.0)
            return PositionwiseFeedForward(
                case["units"], options, hidden=case["hidden_size"], pre_norm=case["pre_norm"]
            )
        case "InitialEncoder":
            stage = StemStage(
                case["out_dim"], (1, *case["downsample_scale"]), case["num_conv_layers"], groups=16
            )
            return InitialEncoder(case["dim"], (stage,), "leaky", case["padding_type"])
        case "InitialStackPatchMergingEncoder":
            stages = zip(
                case["out_dim_list"],
                case["downsample_scale_list"],
                case["num_conv_per_merge_list"],
                strict=True,
            )
            stages = tuple(StemStage(dim, (1, s, s), convs) for dim, s, convs in stages)
            return InitialEncoder(case["in_dim"], stages, "leaky", case["padding_type"])
        case "FinalDecoder":
            stage = StemStage(case["dim"], convs=case["num_conv_layers"], groups=16)
            return FinalDecoder((stage,), (tuple(case["target_thw"]), tuple(x.shape[1:])), "leaky")
        case "FinalStackUpsamplingDecoder":
            shapes = [tuple(shape) for shape in case["target_shape_list"]]
            stages = [
                StemStage(shape[3], convs=convs)
                for shape, convs in zip(shapes, case["num_conv_per_up_list"], strict=True)
            ]
            return FinalDecoder(tuple(stages[::-1]), (*shapes[::-1], tuple(x.shape[1:])), "leaky")
    raise AssertionError(case)


def test_layers_match_the_original(parity):
    fixture = np.load(parity / "earthformer" / "l08_misc_layers.npz")
    for tag in json.loads(str(fixture["cases"])):
        x = torch.from_numpy(fixture[f"{tag}/in/x"])
        case = json.loads(str(fixture[f"{tag}/cfg"]))
        layer = layer_of(case, x)
        prefix = f"{tag}/sd/"
        names = {k.removeprefix(prefix): k for k in fixture.files if k.startswith(prefix)}
        for part in ("conv_block.", "patch_merge.", "upsample."):
            names = {
                n.replace(part, part[:-1] + "_list.0.", 1) if n.startswith(part) else n: k
                for n, k in names.items()
            }
        layer.load_state_dict({name: torch.from_numpy(fixture[key]) for name, key in names.items()})
        y = layer.eval()(x)
        np.testing.assert_allclose(y.detach(), fixture[f"{tag}/out/x"], rtol=0, atol=5e-6, err_msg=tag)
        with torch.inference_mode():
            np.testing.assert_allclose(layer(x), fixture[f"{tag}/out/x"], rtol=0, atol=5e-6, err_msg=tag)


@pytest.mark.parametrize("scale", [(1, 2), (2, 1), (2, 2), (3, 3), (4, 2), (6, 5)])
@pytest.mark.parametrize("hw", [(1, 1), (2, 3), (5, 4)])
def test_composed_convolutions_are_the_two_in_turn(scale, hw):
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    second = torch.nn.Conv2d(5, 2, 3, padding=1).double()
    x = torch.randn(2, 3, *hw, dtype=torch.float64, requires_grad=True)
    weights = [x, *first.parameters(), *second.parameters()]
    cotangent = torch.randn(2, 2, hw[0] * scale[0], hw[1] * scale[1], dtype=torch.float64)

    plain = second(first(F.interpolate(x, scale_factor=scale, mode="nearest")))
    composed = composed_upsample(x, first, second, scale, *composed_kernel(first, second, scale))
    torch.testing.assert_close(composed, plain, rtol=0, atol=1e-12)
    needed = torch.autograd.grad(plain, weights, cotangent)
    found = torch.autograd.grad(composed, weights, cotangent)
    torch.testing.assert_close(found, needed, rtol=0, atol=1e-11)


def test_sizes_that_are_no_multiples_go_the_plain_way():
    torch.manual_seed(0)
    stages = (StemStage(4, (1, 2, 2)), StemStage(8, (1, 2, 3)))
    decoder = FinalDecoder(stages, ((1, 7, 6, 1), (1, 4, 3, 4), (1, 2, 1, 8)), "leaky").double()
    assert decoder.scales == [(2, 3), None]
    x = torch.randn(1, 2, 2, 1, 8, dtype=torch.float64)
    y = decoder(x)
    assert y.shape == (1, 2, 7, 6, 4)
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)
    for up, block, size in zip(decoder.upsample_list, decoder.conv_block_list, ((4, 3), (7, 6)), strict=True):
        frames = block(up.conv(F.interpolate(frames, size=size, mode="nearest")))
    torch.testing.assert_close(y[0], frames.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


def test_linear_is_linear():
    torch.manual_seed(0)
    for rows in (3, 1000):
        x, weight, bias = torch.randn(2, rows, 8), torch.randn(5, 8), torch.randn(5)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    strided = torch.randn(8, 40, 30).permute(2, 1, 0)
    torch.testing.assert_close(linear(strided, weight), F.linear(strided, weight), rtol=1e-5, atol=1e-5)


def test_root_mean_square_norm():
    norm = RMSNorm(4)
    norm.scale.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    torch.testing.assert_close(norm(x), norm.scale * x / (2.5 + 1e-5))


def test_dropout_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    x = torch.ones(100_000, requires_grad=True)
    y = Dropout(0.1)(x)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.9], rel=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    assert Dropout(0.1).eval()(x) is x


def test_nearest_resize_is_that_of_interpolate():
    x = torch.randn(1, 3, 5, 7, 2)
    needed = F.interpolate(x.permute(0, 4, 1, 2, 3), (4, 3, 11), mode="nearest").permute(0, 2, 3, 4, 1)
    assert torch.equal(nearest_resize(x, (4, 3, 11)), needed)


def test_chunks_bound_what_is_seen_at_once(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_PIXELS", 24)
    seen = []

    def double(part):
        seen.append(part.shape[0] * part.shape[1])
        return 2 * part

    x = torch.randn(2, 5, 2, 3, 1)
    with torch.no_grad():
        assert torch.equal(in_chunks(double, x, 6), 2 * x)
    assert seen == [4, 4, 2]
    assert torch.equal(in_chunks(double, x.requires_grad_(), 6), 2 * x)
    assert seen[3:] == [10]


def test_temporal_merging_is_not_split_by_frames(monkeypatch):
    torch.manual_seed(0)
    encoder = InitialEncoder(1, (StemStage(4, (2, 2, 2)),), "gelu", "zeros")
    x = torch.randn(1, 5, 4, 4, 1)
    whole = encoder(x).detach()
    assert whole.shape == (1, 3, 2, 2, 4)
    monkeypatch.setattr(layers, "CHUNK_PIXELS", 1)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), whole)
