"""From a chunk back to the bytes that it was made of."""

import json
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from tiny_archive import built

from pipelines import cli
from pipelines.archives import radar, records, sevir, store, synthetic
from pipelines.errors import InputError
from pipelines.lineage import lineage, lines
from pipelines.version import code_version

EVENTS = 5


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lineage")
    synthetic.write_sevir(folder / "raw", events=EVENTS, seed=5, size=48, modalities=("vil", "lght"))
    built(sevir.plan(str(folder / "raw"), modalities=("vil", "lght"), shard_mb=0), str(folder / "a.zarr"))
    return str(folder / "a.zarr")


def test_the_bytes_that_are_named_hold_the_pixels_of_the_chunk(archive):
    stored = store.Archive(archive).array("", "vil")
    for index in range(EVENTS):
        found = lineage(archive, f"vil/c/{index}/0/0/0")
        assert (found["shard"], found["region"]["event"]) == (index, [index, index + 1])
        assert found["code_version"] == code_version()
        assert found["config_hash"] == store.Archive(archive).config_hash
        (series,) = found["series"]
        assert series["name"] == str(store.Archive(archive).root["event"].values[index])
        files = {Path(source["file"]).parts[-3]: source for source in series["sources"]}
        assert set(files) == {"vil", "lght"}
        ((start, size),) = files["vil"]["bytes"]
        packed = Path(files["vil"]["file"]).read_bytes()[start : start + size]
        pixels = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(48, 48, 49)
        assert np.array_equal(pixels.transpose(2, 0, 1), stored[index])
        with h5py.File(files["lght"]["file"]) as file:
            flashes = file[series["name"]]
            expected = [[flashes.id.get_offset(), flashes.id.get_storage_size()]] if len(flashes) else []
        assert files["lght"]["bytes"] == expected


def test_an_inner_chunk_names_its_own_series_alone(tmp_path, archive):
    url = str(tmp_path / "b.zarr")
    built(sevir.plan(str(Path(archive).parent / "raw")), url)
    whole = lineage(url, "vil/c/0/0/0/0")
    assert len(whole["series"]) == EVENTS
    assert lineage(url, "vil/3/0/0/0")["series"] == [whole["series"][3]]


def test_a_quarantined_series_says_why(tmp_path):
    synthetic.write_sevir(tmp_path / "raw", events=2, seed=5, size=48)
    path = next((tmp_path / "raw/data/vil").rglob("*.h5"))
    with h5py.File(path, "r+") as file:
        file["id"][0] = b"S999999"
    built(sevir.plan(str(tmp_path / "raw"), shard_mb=0), str(tmp_path / "a.zarr"))
    url = str(tmp_path / "a.zarr")
    place = list(records.series(url)).index(records.quarantined(url)[0]["series"])
    said = "\n".join(lines(lineage(url, f"vil/c/{place}/0/0/0")))
    assert "quarantined, row 0 holds event S999999" in said


def test_radar_names_its_file(tmp_path):
    synthetic.write_radar(tmp_path / "raw", sequences=2, seed=5, size=64, frames=20)
    built(radar.plan(str(tmp_path / "raw")), str(tmp_path / "r.zarr"))
    name = sorted(path.stem for path in (tmp_path / "raw").glob("*.h5"))[1]
    found = lineage(str(tmp_path / "r.zarr"), f"{name}/rate/c/0/0/0")
    assert found["series"] == [
        {"name": name, "sources": [{"file": f"{tmp_path}/raw/{name}.h5", "bytes": []}]}
    ]
    assert f"{name}.h5, all of it" in "\n".join(lines(found))


def test_a_forecast_leads_to_its_run_its_windows_and_the_raw_bytes(tmp_path, archive, ray_cluster, capsys):
    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["earthformer", *words])
            with pytest.raises(SystemExit, match="0"):
                cli.main()
        return capsys.readouterr().out

    url = str(tmp_path / "f.zarr")
    few = ["--task", "sevir", "--split", "train", "--limit", "3", "--members", "2", "--keep-members"]
    run("forecast", "--forecaster", "displaced", "--archive", archive, "--out", url, *few)
    found = json.loads(run("lineage", url, "--chunk", "vil/c/1/0/0/0/0", "--json"))
    opened = xr.open_zarr(url).isel(window=1)
    (window,) = found["windows"]
    assert window["series"] == str(opened["series"].values)
    assert window["seeds"] == opened["seed"].values.tolist()
    assert found["run"]["url"] == "displaced"
    (series,) = found["archive"]["series"]
    place = store.Archive(archive).positions("event")[window["series"]]
    assert series["sources"] == lineage(archive, f"vil/c/{place}/0/0/0")["series"][0]["sources"]
    said = run("lineage", url, "--chunk", "vil/c/1/0/0/0/0")
    assert f"2 members of seeds {window['seeds'][0]} …" in said
    assert series["sources"][0]["file"] in said


@pytest.mark.parametrize(
    ("chunk", "told"),
    [
        ("vil/c/9/0/0/0", "has no chunk vil/c/9/0/0/0: needed an index within 5 × 1 × 1 × 1"),
        ("vil/c/0/0", "has no chunk vil/c/0/0: needed an index within"),
        ("nothing/c/0/0/0/0", "has no variable nothing"),
        ("records/c/0", "has no variable records"),
        ("vil", "chunk 'vil': needed VARIABLE/c/0/0/0"),
        ("0/0", "chunk '0/0': needed VARIABLE/c/0/0/0"),
        ("event/c/0", "has no record of who wrote event"),
    ],
)
def test_a_chunk_that_is_none_is_refused_in_one_line(archive, chunk, told):
    with pytest.raises(InputError) as refused:
        lineage(archive, chunk)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("now", "told"), [("2", "    is another by now, 2"), (None, "    is gone")])
def test_an_archive_that_is_another_by_now_is_told_of(archive, now, told):
    gone = {"store": "b.zarr", "config_hash": "1", "config_hash_now": now, "series": []}
    assert told in list(lines(lineage(archive, "vil/c/0/0/0/0") | {"archive": gone}))
