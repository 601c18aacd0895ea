"""Forecasters: physical units in and out, missing pixels told apart, members that depend on themselves."""

import pytest
import torch

from earthformer.config import Attention, EarthformerConfig, FeedForward, Scaling, StemStage
from earthformer.forecasters import EarthformerForecaster, Persistence, present

SIZE, CONTEXT, TARGET = 8, 3, 2
VIL = Scaling(kind="linear", scale=1 / 255)
RAIN = Scaling(kind="log")
SST = Scaling(kind="linear", scale=1 / 26.7, offset=16.5)
SEEDS = torch.zeros(4, 1, dtype=torch.int64)
MODEL = EarthformerConfig(
    context=(CONTEXT, SIZE, SIZE, 1),
    target=(TARGET, SIZE, SIZE, 1),
    widths=(16, 32),
    stem=(StemStage(16, (1, 2, 2), convs=1),),
    attention=Attention(dropout=0.0, projection_dropout=0.0),
    feed_forward=FeedForward(dropout=0.0),
)


def frames(count, dtype=torch.uint8, seed=0):
    values = torch.randint(0, 255, (4, count, SIZE, SIZE, 1), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def trained(scaling, seed=0):
    torch.manual_seed(seed)
    return EarthformerForecaster(MODEL, scaling).eval()


@pytest.fixture(params=[torch.uint8, torch.float32], ids=["bytes", "floats"])
def gappy(request):
    """A batch with pixels missing: one of the last context frame, some of the target."""
    batch = {"context": frames(CONTEXT, request.param), "target": frames(TARGET, request.param, seed=1)}
    missing = 255 if request.param is torch.uint8 else torch.nan
    batch["context"][0, -1, 2, 3] = missing
    batch["context"][1, 0] = missing
    batch["target"][2, :, :4] = missing
    return batch


def test_missing_is_255_in_bytes_and_nan_in_floats():
    assert present(torch.tensor([0, 254, 255], dtype=torch.uint8)).tolist() == [True, True, False]
    assert present(torch.tensor([0.0, 255.0, torch.nan])).tolist() == [True, True, False]


def test_persistence_repeats_the_last_frame(gappy):
    forecast = Persistence(TARGET, VIL).forecast(gappy["context"], SEEDS)
    assert forecast.shape == (4, 1, TARGET, SIZE, SIZE, 1)
    assert forecast.dtype == torch.float32
    for frame in range(TARGET):
        torch.testing.assert_close(forecast[1:, 0, frame], gappy["context"][1:, -1].float())
    gaps = torch.isnan(forecast)
    assert gaps[0, 0, :, 2, 3].all()
    assert int(gaps.sum()) == TARGET


def test_the_loss_is_that_of_the_scaled_fields_where_they_are_observed(gappy):
    forecaster = trained(VIL)
    filled = gappy["context"].clone()
    filled[~present(filled)] = 0
    forecast = forecaster.forecast(filled, SEEDS)[:, 0]
    error = (forecast / 255 - gappy["target"].float() / 255)[present(gappy["target"])]
    expected = error.square().sum() / gappy["target"].numel()
    torch.testing.assert_close(forecaster.loss(gappy), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "dtype"), [(VIL, torch.uint8), (RAIN, torch.float32), (SST, torch.float32)]
)
def test_what_is_missing_is_taken_as_zero_in_the_fields_own_units(scaling, dtype):
    context = frames(CONTEXT, dtype)
    filled, missing = context.clone(), context.clone()
    filled[:, 1, :4] = 0
    missing[:, 1, :4] = 255 if dtype is torch.uint8 else torch.nan
    forecaster = trained(scaling)
    torch.testing.assert_close(forecaster.forecast(missing, SEEDS), forecaster.forecast(filled, SEEDS))


def test_forecasts_are_in_the_units_of_the_context():
    context = frames(CONTEXT, torch.float32)
    forecast = trained(SST).forecast(context, SEEDS)[:, 0]
    torch.manual_seed(0)
    scaled = EarthformerForecaster(MODEL, SST).eval().network((context + 16.5) / 26.7)
    torch.testing.assert_close(forecast, scaled * 26.7 - 16.5, rtol=1e-4, atol=1e-3)
    assert (trained(RAIN).forecast(context - 100, SEEDS) >= 0).all()


def test_a_window_is_forecast_alike_in_any_batch():
    forecaster, context = trained(VIL), frames(CONTEXT)
    whole = forecaster.forecast(context, SEEDS)
    assert whole.shape == (4, 1, TARGET, SIZE, SIZE, 1)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(forecaster.forecast(context[order], SEEDS)[:, 0], whole[order, 0])
    for window in range(4):
        alone = forecaster.forecast(context[window : window + 1], SEEDS[:1])
        torch.testing.assert_close(alone[0], whole[window], rtol=1e-4, atol=1e-2)


def test_the_fused_network_forecasts_the_same():
    forecaster, context = trained(VIL), frames(CONTEXT)
    plain = forecaster.forecast(context, SEEDS)
    forecaster.network = forecaster.network.fuse()
    torch.testing.assert_close(forecaster.forecast(context, SEEDS), plain, rtol=1e-4, atol=1e-2)


def test_the_loss_splits_over_micro_batches_and_trains(gappy):
    forecaster = trained(VIL)
    halves = [{name: values[part] for name, values in gappy.items()} for part in (slice(2), slice(2, 4))]
    whole = forecaster(gappy)
    torch.testing.assert_close(sum(map(forecaster.loss, halves)) / 2, whole)
    whole.backward()
    gradients = [p.grad for p in forecaster.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("make", [lambda: Persistence(TARGET, VIL), lambda: trained(VIL)])
def test_a_deterministic_forecaster_has_one_member(make):
    with pytest.raises(ValueError, match="2 members asked of a deterministic forecaster: needed 1"):
        make().forecast(frames(CONTEXT), torch.zeros(4, 2, dtype=torch.int64))
