"""Archives whose source gains files: what is new is added, what was there stays, and nothing is mixed up."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from tiny_archive import timeless

from pipelines import prepare as stage
from pipelines import storage, windows
from pipelines.archives import checks, records, store, synthetic
from pipelines.errors import InputError
from pipelines.prepare import estimate, prepare
from pipelines.tasks import TASKS

EVENTS, SHARD = 6, 4


@pytest.fixture
def here(monkeypatch):
    """Shards are written in this process."""

    def write_all(plan, archive, pending, *_):
        return sum(stage.write_shard(n, plan.shards[n], archive)["written"] for n in pending)

    monkeypatch.setattr(stage, "_write_all", write_all)
    monkeypatch.setattr("pipelines.engine.connect", lambda *_: None)
    monkeypatch.setattr(stage, "_check_memory", lambda _: None)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A SEVIR archive of two files, of three events each."""
    folder = tmp_path_factory.mktemp("raw")
    synthetic.write_sevir(folder, events=EVENTS, seed=5, size=96)
    return folder


def part(raw: Path, folder: Path, rows: slice) -> Path:
    """A source with some rows of the catalogue, and all files."""
    shutil.copytree(raw, folder, dirs_exist_ok=True)
    catalogue = pd.read_csv(raw / "CATALOG.csv").sort_values(["file_name", "file_index"])
    catalogue.iloc[rows].to_csv(folder / "CATALOG.csv", index=False)
    return folder


def prepared(source: Path, url: Path, **more):
    # Shards of four events: with six, the last one is not full.
    megabytes = 2
    return prepare("sevir", str(source), str(url), shard_mb=megabytes, progress=False, **more)


def stats(url: Path) -> dict[str, int]:
    names = [*url.glob("vil/c/*/0/0/0"), *url.glob("records/0*.json")]
    return {str(path.relative_to(url)): path.stat().st_mtime_ns for path in names}


def files(url: Path) -> dict[str, bytes]:
    return timeless({str(p.relative_to(url)): p.read_bytes() for p in url.rglob("*") if p.is_file()})


def test_a_gained_file_is_added_and_nothing_else_is_done(tmp_path, raw, here):
    url, source = tmp_path / "a.zarr", tmp_path / "raw"
    first = prepared(part(raw, source, slice(0, 5)), url)
    assert first.plan.config["shard_events"] == SHARD
    before, old = stats(url), store.Archive(str(url))
    digest, held = old.config_hash, old.array("", "vil")[:]
    shutil.copy(raw / "CATALOG.csv", source / "CATALOG.csv")
    assert estimate("sevir", str(source), str(url), shard_mb=2).pending == 1
    grown = prepared(source, url)
    assert (grown.written, len(grown.plan.shards)) == (1, 2)
    after = stats(url)
    # The last shard was not full; the others are as they were.
    assert {n for n in before if before[n] != after[n]} == {"vil/c/1/0/0/0", "records/000001.json"}
    assert checks.validate(str(url)) == []
    new = store.Archive(str(url))
    assert new.config_hash != digest
    assert np.array_equal(new.array("", "vil")[:5], held)
    assert prepared(source, url).written == 0
    whole = tmp_path / "b.zarr"
    prepared(raw, whole)
    # The events came in the order of the files, so that it is the same as if there had been all at once.
    assert files(url) == files(whole)
    keys = {w.series for w in windows.enumerate_windows(TASKS["sevir"], new, "train")}
    assert keys == {
        w.series for w in windows.enumerate_windows(TASKS["sevir"], store.Archive(str(whole)), "train")
    }


def test_events_that_come_in_between_are_added_at_the_end(tmp_path, raw, here):
    url, source = tmp_path / "a.zarr", tmp_path / "raw"
    prepared(part(raw, source, slice(2, None)), url)
    held = list(records.series(str(url)))
    shutil.copy(raw / "CATALOG.csv", source / "CATALOG.csv")
    prepared(source, url)
    names = list(records.series(str(url)))
    assert names[:4] == held
    assert len(names) == EVENTS
    whole = tmp_path / "b.zarr"
    prepared(raw, whole)
    ours, theirs = (xr.open_zarr(u, mask_and_scale=False).load() for u in (url, whole))
    xr.testing.assert_identical(ours.sortby("event"), theirs.sortby("event"))


@pytest.mark.parametrize("reached", ["contents", "config", "some of the template", "template", "shard"])
def test_growth_that_was_cut_off_goes_on(tmp_path, raw, here, monkeypatch, reached):
    url, source = tmp_path / "a.zarr", tmp_path / "raw"
    prepared(part(raw, source, slice(0, 5)), url)
    shutil.copy(raw / "CATALOG.csv", source / "CATALOG.csv")

    class Cut(BaseException):
        """As if killed."""

    def cut(*_, **__):
        raise Cut

    def half(place, contents):
        for name in list(contents)[: len(contents) // 2]:
            storage.write_whole(place, name, contents[name])
        raise Cut

    write_json = storage.write_json
    stops = {"contents": records.CONFIG, "template": records.TEMPLATE}

    def write(place, name, value, **how):
        if name == stops.get(reached):
            raise Cut
        write_json(place, name, value, **how)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", write)
        if reached in ("config", "some of the template"):
            patch.setattr(store, "write_all", cut if reached == "config" else half)
        if reached == "shard":
            patch.setattr("pipelines.prepare._write_all", cut)
        with pytest.raises(Cut):
            prepared(source, url)
    with pytest.raises(InputError, match="not complete"):
        store.open_archive(str(url))
    assert prepared(source, url).written == 1
    whole = tmp_path / "b.zarr"
    prepared(raw, whole)
    assert files(url) == files(whole)


def test_a_source_that_lost_or_changed_something_is_refused(tmp_path, raw, here):
    url, source = tmp_path / "a.zarr", tmp_path / "raw"
    prepared(part(raw, source, slice(None)), url)
    before = files(url)
    part(raw, source, slice(0, 4))
    with pytest.raises(InputError, match=r"has no S\d+ any more, nor 1 others that the archive holds"):
        prepared(source, url)
    moved = pd.read_csv(raw / "CATALOG.csv")
    moved["llcrnrlat"] += 1
    moved.to_csv(source / "CATALOG.csv", index=False)
    with pytest.raises(InputError, match=r"a\.zarr holds S\d+ of [0-9a-f]+, and the source has [0-9a-f]+"):
        prepared(source, url)
    assert files(url) == before
    assert records.is_complete(str(url))


def test_radar_and_enso_grow_too(tmp_path, here):
    radar = tmp_path / "radar"
    synthetic.write_radar(radar, sequences=3, seed=5, size=160, frames=30)
    first, *_ = sorted(radar.glob("*.h5"))
    away = Path(shutil.move(first, tmp_path))
    url = str(tmp_path / "r.zarr")
    prepare("radar", str(radar), url, progress=False)
    shutil.move(away, radar)
    broken = radar / "zz.h5"
    broken.write_bytes(b"\x89HDF and no more")
    grown = prepare("radar", str(radar), url, progress=False)
    assert grown.written == 2
    assert list(records.series(url))[-1] == first.stem
    assert checks.validate(url) == []
    # What was broken may be mended: its place in the list of shards is another's by then.
    with h5py.File(broken, "w") as file, h5py.File(away if away.exists() else radar / first.name) as of:
        for name in of:
            of.copy(name, file)
        file.attrs.update(of.attrs)
    mended = prepare("radar", str(radar), url, progress=False)
    assert (mended.written, mended.quarantine) == (1, ())

    enso, url = tmp_path / "enso", str(tmp_path / "e.zarr")
    synthetic.write_enso(enso, seed=5, cmip6=(1, 8), cmip5=(2, 8), soda_years=4)
    soda = [Path(shutil.move(path, tmp_path)) for path in enso.glob("SODA*")]
    prepare("enso", str(enso), url, progress=False)
    for path in soda:
        shutil.move(path, enso)
    grown = prepare("enso", str(enso), url, progress=False)
    assert (grown.written, list(records.series(url))[-1]) == (1, "SODA")
    assert checks.validate(url) == []
