"""Scores against the published numbers, pysteps and hand counts; and that they add up however sharded."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pysteps.verification.detcatscores import det_cat_fct

from earthformer.scores import Contingency, Errors, Nino, max_pool, nino34, nino_weights

THRESHOLDS = (16, 74, 133, 160, 181, 219)
MODES = {0: "pooled", 2: "frame-averaged"}


def encoded(scaled: np.ndarray) -> torch.Tensor:
    # The published scores undo the scaling in float32 by this very division.
    return torch.from_numpy(scaled) / torch.tensor(1 / 255, dtype=torch.float32)


@pytest.fixture(scope="module")
def sevir(parity):
    numbers = np.load(parity / "earthformer" / "x01_sevir_skill.npz")
    states = [
        Contingency.of(encoded(numbers[f"pred_{b}"]), encoded(numbers[f"target_{b}"]), thresholds=THRESHOLDS)
        for b in range(3)
    ]
    return numbers, states[0] + states[1] + states[2]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_sevir_counts_and_scores(sevir, mode):
    numbers, state = sevir
    state = state.under(MODES.get(mode, "pooled"))
    for ours, theirs in ((state.hits, "hits"), (state.misses, "misses"), (state.false_alarms, "fas")):
        expected = numbers[f"mode{mode}/state/{theirs}"]
        np.testing.assert_array_equal(ours if expected.ndim == 2 else ours.sum(1), expected)
    scores = state.per_lead_time() if mode == 1 else state.per_threshold()
    for i, threshold in enumerate(THRESHOLDS):
        for name in ("csi", "pod", "sucr"):
            expected = numbers[f"mode{mode}/{threshold}/{name}"]
            np.testing.assert_allclose(scores[name.upper()][i], expected, atol=2e-6)
    if mode != 1:
        result = state.result()
        for name in ("csi", "pod", "sucr"):
            assert result[f"{name.upper()}-M"] == pytest.approx(float(numbers[f"mode{mode}/avg/{name}"]), abs=2e-6)


def test_published_bias_is_ours_mangled(sevir):
    numbers, state = sevir
    ours = state.per_threshold()["bias"]
    for i, threshold in enumerate(THRESHOLDS):
        theirs = float(numbers[f"mode0/{threshold}/bias"])
        assert theirs == pytest.approx((float(ours[i]) / math.log(2)) ** 2, rel=1e-5)


@pytest.mark.parametrize("pool", [1, 4, 16])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pooled_scores_of_prediff(parity, pool, mode):
    numbers = np.load(parity / "prediff" / "skill_scores.npz")
    state = None
    for update in range(2):
        part = Contingency.of(
            torch.from_numpy(numbers["in/pred"][update]) * 255,
            torch.from_numpy(numbers["in/target"][update]) * 255,
            thresholds=THRESHOLDS,
            protocol=MODES.get(mode, "pooled"),
            pool=pool,
        )
        state = part if state is None else state + part
    prefix = f"out/sevir{'' if pool == 1 else f'_pool{pool}'}/mode{mode}"
    for ours, theirs in ((state.hits, "hits"), (state.misses, "misses"), (state.false_alarms, "fas")):
        expected = numbers[f"{prefix}/{theirs}"]
        np.testing.assert_array_equal(ours if expected.ndim == 2 else ours.sum(1), expected)
    scores = state.per_lead_time() if mode == 1 else state.per_threshold()
    for name in ("csi", "pod", "sucr"):
        values = torch.cat([scores[name.upper()], scores[name.upper()].mean(0, keepdim=True)])
        np.testing.assert_allclose(values, numbers[f"{prefix}/{name}"], atol=1e-6)


def test_against_pysteps():
    rng = np.random.default_rng(0)
    forecast, truth = rng.gamma(0.5, 2, (2, 1, 1, 40, 40, 1))
    state = Contingency.of(torch.from_numpy(forecast), torch.from_numpy(truth), thresholds=(1.0,))
    theirs = det_cat_fct(forecast.ravel(), truth.ravel(), 1.0 - 1e-12, scores=("CSI", "POD", "FAR", "BIAS"))
    ours = state.result()
    assert ours["CSI-1"] == pytest.approx(theirs["CSI"], abs=1e-6)
    assert ours["POD-1"] == pytest.approx(theirs["POD"], abs=1e-6)
    assert ours["SUCR-1"] == pytest.approx(1 - theirs["FAR"], abs=1e-6)
    assert ours["bias-1"] == pytest.approx(theirs["BIAS"], abs=1e-6)


def test_hand_counted():
    truth = torch.tensor([1.0, 1.0, 0.0, 0.0, math.nan, 1.0]).reshape(1, 1, 1, 6, 1)
    forecast = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, math.nan]).reshape(1, 1, 1, 6, 1)
    state = Contingency.of(forecast, truth, thresholds=(0.5,))
    assert (state.hits.item(), state.misses.item(), state.false_alarms.item()) == (1, 1, 1)
    assert state.events() == [3]
    errors = Errors.of(forecast, truth, scale=2.0).result()
    assert errors == {"MSE": pytest.approx(2 * 4 / 4), "MAE": pytest.approx(2 * 2 / 4)}


def test_protocols_pools_and_thresholds_do_not_mix():
    field = torch.rand(1, 2, 8, 8, 1)
    pooled = Contingency.of(field, field, thresholds=(0.5,))
    for other in (
        pooled.under("frame-averaged"),
        Contingency.of(field, field, thresholds=(0.5,), pool=4),
        Contingency.of(field, field, thresholds=(0.6,)),
        Contingency.of(field[:, :1], field[:, :1], thresholds=(0.5,)),
    ):
        with pytest.raises(ValueError, match="cannot be put beside"):
            pooled + other
    with pytest.raises(ValueError, match="needed"):
        Contingency.of(field, field[:, :1], thresholds=(0.5,))
    with pytest.raises(ValueError, match="scale"):
        Errors.of(field, field) + Errors.of(field, field, scale=2.0)


def test_missing_pixels_spread_over_their_pool():
    field = torch.arange(16.0).reshape(1, 1, 4, 4, 1)
    field[0, 0, 0, 0, 0] = math.nan
    pooled = max_pool(field, 2)[0, 0, :, :, 0]
    assert torch.isnan(pooled[0, 0])
    assert pooled.flatten().tolist()[1:] == [7.0, 13.0, 15.0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=0, max_size=4), st.integers(0, 2**16))
def test_any_sharding_gives_the_same(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    forecast, truth = torch.rand(2, 10, 3, 8, 8, 1, generator=generator)
    index, label = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64) + 1e4
    edges = [0, *sorted(cuts), 10]
    parts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
    counts = sum_states([Contingency.of(forecast[p], truth[p], thresholds=(0.2, 0.8)) for p in parts])
    whole = Contingency.of(forecast, truth, thresholds=(0.2, 0.8))
    assert counts.to_dict() == whole.to_dict()
    errors = sum_states([Errors.of(forecast[p], truth[p]) for p in parts]).result()
    assert errors == pytest.approx(Errors.of(forecast, truth).result(), rel=1e-12)
    nino = sum_states([Nino.of_index(index[p], label[p]) for p in parts]).result()
    assert nino == pytest.approx(Nino.of_index(index, label).result(), rel=1e-9)


def sum_states(states):
    total = states[0]
    for state in states[1:]:
        total = total + state
    return total


def test_nino_scores(parity):
    numbers = np.load(parity / "earthformer" / "x03_enso.npz")
    to_kelvin = 10.198975563049316 + 16.549121856689453
    sst = torch.from_numpy(numbers["sst_pred"]).double() * to_kelvin - 16.549121856689453
    np.testing.assert_allclose(nino34(sst), numbers["nino_pred"], atol=5e-6)
    labels = torch.from_numpy(numbers["nino_label"])
    result = Nino.of(sst, labels).result()
    assert result["C-Nino3.4-M"] == pytest.approx(float(numbers["C_nino34_M"]), abs=5e-6)
    assert result["C-Nino3.4-WM"] == pytest.approx(float(numbers["C_nino34_WM"]), abs=5e-6)
    assert result["RMSE"] == pytest.approx(float(numbers["nino_rmse"]), abs=5e-6)
    long = Nino.of_index(torch.from_numpy(numbers["p24"]), torch.from_numpy(numbers["t24"])).per_lead_time()
    assert float((nino_weights(24) * long["C-Nino3.4"]).sum()) == pytest.approx(
        float(numbers["sum_weighted_corr_24"]), rel=1e-5
    )
    assert float(long["RMSE"].sum()) == pytest.approx(float(numbers["sum_rmse_24"]), rel=1e-5)


def test_states_survive_json():
    field = torch.rand(2, 3, 8, 8, 1)
    for state in (
        Contingency.of(field, 1 - field, thresholds=(0.5,), pool=4),
        Errors.of(field, 1 - field),
        Nino.of_index(field[:, :, 0, 0, 0], field[:, :, 1, 0, 0]),
    ):
        again = type(state).from_dict(json.loads(json.dumps(state.to_dict())))
        assert again.result() == state.result()
