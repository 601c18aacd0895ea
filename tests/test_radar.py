"""Radar sequences: the real composites, files that users bring, and what becomes of broken ones."""

import pickle
import re

import fsspec
import h5py
import numpy as np
import pyproj
import pytest
import xarray as xr

from pipelines.archives import radar, store, synthetic
from pipelines.errors import InputError

LAEA = "+proj=laea +lat_0=50 +lon_0=10 +x_0=4000000 +y_0=3000000 +ellps=GRS80 +units=m"
RATES = np.random.default_rng(1).gamma(0.3, 4, (6, 10, 14)).round(2)
RATES[:, 0, :3] = np.nan
EXPECTED = np.where(np.isnan(RATES), 65535, np.rint(RATES * 100)).astype(np.uint16)


def decoded(plan):
    """Counts of each sequence, and the bad files."""
    parts, bad = {}, []
    for shard in plan.shards:
        regions, found, *_ = shard.decode()
        bad += found
        for region in regions:
            parts.setdefault(region.group, []).append(region)
    rates = {}
    for name, regions in parts.items():
        bounds = [(r.region["time"].start, r.region["time"].stop) for r in regions]
        assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), bounds[-1][1]]
        rates[name] = np.concatenate([r.arrays["rate"] for r in regions])
        assert rates[name].shape == plan.groups[name]["rate"].shape
        assert rates[name].dtype == np.uint16
    return rates, bad


def corners(group):
    """Longitude and latitude of the first and last pixel of the first and last row."""
    y, x = group["y"].values, group["x"].values
    if "crs" not in group:
        return [(x[i], y[j]) for j in (0, -1) for i in (0, -1)]
    crs = pyproj.CRS.from_proj4(group["crs"].attrs["proj4"])
    to_degrees = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    return [to_degrees.transform(x[i], y[j]) for j in (0, -1) for i in (0, -1)]


def cf(rates=RATES, *, units="mm h-1", proj=LAEA, minutes=5):
    """CF rain on a projection, row 0 in the north; on latitudes and longitudes where `proj` is empty."""
    times = np.datetime64("2021-07-14T06:00", "ns") + minutes * np.arange(len(rates)) * np.timedelta64(1, "m")
    names = ("y", "x") if proj else ("lat", "lon")
    if proj:
        y, x = 3_000_000 - 1000.0 * np.arange(10), 4_000_000 + 1000.0 * np.arange(14)
        axes = [{"units": "m", "standard_name": f"projection_{axis}_coordinate"} for axis in "yx"]
    else:
        y, x = 51 - 0.01 * np.arange(10), 6 + 0.01 * np.arange(14)
        axes = [{"units": "degrees_north"}, {"units": "degrees_east"}]
    data = xr.Dataset(
        {"rainfall_rate": (("time", *names), rates, {"units": units})},
        {"time": times, names[0]: (names[0], y, axes[0]), names[1]: (names[1], x, axes[1])},
    )
    if proj:
        data["projection"] = ((), 0, pyproj.CRS.from_proj4(proj).to_cf())
        data["rainfall_rate"].attrs["grid_mapping"] = "projection"
    return data


# ------------------------------------------------------------------------------------------ real files

# Corners (north-west, north-east, south-west, south-east) in degrees. KNMI publishes those of its product,
# FMI two of them, and those of MRMS are round; of the Swiss ones it is known about what they cover.
REAL = {
    "knmi_20100826": [(0.0, 55.97), (10.86, 55.39), (0.0, 49.36), (9.01, 48.90)],
    "mch_20150515": [(2.7, 49.4), (12.5, 49.4), (3.2, 43.6), (12.2, 43.6)],
    "mch_20170131": [(2.7, 49.4), (12.5, 49.4), (3.2, 43.6), (12.2, 43.6)],
    "fmi_20160928": [(15.06, 69.0), (34.90, 69.0), (18.60, 57.93), (31.36, 57.93)],
    "mrms_win": [(272.25, 47.32), (277.36, 47.32), (272.25, 42.2), (277.36, 42.2)],
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", list(REAL))
def test_real_composites(real_data, name):
    plan = radar.plan(str(real_data / "radar" / f"{name}.h5"))
    rates, bad = decoded(plan)
    assert bad == []
    group = plan.groups[name]
    with h5py.File(real_data / "radar" / f"{name}.h5") as file:
        stored = file["rate"][...]
        assert plan.groups[""]["cadence_minutes"].values == [file["rate"].attrs["cadence_minutes"]]
    np.testing.assert_array_equal(rates[name], stored)
    covered = rates[name] != 65535
    assert covered.any()
    assert (rates[name][covered] * radar.SCALE).max() < 300
    assert group["rate"].encoding["_FillValue"] == 65535
    assert (np.diff(group["y"]) < 0).all()
    assert (np.diff(group["x"]) > 0).all()
    tolerance = 0.6 if name.startswith("mch") else 0.02
    np.testing.assert_allclose(corners(group), REAL[name], atol=tolerance)
    if name != "mrms_win":
        for axis in "yx":
            np.testing.assert_allclose(np.abs(np.diff(group[axis])), 1000, atol=1)
        assert group["y"].attrs["units"] == group["x"].attrs["units"] == "m"
        assert pyproj.CRS.from_cf(group["crs"].attrs).is_projected
    else:
        assert "crs" not in group
        assert group["y"].attrs["units"] == "degrees_north"


@pytest.mark.real_data
def test_the_real_folder_is_one_plan(real_data):
    plan = radar.plan(str(real_data / "radar"), shard_mb=40)
    root = plan.groups[""]
    assert list(root["sequence"].values) == sorted(REAL)
    assert dict(zip(root["sequence"].values, root["n_frames"].values, strict=True)) == {
        "fmi_20160928": 40,
        "knmi_20100826": 92,
        "mch_20150515": 40,
        "mch_20170131": 40,
        "mrms_win": 36,
    }
    assert str(root["start_time"].values[1])[:16] == "2010-08-26T00:00"
    assert str(root["end_time"].values[4])[:16] == "2019-06-10T01:10"
    assert plan.frames == 248
    # Not more than about 40 MB are held at a time.
    assert max((s.last - s.first) * s.grid[0] * s.grid[1] * 2 for s in plan.shards) <= 40_000_000
    assert len(plan.shards) == 2 + 3 + 1 + 1 + 1


# -------------------------------------------------------------------------------------- the HDF5 layout


@pytest.fixture
def ours(tmp_path):
    """A folder of three synthetic sequences in the HDF5 layout."""
    synthetic.write_radar(tmp_path / "raw", sequences=3, seed=4, size=32, frames=5)
    return tmp_path / "raw"


def test_the_size_of_shards_changes_nothing(ours):
    one, many = radar.plan(str(ours)), radar.plan(str(ours), shard_mb=0)
    assert (len(one.shards), len(many.shards)) == (3, 15)
    whole = decoded(one)[0]
    for name, values in decoded(many)[0].items():
        np.testing.assert_array_equal(values, whole[name])
    assert one.config != many.config


def test_a_plan_reads_no_pixel_and_pickles(ours):
    path = sorted(ours.iterdir())[1]
    whole, _ = decoded(radar.plan(str(ours)))
    with h5py.File(path) as file:
        chunk = file["rate"].id.get_chunk_info(3)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    plan = radar.plan(str(ours), shard_mb=0)
    shards = pickle.loads(pickle.dumps(plan.shards))
    assert shards == plan.shards
    with pytest.raises(AttributeError):
        shards[0].first = 9
    rates, bad = decoded(plan)
    assert [(one.series, one.file) for one in bad] == [(path.stem, path.name)]
    # Only the damaged frame is lost.
    assert (rates[path.stem][3] == 65535).all()
    for name, values in whole.items():
        keep = [0, 1, 2, 4] if name == path.stem else slice(None)
        np.testing.assert_array_equal(rates[name][keep], values[keep])


@pytest.mark.parametrize(
    ("stored", "attributes"),
    [
        (np.nan_to_num(RATES, nan=-1).astype(np.float32), {"fill_value": -1.0}),
        (RATES, {}),
        (np.where(np.isnan(RATES), 9999, np.rint(RATES * 100)).astype(np.int16),
         {"fill_value": 9999, "scale_factor": 0.01}),
        (EXPECTED, {"fill_value": 65535, "scale_factor": 0.01, "units": b"mm h-1"}),
        (RATES / 3600, {"units": "kg m-2 s-1"}),
    ],
)  # fmt: skip
def test_other_packings_are_the_same_rain(tmp_path, stored, attributes):
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["rate"] = stored
        file["rate"].attrs.update({"units": "mm/h", **attributes})
        file["time_utc"] = np.array([f"2021071406{5 * k:02d}" for k in range(6)], "S12")
        file.attrs.update({"lat": 51 - 0.01 * np.arange(10), "lon": 6 + 0.01 * np.arange(14)})
    plan = radar.plan(str(tmp_path))
    rates, bad = decoded(plan)
    assert bad == []
    np.testing.assert_array_equal(rates["mine"], EXPECTED)
    np.testing.assert_array_equal(plan.groups["mine"]["time"], cf()["time"])


# --------------------------------------------------------------------------------------- brought by users


@pytest.fixture(scope="module")
def expected_grid():
    group = cf()
    return group["y"].values, group["x"].values


def _kilometres(data):
    for axis in "yx":
        data[axis] = (axis, data[axis].values / 1000, {**data[axis].attrs, "units": "km"})
    return data


def _proj_in_kilometres(data):
    small = "+proj=laea +lat_0=50 +lon_0=10 +x_0=4000 +y_0=3000 +a=6378.137 +b=6356.752314140356"
    data["projection"].attrs = {"proj4_params": small}
    for axis in "yx":
        data[axis] = (axis, data[axis].values / 1000)
    return data


def _units_in_kilometres(data):
    data["projection"].attrs = {"proj4": LAEA.replace("+units=m", "+units=km")}
    for axis in "yx":
        data[axis] = (axis, data[axis].values / 1000)
    return data


def _jitter(data):
    # Times as fractions of a day come out some microseconds early or late.
    noise = np.array([0, 3, -2, 1, 4, -1]) * np.timedelta64(1000, "ns")
    return data.assign_coords(time=data["time"].values + noise)


LAYOUTS = {
    "as it is": lambda d: d,
    "packed": lambda d: d,
    "other units": lambda d: d.assign(rainfall_rate=(d["rainfall_rate"] / 3600).assign_attrs(
        units="kg m-2 s-1", grid_mapping="projection")),
    "m/s": lambda d: d.assign(rainfall_rate=(d["rainfall_rate"] / 3.6e6).assign_attrs(
        units="m s**-1", grid_mapping="projection")),
    "turned": lambda d: d.transpose("x", "y", "time"),
    "a level": lambda d: d.assign(rainfall_rate=d["rainfall_rate"].expand_dims(height=[2.0], axis=1)),
    "other name": lambda d: d.rename(rainfall_rate="pcp", y="northing", x="easting").assign(
        ghost=(("time",), np.zeros(6))).pipe(
        lambda e: e.assign(pcp=e["pcp"].assign_attrs(standard_name="rainfall_rate"))),
    "kilometres": _kilometres,
    "proj in kilometres": _proj_in_kilometres,
    "proj of kilometres": _units_in_kilometres,
    "negative": lambda d: d.fillna(-99.0),
    "absurd": lambda d: d.fillna(9.96921e36),
    "jitter": _jitter,
}  # fmt: skip


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_same_rain_in_any_layout(tmp_path, expected_grid, layout):
    data = LAYOUTS[layout](cf())
    encoding = {}
    if layout == "packed":
        encoding = {"rainfall_rate": {"dtype": "i2", "scale_factor": 0.01, "_FillValue": -9}}
    if layout == "jitter":
        encoding = {"time": {"units": "days since 2021-01-01", "dtype": "f8"}}
    data.to_netcdf(tmp_path / "mine.nc", encoding=encoding)
    plan = radar.plan(str(tmp_path / "mine.nc"))
    rates, bad = decoded(plan)
    assert bad == []
    np.testing.assert_array_equal(rates["mine"], EXPECTED)
    group = plan.groups["mine"]
    np.testing.assert_allclose(group["y"], expected_grid[0])
    np.testing.assert_allclose(group["x"], expected_grid[1])
    crs = pyproj.CRS.from_proj4(group["crs"].attrs["proj4"])
    to_degrees = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    # The first pixel is the projection's own centre.
    assert to_degrees.transform(float(group["x"][0]), float(group["y"][0])) == pytest.approx(
        (10, 50), abs=1e-6
    )
    assert str(group["time"].values[5]) == "2021-07-14T06:25:00.000000000"


@pytest.mark.parametrize(
    "how", ["NETCDF4", "NETCDF3_64BIT", "NETCDF3_CLASSIC", "zarr 2", "zarr 3", "memory", "file url", "cached"]
)
def test_any_format_and_url_is_a_source(tmp_path, how):
    source, folder = str(tmp_path / "raw"), tmp_path / "raw"
    folder.mkdir()
    if how.startswith("zarr"):
        cf().to_zarr(folder / "mine.zarr", zarr_format=int(how[-1]), consolidated=False)
    else:
        cf().to_netcdf(folder / "mine.nc", format=how if how.startswith("NETCDF") else None)
    if how == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", "/test_radar/", recursive=True)
        source = "memory://test_radar"
    if how in ("file url", "cached"):
        source = f"file://{folder}"
    if how == "cached":
        source = f"simplecache::{source}/mine.nc"
    rates, bad = decoded(radar.plan(source))
    assert bad == []
    np.testing.assert_array_equal(rates["mine"], EXPECTED)
    if how == "memory":
        fsspec.filesystem("memory").rm("/test_radar", recursive=True)


def test_a_zarr_store_of_any_name_is_a_sequence(tmp_path):
    cf().to_zarr(tmp_path / "july", consolidated=False)
    rates, bad = decoded(radar.plan(f"{tmp_path / 'july'}/"))
    assert bad == []
    np.testing.assert_array_equal(rates["july"], EXPECTED)


def test_rows_stay_in_the_order_of_the_file(tmp_path):
    cf(proj="").sortby("lat").to_netcdf(tmp_path / "south.nc")
    cf(proj="").to_netcdf(tmp_path / "north.nc")
    plan = radar.plan(str(tmp_path))
    rates, _ = decoded(plan)
    np.testing.assert_array_equal(rates["south"], rates["north"][:, ::-1])
    for name, sign in (("south", 1), ("north", -1)):
        group = plan.groups[name]
        assert (sign * np.diff(group["y"]) > 0).all()
        assert group["y"].attrs["standard_name"] == "latitude"
        assert "grid_mapping" not in group["rate"].attrs
    assert list(plan.groups[""]["proj"].values) == ["", ""]


def test_geographic_grid_mappings_are_latitudes_and_longitudes(tmp_path):
    data = cf(proj="").rename(lat="y", lon="x")
    data["crs"] = ((), 0, pyproj.CRS.from_epsg(4326).to_cf())
    data["rainfall_rate"].attrs["grid_mapping"] = "crs: x y"
    data.to_netcdf(tmp_path / "mine.nc")
    assert radar.plan(str(tmp_path)).groups["mine"]["x"].attrs["units"] == "degrees_east"


def test_heavy_rain_is_stored_up_to_the_largest_count(tmp_path):
    rates = np.full((2, 10, 14), 655.34)
    rates[0, 0] = 700
    rates[0, 1, :4] = np.inf, -np.inf, 3001, -0.001
    rates[0, 2, 0] = 0.004
    cf(rates).to_netcdf(tmp_path / "mine.nc")
    (found,) = decoded(radar.plan(str(tmp_path)))[0].values()
    assert (found[1] == 65534).all()
    assert (found[0, 0] == 65534).all()
    assert (found[0, 1, :4] == 65535).all()
    assert found[0, 2, 0] == 0


def test_a_variable_can_be_named(tmp_path):
    data = cf().rename(rainfall_rate="Regen")
    data.to_netcdf(tmp_path / "mine.nc")
    with pytest.raises(InputError, match=r"no rain rate among Regen, projection: needed .*--variable NAME"):
        radar.plan(str(tmp_path))
    rates, _ = decoded(radar.plan(str(tmp_path), variable="Regen"))
    np.testing.assert_array_equal(rates["mine"], EXPECTED)
    with pytest.raises(InputError, match="no Schnee among Regen"):
        radar.plan(str(tmp_path), variable="Schnee")


# ------------------------------------------------------------------------------------------- bad input


def _no_mapping(data):
    del data["rainfall_rate"].attrs["grid_mapping"]
    return data.drop_vars("projection")


def _rotated(data):
    data["projection"].attrs = {
        "grid_mapping_name": "rotated_latitude_longitude",
        "grid_north_pole_latitude": 39.25,
        "grid_north_pole_longitude": -162.0,
    }
    return data


def _attributes(name, **attributes):
    def change(data):
        data[name].attrs.update(attributes)
        return data

    return change


OTHERWISE = {
    "no mapping": (_no_mapping, "rainfall_rate has no grid_mapping: needed a projection, or latitudes"),
    "lost mapping": (
        _attributes("rainfall_rate", grid_mapping="nowhere"),
        "grid_mapping 'nowhere' is absent: needed a projection",
    ),
    "rotated": (_rotated, "grid mapping .*: needed a projection, or latitudes and longitudes"),
    "no projection": (lambda d: d.assign(projection=((), 0, {"proj4": "+proj=nonsense"})), "."),
    "empty mapping": (lambda d: d.assign(projection=((), 0)), "."),
    "radians": (_attributes("y", units="rad"), "y has units 'rad': needed m or km"),
    "gap": (
        lambda d: d.drop_isel(time=3),
        "frames are 300 s apart, but 600 s after 2021-07-14T06:10:00: needed equal steps",
    ),
    "backwards": (lambda d: d.isel(time=slice(None, None, -1)), "frames are -300 s apart: needed whole min"),
    "at once": (lambda d: d.assign_coords(time=[d["time"].values[0]] * 6), "frames are 0 s apart"),
    "seconds": (
        lambda d: d.assign_coords(time=d["time"][0].values + np.arange(6) * np.timedelta64(90, "s")),
        "frames are 90 s apart: needed whole minutes",
    ),
    "one frame": (lambda d: d.isel(time=[0]), "holds 1 frames, 0 without time: needed a sequence"),
    "no time": (
        lambda d: d.assign_coords(time=[np.datetime64("NaT", "ns"), *d["time"].values[1:]]),
        "holds 6 frames, 1 without time",
    ),
    "no dates": (
        lambda d: d.assign_coords(time=np.arange(6)),
        "dimension time has no coordinate: needed dates",
    ),
    "no coordinate": (lambda d: d.drop_vars("x"), "dimension x has no coordinate: needed dates, and y and x"),
    "no units": (lambda d: d.drop_attrs(deep=True), "rainfall_rate has units ''"),
    "echoes": (_attributes("rainfall_rate", units="dBZ"), "has units 'dBZ': needed mm/h or kg m-2 s-1"),
    "members": (
        lambda d: d.assign(rainfall_rate=d["rainfall_rate"].expand_dims(member=3)),
        r"dimensions member \(3\), time \(6\), y \(10\), x \(14\): needed time, y and x",
    ),
    "no rows": (lambda d: d.assign(rainfall_rate=d["rainfall_rate"].isel(y=0)), "dimensions time .*: needed"),
    "other variable": (lambda d: d.rename(rainfall_rate="snow"), "no rain rate among snow, projection"),
}


@pytest.mark.parametrize("case", list(OTHERWISE))
def test_one_file_that_is_otherwise_does_not_lose_the_others(tmp_path, case):
    function, told = OTHERWISE[case]
    function(cf()).to_netcdf(tmp_path / "bad.nc")
    cf().to_netcdf(tmp_path / "good.nc")
    plan = radar.plan(str(tmp_path))
    rates, (bad,) = decoded(plan)
    assert (bad.series, bad.file) == ("bad.nc", "bad.nc")
    assert re.search(told, bad.reason), bad.reason
    assert "\n" not in bad.reason
    np.testing.assert_array_equal(rates["good"], EXPECTED)
    assert list(plan.groups) == ["", "good"]
    assert plan.series == 2
    (tmp_path / "good.nc").unlink()
    with pytest.raises(InputError, match=r"bad\.nc cannot be read as a radar sequence: "):
        radar.plan(str(tmp_path))


def _attribute(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            owner, _, key = name.rpartition("/")
            target = file[owner] if owner else file
            if value is None:
                del target.attrs[key]
            else:
                target.attrs[key] = value

    return change


def _dataset(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            attributes = dict(file[name].attrs)
            del file[name]
            file[name] = value
            file[name].attrs.update(attributes)

    return change


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


TIMES = np.array([f"2016-02-14T06:{m:02d}" for m in (0, 5, 10, 15, 25)], "S20")
BROKEN = {
    "text": (lambda p: p.write_text("<html>"), "begins with b'<htm': needed NetCDF or HDF5"),
    "empty": (lambda p: p.write_bytes(b""), "begins with b'': needed NetCDF or HDF5"),
    "truncated": (_truncate, "truncated file"),
    "units": (_attribute("rate/units", "dBZ"), "rate has units 'dBZ': needed mm/h"),
    "no units": (_attribute("rate/units", None), "rate has units ''"),
    "no projection": (
        _attribute("projection", None),
        "attributes are ext, .*: needed projection and ext, or",
    ),
    "odd projection": (_attribute("projection", "+proj=flat"), "."),
    "not projected": (_attribute("projection", "+proj=longlat +ellps=WGS84"), "is no projection in metres"),
    "inside out": (_attribute("ext", [0.0, 5e4, 3e4, 0.0]), "ext is .*: needed x1 < x2 and y1 < y2"),
    "short": (_attribute("ext", [0.0, 5e4]), "."),
    "times": (_dataset("time_utc", TIMES[:3]), "3 times for 5 frames"),
    "gap": (_dataset("time_utc", TIMES), "300 s apart, but 600 s after 2016-02-14T06:15:00"),
    "no dates": (_dataset("time_utc", np.array([b"noon"] * 5)), "noon"),
    "flat": (_dataset("rate", np.zeros((5, 32))), r"rate is \(5, 32\): needed numbers, \(time, y, x\)"),
    "names": (_dataset("rate", np.full((5, 2, 2), b"x")), r"rate is \(5, 2, 2\): needed numbers"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_one_broken_file_does_not_lose_the_others(ours, case):
    first, path, last = sorted(ours.iterdir())
    whole, _ = decoded(radar.plan(str(ours)))
    damage, told = BROKEN[case]
    damage(path)
    plan = radar.plan(str(ours))
    rates, (bad,) = decoded(plan)
    assert bad.file == path.name
    assert re.search(told, bad.reason), bad.reason
    assert "\n" not in bad.reason
    assert set(rates) == {first.stem, last.stem}
    for name, values in rates.items():
        np.testing.assert_array_equal(values, whole[name])


def test_a_file_that_shrank_after_planning_is_bad(ours):
    plan = radar.plan(str(ours))
    path = sorted(ours.iterdir())[0]
    with h5py.File(path, "r+") as file:
        values = file["rate"][:4]
    _dataset("rate", values)(path)
    rates, (bad,) = decoded(plan)
    assert bad.reason == "frames 0 to 5 have shape (4, 32, 32): needed (5, 32, 32)"
    assert (rates[path.stem] == 65535).all()


def test_what_is_no_radar_file_is_passed_over(ours):
    (ours / "README.txt").write_text("about these files")
    (ours / "._hidden.h5").write_text("resource fork")
    (ours / "quicklook.png").write_bytes(b"\x89PNG")
    plan = radar.plan(str(ours))
    assert plan.series == 3
    assert decoded(plan)[1] == []


def test_two_files_of_one_name_are_not_one_sequence(tmp_path):
    cf().to_netcdf(tmp_path / "mine.nc")
    cf(np.zeros_like(RATES)).to_netcdf(tmp_path / "mine.nc4")
    plan = radar.plan(str(tmp_path))
    rates, (bad,) = decoded(plan)
    assert (bad.file, bad.reason) == ("mine.nc4", "sequence mine is in mine.nc already")
    np.testing.assert_array_equal(rates["mine"], EXPECTED)


def test_names_of_files_cannot_break_the_store(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("file", "records", "sequence", "a b.c", "Zürich"):
        cf().to_netcdf(tmp_path / "raw" / f"{name}.nc")
    plan = radar.plan(str(tmp_path / "raw"))
    url = str(tmp_path / "archive.zarr")
    store.create(url, plan.groups, config=plan.config, shards=len(plan.shards))
    for shard in plan.shards:
        (region,), bad, *_ = shard.decode()
        assert bad == []
        store.write_region(url, region.group, region.arrays, region.region)
    root = xr.open_zarr(url)
    assert sorted(root["sequence"].values) == ["Zürich", "a b.c", "file_", "records_", "sequence_"]
    for name in root["sequence"].values:
        group = xr.open_zarr(url, group=str(name))
        np.testing.assert_allclose(group["rate"], RATES, atol=0.0051)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", "nowhere is absent: needed a folder of radar files"),
        ("empty", r"empty holds no \.h5, \.hdf5, \.nc, \.nc4, \.zarr: needed radar sequences"),
        ("empty/notes.txt", r"notes.txt cannot be read as a radar sequence: begins with b'rain'"),
    ],
)
def test_a_source_without_radar_is_refused(tmp_path, path, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("rain")
    with pytest.raises(InputError, match=told):
        radar.plan(str(tmp_path / path))
