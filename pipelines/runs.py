"""A run directory: the resolved configuration, provenance and, once training is over, the weights.

RUN/config.json            resolved configuration and its hash, written before the first step
RUN/metrics.jsonl and RUN/tensorboard/, RUN/checkpoints/: see `journal`
RUN/weights.safetensors    the best checkpoint's weights
RUN/run.json               completion record, written last
"""

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from typing import Any, cast

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from earthformer.forecasters import EarthformerForecaster, Forecaster, Persistence, Trainable
from pipelines import configs, journal
from pipelines.configs import Config
from pipelines.errors import InputError
from pipelines.storage import filesystem, read_json, write_json, write_whole
from pipelines.tasks import Task
from pipelines.version import code_version


def start(run: str, config: Config, provenance: dict[str, Any]) -> bool:
    """Write the run's configuration; True when the run has been completed before.

    Args:
        run: URL of the run directory.
        config: the resolved configuration.
        provenance: where the data come from; `archive_hash` identifies them.

    Raises:
        InputError: the directory holds a run of another configuration or of another archive (both hashes are
            named), or files that are no run's.
    """
    found = journal.read_record(run, "config.json", needs="config_hash")
    if found is None:
        _refuse_other_files(run)
        record = {"config_hash": config.hash, "config": dataclasses.asdict(config), "provenance": provenance}
        write_json(run, "config.json", record)
    elif found["config_hash"] != config.hash:
        raise InputError(
            f"{run} was trained under configuration {found['config_hash']}, asked is {config.hash}: "
            "needed the same configuration, or another run directory"
        )
    written = provenance if found is None else found["provenance"]
    for what in ("archive", "autoencoder"):
        theirs, ours = written.get(f"{what}_hash"), provenance.get(f"{what}_hash")
        if theirs != ours:
            raise InputError(
                f"{run} was trained on {what} {theirs}, {provenance.get(what)} is {ours}: "
                f"needed the same {what}, or another run directory"
            )
    return journal.read_record(run, "run.json", needs="run_hash") is not None


def _refuse_other_files(run: str) -> None:
    fs, path = filesystem(run)
    found = fs.ls(path, detail=False) if fs.exists(path) else []
    names = sorted(name.rstrip("/").rpartition("/")[2] for name in found)
    # A config.json whose writing was cut off is alone, and is written again.
    if names and (names != ["config.json"] or read_json(run, "config.json") is not None):
        raise InputError(
            f"{run} holds {names[0]} but no run's config.json: needed a run, or an empty or absent folder"
        )


def complete(run: str, config: Config, provenance: dict[str, Any]) -> dict[str, Any]:
    """Write the best checkpoint's weights and, last, the completion record; returns the record."""
    records = journal.checkpoints(run)
    top, last = journal.best(records), records[-1]
    assert top is not None
    weights = journal.read_part(run, top, "weights.safetensors")
    write_whole(run, "weights.safetensors", weights)
    digest = hashlib.sha256(weights).hexdigest()
    record = {
        "config_hash": config.hash,
        "run_hash": hashlib.sha256((config.hash + digest).encode()).hexdigest()[:16],
        "weights_sha256": digest,
        "monitor": config.monitor,
        "best_score": abs(top["score"]) if config.monitor == configs.LOSS else top["score"],
        "best_step": top["step"],
        "steps": last["step"],
        "epochs": last["epoch"],
        "worker_peak_rss_mb": last["peak_rss_mb"],
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **provenance,
    }
    write_json(run, "run.json", record)
    return record


@dataclass(frozen=True)
class Run:
    """A finished run, ready to forecast."""

    url: str
    config: Config
    record: dict[str, Any]

    @property
    def hash(self) -> str:
        """Identifies configuration and weights; every forecast carries it."""
        return str(self.record["run_hash"])

    def check_forecasts(self) -> None:
        """
        Raises:
            InputError: the run is of a network that makes no forecasts.
        """
        if self.config.trainable not in configs.FORECASTERS:
            raise InputError(
                f"{self.url} is a run of {self.config.trainable}, which makes no forecasts: needed one of "
                + " or ".join(configs.FORECASTERS)
            )

    def weights(self) -> dict[str, Tensor]:
        """The best weights.

        Raises:
            InputError: they are absent or damaged.
        """
        content = journal.read_checked(
            self.url,
            "weights.safetensors",
            self.record["weights_sha256"],
            "delete the run's run.json, and the same `earthformer train` command writes both again",
        )
        return safetensors.torch.load(content)

    def module(self) -> Trainable:
        """What was trained, with its best weights, in eval mode.

        Raises:
            InputError: the weights are absent, damaged or of another model.
        """
        module = build(self.config)
        load_weights(module, self.weights(), f"{self.url}/weights.safetensors")
        return module.eval().requires_grad_(False)

    def forecaster(self) -> Forecaster:
        """The trained forecaster in eval mode, in its fused inference-time form.

        Raises:
            InputError: the run is of a network that makes no forecasts; the weights are absent, damaged or of
                another model.
        """
        self.check_forecasts()
        module = self.module()
        if isinstance(module, EarthformerForecaster):
            module.network = module.network.fuse()
        return cast(Forecaster, module)


def build(config: Config) -> Trainable:
    """An untrained module of what a configuration describes.

    Raises:
        InputError: an impossible configuration, such as an unknown attention pattern.
    """
    scaling = config.task.scaling
    try:
        if config.trainable == "earthformer":
            return EarthformerForecaster(config.model, scaling)
        # Importing diffusers takes seconds, which those who train an Earthformer need not wait.
        from earthformer.constraint import Constraint
        from earthformer.latents import FrameAutoencoder
        from earthformer.prediff import PreDiff

        if config.trainable == "autoencoder":
            return FrameAutoencoder(config.model, scaling)
        if config.autoencoder is None:
            raise InputError(f"{config.trainable} works on latents: needed --autoencoder RUN")
        kind = PreDiff if config.trainable == "denoiser" else Constraint
        return kind(config.model, config.autoencoder, scaling)
    except ValueError as error:
        raise InputError(f"configuration key model: {error}") from error


def open_run(url: str) -> Run:
    """Open a finished run.

    Raises:
        InputError: there is no run at `url`, or it is unfinished, or its records are of two runs.
    """
    found = journal.read_record(url, "config.json", needs="config_hash")
    if found is None:
        raise InputError(
            f"{url} is not a run: it has no readable config.json; needed what `earthformer train` wrote"
        )
    record = journal.read_record(url, "run.json", needs="run_hash")
    if record is None:
        raise InputError(
            f"{url} is not complete: run the same `earthformer train` command again to finish it"
        )
    if record["config_hash"] != found["config_hash"]:
        raise InputError(
            f"{url}/run.json is of configuration {record['config_hash']}, config.json of "
            f"{found['config_hash']}: needed the records of one run"
        )
    return Run(url, configs.from_dict(found["config"]), record)


def provenance(run: str) -> dict[str, Any]:
    """Where a run's data, and its autoencoder, come from."""
    found = journal.read_record(run, "config.json", needs="config_hash")
    return {} if found is None else dict(found["provenance"])


def describe(url: str) -> str | None:
    """What a run is and how far it is, for people; None where there is no run at `url`."""
    found = journal.read_record(url, "config.json", needs="config_hash")
    if found is None:
        return None
    record, lines = journal.read_record(url, "run.json", needs="run_hash"), journal.read_metrics(url)
    config = found["config"]
    where = f"at step {lines[-1]['step']}, epoch {lines[-1]['epoch']}" if lines else "before its first step"
    state = (
        f"complete: {record['steps']} steps in {record['epochs']} epochs, best {record['monitor']} "
        f"{record['best_score']:.4f} at step {record['best_step']}, run {record['run_hash']}"
        if record
        else f"not complete, {where}: run the same `earthformer train` command again to finish it"
    )
    return "\n".join(
        [
            f"{url}: {config['trainable']} ({config['model_preset']}), configuration {found['config_hash']}",
            state,
            yaml.safe_dump({**found["provenance"], **config}, sort_keys=False, allow_unicode=True).rstrip(),
        ]
    )


def persistence(task: Task) -> Persistence:
    """The baseline as a forecaster of this task."""
    return Persistence(task.target, task.scaling)


def load_weights(module: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Strictly load weights.

    Raises:
        InputError: a missing, surplus or misshapen tensor, named.
    """
    needed = module.state_dict()
    faults = [f"{key} is missing" for key in needed.keys() - state_dict.keys()]
    faults += [f"{key} is surplus" for key in state_dict.keys() - needed.keys()]
    faults += [
        f"{key} has shape {tuple(state_dict[key].shape)}: needed {tuple(tensor.shape)}"
        for key, tensor in needed.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{source} is of another model: {min(faults)}{more}")
    module.load_state_dict(state_dict)
