"""The forecast stage: what it writes, that it is the same however it is made, and what it refuses."""

import contextlib
import dataclasses
import pickle
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyproj
import pytest
import torch
import xarray as xr
import zarr
from tiny_archive import timeless
from tiny_forecast import write_run

from earthformer.config import StemStage
from earthformer.presets import EARTHFORMERS
from pipelines import cli, plans, runs, windows
from pipelines import forecast as stage
from pipelines.archives import checks, records, sevir, store, synthetic
from pipelines.errors import InputError, boundary_error
from pipelines.forecast import forecast
from pipelines.forecast_store import member_seeds
from pipelines.plans import plan
from pipelines.prepare import prepare
from pipelines.series import Window
from pipelines.tasks import TASKS, Splits, Tiles

TASK = dataclasses.replace(TASKS["sevir"], context=3, target=2, stride=(4, 4, 1))
"""One test window a frame: 45 of an event."""
MODEL = dataclasses.replace(
    EARTHFORMERS["earthformer_sevir_tiny"],
    context=(3, 48, 48, 1),
    target=(2, 48, 48, 1),
    widths=(16, 32),
    stem=(StemStage(16, (1, 4, 4), convs=1),),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ray_cluster):
    """A SEVIR archive of two test events, and a run."""
    folder = tmp_path_factory.mktemp("forecast")
    synthetic.write_sevir(folder / "raw", events=8, seed=3, size=48)
    prepare("sevir", str(folder / "raw"), str(folder / "archive.zarr"), progress=False)
    write_run(str(folder / "run"), TASK, MODEL)
    return folder


@pytest.fixture(scope="module")
def archive(folder):
    return store.open_archive(str(folder / "archive.zarr"))


@pytest.fixture(scope="module")
def planned(folder):
    return plan(str(folder / "run"), str(folder / "archive.zarr"), "test")


@pytest.fixture(scope="module")
def whole(folder, planned):
    """The forecast of the test split, undisturbed."""
    forecast(planned, str(folder / "whole.zarr"), progress=False)
    return folder / "whole.zarr"


def values(url, variable="vil"):
    return xr.open_zarr(str(url))[variable].values


def content(url):
    """Bytes of all files but the completion record, and without the hours at which shards were written."""
    return timeless(
        {
            str(path.relative_to(url)): path.read_bytes()
            for path in sorted(Path(url).rglob("*"))
            if path.is_file() and path.name != "complete.json"
        }
    )


# ---------------------------------------------------------------------------------------- what is written


def test_a_forecast_opens_plainly_and_says_what_it_is(whole, planned, archive):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = xr.open_zarr(str(whole)).load()
    vil = found["vil"]
    assert vil.dims == ("window", "member", "lead_time", "y", "x")
    assert vil.shape == (90, 1, 2, 48, 48)
    assert vil.dtype == np.float32
    assert vil.attrs["units"] == archive.root["vil"].attrs["units"]
    assert list(found["lead_time"].values / np.timedelta64(1, "m")) == [5, 10]
    names = {
        "init_time": "forecast_reference_time",
        "valid_time": "time",
        "lead_time": "forecast_period",
        "member": "realization",
    }
    assert {name: found[name].attrs["standard_name"] for name in names} == names
    np.testing.assert_array_equal(found["valid_time"], found["init_time"] + found["lead_time"])
    for number in (0, 44, 45, 89):
        key = planned.keys[number]
        assert (str(found["series"].values[number]), int(found["start"].values[number])) == (
            key.series,
            key.start,
        )
        event = archive.positions("event")[key.series]
        last = archive.root["frame_time"].values[event, key.start + TASK.context - 1]
        assert found["init_time"].values[number] == last
    run = runs.open_run(planned.run)
    assert found.attrs["run_hash"] == run.hash
    assert found.attrs["archive_hash"] == archive.config_hash
    assert found.attrs["split"] == "test"
    np.testing.assert_array_equal(found["seed"], member_seeds(0, planned.keys, 1))
    assert checks.validate(str(whole)) == []
    assert "90 windows, 1 members" in checks.describe(str(whole))


def test_the_values_are_the_forecasters(whole, planned, archive):
    chosen = [0, 17, 44, 89]
    keys = [planned.keys[number] for number in chosen]
    context = torch.from_numpy(windows.read(TASK, archive, keys)["context"])
    expected = runs.open_run(planned.run).forecaster().forecast(context, member_seeds(0, keys, 1))
    np.testing.assert_allclose(values(whole)[chosen], expected[..., 0].numpy(), rtol=1e-4, atol=1e-2)


def test_offsets_do_not_pass_for_projection_coordinates(whole, archive):
    found = xr.open_zarr(str(whole), decode_coords="all")
    assert "grid_mapping" not in found["vil"].encoding
    for axis in ("y", "x"):
        assert "standard_name" not in found[axis].attrs
        assert found[axis].attrs["units"] == "m"
        origin = found[f"{axis}_origin"]
        assert origin.attrs["standard_name"] == f"projection_{axis}_coordinate"
        assert origin.dims == ("window",)
    assert {"y_origin", "x_origin", "proj", "init_time", "valid_time"} <= set(found["vil"].coords)
    projections = set(found["proj"].values.tolist())
    assert {pyproj.CRS(text) for text in projections} == {pyproj.CRS(archive.root["crs"].attrs["proj4"])}


@pytest.mark.usefixtures("in_process")
def test_persistence_is_the_last_frame_of_the_context(tmp_path, folder):
    shutil.copytree(folder / "archive.zarr", tmp_path / "archive.zarr")
    zarr.open_array(str(tmp_path / "archive.zarr"), path="vil")[:, 20, :5] = 255
    done = forecast(
        plan("persistence", str(tmp_path / "archive.zarr"), "test", task=TASK),
        str(tmp_path / "p.zarr"),
        progress=False,
    )
    assert str(done).startswith(f"{tmp_path}/p.zarr: 90 windows by persistence at ")
    opened = store.open_archive(str(tmp_path / "archive.zarr"))
    found = xr.open_zarr(str(tmp_path / "p.zarr"))
    for number in (0, 17, 18, 19, 63, 89):
        event = opened.positions("event")[str(found["series"].values[number])]
        last = opened.array("", "vil")[event, int(found["start"].values[number]) + 2].astype(np.float32)
        last[last == 255] = np.nan
        for lead in range(2):
            np.testing.assert_array_equal(found["vil"].values[number, 0, lead], last)
    gaps = np.isnan(found["vil"].values).any((1, 2, 3, 4))
    assert list(np.flatnonzero(gaps)) == [18, 45 + 18]


@pytest.mark.usefixtures("in_process")
def test_months_are_counted_and_temperatures_are_kelvin(tmp_path, ray_cluster):
    synthetic.write_enso(tmp_path / "raw", seed=1, cmip6=(1, 6), cmip5=(3, 6), soda_years=3)
    prepare("enso", str(tmp_path / "raw"), str(tmp_path / "a.zarr"), progress=False)
    task = dataclasses.replace(TASKS["enso"], stride=(1, 1, 30))
    model = dataclasses.replace(
        EARTHFORMERS["earthformer_enso_tiny"], widths=(16, 32), stem=(StemStage(16, (1, 4, 8)),)
    )
    write_run(str(tmp_path / "run"), task, model)
    forecast(
        plan(str(tmp_path / "run"), str(tmp_path / "a.zarr"), "test"),
        str(tmp_path / "f.zarr"),
        progress=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = xr.open_zarr(str(tmp_path / "f.zarr")).load()
    assert found["sst"].dims == ("window", "member", "lead_time", "lat", "lon")
    assert found["sst"].attrs["units"] == "K"
    assert list(found["lead_time"].values) == list(range(1, 15))
    assert found["lead_time"].attrs["units"] == "months"
    assert set(found["series"].values.tolist()) == {"CMIP5-02"}
    assert list(found["start"].values) == [0, 30, 60]
    # Model years have no date: January 1700 is the first month of a source.
    months = found["valid_time"].values.astype("datetime64[M]") - np.datetime64("1700-01", "M")
    np.testing.assert_array_equal(months.astype(int), found["start"].values[:, None] + 12 + np.arange(14))
    assert "nominal" in found["valid_time"].attrs["comment"]
    assert (float(found["lon"][0]), float(found["lon"][-1])) == (95, 330)
    opened = store.open_archive(str(tmp_path / "a.zarr"))
    context = windows.read(task, opened, [Window("CMIP5-02", 30)])["context"]
    expected = (
        runs.open_run(str(tmp_path / "run"))
        .forecaster()
        .forecast(torch.from_numpy(context), torch.zeros(1, 1))
    )
    np.testing.assert_allclose(found["sst"].values[1], expected[0, ..., 0].numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("in_process")
def test_rain_is_forecast_where_the_radar_sees(tmp_path, ray_cluster):
    synthetic.write_radar(tmp_path / "raw", sequences=3, seed=2, size=64, frames=12)
    prepare("radar", str(tmp_path / "raw"), str(tmp_path / "a.zarr"), progress=False)
    task = dataclasses.replace(
        TASKS["radar"], context=2, target=3, tiles=Tiles(size=32, stride=16, min_wet=0.0, min_cover=0.2)
    )
    planned = plan("persistence", str(tmp_path / "a.zarr"), "test", task=task)
    forecast(planned, str(tmp_path / "f.zarr"), progress=False)
    found = xr.open_zarr(str(tmp_path / "f.zarr")).load()
    assert found["rate"].attrs["units"] == "mm h-1"
    opened = store.open_archive(str(tmp_path / "a.zarr"))
    assert np.isnan(found["rate"].values).any()
    for number, key in enumerate(planned.keys):
        (row, column), group = key.tile, opened.group(key.series)
        stored = opened.array(key.series, "rate")[key.start + 1, row : row + 32, column : column + 32]
        rate = np.where(stored == 65535, np.nan, stored / 100)
        for lead in range(3):
            np.testing.assert_allclose(found["rate"].values[number, 0, lead], rate, rtol=1e-6)
        assert (int(found["tile_y"][number]), int(found["tile_x"][number])) == key.tile
        np.testing.assert_allclose(found["y_origin"][number] + found["y"], group["y"][row : row + 32])
        np.testing.assert_allclose(found["x_origin"][number] + found["x"], group["x"][column : column + 32])


# ---------------------------------------------------------------------------------- the same in any way


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("batch_size", "shard_windows"), [(1, 16), (7, 10), (5, 90)])
def test_batches_and_shards_do_not_matter(tmp_path, planned, whole, batch_size, shard_windows):
    check_the_same(tmp_path, planned, whole, batch_size, 1, shard_windows)


def test_replicas_do_not_matter(tmp_path, planned, whole):
    check_the_same(tmp_path, planned, whole, 64, 3, 7)


def check_the_same(tmp_path, planned, whole, batch_size, workers, shard_windows):
    cut = dataclasses.replace(planned, shard_windows=shard_windows)
    url = str(tmp_path / "f.zarr")
    forecast(cut, url, batch_size=batch_size, workers=workers, progress=False)
    np.testing.assert_allclose(values(url), values(whole), rtol=1e-4, atol=1e-2)
    assert checks.validate(url) == []


@pytest.mark.usefixtures("in_process")
def test_a_limit_is_the_beginning_of_the_whole(tmp_path, folder, whole):
    few = plan(str(folder / "run"), str(folder / "archive.zarr"), "test", limit=5)
    forecast(few, str(tmp_path / "f.zarr"), progress=False)
    found, all_of_it = xr.open_zarr(str(tmp_path / "f.zarr")), xr.open_zarr(str(whole))
    assert found.sizes["window"] == 5
    np.testing.assert_allclose(found["vil"].values, all_of_it["vil"].values[:5], rtol=1e-4, atol=1e-2)
    for name in ("seed", "series", "start", "init_time", "y_origin"):
        np.testing.assert_array_equal(found[name].values, all_of_it[name].values[:5])


def test_a_seed_follows_from_forecast_window_and_member_alone():
    keys = [
        Window("S1", 0),
        Window("S1", 12),
        Window("R1", 0),
        Window("knmi", 0, (0, 64)),
        Window("knmi", 0, (64, 0)),
    ]
    seeds = member_seeds(7, keys, 4)
    assert seeds.shape == (5, 4)
    assert seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    assert len(seeds.unique()) == seeds.numel()
    order = [3, 0, 4]
    assert torch.equal(member_seeds(7, [keys[i] for i in order], 2), seeds[order, :2])
    others = member_seeds(8, keys, 4)
    assert not set(others.flatten().tolist()) & set(seeds.flatten().tolist())
    # Of this value for ever: forecasts that are resumed with a later version go on as they began.
    assert seeds[1, 0].item() == 2944112414382419752


# ------------------------------------------------------------------------------------ kills and resumption


def test_only_missing_shards_are_made_again(tmp_path, planned, whole):
    shutil.copytree(whole, tmp_path / "f.zarr")
    for number in (1, 4):
        (tmp_path / f"f.zarr/records/{number:06d}.json").unlink()
        (tmp_path / f"f.zarr/vil/c/{number}/0/0/0/0").unlink()
    (tmp_path / "f.zarr/records/complete.json").unlink()
    kept = tmp_path / "f.zarr/vil/c/0/0/0/0/0"
    before = kept.stat().st_mtime_ns
    assert stage.pending(planned, str(tmp_path / "f.zarr")) == [1, 4]
    done = forecast(planned, str(tmp_path / "f.zarr"), workers=1, progress=False)
    assert (done.windows, done.written) == (90, 32)
    assert ": 90 windows by earthformer, 32 of them now, at " in str(done)
    assert kept.stat().st_mtime_ns == before
    assert content(tmp_path / "f.zarr") == content(whole)
    again = forecast(planned, str(tmp_path / "f.zarr"), progress=False)
    assert str(again).endswith("90 windows by earthformer, all there before")


def recorded(url):
    return len(list(Path(url).glob("records/[0-9]*.json")))


def test_a_killed_replica_costs_nothing(tmp_path, planned, whole):
    url, cut, killed = tmp_path / "f.zarr", dataclasses.replace(planned, shard_windows=2), []
    over = threading.Event()

    def kill():
        while not killed and not over.wait(0.002):
            if recorded(url) >= 2:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if "_Replica" in "".join(process.cmdline()[:1]):
                            process.kill()
                            killed.append(recorded(url))
                            return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        forecast(cut, str(url), batch_size=1, progress=False)
    finally:
        over.set()
        killer.join()
    assert killed[0] < cut.shards
    np.testing.assert_allclose(values(url), values(whole), rtol=1e-4, atol=1e-2)
    assert checks.validate(str(url)) == []


def test_a_plan_is_small_enough_for_every_replica(planned):
    keys = tuple(Window(f"S{number:06d}", start) for number in range(4053) for start in (0, 12, 24))
    assert len(pickle.dumps(dataclasses.replace(planned, keys=keys))) < 1_000_000


def test_a_replica_holds_few_windows_of_full_size(tmp_path, folder):
    table = pd.read_csv(folder / "raw" / "CATALOG.csv").assign(size_x=384, size_y=384)
    table.to_csv(tmp_path / "CATALOG.csv", index=False)
    laid_out, url = sevir.plan(str(tmp_path)), str(tmp_path / "a.zarr")
    store.create(url, laid_out.groups, config=laid_out.config, shards=0)
    records.complete(url, {"counts": {}})
    dense = dataclasses.replace(TASKS["sevir"], stride=(1, 1, 1))
    planned = plan("persistence", url, "test", task=dense)
    assert (len(planned.keys), planned.shard_windows, planned.shards) == (50, 9, 6)
    assert plans.SHARD_BYTES > 9 * 12 * 384 * 384 * 4
    covered = [i for shard in range(6) for i in range(50)[planned.shard(shard)]]
    assert covered == list(range(50))


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_no_finished_run_is_refused(tmp_path, folder):
    there = str(folder / "archive.zarr")
    with pytest.raises(InputError, match=r"nowhere is not a run"):
        plan(str(tmp_path / "nowhere"), there, "test")
    with pytest.raises(InputError, match=r"archive\.zarr is not a run"):
        plan(there, there, "test")
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(InputError, match="run is not complete: run the same `earthformer train` command"):
        plan(str(tmp_path / "run"), there, "test")


def test_damaged_and_foreign_weights_are_refused_before_anything_is_written(tmp_path, folder, planned):
    for name, damage in (
        ("damaged", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")),
        ("absent", lambda path: path.unlink()),
    ):
        shutil.copytree(folder / "run", tmp_path / name)
        damage(tmp_path / name / "weights.safetensors")
        bad = dataclasses.replace(planned, run=str(tmp_path / name))
        with pytest.raises(InputError, match=rf"{name}/weights\.safetensors"):
            forecast(bad, str(tmp_path / "f.zarr"), progress=False)
    write_run(str(tmp_path / "other"), TASK, dataclasses.replace(MODEL, widths=(16, 64)))
    shutil.copy(tmp_path / "other" / "weights.safetensors", tmp_path / "damaged")
    shutil.copy(tmp_path / "other" / "run.json", tmp_path / "damaged")
    with pytest.raises(InputError, match=r"damaged/run\.json is of configuration \w+, config\.json of \w+"):
        forecast(dataclasses.replace(planned, run=str(tmp_path / "damaged")), str(tmp_path / "f.zarr"))
    assert not (tmp_path / "f.zarr").exists()


def test_an_archive_of_another_kind_or_size_is_refused(tmp_path, folder):
    write_run(str(tmp_path / "lr"), TASKS["sevir-lr"], EARTHFORMERS["earthformer_sevir_lr_tiny"])
    with pytest.raises(InputError, match="is a sevir archive: task sevir-lr needs sevir-lr"):
        plan(str(tmp_path / "lr"), str(folder / "archive.zarr"), "test")
    write_run(str(tmp_path / "full"), TASKS["sevir"], EARTHFORMERS["earthformer_sevir_tiny"])
    with pytest.raises(
        InputError, match=r"gives task sevir a context of 13 × 48 × 48: .*needs 13 × 384 × 384"
    ):
        plan(str(tmp_path / "full"), str(folder / "archive.zarr"), "test")
    with pytest.raises(InputError, match="is not a store"):
        plan(str(folder / "run"), str(tmp_path), "test")


def test_a_forecast_is_not_written_over_another(tmp_path, folder, planned, whole):
    other = dataclasses.replace(planned, seed=1)
    mine, theirs = records.config_hash(other.config), records.config_hash(planned.config)
    before = content(whole)
    with pytest.raises(
        InputError, match=f"whole.zarr was written under configuration {theirs}, asked is {mine}"
    ):
        forecast(other, str(whole), progress=False)
    with pytest.raises(InputError, match="was written under configuration"):
        forecast(planned, str(folder / "archive.zarr"), progress=False)
    with pytest.raises(InputError, match="is no store of ours"):
        forecast(planned, str(folder / "run"), progress=False)
    assert content(whole) == before


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"split": "tset"}, "split 'tset' is unknown: needed one of train, val, test"),
        ({"limit": 0}, "limit is 0: needed 1 or more"),
        ({"seed": -1}, "seed is -1: needed 0 or more"),
        ({"task": TASK}, "was trained for task sevir: baselines alone take another"),
        ({"forecaster": "persistence"}, "persistence has no run to take the task from: needed --task NAME"),
        (
            {
                "forecaster": "persistence",
                "task": dataclasses.replace(TASK, splits=Splits(test_from="2031-01-01")),
            },
            "has no test windows of 5 frames for task sevir",
        ),
    ],
)
def test_impossible_plans_are_refused(folder, how, said):
    where = {"forecaster": str(folder / "run"), "archive": str(folder / "archive.zarr")}
    asked = where | {"split": "test"} | how
    with pytest.raises(InputError, match=said):
        plan(**asked)


def test_impossible_numbers_and_an_absent_gpu_are_refused(tmp_path, planned, monkeypatch):
    url = str(tmp_path / "f.zarr")
    with pytest.raises(InputError, match="workers is 0: needed 1 or more"):
        forecast(planned, url, workers=0)
    with pytest.raises(InputError, match="batch size is 0: needed 1 or more"):
        forecast(planned, url, batch_size=0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU that PyTorch can use: needed one, or no --gpu"):
            forecast(planned, url, gpu=True)
    assert not Path(url).exists()


def test_a_damaged_archive_is_one_line_and_leaves_nothing_that_looks_complete(tmp_path, folder):
    shutil.copytree(folder / "archive.zarr", tmp_path / "archive.zarr")
    for path in (tmp_path / "archive.zarr" / "vil" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    planned = plan("persistence", str(tmp_path / "archive.zarr"), "test", task=TASK)
    with pytest.raises(Exception, match="cannot be read") as caught:
        forecast(planned, str(tmp_path / "f.zarr"), progress=False)
    said = boundary_error(caught.value)
    assert isinstance(said, InputError)
    assert str(said).startswith(f"{tmp_path}/archive.zarr, vil, cannot be read: ")
    assert not records.is_complete(str(tmp_path / "f.zarr"))


# ----------------------------------------------------------------------------------------------- the verb


@pytest.fixture
def earthformer(folder, monkeypatch, capsys):
    """Runs the command in the folder: exit code, standard output and standard error."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["earthformer", *arguments])
        with warnings.catch_warnings():
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folder, earthformer):
    where = ("forecast", "--run", "run", "--archive", "archive.zarr", "--dry-run", "--out")
    code, out, _ = earthformer(*where, "dry.zarr")
    assert code == 0
    assert "datetime64[ns]" in out
    assert "dry.zarr: would hold " in out
    told = dict(re.findall(r"^  (shards|read|write|tasks|time|cost) +(.*)$", out, re.MULTILINE))
    assert told["shards"] == "6, of which 6 are to be written"
    assert told["write"].startswith("1.7 MB, ")
    assert re.fullmatch(r"\S+ CPU-hours, .+ by 1 worker\(s\)", told["time"])
    assert not (folder / "dry.zarr").exists()
    code, _, err = earthformer(*where, "whole.zarr", "--seed", "3")
    assert code == 2
    assert "was written under configuration" in err


def test_the_last_line_fits_a_terminal(whole, earthformer):
    code, out, _ = earthformer("forecast", "--run", "run", "--archive", "archive.zarr", "--out", "whole.zarr")
    assert (code, out) == (0, "whole.zarr: 90 windows by earthformer, all there before\n")
    done = stage.Forecasted("demo/forecasts/earthformer.zarr", "earthformer", 1234, 1234, 100.0)
    assert str(done) == "demo/forecasts/earthformer.zarr: 1234 windows by earthformer at 12.3 windows/s"
    assert len(str(done)) <= 80


def test_an_overlay_needs_a_task_to_lie_over(earthformer):
    where = ("forecast", "--archive", "archive.zarr", "--out", "other.zarr")
    code, _, err = earthformer(*where, "--run", "run", "--set", "task.context=4")
    assert code == 2
    assert "needed --task NAME beside them" in err
    task = ("--task", "sevir", "--set", "task.stride=[12,12,24]")
    code, out, _ = earthformer(*where, "--forecaster", "persistence", *task, "--dry-run")
    assert code == 0
    assert "(window: 4, member: 1, lead_time: 12, y: 48, x: 48)" in out
