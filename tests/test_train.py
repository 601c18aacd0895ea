"""Training: the schedule, what is decayed, and that kills and worker counts change nothing."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from earthformer.forecasters import EarthformerForecaster
from earthformer.presets import EARTHFORMERS
from pipelines import cli, configs, journal, runs, windows
from pipelines.archives import store, synthetic
from pipelines.errors import InputError, boundary_error
from pipelines.loop import Ranks, begin, learning_rate, micro_batches, parameter_groups, schedule_steps
from pipelines.prepare import prepare
from pipelines.train import train

ALONE = Ranks(0, 1, torch.device("cpu"))
OVERLAY = {
    "task": {"context": 3, "target": 2, "stride": [22, 22, 22]},
    "model": {
        "context": [3, 48, 48, 1],
        "target": [2, 48, 48, 1],
        "widths": [16, 32],
        "stem": [{"width": 16, "scale": [1, 4, 4], "convs": 1}],
    },
    "training": {"batch_size": 4, "micro_batch": 2, "epochs": 3, "checkpoint_steps": 3, "log_steps": 1},
}
STEPS = 12
"""Three epochs of four steps: 18 training windows, of which 16 make whole batches."""


def small(dropout: float = 0.0, **training) -> configs.Config:
    """A model and a task of a few seconds."""
    overlay = {**OVERLAY, "training": {**OVERLAY["training"], **training}}
    overlay["model"] = {**OVERLAY["model"], "feed_forward": {"dropout": dropout}}
    return configs.resolve("sevir", "earthformer_sevir_tiny", overlay)


@pytest.fixture(scope="module")
def archive(tmp_path_factory, ray_cluster) -> str:
    folder = tmp_path_factory.mktemp("train")
    synthetic.write_sevir(folder / "raw", events=10, seed=1, size=48)
    prepare("sevir", str(folder / "raw"), str(folder / "archive.zarr"), progress=False)
    return str(folder / "archive.zarr")


def begun(config: configs.Config, archive: str, run: str):
    """The training loop in this process, as one rank of one."""
    runs.start(run, config, {"archive_hash": store.open_archive(archive).config_hash})
    return begin(config, store.open_archive(archive), run, ALONE)


def outcome(run: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights of the last checkpoint, and the metrics that do not depend on the clock."""
    weights, _ = journal.load_checkpoint(run, journal.checkpoints(run)[-1])
    lines = [
        {name: value for name, value in line.items() if name != "windows_per_s"}
        for line in journal.read_metrics(run)
    ]
    return weights, lines


def same(found, needed, tolerance: float) -> None:
    """The same weights and metrics, up to a relative tolerance."""
    weights, lines = found
    torch.testing.assert_close(weights, needed[0], rtol=tolerance, atol=tolerance)
    assert len(lines) == len(needed[1])
    for line, other in zip(lines, needed[1], strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=1e-9)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, archive):
    """URL of a run that was trained in one go, by one rank."""
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    assert list(begun(small(), archive, run).steps()) == list(range(1, STEPS + 1))
    return run


# ------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", ["sevir", "enso"])
def test_learning_rate_is_the_published_one(parity, name):
    numbers = np.load(parity / "earthformer" / "x05_lr_schedule.npz")
    settings = json.loads(str(numbers[f"{name}/settings"]))
    training = configs.Training(
        learning_rate=settings["lr"],
        min_lr_ratio=settings["min_lr_ratio"],
        warmup=settings["warmup"] / settings["total"],
        published_schedule=True,
    )
    ours = [learning_rate(k, settings["total"], training) for k in range(len(numbers[name]))]
    np.testing.assert_allclose(ours, numbers[name], rtol=1e-12, atol=1e-18)


def test_learning_rate_of_prediff_is_the_published_one(parity):
    numbers = np.load(parity / "prediff" / "ema_lr.npz")
    training = dataclasses.replace(
        configs.TRAINING["denoiser", "prediff_sevir_lr"], learning_rate=1e-3, published_schedule=True
    )
    ours = [learning_rate(k, 200, training) for k in range(len(numbers["out/lr"]))]
    np.testing.assert_allclose(ours, numbers["out/lr"], rtol=1e-12)


def test_learning_rate_stays_at_its_floor():
    training = configs.Training(learning_rate=1e-3)
    assert learning_rate(250, 100, training) == learning_rate(100, 100, training) == pytest.approx(1e-6)


def test_schedule_counts_of_the_published_runs():
    sevir = configs.Training(published_schedule=True)
    assert schedule_steps(sevir, 35_718) == 55_809
    assert schedule_steps(configs.Training(), 35_718) == 111_618
    assert schedule_steps(configs.resolve("enso").training, 52_350) == 81_796


def test_layer_norms_and_biases_are_not_decayed():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.layer_norm = nn.LayerNorm(2)
            self.group_norm = nn.GroupNorm(1, 2)
            self.relative_position_bias_table = nn.Parameter(self.linear.weight.detach().clone())

    layer = Layer()
    decayed, free = (group["params"] for group in parameter_groups(layer, 0.1))
    assert {id(p) for p in decayed} == {id(layer.linear.weight), id(layer.group_norm.weight)}
    assert len(free) == 5


def test_each_micro_batch_is_some_workers():
    training = configs.Training()
    for workers in (1, 2, 3, 16):
        shares = [micro_batches(training, rank, workers) for rank in range(workers)]
        assert [place for share in shares for place in share] == list(range(16))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(
        InputError, match=r"17 workers .* 32 makes 16 micro-batches .* 2: needed at least one"
    ):
        micro_batches(training, 0, 17)
    with pytest.raises(InputError, match=r"batch_size 32 is no multiple of training\.micro_batch 3"):
        micro_batches(configs.Training(micro_batch=3), 0, 1)


def test_what_is_decayed_of_the_published_model():
    forecaster = EarthformerForecaster(EARTHFORMERS["earthformer_enso"], configs.resolve("enso").task.scaling)
    decayed, free = ({id(p) for p in group["params"]} for group in parameter_groups(forecaster, 0.1))
    names = {name.removeprefix("network."): id(p) for name, p in forecaster.named_parameters()}
    assert decayed | free == set(names.values())
    attention = "encoder.blocks.0.0.attn_l.0."
    for name in (
        attention + "qkv.weight",
        "initial_encoder.conv_block_list.0.1.weight",
        "enc_pos_embed.T_embed.weight",
    ):
        assert names[name] in decayed, name
    for name in (attention + "relative_position_bias_table", attention + "norm.weight", "z_proj.bias"):
        assert names[name] in free, name


# --------------------------------------------------------------------------------------------- the loop


def test_what_a_run_leaves(undisturbed):
    lines = journal.read_metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "CSI-M" in line] == [4, 8, 12]
    assert lines[0]["learning_rate"] == 0
    assert all(line["windows_per_s"] > 0 for line in lines)
    board = EventAccumulator(f"{undisturbed}/tensorboard").Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    records = journal.checkpoints(undisturbed)
    assert records[-1]["step"] == STEPS
    assert records[-1]["finished"]
    assert 1 <= len(records) <= 2
    scores = {line["step"]: line["CSI-M"] for line in lines if "CSI-M" in line}
    assert journal.best(records)["score"] == max(scores.values())


def test_a_step_is_one_of_the_whole_batch(archive, undisturbed):
    # Plain PyTorch, all windows of a batch at once; five steps reach into the second epoch.
    config, opened = small(), store.open_archive(archive)
    keys = windows.enumerate_windows(config.task, opened, "train")
    torch.manual_seed(config.training.seed)
    forecaster = EarthformerForecaster(config.model, config.task.scaling)
    optimiser = torch.optim.AdamW(parameter_groups(forecaster, config.training.weight_decay))
    for line in journal.read_metrics(undisturbed)[:5]:
        epoch, place = divmod(line["step"] - 1, 4)
        batch = windows.epoch_order(keys, config.training.seed, epoch)[4 * place : 4 * place + 4]
        pixels = {k: torch.from_numpy(v) for k, v in windows.read(config.task, opened, batch).items()}
        for group in optimiser.param_groups:
            group["lr"] = line["learning_rate"]
        loss = forecaster.loss(pixels)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(forecaster.parameters(), 1.0)
        optimiser.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_a_line_is_of_all_steps_since_the_one_before(tmp_path, archive, undisturbed):
    run = str(tmp_path / "run")
    list(itertools.islice(begun(small(log_steps=3, checkpoint_steps=None), archive, run).steps(), 4))
    losses = [line["loss"] for line in journal.read_metrics(undisturbed)]
    lines = {line["step"]: line["loss"] for line in journal.read_metrics(run)}
    assert lines == pytest.approx({3: np.mean(losses[:3]), 4: losses[3]}, rel=1e-5)


@pytest.mark.parametrize("cuts", [(2,), (3, 4), (1, 7, 11)])
def test_a_run_cut_at_any_step_ends_as_an_undisturbed_one(tmp_path, archive, undisturbed, cuts):
    run = str(tmp_path / "run")
    for cut in cuts:
        for step in begun(small(), archive, run).steps():
            if step == cut:
                break
    *_, last = begun(small(), archive, run).steps()
    assert last == STEPS
    same(outcome(run), outcome(undisturbed), 0.0)


def test_a_checkpoint_out_of_turn_changes_nothing(tmp_path, archive, undisturbed):
    run, config = str(tmp_path / "run"), small(log_steps=2, checkpoint_steps=None)
    for step in (loop := begun(config, archive, run)).steps():
        loop.save()
        assert journal.checkpoints(run)[-1]["step"] == step
        if step == 5:
            break
    # That of the validation, at step 4, is as it was.
    assert journal.best(journal.checkpoints(run))["step"] == 4
    list(begun(config, archive, run).steps())
    weights, lines = outcome(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    torch.testing.assert_close(weights, outcome(undisturbed)[0], rtol=0, atol=0)


def test_dropout_is_the_same_after_a_cut(tmp_path, archive, undisturbed):
    config, whole, cut = small(dropout=0.3, epochs=1), str(tmp_path / "whole"), str(tmp_path / "cut")
    list(begun(config, archive, whole).steps())
    list(itertools.islice(begun(config, archive, cut).steps(), 3))
    assert list(begun(config, archive, cut).steps()) == [4]
    same(outcome(cut), outcome(whole), 0.0)
    losses = [journal.read_metrics(url)[0]["loss"] for url in (whole, undisturbed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_training_stops_when_nothing_gets_better(tmp_path, archive):
    config, run = small(learning_rate=1e-12, epochs=9, patience=2), str(tmp_path / "run")
    # The first validation is the best, the next two are no better, though a cut lies between them.
    list(itertools.islice(begun(config, archive, run).steps(), 9))
    assert list(begun(config, archive, run).steps()) == [10, 11, 12]
    assert not list(begun(config, archive, run).steps())
    assert journal.best(journal.checkpoints(run))["step"] == 4


def test_validation_can_be_seldom(tmp_path, archive):
    run = str(tmp_path / "run")
    list(begun(small(validate_every=2), archive, run).steps())
    validated = [line["step"] for line in journal.read_metrics(run) if "CSI-M" in line]
    assert validated == [8, 12]


def test_a_diverging_run_says_so_and_spoils_nothing(tmp_path, archive):
    run = str(tmp_path / "run")
    loop = begun(small(checkpoint_steps=1), archive, run)
    steps = loop.steps()
    assert [next(steps), next(steps)] == [1, 2]
    with torch.no_grad():
        loop.trainable.network.dec_final_proj.bias.fill_(torch.nan)
    with pytest.raises(InputError, match=r"diverged at step 3: loss nan.*learning_rate below 0.002"):
        next(steps)
    weights, _ = outcome(run)
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_bfloat16_learns_as_float32_does(tmp_path, archive, undisturbed):
    run = str(tmp_path / "run")
    list(begun(small(precision="bf16"), archive, run).steps())
    rough, exact = (journal.read_metrics(url)[-1]["loss"] for url in (run, undisturbed))
    assert rough == pytest.approx(exact, rel=0.05)
    assert rough != exact


def test_a_damaged_checkpoint_is_named(tmp_path, archive):
    run = str(tmp_path / "run")
    next(begun(small(checkpoint_steps=1), archive, run).steps())
    (file,) = (tmp_path / "run" / "checkpoints").rglob("weights.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"weights.safetensors has SHA-256 \w+, recorded is \w+"):
        begun(small(checkpoint_steps=1), archive, run)


def test_a_run_cut_before_its_record_is_finished_without_training(tmp_path, archive, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    trained = train(small(), archive, str(run))
    assert trained.record["steps"] == STEPS
    assert trained.record["code_version"]
    assert (run / "metrics.jsonl").read_bytes() == (Path(undisturbed) / "metrics.jsonl").read_bytes()
    assert "12 steps in 3 epochs" in runs.describe(str(run))
    # Cut off in the middle of the record, it is not finished, and finished by the same call.
    (run / "run.json").write_text((run / "run.json").read_text()[:40])
    with pytest.raises(InputError, match="is not complete"):
        runs.open_run(str(run))
    assert train(small(), archive, str(run)).record["run_hash"] == trained.record["run_hash"]


def test_damaged_weights_are_named_and_written_again(tmp_path, archive, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    train(small(), archive, str(run))
    weights = (run / "weights.safetensors").read_bytes()
    (run / "weights.safetensors").write_bytes(weights[:-1])
    with pytest.raises(InputError, match=r"weights.safetensors has SHA-256 .*: delete the run's run.json"):
        runs.open_run(str(run)).forecaster()
    (run / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights.safetensors is absent: delete the run's run.json"):
        runs.open_run(str(run)).forecaster()
    (run / "run.json").unlink()
    train(small(), archive, str(run))
    assert (run / "weights.safetensors").read_bytes() == weights


def test_a_checkpoint_of_another_model_is_refused(tmp_path, archive, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    other = configs.resolve(
        "sevir", "earthformer_sevir_tiny", {**OVERLAY, "model": {**OVERLAY["model"], "widths": [16, 64]}}
    )
    with pytest.raises(InputError, match=r"of step 12, is of another model: \S+ has shape \(.*more\)"):
        begin(other, store.open_archive(archive), str(run), ALONE)


# -------------------------------------------------------------------------------------------- Ray Train


def test_three_workers_take_the_steps_of_one(tmp_path, archive, undisturbed, capsys):
    # One of them sums two micro-batches a step, where the one alone took the same windows by twos.
    run, config = str(tmp_path / "run"), small(micro_batch=1)
    trained = train(config, archive, run, workers=3)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "CSI-M" in line] == [
        "step 4",
        "step 8",
        "step 12",
    ]
    assert trained.record["steps"] == STEPS
    same(outcome(run), outcome(undisturbed), 2e-3)
    losses = [[line["loss"] for line in journal.read_metrics(url)] for url in (run, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=1e-4)

    opened = runs.open_run(run)
    weights = safetensors.torch.load_file(Path(run) / "weights.safetensors")
    forecaster = opened.forecaster()
    assert set(weights) == set(EarthformerForecaster(small().model, small().task.scaling).state_dict())
    assert forecaster.forecast(torch.zeros(1, 3, 48, 48, 1, dtype=torch.uint8), torch.zeros(1, 1)).shape == (
        (1, 1, 2, 48, 48, 1)
    )
    # The same call finds it done.
    written = (Path(run) / "run.json").stat().st_mtime_ns
    assert train(config, archive, run, workers=3, progress=False).record == trained.record
    assert (Path(run) / "run.json").stat().st_mtime_ns == written


def test_a_run_that_cannot_go_on_is_not_tried_again(tmp_path, archive):
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"^training diverged at step 3: loss (nan|inf)"):
        train(small(learning_rate=1e18), archive, str(run), progress=False)
    # Every start of a worker group begins a file.
    assert len(list((run / "tensorboard").iterdir())) == 1
    with pytest.raises(InputError, match="is not complete"):
        runs.open_run(str(run))


def test_what_a_worker_says_stays_one_line(ray_cluster):
    @ray.remote
    def fails():
        raise InputError("found this: needed that")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fails.remote())
    assert str(boundary_error(caught.value)) == "found this: needed that"
    assert boundary_error(ValueError("a bug")) is None


# -------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_trained_is_said_before_ray_starts(tmp_path, archive):
    run = str(tmp_path / "run")
    for overlay, message in (
        ({"training": {"batch_size": 20, "micro_batch": 2}}, "has 18 training windows: .* 20 needs"),
        (
            {"model": {"context": [3, 96, 96, 1], "target": [2, 96, 96, 1]}},
            r"\(3, 48, 48, 1\).*\(3, 96, 96, 1\)",
        ),
        ({"task": {"splits": {"val_from": "2019-05-30"}}}, "no val windows"),
    ):
        merged = {section: {**OVERLAY[section], **overlay.get(section, {})} for section in OVERLAY}
        with pytest.raises(InputError, match=message):
            train(configs.resolve("sevir", "earthformer_sevir_tiny", merged), archive, run)
    with pytest.raises(InputError, match="is a sevir archive: task enso needs enso"):
        train(configs.resolve("enso"), archive, run)
    assert not Path(run).exists()


def test_a_run_of_another_archive_is_refused(tmp_path, archive):
    run = str(tmp_path / "run")
    runs.start(run, small(), {"archive_hash": "0123456789abcdef"})
    with pytest.raises(InputError, match=f"0123456789abcdef.*{store.open_archive(archive).config_hash}"):
        train(small(), archive, run)


def test_a_model_that_cannot_be_built_is_said_before_ray_starts(tmp_path, archive):
    patterns = {**OVERLAY, "model": {**OVERLAY["model"], "encoder": {"patterns": ["axiall"]}}}
    config = configs.resolve("sevir", "earthformer_sevir_tiny", patterns)
    with pytest.raises(InputError, match=r"configuration key model: .*'axiall' is unknown"):
        train(config, archive, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("0", "0 workers asked"),
        ("0:2", "0 workers asked"),
        ("2:1", "from 2 to 1 workers asked: needed the smaller number first"),
        ("1:3", "3 workers asked, and training.batch_size 4 makes 2 micro-batches"),
        ("1-2", "--workers 1-2: needed a number, or the fewest and the most, such as 1:4"),
    ],
)
def test_impossible_numbers_of_workers_are_refused(tmp_path, archive, workers, message):
    with pytest.raises(InputError, match=message):
        train(small(), archive, str(tmp_path / "run"), workers=cli.parse_workers(workers))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_configuration(tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "earthformer", "--task", "sevir", "--archive", "absent.zarr", "--run", str(run)]
    cli.app([*command, "--set", "training.epochs=7", "--dry-run"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    config = configs.resolve("sevir", overlay={"training": {"epochs": 7}})
    assert printed.pop("config_hash") == config.hash
    assert configs.from_dict(printed) == config
    assert not run.exists()
