"""What a configuration refuses, how scalings invert, and that configurations survive being data."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from earthformer.config import (
    Attention,
    CrossCuboid,
    Cuboid,
    Decoder,
    EarthformerConfig,
    Encoder,
    FeedForward,
    GlobalVectors,
    Scaling,
    StemStage,
)
from earthformer.presets import EARTHFORMERS

ENSO = EARTHFORMERS["earthformer_enso"]


@pytest.mark.parametrize("name", EARTHFORMERS)
def test_presets_survive_json(name):
    written = json.loads(json.dumps(dataclasses.asdict(EARTHFORMERS[name])))
    assert TypeAdapter(EarthformerConfig).validate_python(written) == EARTHFORMERS[name]


def test_explicit_cuboids_survive_json():
    config = dataclasses.replace(
        ENSO,
        encoder=Encoder(patterns=((Cuboid((2, 4, 4), ("l", "d", "l"), (1, 0, 2)),), "axial")),
        decoder=Decoder(cross_patterns=((CrossCuboid((2, 2), temporal=2),),)),
    )
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TypeAdapter(EarthformerConfig).validate_python(written) == config


def test_shapes_of_the_published_model():
    sevir = EARTHFORMERS["earthformer_sevir"]
    assert sevir.memory_shapes == ((13, 32, 32, 128), (13, 16, 16, 256))
    assert [shape[1] for shape in sevir.stem_shapes] == [384, 128, 64, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": (12, 24, 48)}, r"context is \(12, 24, 48\): needed \(T, H, W, C\)"),
        ({"target": (14, 24, 24, 1)}, r"target \(H, W\) is \(24, 24\): needed \(24, 48\)"),
        ({"widths": (64, 130)}, "width is 130: needed a multiple of the 4 heads"),
        ({"widths": ()}, "widths is .*: needed at least one level"),
        ({"widths": (32, 64)}, "last stem width is 64: needed 32"),
        ({"stem": ()}, "stem is .*: needed at least one stage"),
        ({"stem": (StemStage(64, groups=7),)}, "stem width is 64: needed a multiple of its 7 groups"),
        ({"stem": (StemStage(64, (1, 0, 1)),)}, "stem scale"),
        ({"stem": (StemStage(64, convs=0),)}, "stem convs is 0"),
        ({"stem": (StemStage(16, final_convs=0), StemStage(64))}, "final_convs is 0: needed at least 1"),
        ({"encoder": Encoder(depth=(1,))}, r"encoder.depth is \(1,\): needed 2 depths"),
        ({"encoder": Encoder(patterns=("axial",) * 3)}, "encoder.patterns is .*: needed 1 or 2"),
        ({"decoder": Decoder(cross_patterns=((),))}, "decoder.cross_patterns"),
        ({"decoder": Decoder(cross_start=2)}, "decoder.cross_start is 2: needed a level from 0 to 1"),
        ({"decoder": Decoder(cross_last_frames=0)}, "decoder.cross_last_frames is 0"),
        ({"decoder": Decoder(initial="noise")}, "decoder.initial is 'noise': needed one of zeros"),
        ({"attention": Attention(heads=0)}, "heads is 0"),
        (
            {"attention": Attention(padding="wrap")},
            "attention.padding is 'wrap': needed one of zeros, ignore",
        ),
        ({"attention": Attention(dropout=1.0)}, "attention.dropout is 1.0: needed a rate"),
        ({"feed_forward": FeedForward(activation="tanh")}, "feed_forward.activation is 'tanh'"),
        ({"global_vectors": GlobalVectors(count=-1)}, "global_vectors.count is -1"),
        (
            {"global_vectors": GlobalVectors(2, ratio=2, separate_projections=False)},
            "global_vectors.ratio is 2: needed 1, or more with separate_projections",
        ),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"downsample": 0}, "downsample is 0"),
    ],
)
def test_an_impossible_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENSO, **change)


def test_impossible_cuboids_are_named():
    with pytest.raises(ValueError, match=r"cuboid size is \(0, 1, 1\)"):
        Cuboid((0, 1, 1))
    with pytest.raises(ValueError, match=r"cuboid shift is \(0, 2, 0\): needed .* the size \(2, 2, 2\)"):
        Cuboid((2, 2, 2), shift=(0, 2, 0))
    with pytest.raises(ValueError, match="cross cuboid shift"):
        CrossCuboid((2, 2), shift_hw=(0, 3))


def test_linear_scaling():
    vil = torch.arange(256, dtype=torch.uint8)
    scaled = Scaling("linear", 1 / 255).encode(vil)
    assert scaled.dtype == torch.float32
    assert scaled[[0, -1]].tolist() == [0.0, 1.0]
    assert torch.equal(Scaling("linear", 1 / 255).decode(scaled).round().to(torch.uint8), vil)
    offset = Scaling("linear", 1 / 47.54, -33.44)
    assert offset.encode(torch.tensor([100.0])).item() == pytest.approx((100 - 33.44) / 47.54)
    assert offset.decode(offset.encode(torch.tensor([100.0]))).item() == pytest.approx(100)


def test_logarithmic_scaling():
    rain = torch.tensor([-1.0, 0.0, 0.1, 3.0, 100.0, 150.0], dtype=torch.float64)
    scaled = Scaling("log").encode(rain)
    assert scaled.dtype == torch.float32
    needed = np.log1p(rain.clamp(min=0).numpy() / 0.1) / np.log1p(1000)
    np.testing.assert_allclose(scaled, needed, rtol=1e-6)
    np.testing.assert_allclose(Scaling("log").decode(scaled), rain.clamp(min=0), rtol=1e-5)
    assert Scaling("log").decode(torch.tensor([-0.2])).item() == 0.0
    assert Scaling("log").encode(torch.tensor([7], dtype=torch.uint8)).item() == pytest.approx(
        np.log1p(70) / np.log1p(1000), rel=1e-6
    )


def test_an_impossible_scaling_is_named():
    with pytest.raises(ValueError, match="kind is 'sqrt': needed linear or log"):
        Scaling("sqrt")
    with pytest.raises(ValueError, match="scale is 0"):
        Scaling(scale=0.0)
