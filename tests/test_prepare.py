"""Preparing archives: the same however it is cut, spread, killed and resumed; what is bad is left out."""

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import ray.data
import xarray as xr
from tiny_archive import timeless

from pipelines import cli, engine, storage, windows
from pipelines.archives import BrokenFile, checks, records, store, synthetic
from pipelines.errors import InputError
from pipelines.prepare import MOST_SHARDS, _check_memory, _tasks, estimate, prepare
from pipelines.tasks import TASKS

EVENTS = 6


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Synthetic raw archives: `sevir` (three modalities), `enso` and `radar`."""
    folder = tmp_path_factory.mktemp("raw")
    modalities = ("vil", "ir069", "lght")
    synthetic.write_sevir(folder / "sevir", events=EVENTS, seed=5, size=96, modalities=modalities)
    synthetic.write_enso(folder / "enso", seed=5, cmip6=(1, 8), cmip5=(2, 8), soda_years=4)
    synthetic.write_radar(folder / "radar", sequences=3, seed=5, size=160, frames=30)
    for path in (folder / "radar").iterdir():
        with h5py.File(path, "r+") as file:
            file["rate"][:, :9, :9] = 65535
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory, raw, ray_cluster):
    """An archive of VIL, an event a shard, prepared with nothing in the way."""
    url = tmp_path_factory.mktemp("archive") / "a.zarr"
    prepare("sevir", str(raw / "sevir"), str(url), shard_mb=0, progress=False)
    return url


@pytest.fixture
def source(tmp_path, raw):
    """A copy of the raw SEVIR archive, to be damaged."""
    return Path(shutil.copytree(raw / "sevir", tmp_path / "raw"))


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process and on its cluster."""
    capfd.readouterr()
    code = 0
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["earthformer", *arguments])
        try:
            cli.main()
        except SystemExit as left:
            code = int(left.code or 0)
    return code, *capfd.readouterr()


def where(source: Path, archive: Path) -> list[str]:
    """Options of `prepare` that make an event a shard."""
    return ["--source", str(source), "--archive", str(archive), "--shard-mb", "0"]


def refused(capfd, *arguments: str) -> str:
    """The one line of a refusal, without `error: `."""
    code, _, err = run(capfd, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err.removeprefix("error: ").rstrip()


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files, without the time of day."""
    return timeless({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = files(folder), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert records.is_complete(str(folder))


# ------------------------------------------------------------------------------------- what is written


def test_shards_and_workers_do_not_matter(tmp_path, raw, archive):
    url = tmp_path / "one.zarr"
    done = prepare("sevir", str(raw / "sevir"), str(url), workers=1, progress=False)
    assert (done.written, len(done.plan.shards)) == (1, 1)
    one, many = (xr.open_zarr(str(u), mask_and_scale=False, chunks=None) for u in (url, archive))
    xr.testing.assert_identical(one.load(), many.load())
    assert records.config_hash(storage.read_json(str(url), records.CONFIG)["config"]) != records.config_hash(
        storage.read_json(str(archive), records.CONFIG)["config"]
    )
    again = tmp_path / "again.zarr"
    prepare("sevir", str(raw / "sevir"), str(again), shard_mb=0, workers=2, memory_mb=100, progress=False)
    assert_same(again, archive)


def test_the_same_call_does_nothing_more(raw, archive):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in archive.rglob("*") if p.is_file()}
    done = prepare("sevir", str(raw / "sevir"), str(archive), shard_mb=0, progress=False)
    assert done.written == 0
    assert f"all {EVENTS} shards were there" in str(done)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in archive.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("shards", "workers"), [(1, 2), (9, 2), (1200, 16), (3, 64)])
def test_tasks_hold_every_shard_once_and_end_with_single_ones(shards, workers):
    pending = list(range(100, 100 + shards))
    cut = list(_tasks(pending, workers))
    assert [shard for task in cut for shard in task] == pending
    sizes = [len(task) for task in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= MOST_SHARDS
    assert sizes.count(1) >= min(workers, shards)


def test_plain_xarray_opens_sevir(tmp_path, raw, ray_cluster):
    url, modalities = str(tmp_path / "a.zarr"), ("vil", "ir069", "lght")
    prepare("sevir", str(raw / "sevir"), url, modalities=modalities, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(url).load()
    event = str(opened["event"].values[3])
    path = next((raw / "sevir/data/ir069").rglob("*.h5"))
    row = opened.sel(event=event)
    path = raw / "sevir/data/vil" / str(row["file_name"].values).removeprefix("vil/")
    with h5py.File(path) as file:
        vil = file["vil"][int(row["file_index"])].transpose(2, 0, 1)
    with h5py.File(str(path).replace("/vil/", "/ir069/").replace("VIL", "IR069")) as file:
        ir = file["ir069"][int(row["file_index"])].transpose(2, 0, 1)
    np.testing.assert_array_equal(row["vil"], vil)
    np.testing.assert_allclose(row["ir069"], ir / 100, rtol=1e-12)
    assert opened["ir069"].attrs["units"] == "degC"
    assert opened["lght"].shape == (EVENTS, 49, 48, 48)
    assert opened["time"].values[0] == -np.timedelta64(2, "h")
    assert row["frame_time"].values[24] == row["time_utc"].values
    assert opened["crs"].attrs["proj4"].startswith("+proj=laea")
    assert {"event_type", "llcrnrlat", "episode_id", "pct_missing"} <= set(opened.coords)
    assert opened.attrs["kind"] == "sevir"
    assert opened.attrs["Conventions"].startswith("CF-1")


@pytest.mark.parametrize("kind", ["sevir-lr", "enso", "radar"])
def test_plain_xarray_opens_the_other_kinds(tmp_path, raw, ray_cluster, kind):
    url = str(tmp_path / "a.zarr")
    prepare(kind, str(raw / kind.removesuffix("-lr")), url, shard_mb=1, progress=False)
    assert checks.validate(url) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(url)
        group = opened if kind != "radar" else xr.open_zarr(url, group=str(opened["sequence"].values[0]))
        pixels = group[TASKS[kind].variable].load()
    assert opened.attrs["kind"] == kind
    assert pixels.attrs["units"] == TASKS[kind].units
    assert pixels.dtype.kind == "f"
    if kind == "sevir-lr":
        assert pixels.shape == (EVENTS, 25, 32, 32)
        assert group["time"].values[1] - group["time"].values[0] == np.timedelta64(10, "m")
    elif kind == "enso":
        assert pixels.dims == ("source", "month", "lat", "lon")
        assert np.isfinite(pixels[0]).all()
        assert np.isnan(pixels[-1, -1]).all()
    else:
        assert pixels.dims == ("time", "y", "x")
        assert group["time"].values[1] - group["time"].values[0] == np.timedelta64(5, "m")
        with h5py.File(raw / "radar" / str(opened["file"].values[0])) as file:
            stored = file["rate"][:]
        assert (stored == 65535).any()
        np.testing.assert_allclose(pixels, np.where(stored == 65535, np.nan, stored / 100), rtol=1e-12)
        assert group["crs"].attrs["proj4"] == str(opened["proj"].values[0])


def test_urls_are_those_of_this_folder(tmp_path, raw, archive, monkeypatch):
    # The workers' working directory is another: the cluster was there before.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(raw / "sevir", "raw")
    prepare("sevir", "raw/", "a.zarr", shard_mb=0, progress=False)
    assert_same(tmp_path / "a.zarr", archive)
    prepare("sevir", f"file://{tmp_path}/raw", f"file://{tmp_path}/b.zarr/", shard_mb=0, progress=False)
    assert_same(tmp_path / "b.zarr", archive)


def test_a_source_may_lie_in_a_zip(tmp_path, raw, ray_cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, inner in (("sevir", ""), ("enso", "a folder"), ("radar", "")):
        (tmp_path / "in" / inner).mkdir(parents=True)
        shutil.copytree(raw / kind, tmp_path / "in" / inner, dirs_exist_ok=True)
        shutil.make_archive("raw", "zip", "in")
        shutil.rmtree("in")
        prepare(kind, f"zip://{inner}::raw.zip", f"zip-{kind}.zarr", progress=False)
        prepare(kind, str(raw / kind), f"{kind}.zarr", progress=False)
        assert_same(tmp_path / f"zip-{kind}.zarr", tmp_path / f"{kind}.zarr")


# ---------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("kind", ["sevir", "sevir-lr", "enso", "radar"])
def test_a_dry_run_foretells_and_writes_nothing(tmp_path, raw, ray_cluster, kind):
    source, url = str(raw / kind.removesuffix("-lr")), str(tmp_path / "a.zarr")
    told = estimate(kind, source, url, shard_mb=1, workers=2)
    assert list(tmp_path.iterdir()) == []
    assert told.work.hours > 0
    done = prepare(kind, source, url, shard_mb=1, progress=False)
    assert told.pending == done.written == len(done.plan.shards)
    assert str(done.plan.series) in str(told)
    data = {p: p.stat().st_size for p in Path(url).rglob("c/**/*") if p.is_file()}
    pixels = sum(size for path, size in data.items() if TASKS[kind].variable in path.parts)
    assert told.work.written_bytes == pytest.approx(pixels, rel=0.4)
    archive, task = store.open_archive(url), TASKS[kind]
    if kind == "radar":
        most = int(re.search(r"at most (\d+) of task radar", told.windows)[1])
        assert most == 3 * 2  # sequences of 30 frames hold two starts of 24, and one tile
    else:
        for count, split in re.findall(r"(\d+) (train|val|test)", told.windows):
            found = []
            with contextlib.suppress(InputError):
                found = windows.enumerate_windows(task, archive, split)
            assert int(count) == len(found)
        assert any(int(count) for count in re.findall(r"\d+", told.windows))
    assert estimate(kind, source, url, shard_mb=1).pending == 0


def test_what_does_not_hold_the_tasks_variable_has_no_windows(tmp_path, raw):
    told = estimate("sevir", str(raw / "sevir"), str(tmp_path / "a.zarr"), modalities=("ir069",))
    assert told.windows == "none of task sevir, which needs vil"


def test_a_dry_run_refuses_what_the_run_would(tmp_path, raw, archive):
    with pytest.raises(InputError, match="was written under configuration"):
        estimate("sevir", str(raw / "sevir"), str(archive), shard_mb=128)


# ----------------------------------------------------------------------------------------- bad series


def damage(source: Path, row: int = 0) -> str:
    """Make an event's place in its file another's; returns its id."""
    path = next((source / "data/vil").rglob("*.h5"))
    with h5py.File(path, "r+") as file:
        event = file["id"][row].decode()
        file["id"][row] = b"S999999"
    return event


def test_one_bad_event_is_left_out_listed_and_counted(tmp_path, source, archive, capfd):
    event, url = damage(source), tmp_path / "a.zarr"
    arguments = "prepare", "sevir", *where(source, url)
    code, out, err = run(capfd, *arguments)
    assert (code, err) == (0, "")
    assert "quarantine: 1 series that could not be read" in out
    assert "S999999" in out
    assert out.splitlines()[-1].startswith(
        f"{EVENTS} series, 1 quarantined, {EVENTS}/{EVENTS} shards written"
    )
    assert f"{event}" in run(capfd, "inspect", str(url))[1]
    assert run(capfd, "validate", str(url))[0] == 0
    prepared, whole = store.open_archive(str(url)), store.open_archive(str(archive))
    assert prepared.quarantine == {event}
    place = prepared.positions("event")[event]
    assert (prepared.array("", "vil")[place] == 255).all()
    rest = [i for i in range(EVENTS) if i != place]
    np.testing.assert_array_equal(prepared.array("", "vil")[:][rest], whole.array("", "vil")[:][rest])
    kept = [w for w in windows.enumerate_windows(TASKS["sevir"], whole, "train") if w.series != event]
    assert windows.enumerate_windows(TASKS["sevir"], prepared, "train") == kept
    line = refused(capfd, *arguments, "--strict")
    assert f"{event}: row 0 holds event S999999: --strict takes no bad series" in line


def test_strict_stops_at_the_first_bad_event_and_resumes_when_it_is_well(tmp_path, source, archive, capfd):
    event, url = damage(source), tmp_path / "a.zarr"
    arguments = (
        "prepare",
        "sevir",
        "--source",
        str(source),
        "--archive",
        str(url),
        "--shard-mb",
        "0",
        "--strict",
    )
    assert f"{event}: row 0 holds event S999999" in refused(capfd, *arguments)
    assert not records.is_complete(str(url))
    path = next((source / "data/vil").rglob("*.h5"))
    with h5py.File(path, "r+") as file:
        file["id"][0] = event.encode()
    assert run(capfd, *arguments)[0] == 0
    assert_same(url, archive)


def test_nothing_but_bad_events_is_an_error_and_the_same_command_tries_again(
    tmp_path, source, archive, capfd
):
    url, away = tmp_path / "a.zarr", source.parent / "away"
    shutil.move(source / "data", away)
    arguments = "prepare", "sevir", *where(source, url)
    assert f"the file is not there (and so for all {EVENTS} series)" in refused(capfd, *arguments)
    assert "not complete" in refused(capfd, "forecast", *forecast(url, tmp_path))
    shutil.move(away, source / "data")
    assert run(capfd, *arguments)[0] == 0
    assert_same(url, archive)


def forecast(archive: Path, folder: Path) -> list[str]:
    out = str(folder / "f.zarr")
    return ["--forecaster", "persistence", "--task", "sevir", "--archive", str(archive), "--out", out]


def test_a_broken_radar_sequence_counts_once_however_many_its_shards(tmp_path, raw, ray_cluster):
    source = Path(shutil.copytree(raw / "radar", tmp_path / "raw"))
    first, second, _ = sorted(source.glob("*.h5"))
    with h5py.File(first, "r+") as file:
        # Every frame's compressed bytes are overwritten: the metadata can be read, the pixels cannot.
        chunks = [file["rate"].id.get_chunk_info(i) for i in range(len(file["rate"]))]
    with first.open("r+b") as bytes_:
        for chunk in chunks:
            bytes_.seek(chunk.byte_offset)
            bytes_.write(b"\0" * chunk.size)
    second.write_bytes(second.read_bytes()[:1000])
    done = prepare("radar", str(source), str(tmp_path / "a.zarr"), shard_mb=0, progress=False)
    assert sum(not isinstance(shard, BrokenFile) for shard in done.plan.shards) == 60
    assert sorted(row["file"] for row in done.quarantine) == [first.name, second.name]
    assert (done.plan.series, done.written) == (3, 61)


# ------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_one_line(tmp_path, raw, archive, capfd):
    good, there = str(raw / "sevir"), str(tmp_path / "a.zarr")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("keep me")

    def line(kind: str, source: str, url: str, *more: str) -> str:
        return refused(capfd, "prepare", kind, "--source", source, "--archive", url, *more)

    ours = store.Archive(str(archive)).config_hash
    assert re.search(
        rf"under configuration {ours}, asked is [0-9a-f]{{16}}", line("sevir", good, str(archive))
    )
    assert "no store of ours" in line("sevir", good, str(tmp_path / "theirs"))
    assert "'sevier' is unknown: needed one of sevir, sevir-lr" in line("sevier", good, there)
    assert "absent/CATALOG.csv" in line("sevir", str(tmp_path / "absent"), there)
    assert "Protocol not known: nosuch" in line("sevir", "nosuch://raw", there)
    assert "Protocol not known: nosuch" in line("sevir", good, "nosuch://a")
    assert "memory of one process" in line("sevir", good, "memory://a")
    assert "cannot be written to" in line("radar", str(raw / "radar"), f"zip://a::{zipped(tmp_path)}")
    assert "only radar takes one, not sevir" in line("sevir", good, there, "--variable", "rate")
    assert "0 workers: needed 1 or more" in line("sevir", good, there, "--workers", "0")
    assert "shards of -1 MB" in line("sevir", good, there, "--shard-mb", "-1")
    assert "'nosuch'" in line("sevir", good, there, "--modalities", "vil,nosuch")
    assert "no nosuch among" in line("radar", str(netcdf(tmp_path)), there, "--variable", "nosuch")
    assert not Path(there).exists()
    assert "999999999 MB of memory a worker: needed 1 to" in line(
        "sevir", good, there, "--memory-mb", "999999999"
    )
    assert files(tmp_path / "theirs") == {"thesis.txt": b"keep me"}
    assert checks.validate(str(archive)) == []


@pytest.mark.parametrize("grows", [False, True])
def test_more_memory_than_any_node_has_is_refused_unless_another_may_come(monkeypatch, grows):
    labels = {"ray.io/node-id": "a"} | ({"ray.io/node-group": "cpu"} if grows else {})
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1e9}, "Labels": labels}]
    )
    with pytest.raises(InputError, match="0 MB of memory a worker: needed 1 to 1000"):
        _check_memory(0)
    if grows:
        _check_memory(1001)
    else:
        with pytest.raises(InputError, match="1001 MB of memory a worker: needed 1 to 1000"):
            _check_memory(1001)


def zipped(folder: Path) -> str:
    (folder / "empty").mkdir()
    (folder / "empty" / "file").write_text("")
    return shutil.make_archive(str(folder / "empty"), "zip", folder / "empty")


def netcdf(folder: Path) -> Path:
    """A CF file whose rain has a name that nobody expects."""
    times = np.datetime64("2020-06-01T00:00", "ns") + np.arange(30) * np.timedelta64(5, "m")
    rain = np.random.default_rng(0).uniform(0, 9, (30, 16, 16)).astype(np.float32)
    coords = {"time": times, "lat": np.linspace(50, 51, 16), "lon": np.linspace(5, 6, 16)}
    (folder / "cf").mkdir(exist_ok=True)
    dataset = xr.Dataset({"wet": (("time", "lat", "lon"), rain, {"units": "mm/h"})}, coords)
    dataset.to_netcdf(folder / "cf" / "rain.nc")
    return folder / "cf"


def test_radar_of_other_names_is_read_by_variable(tmp_path, ray_cluster, capfd):
    url = str(tmp_path / "a.zarr")
    arguments = "prepare", "radar", "--source", str(netcdf(tmp_path)), "--archive", url
    refused(capfd, *arguments)
    assert run(capfd, *arguments, "--variable", "wet")[0] == 0
    with xr.open_dataset(tmp_path / "cf" / "rain.nc") as rain:
        np.testing.assert_allclose(xr.open_zarr(url, group="rain")["rate"], rain["wet"], atol=0.0051)


def test_summaries_fit_a_terminal(tmp_path, source, ray_cluster, capfd):
    damage(source)
    long = tmp_path / "a very long name indeed, much longer than anybody would think to give an archive.zarr"
    arguments = "prepare", "sevir", "--source", str(source), "--archive", str(long)
    for more in (["--dry-run"], [], ["--dry-run"], []):
        lines = run(capfd, *arguments, *more)[1].splitlines()
        assert any(line.startswith(f"{long}: ") for line in lines)
        assert [line for line in lines if len(line) > 80 and not line.startswith(str(long))] == []
    assert re.fullmatch(r"6 series, 1 quarantined, all 1 shards were there", lines[-1])


def test_damage_is_found_by_validate_and_mended_by_the_same_command(tmp_path, raw, archive, capfd):
    url = Path(shutil.copytree(archive, tmp_path / "a.zarr"))
    shard = url / "vil/c/3/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, out, err = run(capfd, "validate", str(url))
    assert code == 2
    assert out.startswith("shard 3, vil cannot be read: ")
    assert re.fullmatch(r"error: \S+ is not whole: shard 3, vil cannot be read: [^\n]+\n", err)
    (url / "records/000003.json").unlink()
    assert "1 of 6 shards have no record: 3" in refused(capfd, "validate", str(url))
    done = prepare("sevir", str(raw / "sevir"), str(url), shard_mb=0, progress=False)
    assert done.written == 1
    assert_same(url, archive)


def test_forecasts_are_inspected_and_validated_too(tmp_path, archive, capfd):
    assert run(capfd, "forecast", *forecast(archive, tmp_path), "--split", "train")[0] == 0
    url = tmp_path / "f.zarr"
    assert "forecast, configuration" in run(capfd, "inspect", str(url))[1]
    assert run(capfd, "validate", str(url))[:2] == (0, f"{url}: complete, all checksums match\n")
    (url / records.COMPLETE).write_text('{"config_hash": "12')
    assert "not complete: " in run(capfd, "inspect", str(url))[1]
    assert "records/complete.json is missing or cut off" in refused(capfd, "validate", str(url))


# ---------------------------------------------------------------------------------------------- faults


def test_ray_does_not_speak_of_its_own_affairs(ray_cluster, capfd):
    class Identity:
        def __init__(self, of: np.ndarray) -> None:
            self.of = of

        def __call__(self, row: dict[str, int]) -> dict[str, int]:
            return row

    rows = ray.data.from_items([{"n": n} for n in range(2)])
    pool = rows.map(Identity, fn_constructor_kwargs={"of": np.zeros(200_000)}, concurrency=1, num_cpus=0.5)
    assert len(list(engine.track(pool, 2, "rows"))) == 2
    assert capfd.readouterr() == ("", "")


def test_a_killed_worker_costs_nothing(tmp_path, raw, archive, capfd):
    killed = []

    def kill() -> None:
        while not killed and not done.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.cmdline()[:1] == ["ray::Map(_write_shard)"]:
                        process.kill()
                        killed.append(process.pid)
                        return

    done = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        prepare("sevir", str(raw / "sevir"), str(tmp_path / "a.zarr"), shard_mb=0, workers=1, progress=False)
    finally:
        done.set()
        killer.join()
    assert killed
    assert_same(tmp_path / "a.zarr", archive)
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_one_line_and_resumes_when_there_is_space(tmp_path, raw, archive, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        ballast, url = disk / "ballast", disk / "a.zarr"
        size = sum(p.stat().st_size for p in (archive / "vil").rglob("*") if p.is_file())
        arguments = (
            "prepare",
            "sevir",
            "--source",
            str(raw / "sevir"),
            "--archive",
            str(url),
            "--shard-mb",
            "0",
        )
        for left in (40_000, 400_000 + size // 2):
            # The disk fills up while the template is written, and while the shards are.
            ballast.unlink(missing_ok=True)
            free = shutil.disk_usage(disk).free
            ballast.write_bytes(b"\0" * (free - left))
            assert "No space left on device" in refused(capfd, *arguments)
            assert not records.is_complete(str(url))
            assert "not complete" in refused(capfd, "score", "--forecast", str(url), "--archive", str(url))
        assert 0 < len(records.read(str(url))) < EVENTS
        ballast.unlink()
        assert run(capfd, *arguments)[0] == 0
        assert_same(url, archive)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
