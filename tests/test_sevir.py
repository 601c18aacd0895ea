"""SEVIR as it really is: which events are kept, what is read of them, what becomes of damaged ones."""

import errno
import json
import pickle
import shutil
import warnings

import fsspec
import h5py
import numpy as np
import pandas as pd
import pyproj
import pytest
import xarray as xr

from pipelines.archives import sevir, synthetic, why
from pipelines.archives.catalog import read_catalog, select
from pipelines.errors import InputError

EVERY = tuple(sevir.MODALITIES)
PROJ = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"
FILE = "vil/2018/SEVIR_VIL_STORMEVENTS_2018_0101_0630.h5"


def archive(folder, *, events=4, size=12, frames=49, file=FILE):
    """A raw archive of random VIL, small: returns the catalogue that is written."""
    path = folder / "data" / file
    path.parent.mkdir(parents=True)
    values = np.random.default_rng(events).integers(0, 255, (events, size, size, frames), np.uint8)
    ids = [f"S{n:06d}" for n in range(events)]
    with h5py.File(path, "w") as opened:
        opened["id"] = np.array(ids, "S7")
        opened.create_dataset("vil", data=values, chunks=(1, size, size, frames), compression="gzip")
    table = pd.DataFrame(
        {
            "id": ids,
            "file_name": file,
            "file_index": np.arange(events),
            "img_type": "vil",
            "time_utc": [f"2018-03-{n + 1:02d} 12:30:00" for n in range(events)],
            "minute_offsets": ":".join(str(5 * k - 120) for k in range(frames)),
            "event_type": "Hail",
            "llcrnrlat": 38.0,
            "llcrnrlon": -98.0,
            "proj": PROJ,
            "size_x": size,
            "size_y": size,
            "pct_missing": 0.0,
        }
    )
    return written(folder, table)


def written(folder, table, **how):
    table.to_csv(folder / "CATALOG.csv", index=False, **how)
    return table


def decoded(plan):
    """Arrays of all shards together, and the bad events."""
    regions, bad = [], []
    for shard in plan.shards:
        (region,), found, *_ = shard.decode()
        regions.append(region)
        bad += found
    places = np.concatenate([np.arange(r.region["event"].start, r.region["event"].stop) for r in regions])
    assert list(places) == list(range(plan.series))
    return {name: np.concatenate([r.arrays[name] for r in regions]) for name in regions[0].arrays}, bad


def events_of(plan):
    return [str(event) for event in plan.groups[""]["event"].values]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """All five modalities, synthetic."""
    folder = tmp_path_factory.mktemp("sevir")
    synthetic.write_sevir(folder, events=6, seed=7, size=48, modalities=EVERY)
    return folder


# ------------------------------------------------------------------------------------------- selection


def test_events_are_those_of_the_published_loader(tmp_path, parity):
    reference = json.loads((parity / "earthformer" / "x02_sevir_loader.json").read_text())
    written(tmp_path, pd.DataFrame(reference["catalog"]))
    catalog = read_catalog(str(tmp_path))
    bounds = {
        "train": (None, "2019-01-01"),
        "val": ("2019-01-01", "2019-06-01"),
        "test": ("2019-06-01", None),
    }
    for split, (start, end) in bounds.items():
        kept = select(catalog, start=start, end=end)
        assert list(kept["id"]) == sorted(kept["id"])
        if split == "train":
            kept = kept.sample(frac=1, random_state=1).sample(frac=1, random_state=1)
        found = [[name, int(row)] for name, row in zip(kept["file_name"], kept["file_index"], strict=True)]
        assert found == reference["splits"][split]["events"], split


def test_low_resolution_events_are_those_of_the_published_loader(tmp_path, parity):
    reference = np.load(parity / "prediff" / "dataset_order.npz")
    (tmp_path / "CATALOG.csv").write_text(str(reference["in/catalog_csv"]))
    catalog, split = read_catalog(str(tmp_path)), str(reference["in/split"])
    for name, kept in (
        ("trainval_noshuffle", select(catalog, end=split)),
        ("test", select(catalog, start=split)),
    ):
        assert list(kept["id"]) == list(reference[f"out/{name}_ids"])
        assert list(kept["file_index"]) == list(reference[f"out/{name}_file_index"])
        assert list(kept["file_name"]) == list(reference[f"out/{name}_file"])


def test_every_row_left_out_is_counted_by_its_reason(tmp_path):
    table = archive(tmp_path, events=6)
    twice = table.iloc[[1]].assign(file_index=5)
    # One of its two rows lacks pixels and goes first, so that the other one stays, as published.
    half = table.iloc[[2]].assign(pct_missing=0.25)
    missing = table.iloc[[3]].assign(pct_missing=0.01)
    other = table.iloc[[0]].assign(img_type="ir069")
    written(tmp_path, pd.concat([table.drop(index=[3, 5]), twice, half, missing, other]))
    plan = sevir.plan(str(tmp_path))
    assert events_of(plan) == ["S000000", "S000002", "S000004"]
    assert plan.dropped == {"of ids with more than one row": 2, "with pct_missing > 0": 2}
    assert plan.series == 3
    assert plan.frames == 3 * 49


def test_an_event_needs_every_modality(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    catalog = pd.read_csv(tmp_path / "raw" / "CATALOG.csv")
    gone = (catalog["id"] == "S800001") & (catalog["img_type"] == "ir107")
    twice = catalog[(catalog["id"] == "S800002") & (catalog["img_type"] == "vis")]
    lacks = (catalog["id"] == "S800003") & (catalog["img_type"] == "lght")
    catalog.loc[lacks, "pct_missing"] = 0.5
    written(tmp_path / "raw", pd.concat([catalog[~gone], twice]))
    plan = sevir.plan(str(tmp_path / "raw"), modalities=EVERY)
    assert events_of(plan) == ["S800000", "S800004", "S800005"]
    assert plan.dropped == {
        "of ids without all modalities": 4 + 4,
        "of ids with more than one row": 6,
        "with pct_missing > 0": 1,
    }
    assert sevir.plan(str(tmp_path / "raw")).series == 6


def test_neighbours_in_the_files_are_neighbours_in_the_archive(tmp_path):
    table = archive(tmp_path, events=5)
    written(tmp_path, table.sample(frac=1, random_state=3))
    assert events_of(sevir.plan(str(tmp_path))) == list(table["id"])


# ----------------------------------------------------------------------------------- what is read of them


def test_images_are_those_of_the_files(raw):
    plan = sevir.plan(str(raw), modalities=EVERY)
    arrays, bad = decoded(plan)
    assert bad == []
    template, catalog = plan.groups[""], pd.read_csv(raw / "CATALOG.csv")
    for name in ("vil", "ir069", "ir107", "vis"):
        assert arrays[name].dtype == template[name].dtype == np.dtype(sevir.MODALITIES[name].dtype)
        assert arrays[name].shape == template[name].shape
        rows = catalog[catalog["img_type"] == name].set_index("id")
        for place, event in enumerate(events_of(plan)):
            with h5py.File(raw / "data" / rows.loc[event, "file_name"]) as file:
                row = rows.loc[event, "file_index"]
                assert file["id"][row].decode() == event
                for time in (0, 20, 48):
                    np.testing.assert_array_equal(arrays[name][place, time], file[name][row, :, :, time])
    sizes = {name: arrays[name].shape[1:] for name in EVERY}
    assert sizes == {
        "vil": (49, 48, 48),
        "ir069": (49, 24, 24),
        "ir107": (49, 24, 24),
        "vis": (49, 96, 96),
        "lght": (49, 48, 48),
    }
    assert template["vis"].dims == ("event", "time", "y_500m", "x_500m")
    # What is stored decodes to degrees and reflectances.
    assert template["ir107"].attrs["scale_factor"] == 0.01
    assert -90 < arrays["ir107"].min() * 0.01 < arrays["ir107"].max() * 0.01 < 30


def test_lightning_falls_into_frames_and_pixels_as_counted_by_hand(tmp_path):
    flashes = [
        # seconds, lat, lon, x, y                       frame, y, x
        (-7200.5, 0, 0, 10.0, 20.0),  # before the first 0, 20, 10
        (-7200.0, 0, 0, 10.9, 20.9),  # on the first     0, 20, 10
        (-6900.1, 0, 0, 10.0, 20.0),  # just before      0, 20, 10
        (-6900.0, 0, 0, 10.0, 20.0),  # on the second    1, 20, 10
        (0.0, 0, 0, 0.0, 0.0),  #       in the middle   24,  0,  0
        (7199.9, 0, 0, 47.99, 0.5),  #                  47,  0, 47
        (7200.0, 0, 0, 47.99, 0.5),  #                  48,  0, 47
        (9000.0, 0, 0, 47.99, 0.5),  #  after the last  48,  0, 47
        (0.0, 0, 0, 48.0, 0.0),  #      just outside
        (0.0, 0, 0, -0.01, 0.0),
        (0.0, 0, 0, 0.0, 48.0),
        (0.0, 0, 0, 0.0, -0.01),
        (np.nan, 0, 0, 1.0, 1.0),  #    no time
        (0.0, 0, 0, np.nan, 1.0),
    ]
    expected = np.zeros((49, 48, 48), int)
    expected[0, 20, 10] = 3
    expected[1, 20, 10] = expected[24, 0, 0] = expected[47, 0, 47] = 1
    expected[48, 0, 47] = 2
    table = archive(tmp_path, events=2)
    path = tmp_path / "data" / "lght" / "2018" / "L.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["id"] = np.array(list(table["id"]), "S7")
        file["S000000"] = np.array(flashes)
        file["S000001"] = np.zeros((0, 5), np.float32)
    written(tmp_path, table.assign(img_type="lght", file_name="lght/2018/L.h5", size_x=0, size_y=np.nan))
    arrays, bad = decoded(sevir.plan(str(tmp_path), modalities=("lght",)))
    assert bad == []
    np.testing.assert_array_equal(arrays["lght"][0], expected)
    assert not arrays["lght"][1].any()


def test_row_0_is_the_south_and_lies_where_the_catalogue_says(raw):
    plan = sevir.plan(str(raw))
    template, catalog = (
        plan.groups[""],
        pd.read_csv(raw / "CATALOG.csv").drop_duplicates("id").set_index("id"),
    )
    assert (np.diff(template["y"]) > 0).all()
    assert template["y"].values[0] == 384_000 / 48 / 2
    to_degrees = pyproj.Transformer.from_crs(
        template["crs"].attrs["proj4"],
        pyproj.CRS(template["crs"].attrs["proj4"]).geodetic_crs,
        always_xy=True,
    )
    for place, event in enumerate(events_of(plan)):
        x, y = (float(template[f"{axis}_origin"][place]) for axis in "xy")
        row = catalog.loc[event]
        assert to_degrees.transform(x, y) == pytest.approx((row["llcrnrlon"], row["llcrnrlat"]), abs=1e-6)
        opposite = to_degrees.transform(x + 384_000, y + 384_000)
        assert opposite == pytest.approx((row["urcrnrlon"], row["urcrnrlat"]), abs=1e-6)
        lat = [to_degrees.transform(x, y + float(metres))[1] for metres in template["y"]]
        assert (np.diff(lat) > 0).all()


def test_frames_have_the_times_of_the_catalogue(tmp_path):
    table = archive(tmp_path, events=3)
    table.loc[1, "minute_offsets"] = ":".join(str(5 * k - 118) for k in range(49))
    table.loc[2, "minute_offsets"] = "#NAME?"
    written(tmp_path, table)
    template = sevir.plan(str(tmp_path)).groups[""]
    first = template["frame_time"].values[:, 0]
    assert [str(t)[:16] for t in first] == ["2018-03-01T10:30", "2018-03-02T10:32", "2018-03-03T10:30"]
    assert (np.diff(template["frame_time"].values, axis=1) == np.timedelta64(5, "m")).all()
    assert template["time"].values[[0, -1]].astype("timedelta64[m]").astype(int).tolist() == [-120, 120]
    low = sevir.plan(str(tmp_path), low_resolution=True).groups[""]
    np.testing.assert_array_equal(low["frame_time"], template["frame_time"][:, ::2])


def test_low_resolution_is_the_published_one(tmp_path, parity):
    reference = np.load(parity / "prediff" / "dataset_order.npz")
    archive(tmp_path, events=1)
    with h5py.File(tmp_path / "data" / FILE, "r+") as file:
        file["vil"][...] = reference["in/raw49"]
    plan = sevir.plan(str(tmp_path), low_resolution=True)
    arrays, bad = decoded(plan)
    assert bad == []
    np.testing.assert_array_equal(arrays["vil"], reference["out/downsampled"].transpose(0, 3, 1, 2))
    assert plan.groups[""]["vil"].shape == (1, 25, 4, 4)
    # The coarse pixels lie in the middle of the nine that they are of.
    np.testing.assert_allclose(plan.groups[""]["y"], sevir.plan(str(tmp_path)).groups[""]["y"][1::3])
    assert plan.stored_bytes == 25 * 4 * 4
    assert plan.decoded_bytes == 49 * 12 * 12


def test_a_missing_pixel_makes_its_block_missing():
    frames = np.zeros((3, 6, 6), np.uint8)
    frames[0, 4, 1], frames[1, 0, 0], frames[2, 0, 5] = 255, 200, 254
    low = sevir.block_maximum(frames)
    assert low[0].tolist() == [[0, 0], [255, 0]]
    assert low[1].tolist() == [[0, 254], [0, 0]]


def test_files_of_low_resolution_are_taken_as_they_are(tmp_path, parity):
    reference = np.load(parity / "prediff" / "dataset_order.npz")
    text = str(reference["in/catalog_csv"])
    (tmp_path / "CATALOG.csv").write_text(text)
    table = pd.read_csv(tmp_path / "CATALOG.csv")
    written(tmp_path, table.assign(size_x=18, size_y=18))
    for name in (n for n in reference if n.startswith("in/vil/")):
        path = tmp_path / "data" / name.removeprefix("in/")
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["vil"] = reference[name]
    plan = sevir.plan(str(tmp_path), low_resolution=True)
    arrays, bad = decoded(plan)
    assert bad == []
    rows = table[table["img_type"] == "vil"].drop_duplicates("id", keep=False).set_index("id")
    for place, event in enumerate(events_of(plan)):
        raw = reference[f"in/{rows.loc[event, 'file_name']}"][rows.loc[event, "file_index"]]
        np.testing.assert_array_equal(arrays["vil"][place], raw.transpose(2, 0, 1))


@pytest.mark.parametrize("low_resolution", [False, True])
def test_the_size_of_shards_changes_nothing(tmp_path, low_resolution):
    archive(tmp_path, events=5, size=96)
    one = sevir.plan(str(tmp_path), low_resolution=low_resolution)
    many = sevir.plan(str(tmp_path), low_resolution=low_resolution, shard_mb=0)
    assert (len(one.shards), len(many.shards)) == (1, 5)
    np.testing.assert_array_equal(decoded(one)[0]["vil"], decoded(many)[0]["vil"])


def test_a_plan_reads_no_pixel_and_pickles(tmp_path):
    archive(tmp_path)
    (tmp_path / "data").rename(tmp_path / "later")
    plan = sevir.plan(str(tmp_path))
    shards = pickle.loads(pickle.dumps(plan.shards))
    assert shards == plan.shards
    with pytest.raises(AttributeError):
        plan.shards[0].start = 1
    (tmp_path / "later").rename(tmp_path / "data")
    (region,), bad, *_ = shards[0].decode()
    assert bad == []
    with h5py.File(tmp_path / "data" / FILE) as file:
        np.testing.assert_array_equal(region.arrays["vil"], file["vil"][...].transpose(0, 3, 1, 2))


def test_any_url_is_a_source(tmp_path):
    table = archive(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/test_sevir/", recursive=True)
    table.to_csv(tmp_path / "mine.csv")
    whole, _ = decoded(sevir.plan(str(tmp_path)))
    sources = [f"{tmp_path}/", f"file://{tmp_path}", "memory://test_sevir", str(tmp_path / "mine.csv")]
    for source in sources:
        arrays, bad = decoded(sevir.plan(source))
        assert bad == [], source
        np.testing.assert_array_equal(arrays["vil"], whole["vil"])
    memory.rm("/test_sevir", recursive=True)


def test_archives_of_the_same_names_are_told_apart(tmp_path):
    table = archive(tmp_path)
    before = sevir.plan(str(tmp_path)).contents
    assert sevir.plan(str(tmp_path)).contents == before
    written(tmp_path, table.assign(llcrnrlat=39.0))
    assert sevir.plan(str(tmp_path)).contents != before


def test_lightning_alone_and_with_other_frames(tmp_path):
    synthetic.write_sevir(tmp_path, events=2, size=48, frames=25, modalities=("lght", "vil"))
    arrays, bad = decoded(sevir.plan(str(tmp_path), modalities=("lght", "vil")))
    assert bad == []
    assert arrays["lght"].shape == (2, 25, 48, 48)
    alone, _ = decoded(sevir.plan(str(tmp_path), modalities=("lght",)))
    np.testing.assert_array_equal(alone["lght"], arrays["lght"])
    assert alone["lght"].sum() > 0


# ----------------------------------------------------------------------------------- damaged catalogues


@pytest.mark.real_data
def test_the_real_spreadsheet_catalogue_is_read(real_data):
    source = str(real_data / "sevir" / "CATALOG_subset851.csv")
    with pytest.warns(UserWarning, match="spreadsheet|#NAME") as told:
        catalog = read_catalog(source)
    messages = [str(warning.message) for warning in told]
    assert any("'5/12/19 18:30'" in m and "m/d/yy" in m for m in messages)
    assert any("'#NAME?' in 851 rows" in m for m in messages)
    assert catalog.loc[0, "id"] == "S834603"
    assert str(catalog.loc[0, "time_utc"]) == "2019-05-12 18:30:00"
    assert catalog["time_utc"].between("2019-01-01", "2019-07-02").all()
    kept = select(catalog)
    assert len(kept) == (catalog["pct_missing"] == 0).sum() > 400
    assert list(kept["id"]) == sorted(kept["id"])
    # Splits by date part it without remainder.
    assert len(select(catalog, end="2019-06-01")) + len(select(catalog, start="2019-06-01")) == len(kept)
    with pytest.warns(UserWarning, match="spreadsheet"):
        plan = sevir.plan(source)
    assert plan.series == len(kept)
    assert plan.dropped == {"with pct_missing > 0": 851 - len(kept)}
    assert plan.groups[""]["crs"].attrs["proj4"] == PROJ
    to_degrees = pyproj.Transformer.from_crs(PROJ, pyproj.CRS(PROJ).geodetic_crs, always_xy=True)
    by_id = kept.set_index("id")
    for event in plan.groups[""]["event"][:5]:
        at, row = plan.groups[""].sel(event=event), by_id.loc[str(event.values)]
        x, y = float(at["x_origin"]) + 384_000, float(at["y_origin"]) + 384_000
        assert to_degrees.transform(x, y) == pytest.approx((row["urcrnrlon"], row["urcrnrlat"]), abs=1e-3)
    bad = [one for shard in plan.shards[:1] for one in shard.decode()[1]]
    assert {one.reason for one in bad} == {"the file is not there"}


def test_a_spreadsheet_changes_nothing_but_the_warning(tmp_path):
    table = archive(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = sevir.plan(str(tmp_path))
    times = pd.to_datetime(table["time_utc"])
    damaged = table.assign(
        time_utc=[f"{t.month}/{t.day}/{t:%y} {t.hour}:{t:%M}" for t in times],
        proj="#NAME?",
        mid_lat=40.1,
        **{"Unnamed: 9": ""},
    )
    written(tmp_path, damaged, encoding="utf-8-sig", lineterminator="\r\n")
    assert (tmp_path / "CATALOG.csv").read_bytes().startswith(b"\xef\xbb\xbfid,")
    with pytest.warns(UserWarning, match="spreadsheet: times like '3/1/18 12:30' are read as m/d/yy"):
        again = sevir.plan(str(tmp_path))
    xr.testing.assert_identical(again.groups[""].drop_vars("vil"), whole.groups[""].drop_vars("vil"))
    assert again.config == whole.config


@pytest.mark.parametrize(
    ("time", "read"),
    [("5/12/2019 8:05", "2019-05-12 08:05"), ("5/12/19 8:05:30", "2019-05-12 08:05:30")],
)
def test_other_spreadsheet_times(tmp_path, time, read):
    written(tmp_path, archive(tmp_path).assign(time_utc=time))
    with pytest.warns(UserWarning, match="spreadsheet"):
        catalog = read_catalog(str(tmp_path))
    assert (catalog["time_utc"] == pd.Timestamp(read)).all()


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("time_utc", "soon", "time_utc 'soon'"),
        ("file_index", "2.5", "file_index 2.5"),
        ("file_index", "#REF!", "file_index '#REF!'"),
        ("pct_missing", "", "pct_missing nan"),
        ("file_name", "", "file_name nan"),
    ],
)
def test_a_row_that_cannot_be_read_does_not_lose_the_others(tmp_path, column, value, told):
    table = archive(tmp_path).astype({column: object})
    table.loc[1, column] = value
    written(tmp_path, table)
    with pytest.warns(UserWarning, match=rf"1 rows have a cell .* \(id S000001\) for {told}"):
        plan = sevir.plan(str(tmp_path))
    assert events_of(plan) == ["S000000", "S000002", "S000003"]
    assert plan.dropped == {"with unreadable cells": 1}
    assert decoded(plan)[1] == []


def test_columns_that_are_not_needed_may_be_absent_or_damaged(tmp_path):
    table = archive(tmp_path)
    needed = ["id", "file_name", "file_index", "img_type", "time_utc", "pct_missing", "size_x", "size_y"]
    written(tmp_path, table[needed])
    bare = sevir.plan(str(tmp_path))
    assert decoded(bare)[1] == []
    assert np.isnan(bare.groups[""]["x_origin"]).all()
    written(
        tmp_path, table.assign(llcrnrlat="38,5", event_type=None, episode_id=None, time="noon", y=3, vil="x")
    )
    plan = sevir.plan(str(tmp_path))
    assert np.isnan(plan.groups[""]["llcrnrlat"]).all()
    assert set(plan.groups[""]["event_type"].values) == {""}
    assert plan.groups[""]["vil"].dims == ("event", "time", "y", "x")


def refusals():
    def drop(folder, table):
        written(folder, table.drop(columns="pct_missing"))

    def binary(folder, table):
        (folder / "CATALOG.csv").write_bytes(b"\x89HDF\r\n\x1a\n\xff\xfe")

    def european(folder, table):
        written(folder, table.assign(time_utc=["5/1/18 1:00", "13/1/18 1:00", "5/2/18 1:00", "6/2/18 1:00"]))

    return {
        "absent": (lambda f, t: (f / "CATALOG.csv").unlink(), {}, "CATALOG.csv is absent: needed the SEVIR"),
        "a folder": (
            lambda f, t: ((f / "CATALOG.csv").unlink(), (f / "CATALOG.csv").mkdir()),
            {},
            r"CATALOG.csv cannot be read \(.*directory",
        ),
        "empty": (lambda f, t: (f / "CATALOG.csv").write_text(""), {}, "is not a CSV table: No columns"),
        "binary": (binary, {}, "is not a CSV table"),
        "column": (drop, {}, "has no column pct_missing: needed id, file_name"),
        "european": (european, {}, "time_utc '13/1/18 1:00', the day before the month"),
        "header": (lambda f, t: written(f, t[:0]), {}, "no event .* among 0 catalogue rows"),
        "missing": (
            lambda f, t: written(f, t.assign(pct_missing=1)),
            {},
            "no event with one whole row of vil among 4 catalogue rows, 4 with pct_missing > 0",
        ),
        "modality": (
            lambda f, t: None,
            {"modalities": ("vil", "tornado")},
            "'tornado' cannot .*: needed vil,",
        ),
        "none": (lambda f, t: None, {"modalities": ()}, "modalities '' cannot be prepared"),
        "twice": (lambda f, t: None, {"modalities": ("vil", "vil")}, "each once"),
        "low": (lambda f, t: None, {"modalities": ("vis",), "low_resolution": True}, "needed vil alone"),
        "threes": (
            lambda f, t: written(f, t.assign(size_x=13)),
            {"low_resolution": True},
            "12 × 13 pixels have no SEVIR-LR: needed multiples of 3",
        ),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_a_catalogue_that_cannot_be_used_is_refused_in_one_line(tmp_path, case):
    damage, arguments, told = refusals()[case]
    damage(tmp_path, archive(tmp_path))
    with pytest.raises(InputError, match=told) as refused:
        sevir.plan(str(tmp_path), **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["nothing://there", "gs://bucket"])
def test_an_unknown_kind_of_url_is_refused(url):
    with pytest.raises(InputError, match=f"{url}/CATALOG.csv cannot be opened: .*needed a path"):
        sevir.plan(url)


# --------------------------------------------------------------------------------------- damaged events


OTHER = "vil/2019/OTHER.h5"


def _remake(values, name="vil", ids=None):
    """Put other contents into the second file."""

    def remake(folder, table):
        with h5py.File(folder / "data" / OTHER, "w") as file:
            if values is not None:
                file[name] = values
            if ids is not None:
                file["id"] = np.array([ids], "S7")
        return table

    return remake


def _truncate(folder, table):
    content = (folder / "data" / OTHER).read_bytes()
    (folder / "data" / OTHER).write_bytes(content[: len(content) // 2])
    return table


def _text(folder, table):
    (folder / "data" / OTHER).write_text("<html>404 Not Found</html>")
    return table


def _rot(folder, table):
    """Flip bytes in the middle of the compressed pixels."""
    with h5py.File(folder / "data" / OTHER) as file:
        chunk = file["vil"].id.get_chunk_info(0)
    content = bytearray((folder / "data" / OTHER).read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    content[middle : middle + 50] = bytes(50)
    (folder / "data" / OTHER).write_bytes(content)
    return table


def _row(index):
    def change(folder, table):
        return table.assign(file_index=table["file_index"].where(table["file_name"] != OTHER, index))

    return change


PIXELS = np.zeros((1, 12, 12, 49), np.uint8)
DAMAGE = {
    "absent": (lambda f, t: (f / "data" / OTHER).unlink() or t, "the file is not there"),
    "truncated": (_truncate, "not readable as HDF5: .*truncated file"),
    "text": (_text, "not readable as HDF5: .*file signature not found"),
    "empty": (lambda f, t: (f / "data" / OTHER).write_bytes(b"") or t, "not readable as HDF5"),
    "folder": (
        lambda f, t: ((f / "data" / OTHER).unlink(), (f / "data" / OTHER).mkdir()) and t,
        "not readable as HDF5",
    ),
    "rotten": (_rot, "."),
    "row outside": (_row(17), "file_index 17 lies outside its 1 events"),
    "row before": (_row(-1), "file_index -1 lies outside its 1 events"),
    "other id": (_remake(PIXELS, ids="S999999"), "row 0 holds event S999999"),
    "no pixels": (_remake(None), "no dataset 'vil', found"),
    "other name": (_remake(PIXELS, "vis"), "no dataset 'vil', found vis"),
    "a group": (_remake(PIXELS, "vil/vil"), "no dataset 'vil', found vil"),
    "shape": (_remake(PIXELS[:, :11]), r"row 0 has shape \(49, 11, 12\) .*: needed \(49, 12, 12\)"),
    "frames": (_remake(PIXELS[..., :48]), r"row 0 has shape \(48, 12, 12\) .*: needed \(49, 12, 12\)"),
    "dimensions": (_remake(PIXELS[0]), "dataset vil is 3-D uint8: needed 4-D uint8"),
    "dtype": (_remake(PIXELS.astype(np.float32)), "dataset vil is 4-D float32: needed 4-D uint8"),
    "signed": (_remake(PIXELS.astype(np.int16)), "dataset vil is 4-D int16: needed 4-D uint8"),
    "names": (_remake(np.array([b"x"])), r"dataset vil is 1-D \|S1"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_one_bad_event_does_not_lose_the_others(tmp_path, case):
    table = archive(tmp_path, events=3)
    archive(tmp_path / "more", events=1, file=OTHER)
    (tmp_path / "data" / OTHER).parent.mkdir()
    (tmp_path / "more" / "data" / OTHER).rename(tmp_path / "data" / OTHER)
    with h5py.File(tmp_path / "data" / OTHER, "r+") as file:
        file["id"][0] = b"S000009"
    alien = table.iloc[[0]].assign(id="S000009", file_name=OTHER, file_index=0)
    damage, told = DAMAGE[case]
    written(tmp_path, damage(tmp_path, pd.concat([table, alien], ignore_index=True)))
    plan = sevir.plan(str(tmp_path))
    arrays, (bad,) = decoded(plan)
    assert events_of(plan)[3] == bad.series == "S000009"
    assert bad.file == OTHER
    assert "\n" not in bad.reason
    with pytest.raises(ValueError, match=told):
        raise ValueError(bad.reason)
    assert (arrays["vil"][3] == 255).all()
    with h5py.File(tmp_path / "data" / FILE) as file:
        np.testing.assert_array_equal(arrays["vil"][:3], file["vil"][...].transpose(0, 3, 1, 2))


def test_an_event_that_lacks_one_modality_is_bad_as_a_whole(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    event = "S800001"
    catalog = pd.read_csv(tmp_path / "raw" / "CATALOG.csv")
    row = catalog[(catalog["id"] == event) & (catalog["img_type"] == "lght")].iloc[0]
    with h5py.File(tmp_path / "raw" / "data" / row["file_name"], "r+") as file:
        del file[event]
        file[event] = np.zeros((3, 4))
    plan = sevir.plan(str(tmp_path / "raw"), modalities=EVERY)
    arrays, (bad,) = decoded(plan)
    assert (bad.series, bad.file) == (event, row["file_name"])
    assert bad.reason == f"flashes {event} are (3, 4) float64: needed numbers, (n, 5)"
    whole, _ = decoded(sevir.plan(str(raw), modalities=EVERY))
    place = events_of(plan).index(event)
    for name, values in arrays.items():
        assert (values[place] == sevir.MODALITIES[name].missing).all()
        np.testing.assert_array_equal(np.delete(values, place, 0), np.delete(whole[name], place, 0))


def test_other_byte_orders_are_read(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    for path in (tmp_path / "raw" / "data" / "ir069").rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            values = file["ir069"][...]
            del file["ir069"]
            file["ir069"] = values.astype(">i2")
    arrays, bad = decoded(sevir.plan(str(tmp_path / "raw"), modalities=("ir069",)))
    assert bad == []
    assert arrays["ir069"].dtype == np.dtype("int16")
    np.testing.assert_array_equal(
        arrays["ir069"], decoded(sevir.plan(str(raw), modalities=("ir069",)))[0]["ir069"]
    )


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ConnectionResetError(), TimeoutError()]
)
def test_an_event_is_not_given_up_for_what_its_file_is_not_to_blame(error):
    with pytest.raises(type(error)):
        why(error)
    assert why(KeyError("no\n dataset")) == r"no\n dataset"
    assert why(ValueError()) == "ValueError"
