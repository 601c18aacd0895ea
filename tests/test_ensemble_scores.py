"""Probabilistic states against scoringrules, pysteps and hand counts; the same however sharded."""

import json
import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import scoringrules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pysteps.utils.spectral import rapsd
from pysteps.verification.ensscores import rankhist
from pysteps.verification.probscores import ROC_curve_accum, ROC_curve_compute, ROC_curve_init
from pysteps.verification.spatialscores import fss

from earthformer import ensemble_scores
from earthformer.ensemble_scores import Brier, Crps, Ranks, Spread, surviving
from earthformer.scores import Contingency, Errors
from earthformer.spatial_scores import Fractions, Spectrum

THRESHOLDS = (0.5, 1.0, 3.0)
SCALES = (1, 3, 4, 16)
SEEDS = torch.arange(4)

KINDS = {
    "crps": lambda members, truth, seeds: Crps.of(members, truth, scale=1 / 255),
    "brier": lambda members, truth, seeds: Brier.of(members, truth, thresholds=THRESHOLDS),
    "ranks": lambda members, truth, seeds: Ranks.of(members, truth, seeds=seeds),
    "spread": lambda members, truth, seeds: Spread.of(members, truth, scale=1 / 255),
    "fss": lambda members, truth, seeds: Fractions.of(members, truth, thresholds=THRESHOLDS, scales=SCALES),
    "spectrum": lambda members, truth, seeds: Spectrum.of(members),
}


def rain(seed: int, members: int = 6, batch: int = 4, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Members (B, M, 3, H, W, 1) and a truth of one distribution, dry in more than half of the pixels."""
    rng = np.random.default_rng(seed)
    wet = rng.gamma(0.5, 2, (batch, members + 1, 3, size, size + 4, 1))
    fields = torch.from_numpy((wet - 1).clip(0)).float()
    return fields[:, :-1], fields[:, -1]


def numbers(state) -> dict:
    return {name: value for name, value in state.to_dict().items() if isinstance(value, list)}


# ----------------------------------------------------------------------------------------------- adding


@pytest.mark.parametrize("kind", KINDS)
def test_any_sharding_gives_the_same(kind):
    members, truth = rain(0)
    members[1, 2], members[2, :, 0, :3] = math.nan, math.nan
    whole = KINDS[kind](members, truth, SEEDS)
    parts = [KINDS[kind](members[[b]], truth[[b]], SEEDS[[b]]) for b in (2, 0, 3, 1)]
    added = reduce(add, parts)
    for name, values in numbers(whole).items():
        np.testing.assert_allclose(numbers(added)[name], values, rtol=1e-12, atol=1e-15)
        if name in whole.COUNTS:
            assert getattr(whole, name).dtype == torch.int64
            assert numbers(added)[name] == values


@pytest.mark.parametrize("kind", KINDS)
def test_states_pass_through_json_exactly(kind):
    state = KINDS[kind](*rain(1), SEEDS)
    again = type(state).from_dict(json.loads(json.dumps(state.to_dict())))
    assert again.to_dict() == state.to_dict()
    state.check_same(again)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_adds_nothing(kind):
    members, truth = rain(2)
    state = KINDS[kind](members, truth, SEEDS)
    nothing = KINDS[kind](members[:0], truth[:0], SEEDS[:0])
    assert (state + nothing).to_dict() == state.to_dict()
    for values in nothing.per_lead_time().values():
        assert torch.isnan(values).any()


@pytest.mark.parametrize("kind", ["crps", "brier", "ranks", "spread"])
def test_strips_of_rows_add_up(kind):
    members, truth = rain(3)
    strips = [
        KINDS[kind](members[:, :, :, rows], truth[:, :, rows], SEEDS) for rows in (slice(7), slice(7, 20))
    ]
    whole = KINDS[kind](members, truth, SEEDS)
    for name, values in numbers(strips[0] + strips[1]).items():
        if kind == "ranks" and name == "count":
            assert np.sum(values) == whole.count.sum()  # Ties fall otherwise.
        else:
            np.testing.assert_allclose(values, numbers(whole)[name], rtol=1e-12)


def test_states_of_different_things_are_not_added():
    members, truth = rain(4)
    with pytest.raises(ValueError, match=r"Brier of thresholds \(1.0,\) cannot be put beside"):
        Brier.of(members, truth, thresholds=THRESHOLDS) + Brier.of(members, truth, thresholds=(1.0,))
    with pytest.raises(ValueError, match=r"Crps of scale 1.0 cannot be put beside scale 0.5"):
        Crps.of(members, truth, scale=0.5) + Crps.of(members, truth)
    with pytest.raises(ValueError, match=r"Ranks of count \(3, 3\) cannot be put beside count \(3, 7\)"):
        Ranks.of(members, truth, seeds=SEEDS) + Ranks.of(members[:, :2], truth, seeds=SEEDS)
    with pytest.raises(ValueError, match=r"needed \(B, M, T, H, W, C\) over a truth of shape \(4, 3, 20"):
        Crps.of(members[:, 0], truth)


# ------------------------------------------------------------------------------------------------- CRPS


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    members=st.integers(2, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_crps_is_that_of_scoringrules(seed, members, dtype):
    x, y = rain(seed, members)
    state = Crps.of(x.to(dtype), y.to(dtype))
    for name, estimator in (("CRPS", "nrg"), ("fair CRPS", "fair")):
        theirs = scoringrules.crps_ensemble(
            y.double().numpy(), x.double().movedim(1, -1).numpy(), estimator=estimator
        )
        np.testing.assert_allclose(
            state.per_lead_time()[name], theirs.mean((0, 2, 3, 4)), atol=1e-6, rtol=1e-6
        )
        assert state.result()[name] == pytest.approx(theirs.mean(), rel=1e-6)


def test_crps_of_one_member_is_its_absolute_error():
    members, truth = rain(5, members=1)
    members[0, 0, 1, 3:5] = math.nan
    state = Crps.of(members, truth, scale=1 / 255)
    mae = Errors.of(members[:, 0], truth, scale=1 / 255)
    np.testing.assert_allclose(state.per_lead_time()["CRPS"], mae.per_lead_time()["MAE"], rtol=1e-6)
    assert torch.equal(state.count, mae.count)
    assert set(state.result()) == {"CRPS"}
    assert torch.isnan(state.per_lead_time()["fair CRPS"]).all()


def test_crps_does_not_depend_on_how_much_is_sorted_at_once(monkeypatch):
    members, truth = rain(6)
    whole = Crps.of(members, truth)
    monkeypatch.setattr(ensemble_scores, "SORTED_VALUES", 100)
    assert Crps.of(members, truth).result() == pytest.approx(whole.result(), rel=1e-12)


def test_fair_crps_does_not_reward_more_members():
    rng = np.random.default_rng(7)
    fields = torch.from_numpy(rng.normal(size=(1, 65, 1, 128, 128, 1)))
    truth = fields[:, 0]
    few, many = (Crps.of(fields[:, 1 : m + 1], truth).result() for m in (4, 64))
    # A normal distribution against itself: 1/√π, and for m plain members (1 + 1/m) times that.
    assert many["fair CRPS"] == pytest.approx(1 / math.sqrt(math.pi), rel=0.01)
    assert few["fair CRPS"] == pytest.approx(many["fair CRPS"], rel=0.01)
    assert few["CRPS"] == pytest.approx(1.25 / math.sqrt(math.pi), rel=0.01)


# ------------------------------------------------------------------------------------------------ Brier


def events(members, truth, threshold):
    p = (members >= threshold).double().mean(1).flatten().numpy()
    return p, (truth >= threshold).flatten().numpy()


@pytest.mark.parametrize("members", [1, 7, 100])
def test_brier_and_murphys_decomposition(members):
    x, y = rain(8, members, batch=2)
    parts = Brier.of(x, y, thresholds=THRESHOLDS).per_threshold()
    for i, threshold in enumerate(THRESHOLDS):
        p, o = events(x, y, threshold)
        assert parts["Brier"][i] == pytest.approx(np.mean((p - o) ** 2), rel=1e-9)
        assert parts["Brier"][i] == pytest.approx(
            scoringrules.brier_score(o.astype(float), p).mean(), rel=1e-9
        )
        reliability = resolution = 0.0
        for value in np.unique(p):
            here = p == value
            reliability += here.mean() * (value - o[here].mean()) ** 2
            resolution += here.mean() * (o[here].mean() - o.mean()) ** 2
        assert parts["reliability"][i] == pytest.approx(reliability, rel=1e-9, abs=1e-12)
        assert parts["resolution"][i] == pytest.approx(resolution, rel=1e-9, abs=1e-12)
        assert parts["uncertainty"][i] == pytest.approx(o.mean() * (1 - o.mean()), rel=1e-9)


def test_probabilities_in_one_bin_are_told_apart_by_the_brier_score():
    x, y = rain(9, members=130, batch=1)
    state = Brier.of(x, y, thresholds=(1.0,))
    p, o = events(x, y, 1.0)
    parts = {name: float(values) for name, values in state.per_threshold().items()}
    assert parts["Brier"] == pytest.approx(np.mean((p - o) ** 2), rel=1e-9)
    bins = np.floor(p * 100 + 1e-9).astype(int)
    reliability = sum(
        (bins == k).mean() * (p[bins == k].mean() - o[bins == k].mean()) ** 2 for k in np.unique(bins)
    )
    assert parts["reliability"] == pytest.approx(reliability, rel=1e-9)


def test_reliability_is_that_of_the_probabilities():
    x, y = rain(10, members=4)
    state = Brier.of(x, y, thresholds=(1.0,))
    mean, frequency, count = (values[0].numpy() for values in state.reliability())
    p, o = events(x, y, 1.0)
    used = [0, 25, 50, 75, 100]
    np.testing.assert_allclose(mean[used], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(frequency[used], [o[p == k / 100].mean() for k in used])
    assert count.tolist() == [(p == k / 100).sum() if k in used else 0 for k in range(101)]


def test_roc_is_that_of_pysteps():
    x, y = rain(11, members=10)
    state = Brier.of(x, y, thresholds=(1.0,))
    theirs = ROC_curve_init(1.0, n_prob_thrs=11)
    p, _ = events(x, y, 1.0)
    # Thresholds of pysteps are 0, 0.1, ...: what is at one but for rounding is to count.
    ROC_curve_accum(theirs, p + 1e-9, y.flatten().numpy() + 1e-9)
    rate, hits = ROC_curve_compute(theirs)
    ours = [values[0].numpy() for values in state.roc()]
    np.testing.assert_allclose(np.unique(ours[0]), np.unique([0, *rate]), atol=1e-12)
    np.testing.assert_allclose(np.unique(ours[1]), np.unique([0, *hits]), atol=1e-12)
    assert state.result()["ROC-1"] == pytest.approx(np.trapezoid(np.r_[hits, 0][::-1], np.r_[rate, 0][::-1]))


def test_roc_area_of_knowledge_and_of_ignorance():
    _, truth = rain(12)
    assert Brier.of(truth[:, None], truth, thresholds=(1.0,)).result()["ROC-1"] == 1
    always = torch.full_like(truth, 9)[:, None]
    assert Brier.of(always, truth, thresholds=(1.0,)).result()["ROC-1"] == 0.5
    assert math.isnan(Brier.of(always, truth, thresholds=(1e9,)).result()["ROC-1e+09"])


@pytest.mark.parametrize("members", [1, 5, 6, 130])
def test_what_is_likely_is_counted_as_forecast(members):
    x, y = rain(13, members, batch=1)
    ours = Brier.of(x, y, thresholds=THRESHOLDS).contingency(0.5)
    for i, threshold in enumerate(THRESHOLDS):
        likely = 2 * (x >= threshold).sum(1) >= members
        theirs = Contingency.of(likely.float(), (y >= threshold).float(), thresholds=(0.5,))
        for name in ("hits", "misses", "false_alarms"):
            assert torch.equal(getattr(ours, name)[i], getattr(theirs, name)[0])


# ------------------------------------------------------------------------------------- ranks and spread


def test_a_calibrated_ensemble_has_flat_ranks_and_its_spread_is_its_error():
    rng = np.random.default_rng(14)
    fields = torch.from_numpy(
        rng.normal(size=(2, 10, 2, 128, 128, 1)) + rng.normal(size=(2, 1, 2, 128, 128, 1))
    )
    members, truth = fields[:, 1:], fields[:, 0]
    state = Ranks.of(members, truth, seeds=SEEDS)
    shares = state.per_lead_time()["ranks"]
    np.testing.assert_allclose(shares, 0.1, atol=0.006)  # Five standard deviations.
    assert state.result()["outside"] == pytest.approx(1, abs=0.04)
    assert Spread.of(members, truth).result()["spread-skill"] == pytest.approx(1, abs=0.01)
    middle = members.mean(1, keepdim=True)
    narrow = Spread.of(middle + (members - middle) / 2, truth).result()
    assert narrow["spread-skill"] == pytest.approx(0.5, abs=0.01)


def test_ranks_are_those_of_pysteps_where_nothing_ties():
    members, truth = rain(15)
    members, truth = members + 0.0, truth + 0.0
    members += torch.rand(members.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    truth += torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    state = Ranks.of(members, truth, seeds=SEEDS)
    theirs = sum(
        rankhist(members[b, :, t, ..., 0].numpy(), truth[b, t, ..., 0].numpy(), normalize=False)
        for b in range(4)
        for t in range(3)
    )
    np.testing.assert_array_equal(state.count.sum(0), theirs)


def test_ties_are_broken_at_random_and_the_same_again():
    members, truth = rain(16, members=4, size=60)
    state = Ranks.of(members, truth, seeds=SEEDS)
    assert state.to_dict() == Ranks.of(members, truth, seeds=SEEDS).to_dict()
    assert state.to_dict() != Ranks.of(members, truth, seeds=SEEDS + 1).to_dict()
    same = (members == truth[:, None]).all(1)
    assert state.tied.tolist() == same.sum((0, 2, 3, 4)).tolist()
    assert (state.count.sum(1) + state.tied).tolist() == [truth[:, 0].numel()] * 3
    # Of one distribution, half of it dry: flat all the same, though many pixels tie.
    np.testing.assert_allclose(state.count.sum(0) / state.count.sum(), 0.2, atol=0.015)


def test_spread_by_hand():
    members, truth = rain(17, members=5)
    found = Spread.of(members, truth, scale=2).result()
    variance = 4 * members.double().var(1, unbiased=True).mean() * 6 / 5
    squared = 4 * (members.double().mean(1) - truth).square().mean()
    assert found["spread"] == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert found["RMSE"] == pytest.approx(math.sqrt(squared), rel=1e-9)
    assert found["spread-skill"] == pytest.approx(math.sqrt(variance / squared), rel=1e-9)


# ------------------------------------------------------------------------------------------ what misses


def test_failed_members_are_left_out_of_their_sample():
    members, truth = rain(18)
    broken = members.clone()
    broken[1, 4], broken[3] = math.nan, math.nan
    assert surviving(broken).sum(1).tolist() == [6, 5, 6, 0]
    kept = members[1:2, [0, 1, 2, 3, 5]]
    for kind in ("crps", "brier", "spread", "fss", "spectrum"):
        whole = KINDS[kind](broken, truth, SEEDS)
        parts = [(members[[0]], truth[[0]]), (kept, truth[[1]]), (members[[2]], truth[[2]])]
        expected = reduce(add, [KINDS[kind](x, y, SEEDS) for x, y in parts])
        for name, values in numbers(expected).items():
            np.testing.assert_allclose(numbers(whole)[name], values, rtol=1e-12)


def test_ranks_among_fewer_members_are_spread_over_all():
    rng = np.random.default_rng(19)
    fields = torch.from_numpy(rng.normal(size=(1, 7, 1, 200, 200, 1)))
    members, truth = fields[:, 1:].clone(), fields[:, 0]
    members[:, [1, 4]] = math.nan
    state = Ranks.of(members, truth, seeds=SEEDS)
    assert state.count.shape == (1, 7)
    np.testing.assert_allclose(state.count.sum(0) / 40_000, 1 / 7, atol=0.01)


def test_one_survivor_has_a_crps_but_no_spread():
    members, truth = rain(20)
    members[0, 1:] = math.nan
    assert not Spread.of(members[:1], truth[:1]).count.any()
    state = Crps.of(members[:1], truth[:1])
    mae = float((members[0, 0].double() - truth[0]).abs().mean())
    assert state.result() == {"CRPS": pytest.approx(mae, rel=1e-9)}


def test_a_pixel_that_any_misses_counts_as_nothing():
    members, truth = rain(21)
    members[0, 2, 1, :4], truth[2, 0, :, :5] = math.nan, math.nan
    for kind in ("crps", "spread"):
        assert KINDS[kind](members, truth, SEEDS).count.tolist() == [4 * 480 - 100, 4 * 480 - 96, 4 * 480]
    brier = KINDS["brier"](members, truth, SEEDS)
    assert brier.count.sum(2).tolist() == [[1820, 1824, 1920]] * 3
    ranks = KINDS["ranks"](members, truth, SEEDS)
    assert (ranks.count.sum(1) + ranks.tied).tolist() == [1820, 1824, 1920]
    # Spectra need whole frames: here one member of one sample misses some.
    assert Spectrum.of(members).count.tolist() == [24, 23, 24]
    assert Spectrum.of(truth).count.tolist() == [3, 4, 4]
    valid = ~(torch.isnan(truth) | torch.isnan(members).any(1))
    x, y = members.movedim(1, -1)[valid], truth[valid]
    theirs = scoringrules.crps_ensemble(y.numpy(), x.numpy(), estimator="nrg").mean()
    assert KINDS["crps"](members, truth, SEEDS).result()["CRPS"] * 255 == pytest.approx(theirs, rel=1e-5)


# --------------------------------------------------------------------------------------- fss, spectrum


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("scale", [1, 2, 3, 8, 16, 20])
def test_fss_is_that_of_pysteps(scale, missing):
    members, truth = rain(22, members=1, batch=1)
    if missing:
        members[..., 2:4, 5:, :], truth[..., :3, :2, :] = math.nan, math.nan
        # In pysteps what one misses still counts in the other.
        gone = torch.isnan(members[:, 0]) | torch.isnan(truth)
    else:
        gone = torch.zeros_like(truth, dtype=torch.bool)
    state = Fractions.of(members, truth, thresholds=THRESHOLDS, scales=(scale,))
    for t in range(3):
        x, y = (f.masked_fill(gone, math.nan)[0, t, ..., 0].double().numpy() for f in (members[:, 0], truth))
        for i, threshold in enumerate(THRESHOLDS):
            ours = float(state.per_lead_time()["FSS"][0, i, t])
            assert ours == pytest.approx(fss(x, y, threshold, scale), abs=1e-9)


def test_fss_of_members_takes_each_by_itself():
    members, truth = rain(23, members=3)
    members[0, 1, :, :2] = math.nan
    together = Fractions.of(members, truth, thresholds=THRESHOLDS, scales=SCALES)
    apart = [Fractions.of(members[:, [m]], truth, thresholds=THRESHOLDS, scales=SCALES) for m in range(3)]
    assert together.result() == pytest.approx(reduce(add, apart).result(), rel=1e-12)
    assert set(together.result()) == {f"FSS {s} px-{t:g}" for s in SCALES for t in THRESHOLDS}


def test_fss_is_one_for_the_truth_and_unsaid_without_events():
    _, truth = rain(24)
    state = Fractions.of(truth[:, None], truth, thresholds=(1.0, 1e9), scales=(1, 8))
    np.testing.assert_allclose(state.per_threshold()["FSS"], [[1, np.nan]] * 2)


@pytest.mark.parametrize("shape", [(32, 32), (31, 31)])
def test_spectrum_is_that_of_pysteps(shape):
    fields = torch.from_numpy(np.random.default_rng(25).normal(size=(2, 3, 2, *shape, 1)))
    ours = Spectrum.of(fields).per_lead_time()["power"]
    for t in range(2):
        theirs = [rapsd(f, fft_method=np.fft) for f in fields[:, :, t, ..., 0].flatten(0, 1).numpy()]
        np.testing.assert_allclose(ours[t], np.mean(theirs, axis=0), rtol=1e-9)


def test_a_wave_lies_at_its_wavenumber():
    x = torch.arange(48) * (2 * math.pi / 48)
    for height in (24, 48):
        wave = torch.sin(5 * x).expand(height, 48)[None, None, ..., None]
        power = Spectrum.of(wave).per_lead_time()["power"][0]
        assert int(power.argmax()) == 5
        assert len(power) == 24
    tall = torch.sin(5 * x)[:, None].expand(48, 24)[None, None, ..., None]
    assert int(Spectrum.of(tall).per_lead_time()["power"][0].argmax()) == 5
