"""Configurations are data: resolved, overlaid, checked and guarded by a hash. A run that is left is whole."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from pipelines import configs, journal, runs
from pipelines.errors import InputError


def test_overlay_changes_what_it_names_and_nothing_else():
    plain = configs.resolve("sevir")
    changed = configs.resolve("sevir", overlay={"training": {"epochs": 3}, "task": {"stride": [6, 12, 12]}})
    assert changed.training == dataclasses.replace(plain.training, epochs=3)
    assert changed.task.stride == (6, 12, 12)
    assert changed.model == plain.model
    assert changed.hash != plain.hash


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"training": {"epoch": 3}}, "'training.epoch' is unknown: the nearest is 'training.epochs'"),
        ({"trainin": {}}, "'trainin' is unknown: the nearest is 'training'"),
        ({"training": {"epochs": "many"}}, "training.epochs is 'many'"),
        ({"training": {"precision": "fp8"}}, "training.precision is 'fp8'"),
        ({"training": {"epochs": 0}}, "key training: epochs is 0: needed at least 1"),
        ({"training": {"micro_batch": -1}}, "micro_batch is -1: needed at least 1"),
        ({"training": {"validate_every": 0}}, "validate_every is 0: needed at least 1"),
        ({"training": {"checkpoint_steps": 0}}, "checkpoint_steps is 0: needed at least 1"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate is nan: needed a finite number"),
        ({"training": {"warmup": 1.5}}, "warmup is 1.5: needed a fraction"),
        ({"training": 5}, "training is 5"),
        ({"training": None}, "training is None"),
        ({"model": {"widths": [33, 64]}}, "key model: width is 33: needed a multiple of the 4 heads"),
        ({"model": {"stem": [{"width": "wide"}]}}, "model.stem.0.width is 'wide'"),
        ({"task": {"stride": [6, 6]}}, "task.stride.2"),
    ],
)
def test_a_wrong_overlay_is_named_in_one_line(overlay, message):
    with pytest.raises(InputError, match=message) as caught:
        configs.resolve("sevir", overlay=overlay)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("augment", True), ("latent_versions", 4)])
def test_the_ocean_is_not_turned(name, value):
    with pytest.raises(InputError, match=rf"configuration: training.{name} is {value}: needed"):
        configs.resolve("enso", overlay={"training": {name: value}})


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="nearest is 'sevir-lr'"):
        configs.resolve("sevirlr")
    with pytest.raises(InputError, match="nearest is 'earthformer_enso'"):
        configs.resolve("enso", preset="earthformer_ensoo")


def test_overlay_file_and_assignments(tmp_path):
    file = tmp_path / "overlay.yaml"
    file.write_text("training: {epochs: 3, seed: 1}\n")
    overlay = configs.read_overlay(str(file), ["training.epochs=5", "task.splits.test_from=2020-01-01"])
    assert overlay["training"] == {"epochs": 5, "seed": 1}
    with pytest.raises(InputError, match="cannot be read"):
        configs.read_overlay(str(tmp_path / "absent.yaml"), [])
    with pytest.raises(InputError, match=r"section.key=value"):
        configs.read_overlay(None, ["training.epochs"])
    with pytest.raises(InputError, match=r"--set training.epochs=\[: '\[' is no YAML"):
        configs.read_overlay(None, ["training.epochs=["])
    with pytest.raises(InputError, match="cannot be read"):
        configs.read_overlay("nowhere://overlay.yaml", [])
    file.write_text("- epochs\n")
    with pytest.raises(InputError, match="holds a list: needed a mapping"):
        configs.read_overlay(str(file), [])
    # The last assignment wins, whatever it lies over.
    assert configs.read_overlay(None, ["a=1", "a.b=2"]) == {"a": {"b": 2}}
    rate = configs.read_overlay(None, ["training.learning_rate=1e-3"])
    assert configs.resolve("sevir", overlay=rate) == configs.resolve("sevir")


def test_configuration_survives_json():
    config = configs.resolve("radar", overlay={"training": {"seed": 7}})
    again = configs.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert again.hash == config.hash


def test_a_run_of_another_configuration_is_refused(tmp_path):
    one, two = (configs.resolve("sevir", overlay={"training": {"seed": seed}}) for seed in (1, 2))
    runs.start(str(tmp_path), one, {})
    runs.start(str(tmp_path), one, {})
    with pytest.raises(InputError, match=f"{one.hash}.*{two.hash}"):
        runs.start(str(tmp_path), two, {})


def test_what_is_not_a_finished_run_is_said(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        runs.open_run(str(tmp_path))
    runs.start(str(tmp_path), configs.resolve("sevir"), {})
    with pytest.raises(InputError, match="is not complete"):
        runs.open_run(str(tmp_path))


def test_a_run_on_another_archive_is_refused(tmp_path):
    config = configs.resolve("sevir")
    assert not runs.start(str(tmp_path), config, {"archive": "one.zarr", "archive_hash": "aaaa"})
    assert not runs.start(str(tmp_path), config, {"archive": "moved.zarr", "archive_hash": "aaaa"})
    with pytest.raises(InputError, match=r"trained on archive aaaa, two.zarr is bbbb: needed the same"):
        runs.start(str(tmp_path), config, {"archive": "two.zarr", "archive_hash": "bbbb"})


@pytest.mark.parametrize("name", ["CATALOG.csv", "checkpoints/00000002/record.json", "config.json"])
def test_a_folder_of_other_files_is_left_alone(tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"theirs": 1}')
    with pytest.raises(InputError, match=rf"holds {name.split('/')[0]} but no run's config.json"):
        runs.start(str(tmp_path / "run"), configs.resolve("sevir"), {})
    assert file.read_text() == '{"theirs": 1}'


def test_a_configuration_cut_off_is_written_again(tmp_path):
    config = configs.resolve("sevir")
    (tmp_path / "config.json").write_text('{"config_hash": "')
    assert runs.describe(str(tmp_path)) is None
    runs.start(str(tmp_path), config, {})
    assert config.hash in runs.describe(str(tmp_path))


# ------------------------------------------------------------------------------------------ checkpoints


def save(run: str, step: int, score: float | None = None) -> None:
    record = {"step": step, "epoch": 0, "score": score, "finished": False, "peak_rss_mb": 1}
    journal.save_checkpoint(run, {"w": torch.full((3,), float(step))}, {"step": step}, record)


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    run = str(tmp_path)
    # The earliest of equals is the best, and what has no score never is.
    for step, score in enumerate([None, 0.5, 0.7, 0.7, None], 1):
        save(run, step, score)
        assert journal.checkpoints(run)[-1]["step"] == step
    kept = journal.checkpoints(run)
    assert [record["step"] for record in kept] == [3, 5]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert journal.best(kept)["step"] == 3
    weights, state = journal.load_checkpoint(run, kept[0])
    assert weights["w"].tolist() == [3.0, 3.0, 3.0]
    assert state == {"step": 3}


def test_a_checkpoint_without_its_record_is_none(tmp_path):
    run = str(tmp_path)
    save(run, 1)
    save(run, 2, 0.5)
    record = tmp_path / "checkpoints" / "00000002" / "record.json"
    for left in (record.read_text()[:30], None):
        record.write_text(left) if left else record.unlink()
        assert journal.checkpoints(run) == []
    save(run, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


@pytest.mark.parametrize("moment", [0.02, 0.11])
def test_a_kill_leaves_whole_checkpoints(tmp_path, moment):
    run = str(tmp_path / "run")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, run], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(moment)
    writer.kill()
    writer.wait()
    records = journal.checkpoints(run)
    assert len(records) >= 1
    for record in records:
        weights, state = journal.load_checkpoint(run, record)
        assert float(weights["w"].mean()) == state["step"] == record["step"]
    assert [line["step"] for line in journal.read_metrics(run)][-1] in (
        records[-1]["step"],
        records[-1]["step"] + 1,
    )


WRITER = """
import itertools, sys, torch
from pipelines import journal
metrics = journal.Metrics(sys.argv[1], 0)
for step in itertools.count(1):
    metrics.write(step, {"loss": 1.0})
    record = {"step": step, "epoch": 0, "score": -step % 7 / 7, "finished": False, "peak_rss_mb": 1}
    weights = {"w": torch.full((100_000,), float(step))}
    journal.save_checkpoint(sys.argv[1], weights, {"step": step}, record)
    if step == 3:
        print("begun", flush=True)
"""


# ---------------------------------------------------------------------------------------------- metrics


def test_metrics_after_the_last_checkpoint_are_done_again(tmp_path):
    run = str(tmp_path)
    metrics = journal.Metrics(run, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0 / step})
    again = journal.Metrics(run, 2)
    again.write(3, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in journal.read_metrics(run)] == [(1, 1), (2, 0.5), (3, 9)]
    assert journal.read_metrics(str(tmp_path / "absent")) == []
