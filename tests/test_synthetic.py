"""Synthetic archives: the formats are the real ones, and every event is the same whatever else is written."""

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipelines.archives import enso, radar, sevir, synthetic
from pipelines.errors import InputError

EVERY = tuple(sevir.MODALITIES)


def events(folder):
    """Raw values of every event and modality, read by the catalogue with h5py alone."""
    found = {}
    for row in pd.read_csv(folder / "CATALOG.csv").itertuples():
        with h5py.File(folder / "data" / row.file_name) as file:
            assert file["id"][row.file_index] == row.id.encode()
            stored = file[row.id][...] if row.img_type == "lght" else file[row.img_type][row.file_index]
        found[row.id, row.img_type] = stored
    return found


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.write_sevir(folder, events=7, seed=5, size=48, modalities=EVERY)
    return folder


# ----------------------------------------------------------------------------------------------- SEVIR


def test_a_seed_makes_one_archive(raw, tmp_path):
    synthetic.write_sevir(tmp_path / "again", events=7, seed=5, size=48, modalities=EVERY)
    synthetic.write_sevir(tmp_path / "other", events=7, seed=6, size=48, modalities=EVERY)
    assert (tmp_path / "again" / "CATALOG.csv").read_bytes() == (raw / "CATALOG.csv").read_bytes()
    first, again, other = (events(folder) for folder in (raw, tmp_path / "again", tmp_path / "other"))
    assert first.keys() == again.keys() == other.keys()
    for key, values in first.items():
        np.testing.assert_array_equal(again[key], values)
        assert not np.array_equal(other[key], values), key


@pytest.mark.parametrize("modalities", [("vil",), ("lght", "vis"), EVERY[::-1]])
def test_an_event_is_the_same_whatever_else_is_written(raw, tmp_path, modalities):
    synthetic.write_sevir(tmp_path, events=3, seed=5, size=48, modalities=modalities)
    whole, fewer = events(raw), events(tmp_path)
    assert {name for _, name in fewer} == set(modalities)
    for key, values in fewer.items():
        np.testing.assert_array_equal(values, whole[key])


def test_files_are_those_of_sevir(raw):
    files = sorted(str(path.relative_to(raw / "data")) for path in raw.rglob("*.h5"))
    spans = ["2018/SEVIR_{}_STORMEVENTS_2018_0101_0630", "2018/SEVIR_{}_STORMEVENTS_2018_0701_1231"]
    spans += ["2019/SEVIR_{}_STORMEVENTS_2019_0101_0630", "2019/SEVIR_{}_STORMEVENTS_2019_0701_1231"]
    assert files == sorted(f"{name}/{span.format(name.upper())}.h5" for name in EVERY for span in spans)
    shapes = {
        "vil": ((48, 48, 49), np.uint8),
        "ir069": ((24, 24, 49), np.int16),
        "ir107": ((24, 24, 49), np.int16),
        "vis": ((96, 96, 49), np.int16),
    }
    found = events(raw)
    assert len(found) == 7 * 5
    for (event, name), values in found.items():
        if name == "lght":
            assert values.ndim == 2
            assert values.shape[1] == 5
            seconds, _, _, x, y = values.T
            assert ((seconds >= -7200) & (seconds < 7500)).all()
            assert ((x >= 0) & (x < 48) & (y >= 0) & (y < 48)).all()
        else:
            assert (values.shape, values.dtype) == shapes[name], event
    assert sum(len(values) for (_, name), values in found.items() if name == "lght") > 0


def test_the_catalogue_is_that_of_sevir(raw):
    text = (raw / "CATALOG.csv").read_text()
    assert text.split("\n")[0] == (
        "id,file_name,file_index,img_type,time_utc,minute_offsets,episode_id,event_id,event_type,llcrnrlat,"
        "llcrnrlon,urcrnrlat,urcrnrlon,proj,size_x,size_y,height_m,width_m,data_min,data_max,pct_missing"
    )
    table = pd.read_csv(raw / "CATALOG.csv")
    assert table["time_utc"].str.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d").all()
    assert table["minute_offsets"].str.match("-120:-115:").all()
    assert (table["minute_offsets"].str.split(":").str.len() == 49).all()
    for (event, name), values in events(raw).items():
        row = table[(table["id"] == event) & (table["img_type"] == name)].iloc[0]
        if len(values):
            assert (row["data_min"], row["data_max"]) == pytest.approx((values.min(), values.max()))
    # An event lies in its file's half-year, and its modalities are of one time and place.
    years = table["file_name"].str.extract(r"_(\d{4})_(\d\d)\d\d_(\d\d)\d\d\.h5").astype(int)
    times = pd.to_datetime(table["time_utc"])
    assert (times.dt.year == years[0]).all()
    assert times.dt.month.between(years[1], years[2]).all()
    shared = table.drop(columns=["file_name", "img_type", "size_x", "size_y", "data_min", "data_max"])
    assert len(shared.drop_duplicates()) == 7


def test_the_reader_takes_every_event(raw):
    plan = sevir.plan(str(raw), modalities=EVERY)
    assert (plan.series, plan.dropped) == (7, {})
    assert [bad for shard in plan.shards for bad in shard.decode()[1]] == []


def test_modalities_go_with_their_storms(raw):
    found = events(raw)
    for event in {event for event, _ in found}:
        vil, cold, bright = (found[event, name].astype(float) for name in ("vil", "ir107", "vis"))
        coarse = vil.reshape(24, 2, 24, 2, 49).max((1, 3))
        assert np.corrcoef(coarse.ravel(), cold.ravel())[0, 1] < -0.7
        assert np.corrcoef(np.repeat(np.repeat(vil, 2, 0), 2, 1).ravel(), bright.ravel())[0, 1] > 0.7
        flashes = found[event, "lght"]
        frame = np.floor((flashes[:, 0] + 7200) / 300).astype(int)
        # Flashes strike where the encoded VIL is high.
        assert (vil[flashes[:, 4].astype(int), flashes[:, 3].astype(int), frame] > 180).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"events": 0}, "0 events: needed at least one event"),
        ({"modalities": ("vil", "hail")}, "modality hail: needed at least one event, and some of vil, ir069"),
        ({"modalities": ()}, "modality none"),
    ],
)
def test_an_archive_that_cannot_be_is_refused_before_anything_is_written(tmp_path, arguments, told):
    with pytest.raises(InputError, match=told):
        synthetic.write_sevir(tmp_path / "raw", size=48, **arguments)
    assert not (tmp_path / "raw").exists()
    with pytest.raises(InputError, match="0 sequences: needed at least one"):
        synthetic.write_radar(tmp_path / "raw", sequences=0)


def test_an_archive_that_was_cut_off_has_no_catalogue(raw, tmp_path, monkeypatch):
    synthetic.write_sevir(tmp_path, events=3, seed=5, size=48)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(synthetic, "storms", full)
    with pytest.raises(OSError, match="No space left"):
        synthetic.write_sevir(tmp_path, events=5, seed=5, size=48)
    with pytest.raises(InputError, match=r"CATALOG\.csv is absent"):
        sevir.plan(str(tmp_path))


# ------------------------------------------------------------------------------------------------ ENSO


@pytest.fixture(scope="module")
def ocean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocean")
    synthetic.write_enso(folder, seed=5, cmip6=(2, 6), cmip5=(2, 6), soda_years=3)
    return folder


def test_files_are_those_of_icar(ocean):
    for kind, rows in (("CMIP", 24), ("SODA", 3)):
        with xr.open_dataset(ocean / f"{kind}_train.nc") as data:
            assert list(data.data_vars) == ["sst", "t300", "ua", "va"]
            for name in data.data_vars:
                assert data[name].dims == ("year", "month", "lat", "lon")
                assert data[name].shape == (rows, 36, 24, 72)
                assert data[name].dtype == np.float32
                assert np.isfinite(data[name]).all()
            np.testing.assert_array_equal(data["lat"], np.arange(-55, 61, 5))
            np.testing.assert_array_equal(data["lon"], np.arange(0, 360, 5))
            sst = data["sst"].values
            first = 6 if kind == "CMIP" else 3
            # Successive rows of a model overlap by 24 months.
            np.testing.assert_array_equal(sst[: first - 1, 12:], sst[1:first, :24])
            assert np.abs(sst).max() < 10
            assert (sst == 0).all((0, 1)).any()
        with xr.open_dataset(ocean / f"{kind}_label.nc") as label:
            assert list(label.data_vars) == ["nino"]
            assert label["nino"].dims == ("year", "month")
            assert label["nino"].shape == (rows, 36)
            assert label["nino"].dtype == np.float32
    # The next model is another series.
    with xr.open_dataset(ocean / "CMIP_train.nc") as data:
        assert not np.isclose(data["sst"][5, 12:], data["sst"][6, :24]).all((1, 2)).any()


def test_a_source_is_the_same_whatever_else_is_written(ocean, tmp_path):
    def sources(folder):
        found = {}
        for shard in enso.plan(str(folder)).shards:
            (region,), bad, *_ = shard.decode()
            assert bad == []
            found[shard.name] = region.arrays
        return found

    synthetic.write_enso(tmp_path / "fewer", seed=5, cmip6=(1, 6), cmip5=(1, 6), soda_years=3)
    synthetic.write_enso(tmp_path / "other", seed=6, cmip6=(1, 6), cmip5=(1, 6), soda_years=3)
    whole, fewer, other = (sources(folder) for folder in (ocean, tmp_path / "fewer", tmp_path / "other"))
    assert set(fewer) == {"CMIP6-00", "CMIP5-00", "SODA"}
    for name, arrays in fewer.items():
        for variable, values in arrays.items():
            np.testing.assert_array_equal(values, whole[name][variable])
            assert not np.array_equal(values, other[name][variable])
    starts = {arrays["nino34"][0, :12].tobytes() for arrays in whole.values()}
    assert len(starts) == len(whole) == 5


# ----------------------------------------------------------------------------------------------- radar


def test_radar_files_are_those_of_the_real_composites(tmp_path):
    synthetic.write_radar(tmp_path / "two", sequences=2, seed=5, size=64, frames=6)
    synthetic.write_radar(tmp_path / "one", sequences=1, seed=5, size=64, frames=6)
    plan = radar.plan(str(tmp_path / "two"))
    names = sorted(path.stem for path in (tmp_path / "two").iterdir())
    assert list(plan.groups[""]["sequence"].values) == names
    for shard in plan.shards:
        (region,), bad, *_ = shard.decode()
        assert bad == []
        rate = region.arrays["rate"]
        with h5py.File(tmp_path / "two" / f"{shard.name}.h5") as file:
            np.testing.assert_array_equal(rate, file["rate"])
        # The radar's disc does not reach the north-east; all else is covered, and it rains somewhere.
        assert (rate[:, 0, -1] == 65535).all()
        assert 0.001 < (rate == 65535).mean() < 0.1
        assert ((rate > 10) & (rate < 65535)).mean() > 0.02
    with (
        h5py.File(tmp_path / "one" / f"{names[0]}.h5") as one,
        h5py.File(tmp_path / "two" / f"{names[0]}.h5") as two,
    ):
        np.testing.assert_array_equal(one["rate"], two["rate"])
    days = plan.groups[""]["start_time"].values.astype("datetime64[D]")
    assert len(set(days)) == 2
