"""Cuboids, masks, relative positions, patterns and attention against the original's numbers."""

import json
import math

import numpy as np
import pytest
import torch
from reference_config import put_bugs_back

from earthformer.config import Attention, CrossCuboid, Cuboid, GlobalVectors
from earthformer.cuboid import (
    CROSS_PATTERNS,
    SELF_PATTERNS,
    CuboidCrossAttention,
    CuboidSelfAttention,
    clip,
    cross_attention_mask,
    cross_pattern,
    decompose,
    merge,
    pad,
    relative_position_index,
    self_attention_mask,
    self_pattern,
    unpad,
)

BUGGY = ("clip_w_misaligned_relpos", "global_ignore_pad_misordered")


@pytest.fixture
def numbers(parity):
    """Loads one of the original's layer fixtures."""
    return lambda name: np.load(parity / "earthformer" / f"{name}.npz")


def cases(numbers, key="cases"):
    return json.loads(str(numbers[key]))


def cuboid_of(case):
    return Cuboid(*(tuple(case[key]) for key in ("cuboid_size", "strategy", "shift_size")))


def state(numbers, tag):
    prefix = f"{tag}/sd/"
    return {
        k.removeprefix(prefix): torch.from_numpy(numbers[k]) for k in numbers.files if k.startswith(prefix)
    }


def given(numbers, tag, name):
    key = f"{tag}/in/{name}"
    return torch.from_numpy(numbers[key]) if key in numbers.files else None


def test_reordering(numbers):
    fixture = numbers("l01_cuboid_reorder")
    for i, case in enumerate(cases(fixture)):
        x = torch.from_numpy(fixture[f"{i}/x"])
        y = decompose(x, case["cuboid_size"], case["strategy"])
        np.testing.assert_array_equal(y, fixture[f"{i}/y"])
        assert torch.equal(merge(y, case["cuboid_size"], case["strategy"], tuple(x.shape[1:4])), x)


def test_masks_and_clipping(numbers):
    fixture = numbers("l02_attention_masks")
    for i, case in enumerate(cases(fixture, "self_cases")):
        mask = self_attention_mask(tuple(case["data_shape"]), cuboid_of(case), case["padding_type"])
        np.testing.assert_array_equal(mask, fixture[f"self/{i}"])
    for i, case in enumerate(cases(fixture, "cross_cases")):
        cuboid = CrossCuboid(
            tuple(case["cuboid_hw"]), tuple(case["strategy"]), tuple(case["shift_hw"]), case["n_temporal"]
        )
        shape = (case["T_x"], case["H"], case["W"])
        mask = cross_attention_mask(shape, case["T_mem"], cuboid, case["padding_type"])
        np.testing.assert_array_equal(mask, fixture[f"cross/{i}"])
    for case in cases(fixture, "clip_cases"):
        clipped = clip(cuboid_of(case), tuple(case["data_shape"]))
        assert [list(clipped.size), list(clipped.shift)] == case["out"]


def test_relative_positions(numbers):
    fixture = numbers("l03_relative_position_index")
    for key in fixture.files:
        kind, size = key.split("/")
        size = tuple(int(n) for n in size.split("x"))
        if kind.endswith("_table_rows"):
            assert fixture[key] == math.prod(2 * n - 1 for n in size)
        else:
            np.testing.assert_array_equal(relative_position_index(size), fixture[key])


def test_clipped_cuboids_keep_true_displacements():
    whole = relative_position_index((2, 4, 8)).reshape(2, 4, 8, 2, 4, 8)
    clipped = relative_position_index((2, 4, 8), (2, 3, 6), (2, 3, 6)).reshape(2, 3, 6, 2, 3, 6)
    assert torch.equal(clipped, whole[:, :3, :6, :, :3, :6])


def test_named_patterns(parity):
    patterns = json.loads((parity / "earthformer" / "l04_patterns.json").read_text())
    assert set(patterns["self"]) == set(SELF_PATTERNS)
    assert set(patterns["cross"]) == set(CROSS_PATTERNS)
    for name, rows in patterns["self"].items():
        for row in rows:
            layers = self_pattern(name, tuple(row["shape"][:3]))
            found = [
                [list(getattr(layer, part)) for layer in layers] for part in ("size", "strategy", "shift")
            ]
            assert found == row["out"], (name, row["shape"])
    for name, rows in patterns["cross"].items():
        for row in rows:
            layers = cross_pattern(name, tuple(row["shape"][:3]))
            found = [
                [list(getattr(layer, part)) for layer in layers] for part in ("hw", "shift_hw", "strategy")
            ]
            assert [*found, [layer.temporal for layer in layers]] == row["out"], (name, row["shape"])


def test_an_unknown_pattern_is_named():
    with pytest.raises(ValueError, match="'axiall' is unknown: needed a known one, such as axial"):
        self_pattern("axiall", (4, 8, 8))
    for name in ("video_swin_3x4", "spatial_lg_5", "axial_space_dilate_3", "full_2"):
        with pytest.raises(ValueError, match=f"'{name}' is unknown"):
            self_pattern(name, (4, 8, 8))
    with pytest.raises(ValueError, match="'cross_3x3' is unknown"):
        cross_pattern("cross_3x3", (4, 8, 8))
    layers = (Cuboid((1, 2, 2)),)
    assert self_pattern(layers, (4, 8, 8)) is layers


def test_padding(numbers):
    fixture = numbers("l05_padding")
    x = torch.from_numpy(fixture["x"])
    for i, case in enumerate(cases(fixture)):
        amount, padding, left = tuple(case["pad_thw"]), case["padding_type"], case["t_pad_left"]
        padded = pad(x, amount, padding, left)
        np.testing.assert_array_equal(padded, fixture[f"{i}/padded"])
        if padding == "nearest" or not left:  # memory, padded on the left, is never unpadded
            np.testing.assert_array_equal(unpad(padded, amount, padding), fixture[f"{i}/unpadded"])


def attention_options(case):
    return Attention(
        heads=case["num_heads"],
        padding=case.get("padding_type", "ignore"),
        relative_position=case.get("use_relative_pos", True),
        output_projection=case.get("use_final_proj", True),
        qkv_bias=case.get("qkv_bias", False),
        qk_scale=case.get("qk_scale"),
        dropout=0.0,
        projection_dropout=0.0,
    )


def global_options(case):
    if not case.get("use_global_vector", False):
        return None
    return GlobalVectors(
        count=3,
        ratio=case.get("global_dim_ratio", 1),
        separate_projections=case.get("separate_global_qkv", False),
        attend_each_other=case.get("use_global_self_attn", False),
    )


def self_attention(fixture, tag):
    case, x = json.loads(str(fixture[f"{tag}/cfg"])), given(fixture, tag, "x")
    cuboid = Cuboid(
        tuple(case["cuboid_size"]),
        tuple(case.get("strategy", "lll")),
        tuple(case.get("shift_size", (0, 0, 0))),
    )
    shape = tuple(x.shape[1:4])
    layer = CuboidSelfAttention(case["dim"], cuboid, shape, attention_options(case), global_options(case))
    weights = state(fixture, tag)
    weights.pop("relative_position_index", None)
    layer.load_state_dict(weights)
    return layer.eval(), x, given(fixture, tag, "global_vectors")


def test_self_attention(numbers):
    fixture = numbers("l06_self_attention")
    for tag in cases(fixture):
        layer, x, g = self_attention(fixture, tag)
        if tag in BUGGY:
            right = layer(x, g)[0]
            put_bugs_back(layer)
            assert g is not None or not torch.allclose(layer(x, g)[0], right, atol=1e-4), tag
        y, dg = layer(x, g)
        np.testing.assert_allclose(y.detach(), fixture[f"{tag}/out/x"], rtol=0, atol=5e-6, err_msg=tag)
        if g is not None:
            needed = fixture[f"{tag}/out/global_vectors"]
            np.testing.assert_allclose(dg.detach(), needed, rtol=0, atol=5e-6, err_msg=tag)
        layer.fuse()
        torch.testing.assert_close(layer(x, g)[0], y, rtol=0, atol=1e-6)


def test_cross_attention(numbers):
    fixture = numbers("l07_cross_attention")
    for tag in cases(fixture):
        case = json.loads(str(fixture[f"{tag}/cfg"]))
        x, memory = given(fixture, tag, "x"), given(fixture, tag, "mem")
        cuboid = CrossCuboid(
            tuple(case["cuboid_hw"]),
            tuple(case["strategy"]),
            tuple(case.get("shift_hw", (0, 0))),
            case.get("n_temporal", 1),
        )
        layer = CuboidCrossAttention(
            case["dim"],
            cuboid,
            tuple(x.shape[1:4]),
            memory.shape[1],
            case["max_temporal_relative"],
            attention_options(case),
            case.get("cross_last_n_frames"),
            global_options(case),
        )
        weights = state(fixture, tag)
        weights.pop("relative_position_index", None)
        layer.load_state_dict(weights)
        y = layer.eval()(x, memory, given(fixture, tag, "mem_global_vectors"))
        np.testing.assert_allclose(y.detach(), fixture[f"{tag}/out/x"], rtol=0, atol=5e-6, err_msg=tag)


def test_too_short_a_table_is_named():
    with pytest.raises(ValueError, match="a cuboid holds 6 frames: needed at most max_frames, 5"):
        CuboidCrossAttention(8, CrossCuboid((1, 1)), (4, 2, 2), 6, 5, Attention())


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 0)])
def test_clipping_and_masks_against_plain_attention(shift):
    """Every token by itself, with true displacements, and global vectors that see real tokens only."""
    torch.manual_seed(0)
    shape, size, dim, heads = (3, 6, 5), (2, 4, 8), 8, 2
    shared = GlobalVectors(3)
    options = Attention(heads, padding="ignore", dropout=0.0, projection_dropout=0.0)
    layer = CuboidSelfAttention(dim, Cuboid(size, shift=shift), shape, options, shared).double().eval()
    x = torch.randn(1, *shape, dim, dtype=torch.float64)
    g = torch.randn(1, 3, dim, dtype=torch.float64)
    with torch.no_grad():
        found, found_g = layer(x, g)
        needed, needed_g = plain_attention(layer, x[0], g[0], shape, (2, 4, 5), size, shift)
    torch.testing.assert_close(found[0], needed, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_g[0], needed_g, rtol=0, atol=1e-12)


def plain_attention(layer, x, g, shape, clipped, table, shift):
    def split(vectors):
        return vectors.unflatten(-1, (layer.heads, -1))

    x, g = layer.norm(x), layer.global_vec_norm(g)
    tokens = x.reshape(-1, x.shape[-1])
    q, k, v = (split(part) for part in layer.qkv(tokens).chunk(3, -1))
    gk, gv = (split(part) for part in layer.l2g_global_kv_net(g).chunk(2, -1))
    gq = split(layer.l2g_q_net(tokens))
    # After rolling by -shift, index i of the field stands at (i - shift) mod the padded length; a token that
    # wrapped round is no neighbour of one that did not.
    padded = [n + -n % c for n, c in zip(shape, clipped, strict=True)]
    places = []
    for where in np.ndindex(*shape):
        rolled = [(i - s) % n for i, s, n in zip(where, shift, padded, strict=True)]
        block = [(r // c, i < s) for r, c, i, s in zip(rolled, clipped, where, shift, strict=True)]
        places.append((block, [r % c for r, c in zip(rolled, clipped, strict=True)]))
    rows = []
    for i, (block, inside) in enumerate(places):
        mates = [j for j, (other, _) in enumerate(places) if other == block]
        bias = []
        for j in mates:
            d = [a - b + n - 1 for a, b, n in zip(inside, places[j][1], table, strict=True)]
            bias.append((d[0] * (2 * table[1] - 1) + d[1]) * (2 * table[2] - 1) + d[2])
        local = torch.einsum("hd,jhd->hj", q[i], k[mates]) * layer.scale
        local = local + layer.relative_position_bias_table[bias].T
        others = torch.einsum("hd,ghd->hg", gq[i], gk) * layer.scale
        weights = torch.cat([local, others], -1).softmax(-1)
        rows.append(torch.einsum("hj,jhd->hd", weights, torch.cat([v[mates], gv])).flatten())
    increment = layer.proj(torch.stack(rows)).reshape(*shape, -1)

    keys, values = split(layer.g2l_k_net(tokens)), split(layer.g2l_v_net(tokens))
    oq, ok, ov = (split(part) for part in layer.g2g_global_qkv_net(g).chunk(3, -1))
    local = torch.einsum("ghd,jhd->hgj", split(layer.g2l_global_q_net(g)), keys)
    weights = torch.cat([local, torch.einsum("ghd,jhd->hgj", oq, ok)], -1).mul(layer.scale).softmax(-1)
    pooled = torch.einsum("hgj,jhd->ghd", weights, torch.cat([values, ov]))
    return increment, layer.global_proj(pooled.flatten(1))
