"""Windows and splits: the published ones, leak-free ones, and reading that fits them."""

import dataclasses
import json
import math
from collections.abc import Mapping

import h5py
import numpy as np
import pandas as pd
import pyproj
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_archive import built

from pipelines import series, windows
from pipelines.archives import enso, radar, sevir, store, synthetic
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.series import SPLITS, Window
from pipelines.tasks import TASKS, Splits, Task, Tiles
from pipelines.windows import enumerate_windows, read

DAY = np.timedelta64(1, "D")
METRES = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"


def bare(url: str, kind: str, root: xr.Dataset, quarantine: tuple[str, ...] = ()) -> Archive:
    """An archive of metadata alone."""
    store.create(url, {"": root}, config={"kind": kind}, shards=0)
    rows = [{"series": name, "file": "f", "reason": "r"} for name in quarantine]
    store.complete(url, {"counts": {}, "quarantine": rows})
    return store.open_archive(url)


def bare_sevir(url: str, times: Mapping[str, object], kind: str = "sevir", **more) -> Archive:
    frames, step, variable = (49, 5, "vil") if kind == "sevir" else (25, 10, "vil")
    minutes = np.arange(frames).astype("timedelta64[ns]") * 60_000_000_000 * step
    return bare(
        url,
        kind,
        xr.Dataset(
            {variable: (("event", "time"), np.zeros((len(times), frames), np.uint8))},
            coords={
                "event": ("event", np.array(list(times))),
                "time_utc": ("event", np.array(list(times.values()), "datetime64[ns]")),
                "time": ("time", minutes),
            },
        ),
        **more,
    )


def bare_enso(url: str, months: Mapping[str, int], **more) -> Archive:
    return bare(
        url,
        "enso",
        xr.Dataset(
            {"sst": ("source", np.zeros(len(months), np.float32))},
            coords={
                "source": ("source", np.array(list(months))),
                "n_months": ("source", np.array(list(months.values()))),
            },
        ),
        **more,
    )


def changed(task: str, **values) -> Task:
    return dataclasses.replace(TASKS[task], **values)


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


# ----------------------------------------------------------------------------------- the order of training


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(count, seed, epoch):
    keys = [Window("S", start) for start in range(count)]
    once = windows.epoch_order(keys, seed, epoch)
    assert sorted(once) == keys
    assert windows.epoch_order(keys, seed, epoch) == once


def test_epochs_and_seeds_differ():
    keys = [Window("S", start) for start in range(50)]
    orders = [windows.epoch_order(keys, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9


# ------------------------------------------------------------------------------------------ radar's tiles


def sequence(folder, name, start, rate, *, cadence=5, pixel=1000.0, **attrs):
    """A radar sequence in the project's layout: `rate` (time, y, x) in counts of 0.01 mm/h."""
    times = np.datetime64(start, "m") + np.arange(len(rate)) * np.timedelta64(cadence, "m")
    height, width = rate.shape[1:]
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["rate"] = rate.astype(np.uint16)
        said = {"cadence_minutes": cadence, "fill_value": 65535, "scale_factor": 0.01, "units": "mm/h"}
        file["rate"].attrs.update({**said, **attrs})
        file["time_utc"] = np.array([str(t) for t in times], dtype="S20")
        file.attrs["projection"] = METRES
        file.attrs["ext"] = np.array([0.0, 0.0, width * pixel, height * pixel])
        file.attrs["px"] = np.array([pixel, pixel])


SMALL = changed("radar", context=2, target=2, stride=(2, 2, 2), tiles=Tiles(size=8, stride=4))


@pytest.fixture(scope="module")
def showers(tmp_path_factory):
    """Sequences of 16 × 24 pixels on three days, and two that do not fit `SMALL`."""
    folder = tmp_path_factory.mktemp("showers")
    rng = np.random.default_rng(5)
    for day, name in ((3, "charlie"), (1, "alpha"), (2, "bravo")):
        rate = rng.integers(0, 2000, (9, 16, 24))
        rate[:, :2] = 65535
        sequence(folder / "raw", name, f"2016-05-0{day}T10:00", rate)
    sequence(folder / "raw", "delta", "2016-05-04T10:00", np.ones((9, 16, 24)), cadence=2)
    sequence(folder / "raw", "echo", "2016-05-05T10:00", np.ones((9, 6, 24)))
    (folder / "raw" / "foxtrot.h5").write_bytes(b"no radar")
    return built(radar.plan(str(folder / "raw")), str(folder / "archive.zarr"))


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


# ---------------------------------------------------------------------------------------------- reading


def test_missing_is_255_for_bytes_and_nan_for_rain(tmp_path, showers):
    keys = [Window("alpha", 0, (0, 0)), Window("alpha", 3, (4, 8))]
    pixels = read(SMALL, showers, keys)
    assert pixels["context"].shape == (2, 2, 8, 8, 1)
    assert {values.dtype for values in pixels.values()} == {np.dtype("float32")}
    assert np.isnan(pixels["context"][0, :, :2]).all()
    assert np.isfinite(pixels["context"][0, :, 2:]).all()
    stored = showers.array("alpha", "rate")
    np.testing.assert_allclose(pixels["target"][1, ..., 0], stored[5:7, 4:12, 8:16] / 100, rtol=1e-7)

    times = {f"S{n}": f"2019-07-0{1 + n}" for n in range(3)}
    archive = bare_sevir(str(tmp_path / "a.zarr"), times)
    zarr.open_array(archive.url, path="vil")[1, 13:] = 255
    pixels = read(TASKS["sevir"], archive, [Window("S1", 0)])
    assert {values.dtype for values in pixels.values()} == {np.dtype("uint8")}
    assert (pixels["context"] == 0).all()
    assert (pixels["target"] == 255).all()


def test_a_tenth_of_a_millimetre_is_a_tenth_of_a_millimetre(tmp_path):
    for day in (1, 2, 3):
        rate = np.arange(4 * 64).reshape(4, 8, 8) * 10
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", rate)
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    pixels = read(SMALL, archive, [Window("s1", 0, (0, 0))])
    tenths = np.concatenate([pixels["context"], pixels["target"]], axis=1).ravel()
    np.testing.assert_array_equal(tenths, np.float32(np.arange(256) / 10))


@pytest.fixture(scope="module")
def modalities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modalities")
    synthetic.write_sevir(folder / "raw", events=4, seed=2, size=48, modalities=("vil", "ir069"))
    plan = sevir.plan(str(folder / "raw"), modalities=("vil", "ir069"))
    return built(plan, str(folder / "archive.zarr"))


def test_packed_modalities_are_unpacked(modalities):
    task = changed("sevir", variable="ir069")
    key = Window(str(modalities.root["event"].values[0]), 12)
    stored = modalities.array("", "ir069")[0, 12:37]
    pixels = read(task, modalities, [key])
    whole = np.concatenate([pixels["context"], pixels["target"]], axis=1)[0, ..., 0]
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, stored * 0.01, rtol=1e-6)
    zarr.open_array(modalities.url, path="ir069")[0, 12, :3] = -32768
    assert np.isnan(read(task, modalities, [key])["context"][0, 0, :3]).all()
    assert tuple(windows.placement(task, modalities, [key]).sizes) == ("y_2km", "x_2km", "window")
    assert windows.attributes(task, modalities, key)["units"] == "degC"


@pytest.mark.parametrize("size", [1, 3, 16, 23, 40])
def test_batches_are_what_is_read_in_order(ray_cluster, modalities, size, monkeypatch):
    # Many tasks, which finish as they like.
    monkeypatch.setattr(windows, "READ_WINDOWS", 1)
    keys = [
        Window(str(event), start) for event in modalities.root["event"].values for start in range(0, 24, 4)
    ][:23]
    keys = windows.epoch_order(keys, seed=1, epoch=0)
    expected = read(TASKS["sevir"], modalities, keys)
    # A URL with a scheme, as of a store that lies elsewhere.
    archive = Archive(f"file://{modalities.url}")
    found = list(windows.batches(TASKS["sevir"], archive, keys, size, torch.device("cpu")))
    assert [len(batch["context"]) for batch in found] == [
        min(size, len(keys) - first) for first in range(0, len(keys), size)
    ]
    for name, values in expected.items():
        together = torch.cat([batch[name] for batch in found])
        assert together.dtype == torch.uint8
        np.testing.assert_array_equal(together.numpy(), values)


def test_batches_of_no_windows_are_none(modalities):
    assert list(windows.batches(TASKS["sevir"], modalities, [], 4, torch.device("cpu"))) == []


def test_keys_survive_as_a_table():
    keys = [Window("S1", 0), Window("R2", 12), Window("knmi", 3, (0, 64)), Window("ü", 4, (64, 0))]
    assert windows.from_table(windows.to_table(keys)) == keys


def test_a_damaged_archive_is_one_line(tmp_path, modalities):
    folder = tmp_path / "raw"
    synthetic.write_sevir(folder, events=4, seed=2, size=48)
    archive = built(sevir.plan(str(folder)), str(tmp_path / "a.zarr"))
    (shard,) = (path for path in (tmp_path / "a.zarr" / "vil" / "c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[:400] = bytes(400)
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zarr, vil, cannot be read: .*`earthformer validate`"):
        read(TASKS["sevir"], archive, [Window(str(e), 0) for e in archive.root["event"].values])


# ------------------------------------------------------------------------------------------ when and where


def test_frames_have_their_times(modalities, showers, tmp_path):
    event = str(modalities.root["event"].values[1])
    times = windows.frame_times(TASKS["sevir"], modalities, [Window(event, 12)])[0]
    reference = modalities.root["time_utc"].values[1]
    assert times[0] == reference - np.timedelta64(60, "m")
    assert times[-1] == reference + np.timedelta64(60, "m")
    (rain,) = windows.frame_times(SMALL, showers, [Window("bravo", 3, (4, 4))])
    assert rain[0] == np.datetime64("2016-05-02T10:15")
    archive = bare_enso(str(tmp_path / "a.zarr"), {"CMIP6-00": 60})
    (months,) = windows.frame_times(TASKS["enso"], archive, [Window("CMIP6-00", 14)])
    assert months[0] == np.datetime64("1701-03-01")
    assert len(months) == 26
    assert months[-1] == np.datetime64("1703-04-01")


def test_offsets_count_from_the_windows_own_corner(modalities, showers):
    keys = [Window("alpha", 0, (4, 8)), Window("bravo", 2, (8, 0))]
    place = windows.placement(SMALL, showers, keys)
    for number, key in enumerate(keys):
        group, (row, column) = showers.group(key.series), key.tile
        for axis, first in (("y", row), ("x", column)):
            where = place[f"{axis}_origin"].values[number] + place[axis].values
            np.testing.assert_allclose(where, group[axis].values[first : first + 8])
    assert list(place["proj"].values) == [METRES, METRES]

    events = modalities.root["event"].values
    place = windows.placement(TASKS["sevir"], modalities, [Window(str(events[2]), 0)])
    longitude, latitude = pyproj.Transformer.from_crs(
        pyproj.CRS(str(place["proj"].values[0])), pyproj.CRS("EPSG:4326"), always_xy=True
    ).transform(place["x_origin"].values[0], place["y_origin"].values[0])
    assert longitude == pytest.approx(modalities.root["llcrnrlon"].values[2], abs=1e-6)
    assert latitude == pytest.approx(modalities.root["llcrnrlat"].values[2], abs=0.2)
    assert place["y"].values[0] == 4000.0
    # Offsets are no projection coordinates, and do not pass for them.
    for axis in ("y", "x"):
        assert "standard_name" not in place[axis].attrs
        assert place[f"{axis}_origin"].attrs["standard_name"] == f"projection_{axis}_coordinate"


def test_windows_of_other_pixels_are_not_put_on_one_grid(tmp_path):
    for day, pixel in ((1, 1000.0), (2, 1000.4), (3, 500.0)):
        sequence(tmp_path / "raw", f"s{day}", f"2016-05-0{day}T10:00", np.ones((4, 8, 8)), pixel=pixel)
    archive = built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "a.zarr"))
    keys = [Window(f"s{day}", 0, (0, 0)) for day in (1, 2, 3)]
    assert windows.placement(SMALL, archive, keys[:2])["x"].values[-1] == 7000.0
    with pytest.raises(InputError, match=r"s3 are -500 × 500 apart, those of s1 -1000 × 1000: needed one"):
        windows.placement(SMALL, archive, keys)


# -------------------------------------------------------------------------------------------- refusals


def test_an_unknown_split_and_other_archives_are_refused(modalities, showers):
    with pytest.raises(InputError, match="split 'tset' is unknown: needed one of train, val, test"):
        enumerate_windows(TASKS["sevir"], modalities, "tset")
    with pytest.raises(InputError, match="is a sevir archive: task enso needs enso"):
        enumerate_windows(TASKS["enso"], modalities, "test")
    with pytest.raises(InputError, match="holds ir069, vil: task sevir needs the variable vis"):
        enumerate_windows(changed("sevir", variable="vis"), modalities, "test")
    with pytest.raises(InputError, match="has a frame every 5 min: task sevir needs 10 min"):
        enumerate_windows(changed("sevir", step_minutes=10), modalities, "test")
    late = changed("sevir", splits=Splits(test_from="2030-01-01"))
    with pytest.raises(InputError, match=r"has no test windows of 25 frames for task sevir: it spans 2018-"):
        enumerate_windows(late, modalities, "test")
    with pytest.raises(InputError, match="has no train windows of 62 frames"):
        enumerate_windows(changed("sevir", context=50), modalities, "train")


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


def test_a_context_needs_no_target_to_be_there(showers):
    # Of nine frames the last two.
    key = Window("charlie", 7, (8, 16))
    windows.check(SMALL, showers, key)
    found = windows.read_context(SMALL, showers, key)
    assert found.shape == (1, 2, 8, 8, 1)
    whole = read(SMALL, showers, [Window("charlie", 5, (8, 16))])["target"]
    np.testing.assert_array_equal(found, whole)
    times = windows.context_times(SMALL, showers, key)
    assert times[1] == showers.group("charlie")["time"].values[-1]
    assert set(np.diff(times)) == {np.timedelta64(5, "m")}
    slow = dataclasses.replace(SMALL, step_minutes=10)
    for wrong, message in (
        (Window("charlie", 8, (8, 16)), "start is 8: needed 0 to 7, for 2 frames of context in charlie"),
        (Window("charlie", -1, (8, 16)), "start is -1"),
        (Window("charly", 0, (0, 0)), "event 'charly' is unknown: the nearest is 'charlie'"),
        (Window("delta", 0, (0, 0)), "event 'delta' is unknown"),
        (Window("charlie", 0), r"tile is None: needed its first row and column, at most \(8, 16\)"),
        (Window("charlie", 0, (9, 0)), r"tile is \[9, 0\]"),
    ):
        with pytest.raises(InputError, match=message):
            windows.check(SMALL, showers, wrong)
    windows.check(slow, showers, Window("charlie", 6, (8, 16)))
    with pytest.raises(InputError, match="needed 0 to 6"):
        windows.check(slow, showers, key)


def test_months_go_on_after_the_context(tmp_path):
    archive, task = bare_enso(str(tmp_path / "a.zarr"), {"CMIP5-1": 36}), TASKS["enso"]
    key = Window("CMIP5-1", 24)
    windows.check(task, archive, key)
    times = windows.context_times(task, archive, key).astype("datetime64[M]")
    assert times[0] == np.datetime64("1702-01")
    assert set(np.diff(times)) == {np.timedelta64(1, "M")}
    assert len(times) == task.frames
    with pytest.raises(InputError, match="start is 25: needed 0 to 24"):
        windows.check(task, archive, Window("CMIP5-1", 25))
