"""Ensembles through the forecast stage: members depend on nothing but their seed, and are reduced."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from tiny_prediff import begun, config

from earthformer.forecasters import members_of
from pipelines import cli, runs, storage, windows
from pipelines.archives import checks, records, store
from pipelines.configs import resolve_task
from pipelines.errors import InputError
from pipelines.events import parse_events
from pipelines.forecast import CHECKED, forecast
from pipelines.forecast_store import command, member_seeds
from pipelines.plans import Drawing, Ensemble, plan
from pipelines.report import report

MENTIONED = [
    {"name": "rain", "variable": "vil", "threshold": 60, "units": "1"},
    {"name": "near", "variable": "vil", "threshold": 60, "units": "1", "radius": 6, "lead_time": [10, 10]},
    {"name": "impossible", "variable": "vil", "threshold": 1e6, "units": "1"},
]
EVENTS = parse_events(MENTIONED, "test")
QUICK = Drawing(sampler="dpm++", steps=3)


@pytest.fixture(scope="module")
def archive(ensemble_archive) -> str:
    return ensemble_archive


@pytest.fixture(scope="module")
def trainings(ensemble_runs) -> dict[str, str]:
    return ensemble_runs


def planned(trainings, archive, members=6, drawing=QUICK, keep=True, limit=3, **ensemble):
    asked = Ensemble(members=members, keep_members=keep, events=EVENTS, **ensemble)
    return plan(trainings["denoiser"], archive, "test", limit=limit, ensemble=asked, drawing=drawing)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, trainings, archive) -> str:
    """An ensemble of six, kept, by batches of four."""
    url = str(tmp_path_factory.mktemp("kept") / "forecast.zarr")
    forecast(planned(trainings, archive, quantiles=(0.1, 0.5)), url, batch_size=4, progress=False)
    return url


def test_moments_quantiles_and_probabilities_are_those_of_the_members(kept):
    found = xr.open_zarr(kept).load()
    vil = found["vil"]
    assert vil.dims == ("window", "member", "lead_time", "y", "x")
    assert (vil.std("member") > 0).any()
    np.testing.assert_allclose(found["vil_mean"], vil.mean("member"), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["vil_stdev"], vil.std("member", ddof=1), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(
        found["vil_quantile"],
        vil.quantile([0.1, 0.5], "member").transpose("window", ...),
        rtol=1e-4,
        atol=1e-3,
    )
    assert found["event"].values.tolist() == ["rain", "near", "impossible"]
    rain = (vil >= 60).any("lead_time").mean("member")
    np.testing.assert_allclose(found["probability"].sel(event="rain"), rain, atol=1e-6)
    assert (found["probability"].sel(event="near") >= (vil[:, :, 0] >= 60).mean("member") - 1e-6).all()
    assert not found["probability"].sel(event="impossible").any()
    assert (found["ci_low"] <= found["probability"]).all()
    assert (found["ci_high"] >= found["probability"]).all()
    assert found["n_members"].values.tolist() == [6, 6]
    assert not found["failed_members"].any()
    np.testing.assert_allclose(found["smallest_resolvable"], 1 / 6, rtol=1e-6)
    assert found["threshold"].attrs["units"] == "1"
    assert found.attrs["sampler"] == "dpm++"
    assert found.attrs["sampler_steps"] == 3
    assert checks.validate(kept) == []


def test_members_are_the_forecasters_own(kept, trainings, archive):
    asked = planned(trainings, archive)
    forecaster, key = asked.load(), asked.keys[1]
    context = torch.from_numpy(windows.read(asked.task, asked.archive, [key])["context"])
    seeds = member_seeds(0, [key], 6)
    parts = [part.fields[0, ..., 0] for part in members_of(forecaster, context, seeds, 4)]
    stored = xr.open_zarr(kept)["vil"][1].values
    np.testing.assert_allclose(torch.cat(parts).numpy(), stored, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("in_process")
def test_a_member_is_the_same_whatever_it_is_made_with(kept, trainings, archive, tmp_path):
    whole = xr.open_zarr(kept)["vil"].values
    forecast(
        planned(trainings, archive, members=3, limit=2),
        str(tmp_path / "few.zarr"),
        batch_size=2,
        progress=False,
    )
    few = xr.open_zarr(str(tmp_path / "few.zarr"))["vil"].values
    np.testing.assert_allclose(few, whole[:2, :3], rtol=1e-3, atol=1e-2)


def test_two_replicas_make_the_same_ensemble_to_the_bit(trainings, archive, tmp_path):
    # Each of two replicas has one thread; a forecast by one of them has them all, and rounds in its own way.
    asked, urls = planned(trainings, archive), [str(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    for url in urls:
        forecast(asked, url, batch_size=4, workers=2, progress=False)
    one, other = (xr.open_zarr(url).load() for url in urls)
    xr.testing.assert_identical(one, other)


@pytest.mark.usefixtures("in_process")
def test_a_forecast_cut_short_goes_on_with_the_same_members(kept, trainings, archive, tmp_path):
    url = str(tmp_path / "cut.zarr")
    asked = planned(trainings, archive, quantiles=(0.1, 0.5))
    forecast(asked, url, batch_size=4, progress=False)
    fs, path = store.filesystem(url)
    for name in (
        "records/complete.json",
        *(
            f"records/{n}"
            for n in (f.rsplit("/", 1)[1] for f in fs.ls(f"{path}/records", detail=False))
            if "1" in n
        ),
    ):
        if fs.exists(f"{path}/{name}"):
            fs.rm_file(f"{path}/{name}")
    done = forecast(asked, url, batch_size=4, progress=False)
    assert 1 <= done.written < 3
    assert done.drawn == (6,) * done.written
    np.testing.assert_array_equal(xr.open_zarr(url)["vil"].values, xr.open_zarr(kept)["vil"].values)


@pytest.mark.usefixtures("in_process")
def test_members_are_written_only_when_asked(kept, trainings, archive, tmp_path):
    url = str(tmp_path / "reduced.zarr")
    forecast(planned(trainings, archive, keep=False), url, batch_size=4, progress=False)
    found, whole = xr.open_zarr(url), xr.open_zarr(kept)
    assert "vil" not in found
    for name in ("vil_mean", "vil_stdev", "probability", "ci_low", "ci_high"):
        np.testing.assert_array_equal(found[name].values, whole[name].values)


@pytest.mark.usefixtures("in_process")
def test_members_are_drawn_until_the_intervals_are_narrow(trainings, archive, tmp_path):
    def drawn(until, events, batch_size=4):
        asked = Ensemble(members=40, until_ci=until, events=events)
        url = str(tmp_path / f"{until}-{batch_size}.zarr")
        one = plan(trainings["denoiser"], archive, "test", limit=1, ensemble=asked, drawing=QUICK)
        done = forecast(one, url, batch_size=batch_size, progress=False)
        found = xr.open_zarr(url)
        assert found["n_members"].values.tolist() == list(done.drawn)
        half = (found["ci_high"] - found["ci_low"]).max() / 2
        return done.drawn[0], float(half)

    never = [event for event in EVENTS if event.name == "impossible"]
    count, half = drawn(0.1, tuple(never))
    assert 4 < count < 40
    assert count % CHECKED == 0
    assert half <= 0.1
    assert drawn(0.1, tuple(never), batch_size=11) == (count, half)
    assert drawn(0.01, tuple(never))[0] == 40


@pytest.mark.usefixtures("in_process")
def test_a_guided_forecast_reports_what_was_asked_and_what_came(trainings, archive, tmp_path):
    url = str(tmp_path / "guided.zarr")
    guided = dataclasses.replace(QUICK, alignment=trainings["alignment"], deviations=4.0)
    asked = planned(trainings, archive, drawing=guided, limit=2)
    done = forecast(asked, url, batch_size=4, progress=False)
    found = xr.open_zarr(url).load()
    mean = found["vil"].mean(("lead_time", "y", "x")) / 255
    np.testing.assert_allclose(found["functional_achieved"], mean, rtol=1e-3, atol=1e-4)
    constraint = runs.open_run(trainings["alignment"]).module()
    context = windows.read(asked.task, asked.archive, asked.keys)["context"]
    level = constraint.request(torch.from_numpy(context), 4.0)
    np.testing.assert_allclose(found["functional_requested"], level, rtol=1e-4)
    said = re.search(r"of the functional (\S+) was requested and (\S+) achieved, on average$", str(done))
    assert [float(s) for s in said.groups()] == pytest.approx(
        [float(level.mean()), float(mean.mean())], rel=1e-3
    )
    report([url], archive, str(tmp_path / "guided.html"), cases=1)
    page = (tmp_path / "guided.html").read_text(encoding="utf-8")
    assert re.search(
        r"\(6 members\): of the functional 0\.\d+ was requested, members have 0\.\d+ to 0\.\d+\.", page
    )
    assert found.attrs["deviations"] == 4.0
    assert found.attrs["guidance_strength"] == constraint.config.strength


@pytest.mark.usefixtures("in_process")
def test_the_command_that_is_noted_makes_the_same_forecast(trainings, archive, tmp_path):
    asked = Ensemble(members=40, until_ci=0.1, events=EVENTS, quantiles=(0.5,), keep_members=True)
    drawing = Drawing("ddim", 4, "bf16", alignment=trainings["alignment"], deviations=-2.0, strength=7.0)
    guided = plan(
        trainings["denoiser"], archive, "val", seed=3, limit=2, every=2, ensemble=asked, drawing=drawing
    )
    changed = resolve_task("sevir-lr", {"task": {"stride": [3, 6, 6]}})
    baseline = plan("displaced", archive, "test", task=changed, ensemble=Ensemble(members=4))
    (tmp_path / "EVENTS.yaml").write_text(yaml.safe_dump(MENTIONED))
    for planned_one in (guided, baseline):
        words = shlex.split(command(planned_one).replace("EVENTS.yaml", f"{tmp_path}/EVENTS.yaml"))
        url = str(tmp_path / f"{planned_one.forecaster[:4]}.zarr")
        cli.app([*words[1:], "--out", url], standalone_mode=False)
        made = xr.open_zarr(url)
        assert made.attrs["history"] == command(planned_one)
        assert storage.read_json(url, "records/config.json")["config_hash"] == records.config_hash(
            planned_one.config
        )


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["displaced", "steps"])
def test_other_ensembles_go_the_same_way(name, trainings, archive, tmp_path):
    task = runs.open_run(trainings["denoiser"]).config.task
    ensemble = Ensemble(members=3, keep_members=True, events=EVENTS)
    url = str(tmp_path / "forecast.zarr")
    forecast(
        plan(name, archive, "test", task=task, limit=1, ensemble=ensemble), url, batch_size=2, progress=False
    )
    found = xr.open_zarr(url).load()
    np.testing.assert_allclose(found["vil_mean"], found["vil"].mean("member"), rtol=1e-4, atol=1e-3)
    assert found.attrs["forecaster"] == name


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ({"members": 0}, "members is 0: needed 1 to 10000"),
        ({"members": 10**9}, "members is 1000000000: needed 1 to 10000"),
        ({"members": 4, "quantiles": (1.5,)}, "quantiles is .*: needed fractions from 0 to 1"),
        ({"members": 4, "until_ci": 0.05}, "until-ci is 0.05: needed --events"),
        ({"members": 4, "until_ci": 0.7, "events": EVENTS}, "until-ci is 0.7: needed a half-width"),
        ({"members": 1, "events": EVENTS}, "members is 1: needed 2 or more for events"),
    ],
)
def test_impossible_ensembles_are_refused(ensemble, message):
    with pytest.raises(InputError, match=message):
        Ensemble(**ensemble)


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        ({"sampler": "dpm+"}, r"sampler is 'dpm\+': needed one of .*the nearest is dpm\+\+"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"alignment": "denoiser"}, "is a run of denoiser: needed one of alignment"),
    ],
)
def test_impossible_drawings_are_refused(drawing, message, trainings, archive):
    if "alignment" in drawing:
        drawing = {"alignment": trainings[drawing["alignment"]]}
    with pytest.raises(InputError, match=message):
        planned(trainings, archive, drawing=dataclasses.replace(QUICK, **drawing))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"units": "K"}, "units|unit"),
        ({"lead_time": [10, 90]}, "lead"),
        ({"region": {"box": [0, 0, 1, 1]}}, "region"),
        ({"variable": "rate"}, "variable 'rate' is unknown"),
    ],
)
def test_events_that_do_not_fit_are_refused_before_anything_is_made(event, message, trainings, archive):
    asked = parse_events([{"name": "e", "variable": "vil", "threshold": 60, "units": "1", **event}], "test")
    with pytest.raises(InputError, match=message):
        plan(
            trainings["denoiser"], archive, "test", ensemble=Ensemble(members=2, events=asked), drawing=QUICK
        )


def test_an_alignment_network_of_other_latents_is_refused(trainings, archive, tmp_path):
    asked = config("alignment", trainings["autoencoder"])
    other = dataclasses.replace(asked, model=dataclasses.replace(asked.model, normalise=False))
    run = str(tmp_path / "alignment")
    for _ in begun(other, archive, run, trainings["autoencoder"]).steps():
        pass
    runs.complete(run, other, runs.provenance(run))
    with pytest.raises(InputError, match=r"was trained with normalise False: .* has True; needed the same"):
        planned(trainings, archive, drawing=dataclasses.replace(QUICK, alignment=run))


def test_other_windows_are_another_forecast(trainings, archive):
    every = [planned(trainings, archive, limit=1).config for _ in range(2)]
    assert every[0] == every[1]
    other = plan(
        trainings["denoiser"], archive, "test", limit=1, every=2, ensemble=Ensemble(members=6), drawing=QUICK
    )
    assert len(other.keys) == 1
    moved = dataclasses.replace(other, keys=planned(trainings, archive, limit=None).keys[1:2])
    assert moved.config != other.config


def test_what_is_not_meant_for_a_forecaster_is_refused(trainings, archive):
    task = runs.open_run(trainings["denoiser"]).config.task
    several = Ensemble(members=4)
    with pytest.raises(InputError, match="4 members asked of persistence, which is deterministic"):
        plan("persistence", archive, "test", task=task, ensemble=several)
    with pytest.raises(InputError, match="displaced draws no members by diffusion"):
        plan("displaced", archive, "test", task=task, ensemble=several, drawing=QUICK)
    with pytest.raises(InputError, match="is a run of autoencoder, which makes no forecasts"):
        plan(trainings["autoencoder"], archive, "test")


def test_the_command_refuses_in_one_line(capsys, monkeypatch, trainings, archive, tmp_path):
    where = ["--archive", archive, "--out", str(tmp_path / "f.zarr")]
    for arguments, message in (
        ([], "needed either --run URL or --forecaster NAME"),
        (["--run", "a", "--forecaster", "steps"], "needed either --run URL or --forecaster NAME"),
        (
            ["--forecaster", "stepps", "--task", "radar"],
            "forecaster 'stepps' is unknown: the nearest is 'steps'",
        ),
        (["--run", trainings["denoiser"], "--quantiles", "a"], "quantiles 'a': needed numbers"),
        (["--run", trainings["denoiser"], "--max-members", "9"], "--max-members 9 is for --until-ci"),
        (
            ["--run", trainings["denoiser"], "--members", "9", "--until-ci", "0.1"],
            "--members 9 beside --until-ci",
        ),
        (["--run", trainings["denoiser"], "--until-ci", "0.1", "--max-members", "0"], "members is 0"),
        (["--run", trainings["denoiser"], "--deviations", "4"], "deviations is 4.0: needed --alignment RUN"),
    ):
        monkeypatch.setattr("sys.argv", ["earthformer", "forecast", *where, *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "f.zarr").exists()
