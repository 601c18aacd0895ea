"""Scores against the published numbers, pysteps and hand counts; and that they add up however sharded."""

import itertools
import json
import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pysteps.verification.detcatscores import det_cat_fct

from earthformer.config import Scaling
from earthformer.scores import Contingency, Errors, Nino, max_pool, nino34, nino_weights

THRESHOLDS = (16, 74, 133, 160, 181, 219)
MODES = {0: "pooled", 2: "frame-averaged"}
SKILL = ("csi", "pod", "sucr")


def encoded(scaled: np.ndarray) -> torch.Tensor:
    # The published scores undo the scaling in float32 by this very division.
    return torch.from_numpy(scaled) / torch.tensor(1 / 255, dtype=torch.float32)


def counted(state: Contingency) -> dict[str, torch.Tensor]:
    return {"hits": state.hits, "misses": state.misses, "fas": state.false_alarms}


@pytest.fixture(scope="module")
def sevir(parity):
    numbers = np.load(parity / "earthformer" / "x01_sevir_skill.npz")
    states = [
        Contingency.of(encoded(numbers[f"pred_{b}"]), encoded(numbers[f"target_{b}"]), thresholds=THRESHOLDS)
        for b in range(3)
    ]
    return numbers, reduce(add, states)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_sevir_counts_and_scores(sevir, mode):
    numbers, state = sevir
    state = state.under(MODES.get(mode, "pooled"))
    for name, ours in counted(state).items():
        assert ours.dtype == torch.int64
        expected = numbers[f"mode{mode}/state/{name}"]
        np.testing.assert_array_equal(ours if expected.ndim == 2 else ours.sum(1), expected)
    scores = state.per_lead_time() if mode == 1 else state.per_threshold()
    for name in SKILL:
        ours = scores[name.upper()]
        expected = [numbers[f"mode{mode}/{threshold}/{name}"] for threshold in THRESHOLDS]
        np.testing.assert_allclose(ours, expected, atol=2e-6)
        average = numbers[f"mode{mode}/avg/{name}"]
        np.testing.assert_allclose(ours.mean(0), average, atol=2e-6)
        if mode != 1:
            assert state.result()[f"{name.upper()}-M"] == pytest.approx(float(average), abs=2e-6)


@pytest.mark.parametrize("mode", [0, 1])
def test_published_bias_is_ours_mangled(sevir, mode):
    numbers, state = sevir
    ours = state.per_threshold()["bias"] if mode == 0 else state.per_lead_time()["bias"]
    for threshold, bias in zip(THRESHOLDS, ours.numpy(), strict=True):
        theirs = numbers[f"mode{mode}/{threshold}/bias"]
        np.testing.assert_allclose(theirs, (bias / math.log(2)) ** 2, rtol=1e-5)


def test_scaled_fields_come_back_as_the_published_scores_take_them(sevir):
    numbers, _ = sevir
    decoded = Scaling(scale=1 / 255).decode(torch.from_numpy(numbers["pred_0"]))
    np.testing.assert_array_equal(decoded, encoded(numbers["pred_0"]))
    # Observations need no detour: scaling encoded integers and back is exact, up to 254 at least.
    vil = torch.arange(255, dtype=torch.float32)
    assert torch.equal(encoded((vil * torch.tensor(1 / 255)).numpy()), vil)


@pytest.mark.parametrize("pool", [1, 4, 16])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pooled_scores_of_prediff(parity, pool, mode):
    numbers = np.load(parity / "prediff" / "skill_scores.npz")
    updates = [
        Contingency.of(
            torch.from_numpy(numbers["in/pred"][update]) * 255,
            torch.from_numpy(numbers["in/target"][update]) * 255,
            thresholds=THRESHOLDS,
            protocol=MODES.get(mode, "pooled"),
            pool=pool,
        )
        for update in range(2)
    ]
    state = reduce(add, updates)
    prefix = f"out/sevir{'' if pool == 1 else f'_pool{pool}'}/mode{mode}"
    for name, ours in counted(state).items():
        expected = numbers[f"{prefix}/{name}"]
        np.testing.assert_array_equal(ours if expected.ndim == 2 else ours.sum(1), expected)
    scores = state.per_lead_time() if mode == 1 else state.per_threshold()
    for name in SKILL:
        values = torch.cat([scores[name.upper()], scores[name.upper()].mean(0, keepdim=True)])
        np.testing.assert_allclose(values, numbers[f"{prefix}/{name}"], atol=1e-6)
    if mode == 0:
        theirs = numbers[f"{prefix}/bias"][:-1]
        np.testing.assert_allclose(theirs, (scores["bias"] / math.log(2)) ** 2, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), threshold=st.floats(0.05, 3))
def test_against_pysteps(seed, threshold):
    forecast, truth = np.random.default_rng(seed).gamma(0.5, 2, (2, 2, 3, 20, 20, 1))
    state = Contingency.of(torch.from_numpy(forecast), torch.from_numpy(truth), thresholds=(threshold,))
    # An event of pysteps is a value above its threshold, of ours one at or above.
    theirs = det_cat_fct(
        forecast.ravel(), truth.ravel(), np.nextafter(threshold, 0), scores=("CSI", "POD", "FAR", "BIAS")
    )
    ours = {name: float(values[0]) for name, values in state.per_threshold().items()}
    assert ours["CSI"] == pytest.approx(theirs["CSI"], abs=1e-5)
    assert ours["POD"] == pytest.approx(theirs["POD"], abs=1e-5)
    assert ours["SUCR"] == pytest.approx(1 - theirs["FAR"], abs=1e-5)
    assert ours["bias"] == pytest.approx(theirs["BIAS"], abs=1e-5)


def frames(*lead_times: list[float]) -> torch.Tensor:
    """One sample whose frames are single rows."""
    return torch.tensor(lead_times)[None, :, None, :, None]


def test_hand_counted():
    truth = frames([1.0, 1.0, 0.0, 0.0, math.nan, 1.0])
    forecast = frames([1.0, 0.0, 1.0, 0.0, 1.0, math.nan])
    state = Contingency.of(forecast, truth, thresholds=(0.5,))
    assert (state.hits.item(), state.misses.item(), state.false_alarms.item()) == (1, 1, 1)
    assert state.events() == [3]
    errors = Errors.of(forecast, truth, scale=2.0)
    assert errors.result() == {"MSE": pytest.approx(2 * 4 / 4), "MAE": pytest.approx(2 * 2 / 4)}
    assert errors.count.tolist() == [4]


def test_the_two_protocols_by_hand():
    # Lead time 1: four hits. Lead time 2: one hit, three misses.
    state = Contingency.of(
        frames([1.0] * 4, [1.0, 0.0, 0.0, 0.0]), frames([1.0] * 4, [1.0] * 4), thresholds=(1.0,)
    )
    assert state.per_lead_time()["CSI"][0].tolist() == pytest.approx([1, 1 / 4], abs=1e-4)
    assert state.result()["CSI-M"] == pytest.approx(5 / 8, abs=1e-4)
    assert state.under("frame-averaged").result()["CSI-M"] == pytest.approx((1 + 1 / 4) / 2, abs=1e-4)


def test_scores_without_events_are_marked():
    # 0.5 occurs in truth alone, 2 in the forecast alone and at the second lead time, 9 never.
    state = Contingency.of(frames([0.0], [2.0]), frames([0.5], [0.5]), thresholds=(0.5, 2, 9))
    assert state.events() == [2, 1, 0]
    defined = {name: values.tolist() for name, values in state.defined().items()}
    assert defined == {
        "CSI": [True, True, False],
        "POD": [True, False, False],
        "SUCR": [True, True, False],
        "bias": [True, False, False],
    }
    assert state.result()["CSI-9"] == 0
    # A lead time of false alarms alone has a bias of 1 / EPS, which would drown the others in a mean.
    drowned = Contingency.of(frames([1.0], [1.0]), frames([1.0], [0.0]), thresholds=(1,))
    assert drowned.defined()["bias"].tolist() == [True]
    assert drowned.under("frame-averaged").defined()["bias"].tolist() == [False]


def test_protocols_pools_and_thresholds_do_not_mix():
    field = torch.rand(1, 2, 8, 8, 1)
    pooled = Contingency.of(field, field, thresholds=(0.5,))
    refused = {
        "protocol frame-averaged cannot be put beside protocol pooled": pooled.under("frame-averaged"),
        "pool 4 cannot be put beside pool 1": Contingency.of(field, field, thresholds=(0.5,), pool=4),
        r"thresholds \(0.6,\) cannot be put beside thresholds \(0.5,\)": Contingency.of(
            field, field, thresholds=(0.6,)
        ),
        "1 lead times cannot be put beside 2": Contingency.of(field[:, :1], field[:, :1], thresholds=(0.5,)),
    }
    for message, other in refused.items():
        with pytest.raises(ValueError, match=message):
            pooled + other
    with pytest.raises(ValueError, match="needed"):
        Contingency.of(field, field[:, :1], thresholds=(0.5,))


def test_errors_and_indices_of_other_kinds_do_not_mix():
    field = torch.rand(2, 3, 8, 8, 1)
    with pytest.raises(ValueError, match=r"scale 2\.0 cannot be put beside scale 1\.0"):
        Errors.of(field, field) + Errors.of(field, field, scale=2.0)
    with pytest.raises(ValueError, match="1 lead times cannot be put beside 3"):
        Errors.of(field, field) + Errors.of(field[:, :1], field[:, :1])
    index = field[:, :, 0, 0, 0]
    with pytest.raises(ValueError, match="2 lead times cannot be put beside 3"):
        Nino.of_index(index, index) + Nino.of_index(index[:, :2], index[:, :2])
    with pytest.raises(ValueError, match="needed"):
        Nino.of(torch.rand(2, 14, 24, 48), torch.rand(2, 14))


def test_missing_pixels_spread_over_their_pool():
    field = torch.arange(16.0).reshape(1, 1, 4, 4, 1)
    field[0, 0, 0, 0, 0] = math.nan
    pooled = max_pool(field, 2)[0, 0, :, :, 0]
    assert torch.isnan(pooled[0, 0])
    assert pooled.flatten().tolist()[1:] == [7.0, 13.0, 15.0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=0, max_size=4), st.integers(0, 2**16), st.sampled_from([1, 2]))
def test_any_sharding_gives_the_same(cuts, seed, pool):
    generator = torch.Generator().manual_seed(seed)
    forecast, truth = torch.rand(2, 10, 3, 8, 8, 1, generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.05] = math.nan
    # A sum of squares of such values keeps half of its digits.
    index, label = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64) + 1e4
    # Empty shards are shards.
    edges = [0, *sorted(cuts), 10]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def count(part: slice) -> Contingency:
        return Contingency.of(forecast[part], truth[part], thresholds=(0.2, 0.8), pool=pool)

    assert reduce(add, map(count, parts)).to_dict() == count(slice(None)).to_dict()
    errors = reduce(add, (Errors.of(forecast[p], truth[p]) for p in parts)).result()
    assert errors == pytest.approx(Errors.of(forecast, truth).result(), rel=1e-12)
    nino = reduce(add, (Nino.of_index(index[p], label[p]) for p in parts)).result()
    assert nino == pytest.approx(Nino.of_index(index, label).result(), rel=1e-9)


def test_nino_scores(parity):
    numbers = np.load(parity / "earthformer" / "x03_enso.npz")
    to_kelvin = 10.198975563049316 + 16.549121856689453
    sst = torch.from_numpy(numbers["sst_pred"]).double() * to_kelvin - 16.549121856689453
    np.testing.assert_allclose(nino34(sst), numbers["nino_pred"], atol=5e-6)
    labels = torch.from_numpy(numbers["nino_label"])
    state = Nino.of(sst[:4], labels[:4]) + Nino.of(sst[4:], labels[4:])
    result, leads = state.result(), state.per_lead_time()
    assert result["C-Nino3.4-M"] == pytest.approx(float(numbers["C_nino34_M"]), abs=5e-6)
    assert result["C-Nino3.4-WM"] == pytest.approx(float(numbers["C_nino34_WM"]), abs=5e-6)
    assert result["RMSE"] == pytest.approx(float(numbers["nino_rmse"]), abs=5e-6)
    assert float(leads["C-Nino3.4"].sum()) == pytest.approx(float(numbers["sum_corr"]), rel=1e-5)
    assert float(leads["RMSE"].sum()) == pytest.approx(float(numbers["sum_rmse"]), rel=1e-5)
    long = Nino.of_index(torch.from_numpy(numbers["p24"]), torch.from_numpy(numbers["t24"])).per_lead_time()
    weighted = float((nino_weights(24) * long["C-Nino3.4"]).sum())
    assert weighted == pytest.approx(float(numbers["sum_weighted_corr_24"]), rel=1e-5)
    assert float(long["RMSE"].sum()) == pytest.approx(float(numbers["sum_rmse_24"]), rel=1e-5)


def test_correlation_leaves_out_what_is_missing():
    truth = torch.tensor([[1.0], [2.0], [4.0], [math.nan]])
    forecast = torch.tensor([[2.0], [4.0], [8.0], [5.0]])
    state = Nino.of_index(forecast[:2], truth[:2]) + Nino.of_index(forecast[2:], truth[2:])
    assert state.count.tolist() == [3]
    assert state.result()["C-Nino3.4-M"] == pytest.approx(1, abs=1e-5)
    assert state.result()["RMSE"] == pytest.approx(math.sqrt((1 + 4 + 16) / 3))


def test_states_survive_json():
    field = torch.rand(2, 3, 8, 8, 1)
    for state in (
        Contingency.of(field, 1 - field, thresholds=(0.5,), protocol="frame-averaged", pool=4),
        Errors.of(field, 1 - field, scale=1 / 255),
        Nino.of_index(field[:, :, 0, 0, 0], field[:, :, 1, 0, 0]),
    ):
        again = type(state).from_dict(json.loads(json.dumps(state.to_dict())))
        assert again.result() == state.result()
        assert (again + state).to_dict() == (state + state).to_dict()
