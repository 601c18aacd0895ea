"""Which windows there are: the published ones, in splits that leak nothing, of every kind of archive."""

import dataclasses
import json
import math

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_archive import SMALL, bare, bare_enso, bare_sevir, built, changed, sequence

from pipelines import series, windows
from pipelines.archives import enso, radar, sevir
from pipelines.errors import InputError
from pipelines.series import SPLITS, Window
from pipelines.tasks import TASKS, Splits, Tiles
from pipelines.windows import enumerate_windows, read

# --------------------------------------------------------------------------------- the published windows


@pytest.fixture(scope="module")
def loader(parity):
    return json.loads((parity / "earthformer" / "x02_sevir_loader.json").read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory, loader):
    """The archive of the fixture's catalogue; its pixels are the frame's number plus four times the row."""
    folder = tmp_path_factory.mktemp("x02")
    catalog = pd.DataFrame(loader["catalog"]).assign(size_x=4, size_y=4)
    for name, rows in catalog[catalog["img_type"] == "vil"].groupby("file_name"):
        path = folder / "data" / str(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.arange(49)[None] + 4 * np.arange(rows["file_index"].max() + 1)[:, None]
        with h5py.File(path, "w") as file:
            file["vil"] = np.tile(values[:, None, None].astype(np.uint8), (1, 4, 4, 1))
    catalog.to_csv(folder / "CATALOG.csv", index=False)
    return built(sevir.plan(str(folder)), str(folder / "archive.zarr"))


def located(loader, keys):
    """(file, row in it) of the windows' events, in order."""
    rows = {
        row["id"]: [row["file_name"], row["file_index"]]
        for row in loader["catalog"]
        if row["img_type"] == "vil"
    }
    return [rows[key.series] for key in keys]


@pytest.mark.parametrize("split", ["val", "test"])
def test_sevir_is_evaluated_in_the_published_order(published, loader, split):
    expected = loader["splits"][split]
    keys = enumerate_windows(TASKS["sevir"], published, split)
    assert len(keys) == expected["total_num_seq"]
    assert located(loader, keys[:: expected["num_seq_per_event"]]) == expected["events"]
    pixels = read(TASKS["sevir"], published, keys)
    ends = np.stack([pixels["context"][:, 0, 0, 0, 0], pixels["target"][:, -1, 0, 0, 0]], axis=1)
    micro_batches = np.array(expected["batch_first_last_values"]).reshape(-1, 2)
    # The published loader drops what does not fill its last micro-batch of two; we do not.
    np.testing.assert_array_equal(ends[: len(micro_batches)], micro_batches)
    assert len(ends) - len(micro_batches) == len(ends) % 2


def test_sevir_trains_on_the_published_windows(published, loader):
    expected = loader["splits"]["train"]
    keys = enumerate_windows(TASKS["sevir"], published, "train")
    assert len(set(keys)) == len(keys) == expected["total_num_seq"]
    assert sorted(located(loader, keys[::3])) == sorted(expected["events"])


@pytest.fixture(scope="module")
def order(parity):
    return np.load(parity / "prediff" / "dataset_order.npz")


@pytest.fixture(scope="module")
def low_resolution(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    (folder / "CATALOG.csv").write_text(str(order["in/catalog_csv"]))
    table = pd.read_csv(folder / "CATALOG.csv").assign(size_x=18, size_y=18)
    table.to_csv(folder / "CATALOG.csv", index=False)
    for name in ("vil/2018/SEVIR_VIL_SYN_2018.h5", "vil/2019/SEVIR_VIL_SYN_2019.h5"):
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["vil"] = order[f"in/{name}"]
    return built(sevir.plan(str(folder), low_resolution=True), str(folder / "archive.zarr"))


def test_sevir_lr_splits_its_windows_as_published(low_resolution, order):
    shuffled = [
        Window(str(event), start) for event in order["out/trainval_shuffle_ids"] for start in (0, 6, 12)
    ]
    for split in ("train", "val"):
        expected = [shuffled[i] for i in order[f"out/random_split_{split}"]]
        assert enumerate_windows(TASKS["sevir-lr"], low_resolution, split) == expected
    test = enumerate_windows(TASKS["sevir-lr"], low_resolution, "test")
    assert test == [Window(str(event), start) for event in order["out/test_ids"] for start in (0, 6, 12)]


def test_sevir_lr_windows_are_read_as_published(low_resolution, order):
    task = TASKS["sevir-lr"]
    pixels = read(task, low_resolution, enumerate_windows(task, low_resolution, "test")[4:5])
    whole = torch.from_numpy(np.concatenate([pixels["context"], pixels["target"]], axis=1))
    scaled = task.scaling.encode(whole).numpy()
    np.testing.assert_array_equal(scaled[..., 0].transpose(0, 2, 3, 1), order["out/test_item4"])


def test_enso_windows_and_labels_are_the_published_ones(tmp_path, parity):
    fixture = np.load(parity / "earthformer" / "x04_enso_windows.npz")
    settings = json.loads(str(fixture["settings"]))
    months, height, width, models = fixture["sst_in"].shape
    names = [f"CMIP6-{n:02d}" for n in range(models)] + ["CMIP5-00", "CMIP5-01"]
    sst = np.full((len(names), months, height, 72), 99.0, np.float32)
    sst[:models, :, :, series.ENSO_LONGITUDES.start :][..., :width] = fixture["sst_in"].transpose(3, 0, 1, 2)
    nino = np.zeros((len(names), months), np.float32)
    nino[:models] = fixture["nino_in"].T
    root = xr.Dataset(
        {"sst": (("source", "month", "lat", "lon"), sst), "nino34": (("source", "month"), nino)},
        coords={"source": names, "n_months": ("source", np.full(len(names), months))},
    )
    archive = bare(str(tmp_path / "a.zarr"), "enso", root)
    gap, lead = settings["samples_gap"], settings["out_len"]
    task = changed("enso", context=settings["in_len"], target=lead, stride=(gap, gap, gap))
    keys = enumerate_windows(task, archive, "train")
    pixels = read(task, archive, keys)
    whole = np.concatenate([pixels["context"], pixels["target"]], axis=1)[:, :, :, :width, 0]
    scaled = task.scaling.encode(torch.from_numpy(whole)).numpy()
    np.testing.assert_allclose(scaled, fixture["sst_out"], atol=2e-7)
    np.testing.assert_array_equal(windows.read_nino(task, archive, keys), fixture["nino_out"])


def test_sevir_has_the_papers_counts(tmp_path):
    counts = {"2018-05-05T12:00": 11_906, "2019-03-05T12:00": 3_020, "2019-08-05T12:00": 4_053}
    stamps = [stamp for stamp, count in counts.items() for _ in range(count)]
    times = {f"S{n:06d}": stamp for n, stamp in enumerate(stamps)}
    archive = bare_sevir(str(tmp_path / "a.zarr"), times)
    found = [len(enumerate_windows(TASKS["sevir"], archive, split)) for split in SPLITS]
    assert found == [35_718, 9_060, 12_159]


def test_enso_has_the_published_counts(tmp_path):
    six = {f"CMIP6-{n:02d}": enso.series_months(151) for n in range(15)}
    five = {f"CMIP5-{n:02d}": enso.series_months(140) for n in range(17)}
    archive = bare_enso(str(tmp_path / "a.zarr"), {**six, **five, "SODA": 1236, "ersst": 128})
    paper = changed("enso", target=26, stride=(10, 5, 1))
    for task, expected in ((TASKS["enso"], (52_350, 1_679, 1_679)), (paper, (5_205, 334, 1_667))):
        found = {split: enumerate_windows(task, archive, split) for split in SPLITS}
        assert tuple(map(len, found.values())) == expected
        assert list(dict.fromkeys(key.series for key in found["train"])) == [*six, *list(five)[:15]]
        assert {key.series for key in found["val"]} == {"CMIP5-15"}
        assert {key.series for key in found["test"]} == {"CMIP5-16"}


# ------------------------------------------------------------------------------------------ radar's tiles


def test_radar_holds_the_last_dates_out_and_says_what_does_not_fit(showers):
    with pytest.warns(UserWarning, match="it is left out") as warned:
        found = {split: enumerate_windows(SMALL, showers, split) for split in SPLITS}
    names = {split: {key.series for key in keys} for split, keys in found.items()}
    assert names == {"train": {"alpha"}, "val": {"bravo"}, "test": {"charlie"}}
    said = {str(warning.message) for warning in warned}
    assert said == {
        "delta has a frame every 2 min, which gives no steps of 5 min: it is left out",
        "echo is 6 × 24 pixels, smaller than a tile of 8 × 8: it is left out",
    }


@pytest.mark.filterwarnings("ignore:delta has", "ignore:echo is")
def test_tiles_are_those_that_are_covered_and_come_in_order(showers):
    keys = enumerate_windows(SMALL, showers, "train")
    # Rows 0 and 1 are uncovered, so that tiles begin at row 4 and 8.
    corners = [(y, x) for y in (4, 8) for x in (0, 4, 8, 12, 16)]
    assert keys == [Window("alpha", start, corner) for start in (0, 2, 4) for corner in corners]
    loose = dataclasses.replace(SMALL, tiles=Tiles(size=8, stride=4, min_cover=0.75))
    assert {key.tile[0] for key in enumerate_windows(loose, showers, "train")} == {0, 4, 8}


def test_the_target_is_covered_as_well(tmp_path):
    rate = np.full((4, 8, 16), 500)
    rate[3, 0, 0] = 65535
    for day in (1, 2, 3):
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", rate)
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    for cover, columns in ((1.0, [8]), (255 / 256, [0, 8]), (0.0, [0, 8])):
        task = dataclasses.replace(SMALL, tiles=Tiles(size=8, stride=8, min_cover=cover))
        assert [key.tile[1] for key in enumerate_windows(task, archive, "test")] == columns


def test_rain_is_looked_for_in_the_context_alone(tmp_path):
    wet = np.zeros((4, 8, 32), int)
    wet[:2, :4, 0:8] = 10  # half of the first tile, in the context: exactly 0.1 mm/h
    wet[2:, :, 8:16] = 5000  # the second, in the target
    wet[0, :, 16:24] = 10  # the third, in one frame of two
    wet[:2, 0, 24:32] = 5000  # an eighth of the fourth
    for day in (1, 2, 3):
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", wet)
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))

    def columns(**wanted):
        tiles = Tiles(size=8, stride=8, **wanted)
        keys = enumerate_windows(dataclasses.replace(SMALL, tiles=tiles), archive, "test")
        return [key.tile[1] for key in keys]

    assert columns(min_wet=0.5) == [0, 16]
    with pytest.raises(InputError, match="has no test windows"):
        columns(min_wet=0.51)
    assert columns(min_wet=0.1) == [0, 16, 24]
    assert columns(min_wet=0.0) == [0, 8, 16, 24]
    assert columns(min_wet=0.1, wet=1.0) == [24]


def test_steps_longer_than_the_cadence_skip_frames(tmp_path):
    rate = np.arange(12)[:, None, None] * np.ones((1, 8, 8)) + 100
    for day in (1, 2, 3):
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", rate)
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    task = dataclasses.replace(SMALL, step_minutes=15, stride=(1, 1, 1), tiles=Tiles(size=8))
    keys = enumerate_windows(task, archive, "test")
    assert [key.start for key in keys] == [0]
    pixels = read(task, archive, keys)
    shown = np.concatenate([pixels["context"], pixels["target"]], axis=1)[0, :, 0, 0, 0]
    np.testing.assert_array_equal(shown, np.float32([1.00, 1.03, 1.06, 1.09]))
    times = windows.frame_times(task, archive, keys)[0]
    assert times[0] == np.datetime64("2016-05-03T10:00")
    assert set(np.diff(times)) == {np.timedelta64(15, "m")}


@pytest.mark.real_data
def test_real_radar_holds_out_its_last_date(tmp_path, real_data):
    (tmp_path / "raw").mkdir()
    for name in ("knmi_20100826", "mch_20150515", "mch_20170131", "mrms_win"):
        (tmp_path / "raw" / f"{name}.h5").symlink_to(real_data / "radar" / f"{name}.h5")
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    task = TASKS["radar"]
    with pytest.warns(UserWarning, match="mrms_win has a frame every 2 min"):
        found = {split: enumerate_windows(task, archive, split) for split in SPLITS}
    names = [{key.series for key in keys} for keys in found.values()]
    assert names == [{"knmi_20100826"}, {"mch_20150515"}, {"mch_20170131"}]
    assert all(len(keys) > 10 for keys in found.values())
    pixels = read(task, archive, found["test"][::20])
    assert all(np.isfinite(values).all() for values in pixels.values())
    assert ((pixels["context"] >= task.tiles.wet).mean((1, 2, 3, 4)) >= task.tiles.min_wet).all()
    dates = windows.frame_times(task, archive, found["test"]).astype("datetime64[D]")
    assert set(dates.ravel()) == {np.datetime64("2017-01-31")}


# ----------------------------------------------------------------------------- no window crosses a split


STARTS = {
    "across": ("2016-01-10T22:00", 60, 5),
    "beyond": ("2016-01-11T23:30", 30, 10),
    "coarse": ("2016-02-10T00:00", 20, 20),
    "double": ("2016-03-10T12:00", 50, 5),
}
DATES = st.sampled_from(
    ["2016-01-10", "2016-01-11", "2016-01-12T01:00", "2016-02-10", "2016-02-10T03:00", "2016-03-10T13:02"]
)


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """Radar sequences, some over midnight, wet throughout."""
    folder = tmp_path_factory.mktemp("nights")
    for name, (start, frames, cadence) in STARTS.items():
        sequence(folder / "raw", name, start, np.full((frames, 4, 4), 500), cadence=cadence)
    return built(radar.plan(str(folder / "raw")), str(folder / "archive.zarr"))


@st.composite
def parted(draw, **fixed):
    """Values for a task: lengths, strides and dates."""
    dates = sorted(draw(st.lists(DATES, max_size=2, unique=True)))
    val, test = (dates * 2)[:2] if dates else (None, None)
    if len(dates) == 1 and draw(st.booleans()):
        val = None
    return {
        "context": draw(st.integers(1, 8)),
        "target": draw(st.integers(1, 8)),
        "stride": tuple(draw(st.integers(1, 7)) for _ in SPLITS),
        "splits": Splits(val_from=val, test_from=test),
        **fixed,
    }


def split_of(moment, splits, days):
    """The split that an instant belongs to, as `Splits` says it."""
    if splits.val_from or splits.test_from:
        if splits.test_from and moment > np.datetime64(splits.test_from):
            return "test"
        return "val" if splits.val_from and moment > np.datetime64(splits.val_from) else "train"
    day = moment.astype("datetime64[D]")
    return "test" if day == days[-1] else "val" if day == days[-2] else "train"


def windows_or_none(task, archive, split):
    try:
        return enumerate_windows(task, archive, split)
    except InputError:
        return []


@settings(max_examples=60, deadline=None)
@given(values=parted(tiles=Tiles(size=4)), step=st.sampled_from([5, 10, 20, 40]))
@pytest.mark.filterwarnings("ignore:.*it is left out")
def test_no_radar_window_crosses_a_split_and_none_is_lost(nights, values, step):
    task = changed("radar", step_minutes=step, **values)
    times = {
        name: np.datetime64(start, "m") + np.arange(frames) * np.timedelta64(cadence, "m")
        for name, (start, frames, cadence) in STARTS.items()
        if step % cadence == 0
    }
    days = np.unique(np.concatenate(list(times.values())).astype("datetime64[D]"))
    if len(days) < 3 and task.splits == Splits():
        return
    for split, stride in zip(SPLITS, task.stride, strict=True):
        expected = []
        for name, moments in times.items():
            every = step // STARTS[name][2]
            for first in range(0, len(moments), stride * every):
                frames = moments[first::every][: task.frames]
                held = {
                    split_of(t, task.splits, days)
                    for t in moments[first : first + (task.frames - 1) * every + 1]
                }
                if len(frames) == task.frames and held == {split}:
                    expected.append(Window(name, first, (0, 0)))
        assert windows_or_none(task, nights, split) == expected


@pytest.fixture(scope="module")
def storms(tmp_path_factory):
    """Times of SEVIR events around the dates above, in no order, and their archives."""
    rng = np.random.default_rng(0)
    minutes = np.concatenate([rng.integers(0, 90_000, 30), [0, 1440, 2880]])
    times = {f"{'SR'[n % 2]}{n:04d}": np.datetime64("2016-01-10", "m") + m for n, m in enumerate(minutes)}
    folder = tmp_path_factory.mktemp("storms")
    return times, {
        kind: bare_sevir(str(folder / f"{kind}.zarr"), times, kind) for kind in ("sevir", "sevir-lr")
    }


@settings(max_examples=40, deadline=None)
@given(values=parted())
def test_no_sevir_event_is_in_two_splits_and_none_is_lost(storms, values):
    times, archives = storms
    task = changed("sevir", **values)
    days = np.unique(np.array(list(times.values())).astype("datetime64[D]"))
    for split, stride in zip(SPLITS, task.stride, strict=True):
        events = sorted(n for n, t in times.items() if split_of(t, task.splits, days) == split)
        expected = [Window(n, start) for n in events for start in range(0, 50 - task.frames, stride)]
        assert windows_or_none(task, archives["sevir"], split) == expected


@settings(max_examples=20, deadline=None)
@given(values=parted(), fraction=st.sampled_from([0.1, 0.25, 0.5]))
def test_the_published_exception_parts_windows_but_spares_the_test_set(storms, values, fraction):
    times, archives = storms
    test_from = values["splits"].test_from
    stride = values["stride"][0]
    values |= {"splits": Splits(test_from=test_from, val_fraction=fraction), "stride": (stride,) * 3}
    task = changed("sevir-lr", **values)
    found = {split: windows_or_none(task, archives["sevir-lr"], split) for split in SPLITS}
    both = found["train"] + found["val"]
    assert len(set(both)) == len(both)
    assert not {key.series for key in both} & {key.series for key in found["test"]}
    assert {key.series for key in both + found["test"]} == set(times)
    assert len(found["val"]) == pytest.approx(fraction * len(both), abs=1)


@settings(max_examples=40, deadline=None)
@given(values=parted(splits=Splits()), months=st.lists(st.integers(1, 40), min_size=5, max_size=5))
def test_no_enso_window_leaves_its_source_and_no_source_is_in_two_splits(tmp_path_factory, values, months):
    names = ("CMIP6-00", "CMIP6-01", "CMIP5-00", "CMIP5-01", "CMIP5-02")
    lengths = dict(zip(names, months, strict=True))
    archive = bare_enso(str(tmp_path_factory.mktemp("e") / "a.zarr"), lengths)
    task = changed("enso", **values)
    sources = {"train": names[:3], "val": names[3:4], "test": names[4:]}
    for split, stride in zip(SPLITS, task.stride, strict=True):
        starts = {name: range(0, lengths[name] - task.frames + 1, stride) for name in sources[split]}
        expected = [Window(name, start) for name in sources[split] for start in starts[name]]
        assert windows_or_none(task, archive, split) == expected


def test_quarantined_series_are_left_out(tmp_path):
    times = {f"S{n}": f"2019-0{1 + n}-05" for n in range(9)}
    archive = bare_sevir(str(tmp_path / "s.zarr"), times, quarantine=("S7", "S2"))
    assert {key.series for key in enumerate_windows(TASKS["sevir"], archive, "test")} == {"S5", "S6", "S8"}
    assert {key.series for key in enumerate_windows(TASKS["sevir"], archive, "val")} == {
        "S0",
        "S1",
        "S3",
        "S4",
    }
    months = {f"CMIP{kind}-0{n}": 48 for kind in (6, 5) for n in range(3)}
    sources = bare_enso(str(tmp_path / "e.zarr"), months, quarantine=("CMIP5-02", "CMIP6-01"))
    train = enumerate_windows(TASKS["enso"], sources, "train")
    assert {key.series for key in train} == {"CMIP6-00", "CMIP6-02", "CMIP5-00"}
    # Another source does not take the place of the one that is held out.
    with pytest.raises(InputError, match="has no test windows"):
        enumerate_windows(TASKS["enso"], sources, "test")


# -------------------------------------------------------------------------------------------- refusals


def test_fewer_than_three_dates_cannot_be_parted_by_themselves(tmp_path):
    for day in (1, 2):
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", np.full((4, 8, 8), 500))
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    with pytest.raises(InputError, match=r"a\.zarr holds 2 date\(s\) that task radar can use: needed 3"):
        enumerate_windows(SMALL, archive, "test")
    parted = dataclasses.replace(SMALL, splits=Splits(test_from="2016-05-02"))
    assert {key.series for key in enumerate_windows(parted, archive, "test")} == {"s2"}


@pytest.mark.parametrize(
    ("task", "values", "said"),
    [
        ("sevir", {"stride": (12, 0, 12)}, r"task.stride is \(12, 0, 12\): needed steps of at least 1"),
        ("sevir", {"context": 0}, "task.context is 0: needed at least 1 frame"),
        ("sevir", {"archive": "sevr"}, "task.archive is 'sevr': needed one of sevir"),
        ("radar", {"step_minutes": None}, "task.step_minutes is None: needed .* minutes"),
        ("enso", {"step_minutes": 5}, "task.step_minutes is 5: needed none"),
        ("enso", {"splits": Splits(test_from="2000-01-01")}, "no dates: ENSO parts by climate model"),
        ("enso", {"splits": Splits(val_fraction=0.1)}, "splits.val_fraction is 0.1: needed none"),
    ],
)
def test_impossible_tasks_are_refused(task, values, said):
    with pytest.raises(ValueError, match=said):
        changed(task, **values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Splits(val_from="2019-13-01"), "splits.val_from is '2019-13-01': needed a date"),
        (
            lambda: Splits(val_from="2019-06-02", test_from="2019-06-01"),
            "splits.val_from is '2019-06-02': needed no later than test_from, 2019-06-01",
        ),
        (lambda: Splits(val_fraction=1.0), "splits.val_fraction is 1.0: needed between 0 and 1"),
        (lambda: Splits(val_from="2019-01-01", val_fraction=0.1), "needed none beside val_fraction"),
        (lambda: Tiles(size=0), "tiles.size is 0: needed at least 1 pixel"),
        (lambda: Tiles(min_wet=math.nan), "tiles.min_wet is nan: needed a fraction"),
    ],
)
def test_impossible_splits_and_tiles_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore:mrms_win")
def test_a_random_part_of_the_radar_windows_validates(real_data, tmp_path):
    archive = built(radar.plan(str(real_data / "radar")), str(tmp_path / "archive.zarr"))
    task = dataclasses.replace(TASKS["radar-256"], stride=(12, 3, 12))
    keys = {split: windows.enumerate_windows(task, archive, split) for split in windows.SPLITS}
    assert not set(keys["train"]) & set(keys["val"])
    assert len(keys["val"]) == int(0.1 * (len(keys["train"]) + len(keys["val"])))
    assert {key.series for key in keys["test"]} == {"mch_20170131"}
    assert "mch_20170131" not in {key.series for key in keys["train"] + keys["val"]}
    assert len({key.series for key in keys["train"]}) == 3
