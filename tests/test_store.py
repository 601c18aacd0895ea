"""Stores: laid out whole, then filled shard by shard; what is cut off or damaged is never taken for whole."""

import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import uuid
import warnings
from pathlib import Path

import dask.array
import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from tiny_archive import timeless

from pipelines import storage
from pipelines.archives import checks, records, store
from pipelines.errors import InputError

CONFIG = {"kind": "radar", "of": "tests"}
EVENTS, SHARD = 5, 2
SHARDS = 3


def values(seed: int = 0) -> np.ndarray:
    """Counts of 0.01 mm/h, with a missing corner."""
    drawn = np.random.default_rng(seed).integers(0, 900, (EVENTS, 4, 8, 8)).astype(np.uint16)
    drawn[:, :, :2, :2] = 65535
    return drawn


def template() -> dict[str, xr.Dataset]:
    """A root with a variable of three shards, and a group with one of one."""

    def dataset(events: int) -> xr.Dataset:
        shape = (events, 4, 8, 8)
        rate = xr.Variable(
            ("event", "time", "y", "x"),
            dask.array.zeros(shape, dtype=np.uint16, chunks=shape),
            {"units": "mm h-1", "scale_factor": 0.01, "grid_mapping": "crs"},
            {"chunks": (1, 4, 8, 8), "shards": (min(SHARD, events), 4, 8, 8), "_FillValue": 65535},
        )
        coords = {
            "event": np.array([f"S{n:03d}" for n in range(events)]),
            "event_type": ("event", np.array(["Hail", "Flash flood", "", "Tornado", "Ōkyō"][:events])),
            "time": np.arange(4).astype("datetime64[h]").astype("datetime64[ns]"),
            "lead": ("time", (np.arange(4) * 5).astype("timedelta64[m]").astype("timedelta64[ns]")),
            "crs": ((), np.int32(0), {"proj4": "+proj=laea"}),
        }
        return xr.Dataset({"rate": rate}, coords, {"title": "a test"})

    return {"": dataset(EVENTS), "other": dataset(1)}


def begin(url: str, config: dict[str, str] = CONFIG) -> None:
    store.create(url, template(), config=config, shards=SHARDS)


def write(url: str, shard: int, quarantine: list[dict[str, str]] | None = None) -> None:
    region = {"event": slice(shard * SHARD, min((shard + 1) * SHARD, EVENTS))}
    arrays = {"rate": values()[region["event"]]}
    written = [store.region_record("", region, store.write_region(url, "", arrays, region))]
    if shard == 0:
        crc32 = store.write_region(url, "other", {"rate": values(1)[:1]}, {})
        written.append(store.region_record("other", {}, crc32))
    records.write(url, shard, {"regions": written, "quarantine": quarantine or []})


def finish(url: str) -> str:
    begin(url)
    for shard in range(SHARDS):
        write(url, shard)
    records.complete(url, {"counts": {"series": EVENTS, "dropped": {"pct_missing > 0": 2, "twice": 0}}})
    return url


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(str(tmp_path_factory.mktemp("store") / "finished.zarr"))


@pytest.fixture
def copy(tmp_path, finished):
    """A finished store to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy.zarr"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize(
    "pattern",
    [
        "{tmp}/a.zarr",
        "file://{tmp}/a.zarr",
        "local://{tmp}/a.zarr",
        "memory://{id}/a.zarr",
        "{tmp}/[*] ?.zarr",
    ],
)
def test_a_store_is_the_same_at_any_url(tmp_path, finished, pattern):
    url = finish(pattern.format(tmp=tmp_path, id=uuid.uuid4().hex))
    assert checks.validate(url) == []
    assert records.pending(url, SHARDS) == []
    np.testing.assert_array_equal(store.open_store(url)["rate"], values())
    np.testing.assert_array_equal(store.Archive(url).array("other", "rate")[:], values(1)[:1])
    fs, path = fsspec.core.url_to_fs(url)
    found = {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}
    assert timeless(found) == timeless(files(Path(finished)))


class Remembering(MemoryFileSystem):
    """Answers from listings it has made, as those of object stores do, until it is told to forget them."""

    protocol = "remembering"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("remembering://"))

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True, **kwargs)
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def cat_file(self, path, start=None, end=None, **kwargs):
        path = self._strip_protocol(path)
        listed = self.dircache.get(self._parent(path))
        if listed is not None and path not in {entry["name"] for entry in listed}:
            raise FileNotFoundError(path)
        return super().cat_file(path, start, end, **kwargs)

    def invalidate_cache(self, path=None):
        self.dircache.clear()


def test_what_others_wrote_is_seen_where_listings_are_remembered():
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    name = uuid.uuid4().hex
    ours, theirs = f"remembering://{name}", f"memory://{name}"
    fs, path = fsspec.core.url_to_fs(ours)
    begin(ours)
    assert len(fs.ls(f"{path}/records")) == 4
    for shard in range(SHARDS):
        write(theirs, shard)
    assert len(fs.ls(f"{path}/records")) == 4
    records.complete(ours, {})
    assert checks.validate(ours) == []


def test_plain_xarray_opens_it_and_says_nothing(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(finished)
        group = xr.open_zarr(finished, group="other")
        opened.load()
    rate = values().astype(float) / 100
    rate[values() == 65535] = np.nan
    np.testing.assert_allclose(opened["rate"], rate, rtol=1e-12)
    assert opened["rate"].attrs["units"] == "mm h-1"
    assert "crs" in opened.coords
    assert opened["crs"].attrs["proj4"] == "+proj=laea"
    assert list(opened["event_type"].values) == ["Hail", "Flash flood", "", "Tornado", "Ōkyō"]
    assert opened["time"].values[3] == np.datetime64("1970-01-01T03:00")
    assert opened["lead"].values[3] == np.timedelta64(15, "m")
    assert opened.attrs["title"] == "a test"
    assert group.sizes["event"] == 1


def test_what_is_not_written_yet_is_missing_not_zero(tmp_path):
    url = str(tmp_path / "a.zarr")
    begin(url)
    write(url, 1)
    opened = xr.open_zarr(url)["rate"].load()
    assert np.isnan(opened[:2]).all()
    assert np.isnan(opened[4:]).all()
    assert np.isfinite(opened[2:4, :, 2:, 2:]).all()


def test_zeros_are_written(tmp_path):
    url = str(tmp_path / "a.zarr")
    begin(url)
    store.write_region(url, "", {"rate": np.zeros((2, 4, 8, 8), np.uint16)}, {"event": slice(0, 2)})
    assert (tmp_path / "a.zarr/rate/c/0/0/0/0").exists()


def test_an_archive_travels_as_its_url(finished):
    archive = store.open_archive(finished)
    np.testing.assert_array_equal(archive.array("", "rate")[:], values())
    again = pickle.loads(pickle.dumps(archive))
    assert vars(again) == {"url": finished}
    assert again.root["event"].values.dtype.kind == "U"
    assert again.positions("event")["S003"] == 3
    assert (again.kind, again.config_hash) == ("radar", records.config_hash(CONFIG))


def test_the_hash_is_of_what_the_configuration_says():
    assert records.config_hash({"a": 1, "b": [1, 2]}) == records.config_hash({"b": (1, 2), "a": 1})
    assert records.config_hash({"a": 1}) != records.config_hash({"a": 2})
    assert len(records.config_hash({})) == 16


# -------------------------------------------------------------------------------------------- resuming


def test_the_same_configuration_continues(tmp_path):
    url = str(tmp_path / "a.zarr")
    begin(url)
    write(url, 1)
    before = files(tmp_path)
    begin(url)
    assert files(tmp_path) == before
    assert records.pending(url, SHARDS) == [0, 2]
    with pytest.raises(InputError, match="not complete: 1 of 3 shards are there; run the same command again"):
        records.complete(url, {})
    with pytest.raises(InputError, match="not complete: 1 of 3 shards are there"):
        store.open_archive(url)


def test_another_configuration_is_refused_and_both_are_named(finished):
    other = {**CONFIG, "of": "others"}
    before = files(Path(finished))
    with pytest.raises(
        InputError, match=f"{records.config_hash(CONFIG)}, asked is {records.config_hash(other)}"
    ):
        begin(finished, other)
    assert files(Path(finished)) == before


def test_what_is_not_ours_is_left_alone(tmp_path):
    zarr.create_array(str(tmp_path / "theirs.zarr"), data=np.arange(4))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    (tmp_path / "run" / "records").mkdir(parents=True)
    (tmp_path / "run" / "records" / "mine.txt").write_text("keep me")
    (tmp_path / "file.zarr").write_text("keep me")
    before = files(tmp_path)
    for name in ("theirs.zarr", "notes", "run", "file.zarr", ""):
        with pytest.raises(InputError, match="is no store of ours: needed an empty or absent folder"):
            begin(str(tmp_path / name))
    assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    begin(str(tmp_path / "empty"))


def test_a_group_cannot_lie_where_the_records_do(tmp_path):
    groups = {"": template()[""], "records": template()["other"]}
    with pytest.raises(InputError, match="called records"):
        store.create(str(tmp_path / "a.zarr"), groups, config=CONFIG, shards=SHARDS)
    assert not (tmp_path / "a.zarr").exists()


def test_where_nothing_can_be_written_it_is_said(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "file").write_text("")
    path = shutil.make_archive(str(tmp_path / "raw"), "zip", tmp_path / "raw")
    with pytest.raises(InputError, match=r"a\.zarr::.*raw\.zip cannot be written to"):
        begin(f"zip://a.zarr::{path}")


@pytest.mark.parametrize("wait_for", ["records/config.json", "zarr.json", "event_type", "written"])
def test_a_kill_while_the_template_is_written_costs_nothing(tmp_path, finished, wait_for):
    folder = tmp_path / "a.zarr"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_store\nprint(flush=True)\ntest_store.begin({str(folder)!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    watched = folder / ("records/template.json" if wait_for == "written" else wait_for)
    while not watched.exists() and child.poll() is None:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert watched.exists()
    if storage.read_json(str(folder), records.CONFIG):  # whole
        assert "not complete" in checks.describe(str(folder))
    with pytest.raises(InputError):
        store.open_archive(str(folder))
    finish(str(folder))
    assert timeless(files(folder)) == timeless(files(Path(finished)))


def test_records_that_were_cut_off_are_no_records(copy):
    whole = (copy / "records/000001.json").read_bytes()
    for text in (b"", whole[:20], whole[:-1], b"\xff\xfe" + whole[2:], b"[]", b'{"shard": 1}', b"null"):
        (copy / "records/000001.json").write_bytes(text)
        assert records.pending(str(copy), SHARDS) == [1]
    (copy / "records/000001.json").write_bytes(whole)
    assert records.pending(str(copy), SHARDS) == []
    (copy / records.COMPLETE).write_bytes((copy / records.COMPLETE).read_bytes()[:-3])
    assert not records.is_complete(str(copy))
    records.complete(str(copy), {})
    assert records.is_complete(str(copy))


def test_a_configuration_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / records.CONFIG).write_text('{"config_hash": "01')
    assert checks.validate(finish(str(tmp_path))) == []


def test_data_are_never_wiped_for_a_lost_template_record(copy):
    (copy / records.TEMPLATE).unlink()
    before = files(copy)
    with pytest.raises(InputError, match=r"has shards but no records/template\.json: it is damaged"):
        begin(str(copy))
    assert files(copy) == before


def test_leftovers_of_killed_writers_are_swept_at_the_end(tmp_path):
    url = str(tmp_path / "a.zarr")
    begin(url)
    for shard in range(SHARDS):
        write(url, shard)
    left = tmp_path / f"a.zarr/rate/c/0/0/0/0.{uuid.uuid4().hex}.partial"
    left.write_bytes(b"half")
    records.complete(url, {})
    assert not left.exists()
    assert checks.validate(url) == []


def test_a_removed_record_reopens_the_store(copy):
    (copy / "records/000002.json").unlink()
    begin(str(copy))
    records.reopen(str(copy))
    assert not records.is_complete(str(copy))
    write(str(copy), 2)
    records.complete(str(copy), {})
    assert checks.validate(str(copy)) == []


def test_every_quarantined_series_counts_once(tmp_path):
    url = str(tmp_path / "a.zarr")
    begin(url)
    first, again = ({"series": "S001", "file": "a.h5", "reason": reason} for reason in ("cut", "cut again"))
    other = {"series": "S000", "file": "a.h5", "reason": "cut"}
    for shard, rows in enumerate([[first], [again, other], []]):
        write(url, shard, rows)
    assert records.quarantined(url) == [first, other]
    records.complete(url, {"quarantine": records.quarantined(url)})
    assert records.quarantined(url) == [first, other]
    assert store.open_archive(url).quarantine == {"S000", "S001"}


# --------------------------------------------------------------------------------------------- damage


def test_a_flipped_byte_anywhere_is_found(copy):
    checked = [n for n in files(copy) if not n.startswith("records/")]
    assert len(checked) > 20
    rng = np.random.default_rng(0)
    for name in checked:
        whole = (copy / name).read_bytes()
        for place in {0, len(whole) - 1, int(rng.integers(len(whole)))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            (copy / name).write_bytes(damaged)
            found = checks.validate(str(copy))
            assert found, f"byte {place} of {name}"
            assert all("\n" not in line for line in found)
        (copy / name).write_bytes(whole)
    assert checks.validate(str(copy)) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rate/c/1/0/0/0", "shard 1, rate has CRC-32 [0-9a-f]{8}: needed [0-9a-f]{8}"),
        ("other/rate/c/0/0/0/0", "shard 0, other/rate has CRC-32"),
        ("event_type/c/0", "event_type/c/0 is missing"),
        ("rate/zarr.json", "rate/zarr.json is missing"),
        ("zarr.json", "zarr.json is missing"),
        ("records/000001.json", "1 of 3 shards have no record: 1$"),
        ("records/complete.json", "records/complete.json is missing"),
        ("records/template.json", "records/template.json is missing"),
    ],
)
def test_what_is_lost_is_named(copy, name, expected):
    (copy / name).unlink()
    found = checks.validate(str(copy))
    assert any(re.search(expected, line) for line in found), found


def test_a_cut_shard_and_an_altered_configuration_are_named(copy):
    shard = copy / "rate/c/2/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-7])
    config = json.loads((copy / records.CONFIG).read_text())
    config["config"]["of"] = "another"
    (copy / records.CONFIG).write_text(json.dumps(config))
    problems = checks.validate(str(copy))
    assert len(problems) == 2
    assert "records/config.json does not have the hash" in problems[0]
    assert "shard 2, rate cannot be read" in problems[1]


def test_damaged_metadata_are_one_line(copy):
    for text in ("", "{", '{"zarr_format": 9}'):
        (copy / "zarr.json").write_text(text)
        for look in (store.open_archive, checks.describe):
            with pytest.raises(InputError, match=r"cannot be opened: .*`earthformer validate` says") as error:
                look(str(copy))
            assert "\n" not in str(error.value)


def test_what_is_no_store_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path), str(tmp_path / "absent"), str(tmp_path / "file"), f"memory://{uuid.uuid4()}"):
        for look in (checks.validate, checks.describe, store.open_archive):
            with pytest.raises(InputError, match=r"is not a store: it has no records/config\.json"):
                look(url)
    with pytest.raises(InputError, match="Protocol not known: nosuch"):
        checks.describe("nosuch://a")


def test_a_description_says_how_far_a_store_is(tmp_path, finished):
    text = checks.describe(finished)
    assert f"radar, configuration {records.config_hash(CONFIG)}" in text
    assert "complete since 20" in text
    assert "5 series; left out: 2 rows (pct_missing > 0)\n" in text
    assert "other: rate {'event': 1, 'time': 4, 'y': 8, 'x': 8} uint16" in text
    url = str(tmp_path / "a.zarr")
    begin(url)
    write(url, 1)
    assert "not complete: 1 of 3 shards are there; run the same command again" in checks.describe(url)
    (tmp_path / "a.zarr" / records.TEMPLATE).unlink()
    assert "its template is cut off; run the same command again" in checks.describe(url)
