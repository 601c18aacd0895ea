"""Windows are enumerated, ordered, read, dated and placed alike, whatever the archive."""

import dataclasses

import numpy as np
import pyproj
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from tiny_archive import METRES, SMALL, bare_enso, bare_sevir, built, changed, sequence

from pipelines import windows
from pipelines.archives import radar, sevir, synthetic
from pipelines.archives.store import Archive
from pipelines.errors import InputError
from pipelines.series import Window
from pipelines.tasks import TASKS, Splits
from pipelines.windows import enumerate_windows, read

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
