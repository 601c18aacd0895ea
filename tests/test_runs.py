"""Configurations are data: resolved, overlaid, checked and guarded by their hash."""

import dataclasses
import json

import pytest

from pipelines import runs
from pipelines.errors import InputError


def test_overlay_changes_what_it_names_and_nothing_else():
    plain = runs.resolve("sevir")
    changed = runs.resolve("sevir", overlay={"training": {"epochs": 3}, "task": {"stride": [6, 12, 12]}})
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
    ],
)
def test_a_wrong_overlay_is_named(overlay, message):
    with pytest.raises(InputError, match=message):
        runs.resolve("sevir", overlay=overlay)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="nearest is 'sevir-lr'"):
        runs.resolve("sevirlr")
    with pytest.raises(InputError, match="nearest is 'earthformer_enso'"):
        runs.resolve("enso", preset="earthformer_ensoo")


def test_overlay_file_and_assignments(tmp_path):
    file = tmp_path / "overlay.yaml"
    file.write_text("training: {epochs: 3, seed: 1}\n")
    overlay = runs.read_overlay(str(file), ["training.epochs=5", "task.splits.test_from=2020-01-01"])
    assert overlay["training"] == {"epochs": 5, "seed": 1}
    with pytest.raises(InputError, match="cannot be read"):
        runs.read_overlay(str(tmp_path / "absent.yaml"), [])
    with pytest.raises(InputError, match=r"section.key=value"):
        runs.read_overlay(None, ["training.epochs"])


def test_configuration_survives_json():
    config = runs.resolve("radar", overlay={"training": {"seed": 7}})
    again = runs.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert again.hash == config.hash


def test_a_run_of_another_configuration_is_refused(tmp_path):
    one, two = (runs.resolve("sevir", overlay={"training": {"seed": seed}}) for seed in (1, 2))
    runs.start(str(tmp_path), one, {})
    runs.start(str(tmp_path), one, {})
    with pytest.raises(InputError, match=f"{one.hash}.*{two.hash}"):
        runs.start(str(tmp_path), two, {})


def test_what_is_not_a_finished_run_is_said(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        runs.open_run(str(tmp_path))
    runs.start(str(tmp_path), runs.resolve("sevir"), {})
    with pytest.raises(InputError, match="is not complete"):
        runs.open_run(str(tmp_path))
