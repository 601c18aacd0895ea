"""Training on latents: what is stored, what each epoch sees of it, and that cut runs go on as they were."""

import dataclasses
import shutil

import pytest
import safetensors.torch
import tiny_prediff
import torch
from tiny_prediff import ALONE, begun, config, trained
from tiny_replicas import replicas_in_process

from earthformer.config import Scaling
from pipelines import configs, journal, latents, loop, plans, runs, windows
from pipelines.archives import checks, records, store
from pipelines.errors import InputError
from pipelines.tasks import Splits
from pipelines.train import train


@pytest.fixture(scope="module")
def archive(ensemble_archive) -> str:
    return ensemble_archive


@pytest.fixture(scope="module")
def autoencoder(ensemble_runs) -> str:
    return ensemble_runs["autoencoder"]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory, archive, autoencoder) -> str:
    """A run on stored latents of three versions."""
    run = str(tmp_path_factory.mktemp("denoiser") / "run")
    with replicas_in_process():
        return trained("denoiser", archive, run, autoencoder, epochs=2, latent_versions=3)


def test_stored_latents_are_the_windows_turned_and_mirrored(archive, denoiser):
    opened, asked = store.open_archive(archive), runs.open_run(denoiser).config
    keys = windows.enumerate_windows(asked.task, opened, "train")
    module = runs.open_run(denoiser).module()
    wanted = [keys[5], keys[0], keys[3]]
    for epoch in (0, 1, 2, 3):
        (batch,) = latents.batches(latents.store_of(denoiser), wanted, 3, epoch, ALONE.device)
        for i, key in enumerate(wanted):
            row = keys.index(key)
            turn = (row + epoch) % 3
            pixels = windows.read(asked.task, opened, [key])
            turned = {n: latents.turned(torch.from_numpy(p[0]), turn)[None] for n, p in pixels.items()}
            for name, expected in module.encode(turned, torch.tensor([3 * row + turn])).items():
                torch.testing.assert_close(batch[name][i].float(), expected[0], rtol=2e-3, atol=2e-3)


def test_the_eight_turns_are_different_and_keep_the_values():
    field = torch.arange(2 * 3 * 3.0).reshape(2, 3, 3, 1)
    seen = [latents.turned(field, turn) for turn in range(8)]
    assert len({tuple(f.flatten().tolist()) for f in seen}) == 8
    assert all(torch.equal(f.flatten(1).sort().values, field.flatten(1)) for f in seen)
    oblong = torch.arange(2 * 2 * 3.0).reshape(2, 2, 3, 1)
    assert {latents.turned(oblong, turn).shape for turn in range(8)} == {oblong.shape}
    assert len({tuple(latents.turned(oblong, t).flatten().tolist()) for t in range(8)}) == 4


def test_latents_that_are_there_are_not_made_again(archive, denoiser):
    url = latents.store_of(denoiser)
    before = records.read(url)
    latents.encode(
        runs.open_run(denoiser).config,
        store.open_archive(archive),
        denoiser,
        workers=1,
        gpu=False,
        progress=False,
    )
    assert records.read(url) == before
    assert checks.validate(url) == []


def test_a_run_on_latents_needs_nothing_but_its_own_folder(archive, denoiser, tmp_path):
    moved = shutil.copytree(denoiser, tmp_path / "moved")
    shutil.rmtree(moved / "latents.zarr")
    forecaster = runs.open_run(str(moved)).forecaster()
    plans.set_up(forecaster, plans.Drawing(steps=2), None)
    context = torch.zeros(1, 3, 48, 48, 1, dtype=torch.uint8)
    assert forecaster.forecast(context, torch.tensor([[1, 2]])).shape == (1, 2, 2, 48, 48, 1)


@pytest.mark.usefixtures("in_process")
def test_a_run_cut_and_resumed_ends_as_one_that_was_not(archive, autoencoder, denoiser, tmp_path):
    run = str(tmp_path / "run")
    asked = config("denoiser", autoencoder, epochs=2, latent_versions=3, checkpoint_steps=1)
    whole = config("denoiser", autoencoder, epochs=2, latent_versions=3)
    steps = begun(asked, archive, run, autoencoder).steps()
    for _ in range(3):
        last = next(steps)
    del steps
    resumed = loop.begin(asked, store.open_archive(archive), run, ALONE)
    assert resumed.state.step == last
    assert list(resumed.steps()) == list(range(last + 1, 2 * last + 1))
    found, _ = journal.load_checkpoint(run, journal.checkpoints(run)[-1])
    needed, _ = journal.load_checkpoint(denoiser, journal.checkpoints(denoiser)[-1])
    assert whole.training.epochs == asked.training.epochs
    for name, tensor in needed.items():
        assert torch.equal(found[name], tensor), name
    assert int(found["ema.updates"]) == resumed.state.step


def test_training_moves_the_denoiser_and_its_mean_but_not_the_autoencoder(denoiser, autoencoder):
    weights, _ = journal.load_checkpoint(denoiser, journal.checkpoints(denoiser)[-1])
    source = safetensors.torch.load_file(f"{denoiser}/{latents.AUTOENCODER}")
    kept = {name.removeprefix("latents."): t for name, t in weights.items() if name.startswith("latents.")}
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], source[name]) for name in source)
    assert not torch.equal(source["latent_std"], torch.ones(4))
    name = "first_proj.in_layers.2.weight"
    assert not torch.equal(weights[f"denoiser.{name}"], weights[f"ema.module.{name}"])


def test_encoding_at_every_step_trains_too(archive, autoencoder, tmp_path):
    run = trained("denoiser", archive, str(tmp_path / "run"), autoencoder, latent_versions=0, augment=True)
    lines = journal.read_metrics(run)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert not (tmp_path / "run" / "latents.zarr").exists()


@pytest.mark.usefixtures("in_process")
def test_the_alignment_network_trains_beside(archive, autoencoder, tmp_path):
    run = trained("alignment", archive, str(tmp_path / "run"), autoencoder)
    constraint = runs.open_run(run).module()
    assert float(constraint.gaussian.mean) > 0
    with pytest.raises(InputError, match="is a run of alignment, which makes no forecasts"):
        runs.open_run(run).forecaster()


def test_train_makes_the_whole_of_it_on_ray(archive, autoencoder, tmp_path):
    asked = config("denoiser", autoencoder, latent_versions=1)
    done = train(asked, archive, str(tmp_path / "run"), autoencoder=autoencoder, progress=False)
    assert done.record["monitor"] == configs.LOSS
    assert 0 < done.record["best_score"] < 2
    assert done.record["autoencoder_hash"] == runs.open_run(autoencoder).hash
    assert "best val_loss" in str(done)


def test_what_does_not_fit_is_refused(archive, autoencoder, denoiser, tmp_path):
    with pytest.raises(InputError, match="denoiser works on latents: needed --autoencoder RUN"):
        config("denoiser")
    with pytest.raises(InputError, match=r"is no autoencoder's run: needed what `earthformer train autoenc"):
        config("denoiser", denoiser)
    with pytest.raises(InputError, match=r"--autoencoder .*: autoencoder does not work on latents"):
        config("autoencoder", autoencoder)
    with pytest.raises(InputError, match=r"trainable 'denoisr' is unknown: the nearest is 'denoiser'"):
        configs.resolve("sevir-lr", trainable="denoisr")
    with pytest.raises(InputError, match=r"configuration key latent_versions|training"):
        config("denoiser", autoencoder, latent_versions=9)
    asked = config("denoiser", autoencoder)
    for name, value in (
        ("scaling", Scaling(scale=0.5)),
        ("splits", Splits(test_from="2019-06-01", val_fraction=0.1)),
    ):
        task = dataclasses.replace(asked.task, **{name: value})
        with pytest.raises(InputError, match=rf"was trained with task.{name} .*: needed .*, as here"):
            train(
                dataclasses.replace(asked, task=task), archive, str(tmp_path / "run"), autoencoder=autoencoder
            )
    assert not (tmp_path / "run").exists()
    other = tiny_prediff.trained("autoencoder", archive, str(tmp_path / "other"), seed=5)
    asked = runs.open_run(denoiser).config
    with pytest.raises(InputError, match=r"was trained on autoencoder .*: needed the same autoencoder"):
        train(asked, archive, denoiser, autoencoder=other, progress=False)
