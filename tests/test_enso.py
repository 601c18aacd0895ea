"""ICAR-ENSO and SST analyses: unfolding, labels, land, and what becomes of files that are otherwise."""

import dataclasses
import gc
import io
import pickle
import re
import shutil
import zipfile

import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from tiny_archive import built

from pipelines import engine, plans, windows
from pipelines import forecast as stage
from pipelines.archives import enso, store, synthetic
from pipelines.errors import InputError
from pipelines.prepare import prepare
from pipelines.score import score
from pipelines.series import Window
from pipelines.tasks import TASKS


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enso")
    synthetic.write_enso(folder, seed=2, cmip6=(2, 8), cmip5=(3, 6), soda_years=4)
    return folder


@pytest.fixture
def copy(raw, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(raw, tmp_path / "raw")
    return tmp_path / "raw"


def change(path, function, **how):
    """Write a NetCDF file anew with what `function` makes of its Dataset."""
    with xr.open_dataset(path) as data:
        changed = function(data.load())
    path.unlink()
    changed.to_netcdf(path, **how)


def decoded(plan):
    """(sst, nino34) of each source, and the bad ones."""
    values, bad = {}, []
    for shard in plan.shards:
        regions, found, *_ = shard.decode()
        bad += found
        for region in regions:
            at = region.region["source"].start
            values[at] = (region.arrays["sst"][0], region.arrays["nino34"][0])
    names = plan.groups[""]["source"].values
    assert sorted(values) == list(range(len(names)))
    return {str(name): values[i] for i, name in enumerate(names)}, bad


# ----------------------------------------------------------------------------------------- unfolding


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_rows_unfold_as_published(parity, rows):
    reference = np.load(parity / "earthformer" / "x03_enso.npz")
    series = enso.unfold(reference[f"fold/{rows}_in"])
    np.testing.assert_array_equal(series, reference[f"fold/{rows}_out"])
    assert enso.series_months(rows) == len(series)


@pytest.mark.parametrize("rows", range(1, 12))
def test_unfolding_undoes_the_overlap(rows):
    months = np.arange(12 * (rows + 2))
    overlapping = months[12 * np.arange(rows)[:, None] + np.arange(36)]
    np.testing.assert_array_equal(enso.unfold(overlapping), months)


def test_an_archive_of_the_published_shape_has_the_published_series(tmp_path):
    # HDF5 stores nothing for chunks that were never written.
    for name, shape in (("CMIP", 4645), ("SODA", 100)):
        with h5py.File(tmp_path / f"{name}_train.nc", "w") as file:
            file.create_dataset("sst", (shape, 36, 24, 72), "f4", chunks=(1, 36, 24, 72))
        with h5py.File(tmp_path / f"{name}_label.nc", "w") as file:
            file.create_dataset("nino", (shape, 36), "f4", chunks=(64, 36))
    plan = enso.plan(str(tmp_path))
    template = plan.groups[""]
    months = template["n_months"].to_series()
    months.index = template["source"].values
    assert list(months.index) == [
        *(f"CMIP6-{n:02d}" for n in range(15)),
        *(f"CMIP5-{n:02d}" for n in range(17)),
        "SODA",
    ]
    assert set(months[:15]) == {1836}
    assert set(months[15:32]) == {1704}
    assert months["SODA"] == 102 * 12
    assert template["sst"].shape == (33, 1836, 24, 72)
    assert plan.frames == 15 * 1836 + 17 * 1704 + 1224
    assert plan.shards[14].rows == (14 * 151, 15 * 151)
    assert plan.shards[31].rows == (2265 + 16 * 140, 4645)
    (region,), bad, *_ = plan.shards[31].decode()
    assert bad == []
    assert region.arrays["sst"].shape == (1, 1704, 24, 72)
    assert region.region == {"source": slice(31, 32), "month": slice(0, 1704)}


def test_series_are_those_of_the_files(raw):
    values, bad = decoded(enso.plan(str(raw)))
    assert bad == []
    assert list(values) == ["CMIP6-00", "CMIP6-01", "CMIP5-00", "CMIP5-01", "CMIP5-02", "SODA"]
    with xr.open_dataset(raw / "CMIP_train.nc") as data, xr.open_dataset(raw / "CMIP_label.nc") as label:
        for name, first, years in (("CMIP6-01", 8, 8), ("CMIP5-00", 16, 6), ("CMIP5-02", 28, 6)):
            sst, nino = values[name]
            assert sst.shape == (12 * (years + 2), 24, 72)
            for month in (0, 13, 40, len(sst) - 1):
                row = min(month // 12, years - 1)
                at = month - 12 * row
                np.testing.assert_array_equal(sst[month], data["sst"][first + row, at])
                assert nino[month] == label["nino"][first + row, at]


def test_label_m_is_the_mean_of_months_m_to_m_plus_2(raw):
    for name, (sst, nino) in decoded(enso.plan(str(raw)))[0].items():
        # 5°S-5°N and 170-120°W.
        rows, columns = np.abs(enso.LAT) <= 5, (enso.LON >= 190) & (enso.LON <= 240)
        box = sst[:, rows][:, :, columns].mean((1, 2))
        means = (box[:-2] + box[1:-1] + box[2:]) / 3
        np.testing.assert_allclose(nino[:-2], means, atol=1e-5, err_msg=name)
        assert np.abs(nino[1:-1] - means).max() > 0.01


def test_land_is_0_whether_it_is_stored_as_0_or_nan(raw, copy):
    change(copy / "CMIP_train.nc", lambda data: data.where(data != 0))
    with xr.open_dataset(copy / "CMIP_train.nc") as data:
        assert np.isnan(data["sst"]).any()
    values, bad = decoded(enso.plan(str(copy)))
    assert bad == []
    for name, (sst, _) in decoded(enso.plan(str(raw)))[0].items():
        np.testing.assert_array_equal(values[name][0], sst)


def test_a_plan_reads_no_pixel_and_pickles(raw, copy):
    plan = enso.plan(str(copy))
    shards = pickle.loads(pickle.dumps(plan.shards))
    assert shards == plan.shards
    with pytest.raises(AttributeError):
        shards[0].months = 1
    (whole,), *_ = shards[0].decode()
    (copy / "CMIP_label.nc").unlink()
    (region,), (bad,), *_ = shards[0].decode()
    assert bad.series == "CMIP6-00"
    assert "CMIP_label.nc" in bad.reason
    assert np.isnan(region.arrays["sst"]).all()
    assert region.arrays["sst"].shape == whole.arrays["sst"].shape


def test_any_url_and_netcdf_is_a_source(raw, copy):
    whole, _ = decoded(enso.plan(str(raw)))
    for path in copy.glob("*.nc"):
        change(path, lambda data: data, format="NETCDF3_64BIT")
    memory = fsspec.filesystem("memory")
    memory.put(f"{raw}/", "/test_enso/", recursive=True)
    for source in (str(copy) + "/", f"file://{raw}", "memory://test_enso"):
        values, bad = decoded(enso.plan(source))
        assert bad == []
        for name, (sst, nino) in whole.items():
            np.testing.assert_array_equal(values[name][0], sst)
            np.testing.assert_array_equal(values[name][1], nino)
    memory.rm("/test_enso", recursive=True)


def test_one_of_the_two_archives_is_enough(copy):
    for path in copy.glob("CMIP_*"):
        path.unlink()
    plan = enso.plan(str(copy))
    assert [str(name) for name in plan.groups[""]["source"].values] == ["SODA"]
    assert decoded(plan)[1] == []


# ------------------------------------------------------------------------------------------- bad input


# Rows 8 to 15 are the second model's; its series takes rows 8, 11 and 14, and the end of row 15.


def _absolute(folder):
    def warm(data):
        data["sst"][11] += 27.5
        return data

    change(folder / "CMIP_train.nc", warm)


def _infinite(folder):
    def fill(data):
        data["sst"][11, 3, 5, 6] = np.inf
        return data

    change(folder / "CMIP_train.nc", fill)


def _no_label(folder):
    def forget(data):
        data["nino"][11, 5] = np.nan
        return data

    change(folder / "CMIP_label.nc", forget)


def _rot(folder):
    rot(folder / "CMIP_train.nc", (1, 36, 24, 72), at=11)


def rot(path, chunk, at):
    """Compress a file's `sst` in chunks of this shape, and overwrite part of one."""
    change(path, lambda data: data, encoding={"sst": {"zlib": True, "chunksizes": chunk}})
    with h5py.File(path) as file:
        found = file["sst"].id.get_chunk_info_by_coord((at, *(0 for _ in chunk[1:])))
    content = bytearray(path.read_bytes())
    middle = found.byte_offset + found.size // 2
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "told"),
    [
        (_absolute, "CMIP_train.nc", r"sst reaches [23]\d\.\d+: needed anomalies in K"),
        (_infinite, "CMIP_train.nc", "sst reaches inf: needed anomalies in K"),
        (_no_label, "CMIP_train.nc", "the label of month 41 in CMIP_label.nc is missing"),
        (_rot, "CMIP_train.nc", "HDF error"),
    ],
)
def test_one_bad_source_does_not_lose_the_others(raw, copy, damage, file, told):
    damage(copy)
    values, (bad,) = decoded(enso.plan(str(copy)))
    assert (bad.series, bad.file) == ("CMIP6-01", file)
    assert re.search(told, bad.reason)
    for name, (sst, nino) in decoded(enso.plan(str(raw)))[0].items():
        if name == "CMIP6-01":
            sst, nino = np.full_like(sst, np.nan), np.full_like(nino, np.nan)
        np.testing.assert_array_equal(values[name][0], sst)
        np.testing.assert_array_equal(values[name][1], nino)


def _edited(name, function):
    return lambda folder: change(folder / name, function)


def _truncated(folder):
    content = (folder / "SODA_train.nc").read_bytes()
    (folder / "SODA_train.nc").write_bytes(content[: len(content) // 2])


def _fewer(data):
    return data.isel(year=slice(3))


REFUSALS = {
    "absent": (shutil.rmtree, "raw is absent: needed the folder of CMIP_train.nc"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "has no CMIP_train.nc, SODA_train.nc or"),
    "no label": (
        lambda f: (f / "SODA_label.nc").unlink(),
        "SODA_label.nc is absent: needed beside SODA_train",
    ),
    "truncated": (_truncated, "SODA_train.nc cannot be read: .*HDF error"),
    "text": (
        lambda f: (f / "CMIP_train.nc").write_text("<html>"),
        "CMIP_train.nc cannot be read: begins with b'<htm': needed NetCDF",
    ),
    "nothing": (
        lambda f: (f / "CMIP_label.nc").write_bytes(b""),
        "CMIP_label.nc cannot be read: begins with b'': needed NetCDF",
    ),
    "rows": (
        _edited("CMIP_train.nc", lambda data: data.assign_attrs(cmip6_years=9)),
        r"CMIP_train.nc has 34 rows: needed 36 \(2 × 9 of CMIP6, then 3 × 6 of CMIP5\)",
    ),
    "published rows": (
        _edited("CMIP_train.nc", lambda data: data.drop_attrs()),
        r"has 34 rows: needed 4645 \(15 × 151 of CMIP6, then 17 × 140 of CMIP5\)",
    ),
    "labels": (_edited("SODA_label.nc", _fewer), "SODA_label.nc has 3 rows: needed 4"),
    "shape": (
        _edited("SODA_train.nc", lambda data: data.isel(lon=slice(48))),
        r"SODA_train.nc cannot be read: sst has shape \(4, 36, 24, 48\): needed \(year, 36, 24, 72\)",
    ),
    "label shape": (
        _edited("SODA_label.nc", lambda data: data.isel(month=slice(12))),
        r"SODA_label.nc cannot be read: nino has shape \(4, 12\): needed \(year, 36\)",
    ),
    "dimensions": (
        _edited("SODA_train.nc", lambda data: data.isel(month=0)),
        r"sst has shape \(4, 24, 72\): needed",
    ),
    "variable": (
        _edited("SODA_train.nc", lambda data: data.rename(sst="tos")),
        "SODA_train.nc cannot be read: no variable sst, found tos, t300, ua, va",
    ),
    "north first": (
        _edited("SODA_train.nc", lambda data: data.isel(lat=slice(None, None, -1))),
        "SODA_train.nc cannot be read: lat runs 60 to -55: needed -55 to 60",
    ),
    "greenwich": (
        _edited("SODA_train.nc", lambda data: data.assign_coords(lon=data["lon"] - 180)),
        "SODA_train.nc cannot be read: lon runs -180 to 175: needed 0 to 355",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_files_that_are_otherwise_are_refused_in_one_line(copy, case):
    damage, told = REFUSALS[case]
    damage(copy)
    with pytest.raises(InputError, match=told) as refused:
        enso.plan(str(copy))
    assert "\n" not in str(refused.value)


def test_an_archive_of_other_rows_is_another(raw, copy):
    contents = enso.plan(str(raw)).contents
    assert enso.plan(str(copy)).contents == contents
    change(copy / "SODA_train.nc", _fewer)
    change(copy / "SODA_label.nc", _fewer)
    assert enso.plan(str(copy)).contents != contents


# ---------------------------------------------------------------------------------------- observations


def analysis(path, *, step=2.0, months=48, function=None):
    """A monthly SST analysis of a mean year, one anomaly everywhere, and a continent: the anomaly."""
    lat, lon = np.arange(-88, 89, step), np.arange(0, 360, step)
    anomaly = np.random.default_rng(0).normal(0, 1, months)
    year = 20 + 3 * np.sin(2 * np.pi * np.arange(months) / 12)
    sst = np.broadcast_to((year + anomaly)[:, None, None], (months, len(lat), len(lon))).copy()
    sst[:, (lat > 20) & (lat < 60)] = np.where((lon > 80) & (lon < 120), np.nan, sst[:, :1])
    data = xr.Dataset(
        {"sst": (("time", "lat", "lon"), sst.astype(np.float32), {"units": "degC"})},
        {"time": pd.date_range("1990-03-01", periods=months, freq="MS"), "lat": lat, "lon": lon},
    )
    (function or (lambda d: d))(data).to_netcdf(path)
    anomaly -= [anomaly[m % 12 :: 12].mean() for m in range(months)]
    return anomaly


def test_anomalies_of_an_analysis_are_of_its_own_mean_year(tmp_path):
    anomaly = analysis(tmp_path / "mine.nc")
    plan = enso.plan(str(tmp_path / "mine.nc"))
    values, bad = decoded(plan)
    assert bad == []
    sst, nino = values["mine"]
    rows, columns = (enso.LAT > 20) & (enso.LAT < 60), (enso.LON > 80) & (enso.LON < 120)
    land = rows[:, None] & columns
    # 2° pixels reach over the continent's edge, and cells that are mostly land are land.
    assert (sst[:, land] == 0).all()
    assert (np.abs(sst[:, ~land] - anomaly[:, None]) < 1e-5).all()
    np.testing.assert_allclose(nino[:-2], np.convolve(anomaly, np.ones(3) / 3, "valid"), atol=1e-5)
    assert np.isnan(nino[-2:]).all()
    assert plan.groups[""]["first_month"].values.tolist() == ["1990-03"]


def test_cells_are_means_by_area(tmp_path):
    def south_only(data):
        return data.assign(sst=data["sst"].where(data["lat"] <= 54, 20).assign_attrs(units="degC"))

    anomaly = analysis(tmp_path / "mine.nc", function=south_only)
    sst, _ = decoded(enso.plan(str(tmp_path)))[0]["mine"]
    # The cell from 52.5 to 57.5°N holds half a degree of the pixel at 52, and one of two at 54, 56 and 58.
    inside = np.array([0.5, 2, 2, 0.5]) * np.cos(np.deg2rad([52, 54, 56, 58]))
    share = inside[:2].sum() / inside.sum()
    np.testing.assert_allclose(sst[:, enso.LAT == 55, 0][:, 0], share * anomaly, atol=1e-5)
    assert share > 0.515


def _other_axes(data):
    turned = (
        data.assign_coords(lon=(data["lon"] + 180) % 360 - 180).sortby("lon").sortby("lat", ascending=False)
    )
    kelvin = (turned["sst"] + 273.15).assign_attrs(units="K").transpose("lon", "lat", "time")
    deep = kelvin.expand_dims(lev=[0.0]).rename(lat="latitude", lon="longitude")
    return deep.to_dataset(name="sst")


def test_the_layout_of_an_analysis_changes_nothing(tmp_path):
    analysis(tmp_path / "mine.nc")
    analysis(tmp_path / "other.nc", function=_other_axes)
    values, bad = decoded(enso.plan(str(tmp_path)))
    assert bad == []
    np.testing.assert_allclose(values["mine"][0], values["other"][0], atol=1e-4)
    np.testing.assert_allclose(values["mine"][1], values["other"][1], atol=1e-4)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda d: d.isel(time=slice(0, 30)), "time spans 30 months: needed 36 for a mean year"),
        (lambda d: d.drop_isel(time=20), "time goes from 1991-10 to 1991-12: needed successive months"),
        (
            lambda d: d.assign_coords(time=pd.date_range("1990-01-01", periods=48)),
            "time goes from 1990-01 to 1990-01: needed successive months",
        ),
        (lambda d: d.assign_coords(time=np.arange(48)), "time is int64: needed dates"),
        (lambda d: d.isel(lat=5), r"sst has dimensions {'time': 48, 'lon': 180}: needed time, lat and lon"),
        (lambda d: d.rename(sst="tos"), "no variable sst, found tos"),
        (
            lambda d: d.assign(sst=d["sst"].assign_attrs(units="degF")),
            "sst has units 'degF': needed degC or K",
        ),
        (lambda d: d.drop_isel(lat=7), "lat has no equally spaced coordinate: needed a regular grid"),
        (lambda d: d.drop_vars("lon"), "lon has no equally spaced coordinate: needed a regular grid"),
        (lambda d: d.sel(lon=slice(0, 170)), "month 0 has no value in Niño3.4"),
        (lambda d: d.where(d["time"] != d["time"][9]), "month 9 has no value in Niño3.4"),
    ],
)
def test_an_analysis_that_is_otherwise_does_not_lose_the_others(copy, function, told):
    analysis(copy / "mine.nc", function=function)
    plan = enso.plan(str(copy))
    values, (bad,) = decoded(plan)
    assert bad.file == "mine.nc"
    assert told in bad.reason
    assert {"SODA", "CMIP6-00"} <= set(values)
    assert plan.series == 7


def test_an_analysis_is_read_in_parts_of_limited_size(tmp_path, monkeypatch):
    analysis(tmp_path / "mine.nc", months=50, function=_other_axes)
    whole = enso.observed(str(tmp_path / "mine.nc"))
    parts, original = [], enso._sums

    def spied(url, month, band):
        parts.append((month, band))
        return original(url, month, band)

    monkeypatch.setattr(enso, "_sums", spied)
    # Five years of 20 rows of 180 pixels.
    monkeypatch.setattr(enso, "CHUNK_BYTES", 5 * 20 * 180 * 4)
    cut = enso.observed(str(tmp_path / "mine.nc"))
    bands = {month: sorted((b for m, b in parts if m == month), key=lambda b: b.start) for month in range(12)}
    for rows in bands.values():
        assert [band.start for band in rows] == [0, 20, 40, 60, 80]
        assert max(band.stop - band.start for band in rows) == 20
    for part, all_at_once in zip(cut, whole, strict=True):
        np.testing.assert_allclose(part, all_at_once, atol=1e-5)


@pytest.mark.parametrize("layout", ["NETCDF4", "NETCDF3_64BIT"])
def test_an_analysis_may_lie_anywhere(tmp_path, layout):
    analysis(tmp_path / "mine.nc")
    change(tmp_path / "mine.nc", lambda data: data, format=layout)
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as file:
        file.write(tmp_path / "mine.nc", "mine.nc")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "mine.nc"), "/test_enso/mine.nc")
    whole = enso.observed(str(tmp_path / "mine.nc"))
    for url in ("memory://test_enso/mine.nc", f"zip://mine.nc::{tmp_path}/mine.zip"):
        for found, expected in zip(enso.observed(url), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert gc.isenabled()
    memory.rm("/test_enso", recursive=True)


def test_the_clusters_workers_compute_an_analysis(tmp_path, ray_cluster, monkeypatch):
    analysis(tmp_path / "mine.nc")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as file:
        file.write(tmp_path / "mine.nc", "mine.nc")
    whole = enso.observed(str(tmp_path / "mine.nc"))
    sent, original = [], engine._dask_get

    def spied(graph, keys, **options):
        sent.extend(key for key in keys if key.startswith("_sums"))
        return original(graph, keys, **options)

    monkeypatch.setattr(engine, "_dask_get", spied)
    for url in (str(tmp_path / "mine.nc"), f"zip://mine.nc::{tmp_path}/mine.zip"):
        with engine.dask_on_cluster():
            found = enso.observed(url)
        for values, expected in zip(found, whole, strict=True):
            np.testing.assert_array_equal(values, expected)
    assert len(set(sent)) == 2 * 12


def test_a_damaged_analysis_is_told_of_alike_by_threads_and_the_cluster(tmp_path, ray_cluster):
    analysis(tmp_path / "mine.nc")
    rot(tmp_path / "mine.nc", (1, 89, 180), at=9)
    (shard,) = enso.plan(str(tmp_path / "mine.nc")).shards
    _, (here,), *_ = shard.decode()
    with engine.dask_on_cluster():
        (region,), (there,), *_ = shard.decode()
    assert here == there
    assert "HDF error" in here.reason
    assert len(here.reason) < 200
    assert np.isnan(region.arrays["sst"]).all()


def test_months_of_an_analysis_have_their_dates(tmp_path):
    analysis(tmp_path / "mine.nc")
    archive = built(enso.plan(str(tmp_path / "mine.nc")), str(tmp_path / "a.zarr"))
    task = TASKS["enso"]
    keys = windows.enumerate_windows(task, archive, "test")
    assert keys == [Window("mine", start) for start in range(48 - 26 + 1)]
    (times,) = windows.frame_times(task, archive, keys[2:3])
    months = np.datetime64("1990-05") + np.arange(26)
    np.testing.assert_array_equal(times, months.astype("datetime64[ns]"))
    assert np.isfinite(windows.read_nino(task, archive, keys)).all()
    for split in ("train", "val"):
        with pytest.raises(InputError, match=f"has no {split} windows of 26 frames"):
            windows.enumerate_windows(task, archive, split)


def test_beside_climate_models_an_analysis_is_in_no_split(raw, copy):
    analysis(copy / "mine.nc")
    archives = [built(enso.plan(str(f)), str(copy.parent / f"{n}.zarr")) for n, f in enumerate((raw, copy))]
    short = dataclasses.replace(TASKS["enso"], stride=(1, 1, 1))
    for split in ("train", "val", "test"):
        without, beside = (windows.enumerate_windows(short, archive, split) for archive in archives)
        assert without == beside
    windows.check(short, archives[1], Window("mine", 36))


# ------------------------------------------------------------------------------------------- real SST


def of_own_mean_year(values):
    return values - np.array([values[m % 12 :: 12].mean() for m in range(len(values))])


def three_months(values):
    return np.convolve(values, np.ones(3) / 3, mode="valid")


@pytest.fixture(scope="module")
def noaa(real_data):
    """NOAA's own Niño3.4 of January 2010 to August 2020: three-month means, from their own mean year."""
    text = (real_data / "sst" / "ersst5.nino.mth.91-20.ascii").read_text().split("\n", 1)[1]
    table = pd.read_csv(io.StringIO(text), sep=r"\s+")
    table = table[table["YR"] >= 2010].iloc[:128]
    assert table.iloc[-1]["MON"] == 8
    return three_months(of_own_mean_year(table["NINO3.4"].to_numpy()))


@pytest.fixture(scope="module")
def ersst(tmp_path_factory, real_data, ray_cluster):
    """URL of the archive of the real analysis, prepared on the cluster."""
    url = str(tmp_path_factory.mktemp("ersst") / "a.zarr")
    done = prepare("enso", str(real_data / "sst" / "sst.mnmean.nc"), url, progress=False)
    assert (done.plan.series, done.quarantine) == (1, ())
    return url


@pytest.mark.real_data
def test_nino_of_the_archive_agrees_with_noaa(ersst, noaa):
    opened = store.open_dataset(ersst).isel(source=0)
    box = opened["sst"].sel(lat=slice(-5, 5), lon=slice(190, 240))
    # Cells at the box's edges lie in it by halves.
    area = np.outer([0.5, 1, 0.5], [0.5, *np.ones(9), 0.5]) * np.cos(np.deg2rad(box["lat"].values))[:, None]
    with engine.dask_on_cluster():
        mean = box.weighted(xr.DataArray(area, box[0].coords, ("lat", "lon"))).mean(("lat", "lon")).values
        label = opened["nino34"].values
    assert np.isnan(label[-2:]).all()
    assert np.corrcoef(label[:-2], noaa)[0, 1] >= 0.999
    assert np.abs(label[:-2] - noaa).max() <= 0.05
    # Half of what the cells at the edges are means of lies outside of the box, where anomalies are smaller.
    assert np.corrcoef(three_months(mean), noaa)[0, 1] >= 0.999
    assert np.abs(three_months(mean) - noaa).mean() <= 0.05


@pytest.mark.real_data
@pytest.mark.usefixtures("in_process")
def test_real_sst_is_forecast_and_scored(tmp_path, ersst):
    url, task = str(tmp_path / "f.zarr"), TASKS["enso"]
    stage.forecast(plans.plan("persistence", ersst, "test", task=task), url, progress=False)
    (card,) = score([url], ersst, progress=False)
    assert card.windows == 128 - 26 + 1
    sst, nino34 = (store.open_dataset(ersst)[name][0].values for name in ("sst", "nino34"))
    last = sst[11:114, 10:13, 38:49].mean((1, 2))
    correlation = card.nino.per_lead_time()["C-Nino3.4"].numpy()
    for lead in (1, 12):
        expected = np.corrcoef(last, nino34[11 + lead : 114 + lead])[0, 1]
        assert correlation[lead - 1] == pytest.approx(expected, abs=1e-4)
    assert correlation[0] > 0.8 > 0.5 > correlation[11]
    valid = store.open_dataset(url)["valid_time"].values
    assert (valid[0, 0], valid[-1, -1]) == (np.datetime64("2011-01-01"), np.datetime64("2020-08-01"))


@pytest.mark.real_data
def test_land_lies_where_a_sample_of_icar_has_it(real_data):
    plan = enso.plan(str(real_data / "sst"))
    values, bad = decoded(plan)
    # The folder also holds a series without a grid.
    assert [one.file for one in bad] == ["NMME_Reyn_SmithOIv2_Nino34_sst.nc"]
    assert list(values) == ["sst.mnmean"]
    sst, _ = values["sst.mnmean"]
    assert sst.shape == (128, 24, 72)
    # Neither north for south nor a cell aside.
    land = (np.load(real_data / "sst" / "test_0144-01-12.npy")[..., 0] == 0).all(0)
    ours = (sst == 0).all(0)
    assert (land == ours).mean() > 0.93
    moved = [ours[::-1], *(np.roll(ours, step, axis) for step in (-1, 1) for axis in (0, 1))]
    assert max((land == other).mean() for other in moved) < 0.92
