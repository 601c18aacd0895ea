"""A run directory: the resolved configuration, checkpoints, metrics and provenance.

RUN/config.json             resolved configuration and its hash, written before the first step
RUN/metrics.jsonl           one line a logging interval, one a validation
RUN/tensorboard/            the same for TensorBoard
RUN/checkpoint_*/           Ray Train's: weights.safetensors and state.pt (optimiser, step, best score)
RUN/weights.safetensors     the best checkpoint's weights
RUN/run.json                completion record, written last
"""

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import fsspec
import safetensors.torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch.utils.tensorboard import SummaryWriter

from earthformer.config import PRESETS, EarthformerConfig
from earthformer.forecasters import EarthformerForecaster, Persistence
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


_ENSO = Training(
    batch_size=64, micro_batch=16, learning_rate=1e-4, weight_decay=1e-5, validate_every=5, patience=5
)
_TINY = Training(batch_size=8, micro_batch=8, epochs=10, learning_rate=2e-3, patience=10)

TRAINING: dict[str, Training] = {
    "earthformer_enso": _ENSO,
    "earthformer_enso_tiny": _TINY,
    "earthformer_sevir_tiny": dataclasses.replace(_TINY, batch_size=4, micro_batch=2),
    "earthformer_sevir_lr_tiny": _TINY,
    "earthformer_radar_tiny": _TINY,
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
        InputError: unknown task, preset or key (the nearest one is named); a value of the wrong type.
    """
    chosen = TASKS.get(task) or _unknown("task", task, TASKS)
    preset = preset or chosen.model
    model = PRESETS.get(preset) or _unknown("preset", preset, PRESETS)
    config = Config("earthformer", chosen, model, TRAINING.get(preset, Training()), preset)
    merged = _overlay(dataclasses.asdict(config), overlay or {}, "")
    return from_dict(merged)


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from what `dataclasses.asdict` or `config.json` holds.

    Raises:
        InputError: a key of the wrong type or an impossible value.
    """
    return _validated(Config, values)


def read_overlay(path: str | None, assignments: list[str]) -> dict[str, Any]:
    """A YAML or JSON file and `section.key=value` assignments (later ones win) as one nested dict.

    Raises:
        InputError: absent or unreadable file, or an assignment without `=`.
    """
    overlay: dict[str, Any] = {}
    if path:
        try:
            with fsspec.open(path, "rt") as file:
                overlay = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"configuration {path} cannot be read: {_one_line(error)}") from error
        if not isinstance(overlay, dict):
            raise InputError(f"configuration {path} holds a {type(overlay).__name__}: needed a mapping")
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: needed section.key=value, such as training.epochs=5")
        *sections, key = name.split(".")
        place = overlay
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = yaml.safe_load(value)
    return overlay


def start(run: str, config: Config, provenance: dict[str, Any]) -> bool:
    """Write the run's configuration; True when the run has been completed before.

    Raises:
        InputError: the directory holds a run of another configuration (both hashes are named).
    """
    found = read_json(run, "config.json")
    if found is not None and found["config_hash"] != config.hash:
        raise InputError(
            f"{run} was trained under configuration {found['config_hash']}, asked is {config.hash}: "
            "needed the same configuration, or another run directory"
        )
    if found is None:
        record = {"config_hash": config.hash, "config": dataclasses.asdict(config), "provenance": provenance}
        write_json(run, "config.json", record)
    return read_json(run, "run.json") is not None


def complete(run: str, weights: bytes, record: dict[str, Any]) -> dict[str, Any]:
    """Write the best weights and, last, the completion record; returns the record."""
    fs, path = fsspec.core.url_to_fs(run)
    fs.pipe_file(f"{path}/weights.safetensors", weights)
    record = {**record, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    record["run_hash"] = hashlib.sha256(
        (record["config_hash"] + record["weights_sha256"]).encode()
    ).hexdigest()[:16]
    write_json(run, "run.json", record)
    return record


class Metrics:
    """A run's `metrics.jsonl` and TensorBoard folder, written by one process at a time."""

    def __init__(self, run: str, step: int) -> None:
        self.run = run
        # What a killed run logged after its last checkpoint is about to be done again.
        self.lines = [line for line in read_metrics(run) if line["step"] <= step]
        self.board = SummaryWriter(f"{run}/tensorboard", purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line; the file is written whole, since object stores cannot append."""
        self.lines.append({"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}})
        fs, path = fsspec.core.url_to_fs(self.run)
        fs.pipe_file(f"{path}/metrics.jsonl", "\n".join(map(json.dumps, self.lines)).encode() + b"\n")
        for name, value in self.lines[-1].items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


def read_metrics(run: str) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; none where there is no such file."""
    fs, path = fsspec.core.url_to_fs(run)
    try:
        return [json.loads(line) for line in fs.cat_file(f"{path}/metrics.jsonl").splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


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
            InputError: the weights are damaged or belong to another model.
        """
        fs, path = fsspec.core.url_to_fs(self.url)
        weights = fs.cat_file(f"{path}/weights.safetensors")
        digest = hashlib.sha256(weights).hexdigest()
        if digest != self.record["weights_sha256"]:
            raise InputError(
                f"{self.url}/weights.safetensors has SHA-256 {digest[:16]}: needed "
                f"{self.record['weights_sha256'][:16]}, which the run recorded"
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
    found = read_json(url, "config.json")
    if found is None or "config_hash" not in found:
        raise InputError(f"{url} is not a run: it has no config.json; needed what `earthformer train` wrote")
    record = read_json(url, "run.json")
    if record is None:
        raise InputError(
            f"{url} is not complete: run the same `earthformer train` command again to finish it"
        )
    return Run(url, from_dict(found["config"]), record)


def describe(url: str) -> str | None:
    """What a run is and how far it is, for people; None where there is no run at `url`."""
    found = read_json(url, "config.json")
    if found is None or "config_hash" not in found:
        return None
    record, lines = read_json(url, "run.json"), read_metrics(url)
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


def load_weights(module: Any, state_dict: dict[str, Any], source: str) -> None:
    """Strictly load weights.

    Raises:
        InputError: a missing, surplus or misshapen tensor, named.
    """
    try:
        module.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise InputError(f"{source} is of another model: {'; '.join(lines)[:300]}") from error


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
        raise InputError(
            f"configuration key {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}"
        ) from error
    except ValueError as error:
        raise InputError(f"configuration: {_one_line(error)}") from error


def _unknown(what: str, name: str, known: Any) -> Any:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    raise InputError(
        f"{what} {name!r} is unknown: the nearest is {near[0]!r}" if near else f"no {what} {name!r}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
