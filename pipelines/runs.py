"""A run directory: the resolved configuration, provenance and, once training is over, the weights.

RUN/config.json            resolved configuration and its hash, written before the first step
RUN/metrics.jsonl and RUN/tensorboard/, RUN/checkpoints/: see `journal`
RUN/weights.safetensors    the best checkpoint's weights
RUN/run.json               completion record, written last
"""

import dataclasses
import difflib
import hashlib
import math
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import fsspec
import safetensors.torch
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from earthformer.config import EarthformerConfig
from earthformer.forecasters import EarthformerForecaster, Persistence
from earthformer.presets import EARTHFORMERS
from pipelines import journal
from pipelines.archives import filesystem
from pipelines.archives.store import config_hash, read_json, write_json
from pipelines.errors import InputError
from pipelines.tasks import TASKS, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """How a model is trained (Earthformer, Appendix B). Sizes count windows, times count epochs."""

    batch_size: int = 32
    """Windows an optimiser step, over all workers."""
    micro_batch: int = 2
    """Windows a forward pass, on one worker; the rest is accumulated."""
    epochs: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.2
    """Fraction of all steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 1e-3
    """The cosine ends at this fraction of the learning rate and stays there."""
    published_schedule: bool = False
    """Count micro-batches as windows and let the cosine rise again, as the published SEVIR runs did."""
    clip_norm: float = 1.0
    validate_every: int = 1
    patience: int = 20
    """Validations without a better score before training stops."""
    checkpoint_steps: int | None = None
    """Also save every so many steps within an epoch."""
    log_steps: int = 10
    seed: int = 0
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "epochs", "validate_every", "patience", "log_steps"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        every = self.checkpoint_steps
        _need(every is None or every >= 1, "checkpoint_steps", every, "at least 1, or none")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            _need(0 < value < math.inf, name, value, "a finite number above 0")
        _need(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0")
        _need(0 <= self.warmup < 1, "warmup", self.warmup, "a fraction from 0 to below 1")
        _need(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "a fraction from 0 to 1")
        _need(self.seed >= 0, "seed", self.seed, "at least 0")


def _need(held: bool, name: str, found: Any, needed: str) -> None:
    if not held:
        raise ValueError(f"{name} is {found}: needed {needed}")


_ENSO = Training(
    batch_size=64, micro_batch=16, learning_rate=1e-4, weight_decay=1e-5, validate_every=5, patience=5
)
_TINY = Training(batch_size=8, micro_batch=8, epochs=10, learning_rate=2e-3, patience=10)

TRAINING: dict[str, Training] = {
    "earthformer_enso": _ENSO,
    "earthformer_enso_tiny": _TINY,
    "earthformer_sevir_tiny": dataclasses.replace(_TINY, batch_size=4, micro_batch=2),
    "earthformer_sevir_lr_tiny": dataclasses.replace(_TINY, epochs=16),
    "earthformer_radar_tiny": dataclasses.replace(_TINY, epochs=6),
}
"""How each model preset is trained; those not named here as SEVIR was published."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's weights; saved with the run and printed by `--dry-run`."""

    trainable: Literal["earthformer"]
    task: Task
    model: EarthformerConfig
    training: Training = field(default_factory=Training)
    model_preset: str = ""

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration."""
        return config_hash(dataclasses.asdict(self))


def resolve(task: str, preset: str | None = None, overlay: dict[str, Any] | None = None) -> Config:
    """The configuration of a task and a model preset, with a (partial) overlay laid over both.

    Raises:
        InputError: unknown task, preset or key (the nearest one is named); an impossible value.
    """
    chosen = TASKS.get(task) or _unknown("task", task, TASKS)
    preset = preset or chosen.model
    model = EARTHFORMERS.get(preset) or _unknown("preset", preset, EARTHFORMERS)
    config = Config("earthformer", chosen, model, TRAINING.get(preset, Training()), preset)
    return from_dict(_overlay(dataclasses.asdict(config), overlay or {}, ""))


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from what `dataclasses.asdict` or `config.json` holds.

    Raises:
        InputError: a key of the wrong type or an impossible value.
    """
    return _validated(Config, values)


def read_overlay(path: str | None, assignments: list[str]) -> dict[str, Any]:
    """A YAML or JSON file and `section.key=value` assignments (later ones win) as one nested dict.

    Raises:
        InputError: absent or unreadable file, an assignment without `=` or with an unreadable value.
    """
    overlay: dict[str, Any] = {}
    if path:
        try:
            with fsspec.open(path, "rt") as file:
                overlay = yaml.safe_load(file) or {}
        except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
            raise InputError(f"configuration {path} cannot be read: {_one_line(error)}") from error
        if not isinstance(overlay, dict):
            raise InputError(f"configuration {path} holds a {type(overlay).__name__}: needed a mapping")
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: needed section.key=value, such as training.epochs=5")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment}: {value!r} is no YAML: {_one_line(error)}") from error
        *sections, key = name.split(".")
        place = overlay
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[key] = parsed
    return overlay


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
    elif found["provenance"].get("archive_hash") != provenance.get("archive_hash"):
        raise InputError(
            f"{run} was trained on archive {found['provenance'].get('archive_hash')}, "
            f"{provenance.get('archive')} is {provenance.get('archive_hash')}: "
            "needed the same archive, or another run directory"
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
    journal.write_whole(run, "weights.safetensors", weights)
    digest = hashlib.sha256(weights).hexdigest()
    record = {
        "config_hash": config.hash,
        "run_hash": hashlib.sha256((config.hash + digest).encode()).hexdigest()[:16],
        "weights_sha256": digest,
        "monitor": config.task.monitor,
        "best_score": top["score"],
        "best_step": top["step"],
        "steps": last["step"],
        "epochs": last["epoch"],
        "worker_peak_rss_mb": last["peak_rss_mb"],
        "code_version": version("earthformer-ray"),
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

    def forecaster(self) -> EarthformerForecaster:
        """The trained forecaster in eval mode, in its fused inference-time form.

        Raises:
            InputError: the weights are absent, damaged or of another model.
        """
        weights = journal.read_checked(
            self.url,
            "weights.safetensors",
            self.record["weights_sha256"],
            "delete the run's run.json, and the same `earthformer train` command writes both again",
        )
        forecaster = EarthformerForecaster(self.config.model, self.config.task.scaling)
        load_weights(forecaster, safetensors.torch.load(weights), f"{self.url}/weights.safetensors")
        forecaster.network = forecaster.network.eval().fuse()
        return forecaster.eval()


def open_run(url: str) -> Run:
    """Open a finished run.

    Raises:
        InputError: there is no run at `url`, or it is unfinished.
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
    return Run(url, from_dict(found["config"]), record)


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


def _overlay(base: dict[str, Any], overlay: dict[str, Any], place: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        if key not in base:
            _unknown("configuration key", f"{place}{key}", [f"{place}{name}" for name in base])
        if isinstance(base[key], dict) and isinstance(value, dict):
            merged[key] = _overlay(base[key], value, f"{place}{key}.")
        else:
            merged[key] = value
    return merged


def _validated(kind: type[T], values: dict[str, Any]) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            raise InputError(f"configuration key {key}: {first['ctx']['error']}") from error
        raise InputError(f"configuration key {key} is {first['input']!r:.80}: {first['msg']}") from error


def _unknown(what: str, name: str, known: Any) -> Any:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    raise InputError(
        f"{what} {name!r} is unknown: the nearest is {near[0]!r}" if near else f"no {what} {name!r}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
