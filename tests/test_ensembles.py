"""Ensembles: what is left of the members is what numpy makes of all of them at once, however they came."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binom
from tiny_grid import box, enso_placed, minutes, placed, rain

from earthformer.scores import nino34
from pipelines import windows
from pipelines.archives import checks, records, store, synthetic
from pipelines.ensembles import Reduction, dilate, disk, interval
from pipelines.events import NINO34, Event, bind, vil_kg_m2
from pipelines.forecast_store import reductions
from pipelines.prepare import prepare
from pipelines.regions import Region
from pipelines.tasks import TASKS

RADAR, SEVIR, ENSO = TASKS["radar"], TASKS["sevir"], TASKS["enso"]
COMPARE = {">=": np.greater_equal, ">": np.greater, "<=": np.less_equal, "<": np.less}


def rates(members, frames=6, height=9, width=11, seed=0):
    """Members with ties, so that >= and > differ."""
    drawn = np.random.default_rng(seed).gamma(0.5, 2.0, (members, frames, height, width))
    return np.round(drawn * 2).astype(np.float32) / 2


def reduced(members, *events, quantiles=(), chunks=(), place=None, task=RADAR, leads=None):
    """The reduction of members, added in chunks that end at `chunks`."""
    place = placed(*members.shape[2:]) if place is None else place
    leads = minutes(members.shape[1]) if leads is None else leads
    reduction = Reduction(bind(events, task, place, leads), 0, quantiles)
    for part in np.split(members, chunks):
        reduction.add(part)
    return reduction


def happened(event, member, mask=None):
    """Whether one member has an event, pixel by pixel: (H, W); with a mask, of the region."""
    frames, height, width = member.shape
    minute = 5 * np.arange(1, frames + 1)
    first, last = event.lead_time or (0, np.inf)
    series = member[(minute >= first) & (minute <= last)].astype(np.float64)

    def one(values):
        if event.accumulated:
            return COMPARE[event.comparison](values.sum() * 5 / 60, event.threshold)
        hits = COMPARE[event.comparison](values, event.threshold)
        return any(hits[i : i + event.duration].all() for i in range(len(hits) - event.duration + 1))

    if mask is not None and event.region.reduce == "mean":
        return one(series[:, mask].mean(axis=1))
    field = np.array([[one(series[:, i, j]) for j in range(width)] for i in range(height)])
    near = np.zeros_like(field)
    for i, j in np.ndindex(height, width):
        y, x = np.ogrid[:height, :width]
        near[i, j] = field[(y - i) ** 2 + (x - j) ** 2 <= event.radius**2].any()
    if mask is None:
        return near
    needed = event.region.fraction * mask.sum() if event.region.fraction else 1
    return near[mask].sum() >= needed


EVENTS = [
    rain(4.5),
    rain(4.5, comparison=">"),
    rain(0.5, comparison="<"),
    rain(0.5, comparison="<="),
    rain(2, lead_time=(10, 20)),
    rain(1, duration=3),
    rain(1, duration=2, lead_time=(15, 30)),
    rain(1.0, units="mm", accumulated=True),
    rain(0.5, units="mm", accumulated=True, lead_time=(5, 15)),
    rain(6, radius=2),
    rain(6, radius=2.9),
    rain(2, radius=1, duration=2),
]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_a_field_of_probabilities_counts_members(event):
    members = rates(7)
    needed = np.mean([happened(event, member) for member in members], axis=0)
    assert 0 < needed.mean() < 1
    found = reduced(members, event).result()
    np.testing.assert_allclose(found["probability"][0], needed, rtol=1e-6)
    assert "regional_probability" not in found


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"reduce": "fraction", "fraction": 0.25}, {"reduce": "mean"}], ids=["any", "fraction", "mean"]
)
def test_a_region_asks_its_pixels(event, how):
    if how.get("reduce") == "mean" and event.radius:
        return
    members = rates(31, seed=3)
    corner = placed(*members.shape[2:])
    event = dataclasses.replace(event, region=box(5.02, 51.93, 5.09, 51.985, **how))
    bound = bind((event,), RADAR, corner, minutes(6))
    mask = np.zeros(members.shape[2:], dtype=bool)
    mask[bound.grid.pixels(event.region, 0)] = True
    assert 10 < mask.sum() < 50
    found = reduced(members, event).result()
    needed = np.mean([happened(event, member, mask) for member in members])
    assert found["regional_probability"] == pytest.approx([needed], rel=1e-6)
    assert "probability" not in found


def test_events_by_hand():
    members = np.zeros((4, 3, 4, 4), dtype=np.float32)
    members[0, 1, 1, 1] = 5  # one frame, one pixel
    members[1, :, 1, 1] = 5  # all three frames
    members[2, 1:, 3, 3] = 1
    asked = (
        rain(5, name="once"),
        rain(5, name="lasts", duration=2),
        rain(0.25, name="amount", units="mm", accumulated=True),  # 15 mm/h for 5 min are 1.25 mm
        rain(1, name="near", radius=1),
    )
    once, lasts, amount, near = reduced(members, *asked).result()["probability"]
    corner = np.zeros((4, 4))
    corner[1, 1] = 0.5
    assert np.array_equal(once, corner)
    assert np.array_equal(lasts, corner / 2)
    assert np.array_equal(amount, corner)
    plus = np.array([[0, 2, 0, 0], [2, 2, 2, 0], [0, 2, 0, 1], [0, 0, 1, 1]]) / 4
    assert np.array_equal(near, plus)


def test_decimal_thresholds_are_reached_by_their_own_value():
    for value in (0.1, 0.3, 0.7, 2.3):
        members = np.full((2, 3, 6, 6), value, dtype=np.float32)
        region = Region(point=(5.03, 51.98), reduce="mean")
        found = reduced(members, rain(value), rain(value, name="mean", region=region)).result()
        assert (found["probability"] == 1).all()
        assert found["regional_probability"] == [1]


def test_vil_in_physical_units_is_the_event_of_its_encoding():
    members = np.random.default_rng(0).integers(0, 255, (9, 4, 12, 12)).astype(np.float32)
    limit = float(vil_kg_m2(np.array([132.5]))[0])
    encoded, physical = Event("encoded", "vil", 132.5, "1"), Event("physical", "vil", limit, "kg m-2")
    one, other = reduced(members, encoded, physical, task=SEVIR).result()["probability"]
    assert 0 < one.mean() < 1
    assert np.array_equal(one, other)


def test_a_mean_in_physical_units_is_of_physical_values():
    # Half of the pixels strong, half dry: half of the strong value, not what the mean encoding means.
    members = np.zeros((1, 1, 8, 8), dtype=np.float32)
    members[..., ::2] = 250
    region = box(4.995, 51.935, 5.105, 52.001, reduce="mean")
    strong = float(vil_kg_m2(np.array([250.0]))[0])
    asked = [Event(str(share), "vil", strong * share, "kg/m2", region=region) for share in (0.45, 0.55)]
    assert reduced(members, *asked, task=SEVIR).result()["regional_probability"].tolist() == [1, 0]


@pytest.mark.parametrize("radius", [0, 1, 2, 2.24, 5, 7.5, 30])
@pytest.mark.parametrize("pixel", [(1, 1), (1.0003, 0.9998), (3, 2)])
def test_a_disk_is_all_centres_within_its_radius(radius, pixel):
    hits = np.random.default_rng(1).random((3, 13, 17)) < 0.02
    hits[1] = False
    hits[2, 0, 0] = True
    y, x = np.ogrid[:13, :17]
    needed = np.zeros_like(hits)
    for m, i, j in np.argwhere(hits):
        distance = np.hypot((y - i) * pixel[0], (x - j) * pixel[1])
        needed[m] |= distance <= radius * 1.001
    assert np.array_equal(dilate(hits, disk(radius, pixel)), needed)


def test_moments_and_quantiles_are_those_of_numpy():
    members = rates(37)
    asked = (0.0, 0.1, 0.5, 0.77, 1.0)
    found = reduced(members, quantiles=asked, chunks=(1, 5, 20)).result()
    exact = members.astype(np.float64)
    np.testing.assert_allclose(found["rate_mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["rate_stdev"], exact.std(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(found["rate_quantile"], np.quantile(exact, asked, axis=0), rtol=1e-6)
    assert (found["n_members"], found["failed_members"]) == (37, 0)
    assert found["smallest_resolvable"] == np.float32(1 / 37)


def test_small_spread_about_a_large_mean_keeps_its_digits():
    members = np.float32(300) + rates(50) * np.float32(2**-10)
    found = reduced(members, chunks=range(1, 50, 3)).result()
    np.testing.assert_allclose(found["rate_stdev"], members.astype(np.float64).std(0, ddof=1), rtol=1e-6)


def test_any_order_and_chunking_give_the_same():
    members = rates(40)
    members[3, 2, 4, 5] = np.nan
    members[7] = np.nan
    asked = (*(dataclasses.replace(event, name=str(i)) for i, event in enumerate(EVENTS)),)
    whole = reduced(members, *asked, quantiles=(0.25,)).result()
    order = np.random.default_rng(0).permutation(40)
    for part in (range(1, 40), (7, 8, 30), (39,)):
        other = reduced(members[order], *asked, quantiles=(0.25,), chunks=part).result()
        assert whole.keys() == other.keys()
        for name, values in whole.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_failed_members_are_counted_apart():
    members = rates(8)
    members[2], members[5] = np.nan, np.inf
    alive = np.delete(members, (2, 5), axis=0)
    found, needed = (reduced(of, *EVENTS[:1], quantiles=(0.5,)).result() for of in (members, alive))
    assert (found.pop("n_members"), found.pop("failed_members")) == (6, 2)
    needed.pop("n_members"), needed.pop("failed_members")
    for name, values in needed.items():
        assert np.array_equal(found[name], values), name


def test_pixels_that_some_members_miss_count_their_own():
    members = rates(10)
    members[:4, 0, 2, 3] = np.nan
    members[:, :, 5, 5] = np.inf
    asked = (rain(1), rain(1, name="later", lead_time=(10, 30)))
    found = reduced(members, *asked, quantiles=(0.3,)).result()
    assert found["n_members"] == 10
    rest = members[4:, :, 2, 3].astype(np.float64)
    assert found["rate_mean"][0, 2, 3] == pytest.approx(rest[:, 0].mean(), rel=1e-6)
    assert found["rate_stdev"][0, 2, 3] == pytest.approx(rest[:, 0].std(ddof=1), rel=1e-6)
    assert found["rate_quantile"][0, 0, 2, 3] == pytest.approx(np.quantile(rest[:, 0], 0.3), rel=1e-6)
    hits = (rest >= 1).any(1)
    assert found["probability"][0, 2, 3] == pytest.approx(hits.mean())
    low, high = interval(np.array(hits.sum()), np.array(6))
    assert (found["ci_low"][0, 2, 3], found["ci_high"][0, 2, 3]) == pytest.approx((low, high))
    # The missing frame is none of the second event's.
    assert found["probability"][1, 2, 3] == pytest.approx((members[:, 1:, 2, 3] >= 1).any(1).mean())
    for name in ("probability", "ci_low", "ci_high"):
        assert np.isnan(found[name][:, 5, 5]).all()
    assert np.isnan(found["rate_quantile"][..., 5, 5]).all()


def test_missing_pixels_are_no_neighbours_and_no_part_of_a_region():
    members = np.zeros((2, 2, 6, 6), dtype=np.float32)
    members[:, 0, 2, 2] = 9
    members[1, 1, 2, 2] = np.nan
    members[:, :, 0, :] = np.nan
    region = box(4.995, 51.953, 5.078, 52.003)
    everywhere = dataclasses.replace(region, reduce="fraction", fraction=1.0)
    asked = (
        rain(5, radius=1),
        rain(5, name="any", region=region),
        rain(0, name="all", region=everywhere),
        rain(0, name="mean", region=dataclasses.replace(region, reduce="mean")),
    )
    found = reduced(members, *asked).result()
    assert found["probability"][0, 2].tolist() == [0, 0.5, 1, 0.5, 0, 0]
    assert found["probability"][0, 3].tolist() == [0, 0, 0.5, 0, 0, 0]
    assert np.isnan(found["probability"][0, 0]).all()
    assert found["regional_probability"].tolist() == [0.5, 1, 1]


def test_a_region_without_known_pixels_has_no_probability():
    members = np.zeros((3, 2, 6, 6), dtype=np.float32)
    members[:, :, :3] = np.nan
    region = box(5.0, 51.985, 5.05, 52.001)
    asked = [rain(0, name=how, region=dataclasses.replace(region, reduce=how)) for how in ("any", "mean")]
    reduction = reduced(members, *asked)
    assert np.isnan(reduction.result()["regional_probability"]).all()
    assert reduction.half_width() == 0


def test_windows_without_the_region_have_no_probability():
    place = placed(8, 8, ((0.0, 0.0), (0.0, 50_000.0)))
    region = Region(point=(5.05, 51.97))
    bound = bind((rain(region=region), rain(name="field")), RADAR, place, minutes(6))
    inside, outside = Reduction(bound, 0), Reduction(bound, 1)
    for reduction in (inside, outside):
        reduction.add(rates(5, height=8, width=8))
    assert np.isfinite(inside.result()["regional_probability"]).all()
    for name in ("probability", "ci_low", "ci_high"):
        assert np.isnan(outside.result()[f"regional_{name}"]).all()
        assert np.isfinite(outside.result()[name]).all()


def test_el_nino_is_the_published_index_above_its_threshold():
    members = np.random.default_rng(4).normal(0.4, 1, (60, 14, 24, 48)).astype(np.float32)
    members += np.random.default_rng(5).normal(0, 0.5, (60, 14, 1, 1)).cumsum(1).astype(np.float32)
    index = nino34(torch.from_numpy(members).double()).numpy()
    warm = index >= 0.5
    for duration, months in ((1, (1, 12)), (5, (1, 12)), (3, (4, 9))):
        event = Event("El Niño", NINO34, 0.5, "K", lead_time=months, duration=duration)
        chosen = warm[:, months[0] - 1 : months[1]]
        runs = np.lib.stride_tricks.sliding_window_view(chosen, duration, axis=1).all(-1).any(-1)
        assert 0 < runs.mean() < 1
        reduction = reduced(
            members, event, task=ENSO, place=enso_placed(), leads=np.arange(1, 15), chunks=(9, 10)
        )
        assert reduction.result()["regional_probability"] == pytest.approx([runs.mean()])


# ------------------------------------------------------------------------------------------ intervals


def coverage(p, n):
    """Probability that the interval of n members holds p."""
    k = np.arange(n + 1)
    low, high = interval(k, np.full(n + 1, n))
    return float(binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum())


@pytest.mark.parametrize("n", [8, 32, 256])
def test_intervals_cover_as_they_say(n):
    p = np.concatenate([np.geomspace(0.01 / n, 0.5, 400), 1 - np.geomspace(0.01 / n, 0.5, 400)])
    covered = np.array([coverage(each, n) for each in p])
    assert covered.min() > 0.91
    mean = np.mean([coverage(each, n) for each in np.linspace(0.001, 0.999, 301)])
    # Few members have few intervals to choose from, and err to the safe side.
    assert 0.948 < mean < 0.952 + 0.2 / n


def test_intervals_cover_in_simulation():
    rng = np.random.default_rng(0)
    p = rng.random((20, 20))
    inside = []
    for _ in range(40):
        members = (rng.random((24, 1, 20, 20)) < p).astype(np.float32)
        found = reduced(members, rain(0.5)).result()
        inside.append((found["ci_low"][0] <= p) & (p <= found["ci_high"][0]))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)


def test_no_members_with_an_event_do_not_make_it_impossible():
    low, high = interval(np.array([0, 20, 0, 2, 0, 1]), np.array([20, 20, 0, 20, 1, 1]))
    assert (low[0], high[1]) == (0, 1)
    # With 20 members, an event of 16.8 % is missed by all of them in 2.5 % of cases.
    assert (1 - high[0]) ** 20 == pytest.approx(0.025)
    assert low[1] == pytest.approx(1 - high[0])
    assert np.isnan([low[2], high[2]]).all()
    assert 0 < low[3] < 2 / 20 < high[3] < 1
    # One member tells nothing.
    assert (low[4:].tolist(), high[4:].tolist()) == ([0, 0], [1, 1])


def test_intervals_keep_the_shape_of_their_counts():
    k = np.random.default_rng(0).integers(0, 9, (3, 4, 5))
    low, high = interval(k, np.full_like(k, 9))
    assert low.shape == high.shape == k.shape
    for index in np.ndindex(k.shape):
        one = interval(np.array(k[index]), np.array(9))
        assert (low[index], high[index]) == one


def test_half_width_is_that_of_the_widest_interval_and_shrinks():
    asked = (rain(4), rain(2, name="b", region=Region(point=(5.03, 51.97))))
    reduction = Reduction(bind(asked, RADAR, placed(9, 11), minutes(6)), 0)
    assert reduction.half_width() == np.inf
    widths = []
    for members in np.split(rates(128), 16):
        reduction.add(members)
        found = reduction.result()
        fields = (found["ci_high"] - found["ci_low"]).max()
        scalar = (found["regional_ci_high"] - found["regional_ci_low"]).max()
        assert reduction.half_width() == pytest.approx(max(fields, scalar) / 2, rel=1e-5)
        widths.append(reduction.half_width())
    assert widths[-1] < 0.1 < widths[0]


def test_half_width_leaves_out_what_no_member_tells():
    members = rates(200, frames=1)
    members[:, :, 0, 0] = np.nan
    members[1:, :, 0, 1] = np.nan
    assert reduced(members, rain(2)).half_width() > 0.3  # of the pixel of one member
    members[0, :, 0, 1] = np.nan
    assert reduced(members, rain(2)).half_width() < 0.08
    assert reduced(members).half_width() == 0


# ------------------------------------------------------------------------------- members and memory


def test_no_members_make_no_numbers():
    found = reduced(rates(0), rain(1), quantiles=(0.5,)).result()
    assert found["n_members"] == 0
    for name in ("rate_mean", "rate_stdev", "rate_quantile", "probability", "ci_low", "smallest_resolvable"):
        assert np.isnan(found[name]).all(), name


def test_one_member_has_no_spread():
    found = reduced(rates(1), rain(1)).result()
    assert np.isfinite(found["rate_mean"]).all()
    assert np.isnan(found["rate_stdev"]).all()
    assert set(np.unique(found["probability"])) == {0, 1}


def test_members_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"members of shape \(6, 9, 10\): needed \(6, 9, 11\)"):
        reduced(rates(2), place=placed(9, 11)).add(rates(2, width=10))


def test_members_are_left_as_they_were():
    members = rates(6)
    members[1, 0, 0, 0], members[2] = np.nan, np.inf
    kept = members.copy()
    members.flags.writeable = False
    reduced(members, *EVENTS[:1], rain(2, name="b", radius=2), quantiles=(0.5,)).result()
    np.testing.assert_array_equal(members, kept)


def test_results_may_be_asked_for_between_members():
    members = rates(20)
    reduction = reduced(members[:8], rain(1), quantiles=(0.5,))
    reduction.result()
    reduction.add(members[8:])
    whole = reduced(members, rain(1), quantiles=(0.5,)).result()
    for name, values in reduction.result().items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-6, err_msg=name)


def test_memory_does_not_grow_with_the_number_of_members():
    def peak(batches):
        members = rates(8, frames=6, height=64, width=64)
        tracemalloc.start()
        reduction = reduced(members[:0], *EVENTS[:1], rain(1, name="b", radius=3), quantiles=(0.1, 0.9))
        for _ in range(batches):
            reduction.add(members)
        reduction.result()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    few, many = peak(4), peak(32)  # 256 members are 25 MB
    assert many < 1.2 * few + (8 << 20)


# -------------------------------------------------------------------------------------- in a store


@pytest.fixture(scope="module")
def archive(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("ensembles")
    synthetic.write_sevir(folder / "raw", events=8, seed=3, size=48)
    prepare("sevir", str(folder / "raw"), str(folder / "archive.zarr"), progress=False)
    return store.open_archive(str(folder / "archive.zarr"))


def test_reductions_of_an_archive_fill_their_template(archive, tmp_path):
    task = dataclasses.replace(SEVIR, context=3, target=2, stride=(4, 4, 12))
    keys = windows.enumerate_windows(task, archive, "test")
    place = windows.placement(task, archive, keys)
    y0, x0 = (float(place[f"{axis}_origin"][0]) for axis in "yx")
    lon, lat = windows_degrees(place, x0 + place["x"].values[20], y0 + place["y"].values[30])
    asked = (
        Event("strong", "vil", 133, "1", radius=16),
        Event("wet", "vil", 0.1, "kg m-2"),
        Event("here", "vil", 74, "1", region=Region(point=(lon, lat))),
    )
    leads = minutes(2)
    bound = bind(asked, task, place, leads)
    assert 0 < bound.regional[0].windows.sum() < len(keys)
    laid = reductions(bound, len(keys), 2, windows.attributes(task, archive, keys[0]), (0.1, 0.9))
    url = str(tmp_path / "reduced.zarr")
    whole = laid.assign_coords(place.coords).assign_coords(lead_time=leads)
    store.create(url, {"": whole}, config={"kind": "test"}, shards=(len(keys) + 1) // 2)
    frames = windows.read(task, archive, keys)["target"][..., 0].astype(np.float32)
    members = frames[:, None] + np.arange(-40, 41, 20, dtype=np.float32)[:, None, None, None]
    results = []
    for window in range(len(keys)):
        reduction = Reduction(bound, window, (0.1, 0.9))
        reduction.add(members[window])
        results.append(reduction.result())
    for shard, first in enumerate(range(0, len(keys), 2)):
        region = {"window": slice(first, min(first + 2, len(keys)))}
        part = {name: np.stack([r[name] for r in results[region["window"]]]) for name in results[0]}
        crc32 = store.write_region(url, "", part, region)
        records.write(url, shard, {"regions": [store.region_record("", region, crc32)]})
    records.complete(url, {"counts": {"windows": len(keys)}})
    assert checks.validate(url) == []
    with xr.open_zarr(url, decode_timedelta=True) as opened:
        assert set(opened.data_vars) == set(results[0])
        for name in results[0]:
            needed = np.stack([result[name] for result in results])
            np.testing.assert_array_equal(opened[name].values, needed, err_msg=name)
        assert opened["probability"].dims == ("window", "event", "y", "x")
        assert opened["regional_probability"].dims == ("window", "regional_event")
        assert opened["vil_mean"].attrs["cell_methods"] == "realization: mean"
        strong = opened["probability"].sel(event=opened["event"] == "strong")
        assert strong["threshold"].values == [133]
        assert opened["threshold_units"].values.tolist() == ["1", "kg m-2"]
        assert opened["radius"].values.tolist() == [16, 0]
        assert opened["lead_to"].values.tolist() == [np.timedelta64(10, "m").astype("timedelta64[ns]")] * 2
        assert opened["regional_event"].values.tolist() == ["here"]
        inside = np.isfinite(opened["regional_probability"].values[:, 0])
        assert np.array_equal(inside, bound.regional[0].windows)
        hits = (members[inside][:, :, :, 30, 20] >= 74).any(2).mean(1)
        np.testing.assert_allclose(opened["regional_probability"].values[inside, 0], hits, rtol=1e-6)


def windows_degrees(place, x, y):
    import pyproj

    crs = pyproj.CRS.from_proj4(str(place["proj"].values[0]))
    return pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(x, y)
