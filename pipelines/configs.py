"""What decides a run's weights: task, model and training, from presets with an overlay over them."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import fsspec
import yaml
from pydantic import TypeAdapter, ValidationError

from earthformer.config import EarthformerConfig
from earthformer.prediff_config import AlignmentConfig, AutoencoderConfig, PreDiffConfig
from earthformer.presets import ALIGNMENTS, AUTOENCODERS, DENOISERS, EARTHFORMERS
from pipelines import journal
from pipelines.archives.records import config_hash
from pipelines.errors import InputError
from pipelines.tasks import TASKS, Task

T = TypeVar("T")
Model = EarthformerConfig | AutoencoderConfig | PreDiffConfig | AlignmentConfig
TRAINABLES: dict[str, dict[str, Any]] = {
    "earthformer": EARTHFORMERS,
    "autoencoder": AUTOENCODERS,
    "denoiser": DENOISERS,
    "alignment": ALIGNMENTS,
}
"""What can be trained, and the presets of each."""
LOSS = "val_loss"
"""The validation's number of those that are not scored by their forecasts: lower is better."""
FORECASTERS = ("earthformer", "denoiser")
"""Trainables that make forecasts."""
ON_LATENTS = ("denoiser", "alignment")
"""Trainables that build on a trained autoencoder."""


@dataclass(frozen=True)
class Training:
    """How a model is trained (Earthformer, App. B; PreDiff, App. B). Sizes count windows, times epochs."""

    batch_size: int = 32
    """Windows an optimiser step, over all workers."""
    micro_batch: int = 2
    """Windows a forward pass, on one worker; the rest is accumulated."""
    epochs: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    warmup: float = 0.2
    """Fraction of all steps in which the learning rate rises linearly."""
    warmup_start: float = 0.0
    """Fraction of the learning rate that it rises from."""
    min_lr_ratio: float = 1e-3
    """The cosine ends at this fraction of the learning rate and stays there."""
    published_schedule: bool = False
    """Count micro-batches as windows and let the cosine rise again, as the published SEVIR runs did."""
    clip_norm: float = 1.0
    augment: bool = False
    """Turn and mirror each window at random."""
    latent_versions: int = 0
    """Trainables on latents: encode each training window once, so many times (turned and mirrored if more
    than one), and train on what is stored; 0: encode it anew at every step."""
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
        _need(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "fractions from 0 to below 1")
        _need(0 <= self.warmup_start <= 1, "warmup_start", self.warmup_start, "a fraction from 0 to 1")
        _need(0 <= self.latent_versions <= 8, "latent_versions", self.latent_versions, "0 to 8")
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
_DEMO = dataclasses.replace(_TINY, batch_size=4, micro_batch=4)
_PREDIFF = Training(warmup=0.1, warmup_start=0.1, patience=1000, augment=True)
TRAINING: dict[tuple[str, str], Training] = {
    ("earthformer", "earthformer_enso"): _ENSO,
    ("earthformer", "earthformer_enso_tiny"): _TINY,
    ("earthformer", "earthformer_sevir_tiny"): dataclasses.replace(_TINY, batch_size=4, micro_batch=2),
    ("earthformer", "earthformer_sevir_lr_tiny"): dataclasses.replace(_DEMO, epochs=3, validate_every=3),
    ("earthformer", "earthformer_radar_tiny"): dataclasses.replace(_TINY, epochs=6),
    ("autoencoder", "prediff_sevir_lr"): dataclasses.replace(
        _PREDIFF,
        batch_size=128,
        micro_batch=4,
        epochs=500,
        validate_every=5,
        learning_rate=5e-6,
        betas=(0.5, 0.9),
    ),
    ("denoiser", "prediff_sevir_lr"): dataclasses.replace(
        _PREDIFF, batch_size=64, micro_batch=2, epochs=2000, validate_every=50, weight_decay=1e-2
    ),
    ("alignment", "prediff_sevir_lr"): dataclasses.replace(
        _PREDIFF, batch_size=128, micro_batch=32, epochs=1000, validate_every=5, weight_decay=1e-2
    ),
    ("autoencoder", "prediff_radar_256"): dataclasses.replace(
        _TINY, epochs=24, validate_every=4, augment=True
    ),
    ("denoiser", "prediff_radar_256"): dataclasses.replace(
        _TINY,
        batch_size=4,
        micro_batch=4,
        epochs=30,
        latent_versions=3,
        validate_every=5,
        checkpoint_steps=200,
    ),
    ("autoencoder", "prediff_sevir_lr_tiny"): dataclasses.replace(
        _DEMO, epochs=4, validate_every=4, augment=True
    ),
    ("denoiser", "prediff_sevir_lr_tiny"): dataclasses.replace(
        _DEMO, epochs=4, latent_versions=1, validate_every=4
    ),
    ("alignment", "prediff_sevir_lr_tiny"): dataclasses.replace(_DEMO, epochs=3, validate_every=3),
    ("autoencoder", "prediff_enso_tiny"): _TINY,
    ("denoiser", "prediff_enso_tiny"): dataclasses.replace(_TINY, latent_versions=1),
}
"""How each trainable's presets are trained; those not named here as Earthformer for SEVIR was published."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's weights; saved with the run and printed by `--dry-run`."""

    trainable: str
    task: Task
    model: Any
    """One of `Model`, by the trainable."""
    training: Training = field(default_factory=Training)
    model_preset: str = ""
    autoencoder: AutoencoderConfig | None = None
    """Of the latents that the model works on."""

    def __post_init__(self) -> None:
        # East of the ocean is not like west of it.
        for name, most in (("augment", False), ("latent_versions", 1)):
            value = getattr(self.training, name)
            upright = self.task.archive != "enso" or value <= most
            _need(upright, f"training.{name}", value, f"{most}: {self.task.name} is not to be turned")

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration."""
        return config_hash(dataclasses.asdict(self))

    @property
    def monitor(self) -> str:
        """The validation's number that picks the best checkpoint: a score of the task, or a loss."""
        return self.task.monitor if self.trainable == "earthformer" else LOSS


def resolve(
    task: str,
    preset: str | None = None,
    overlay: dict[str, Any] | None = None,
    *,
    trainable: str = "earthformer",
    autoencoder: str | None = None,
) -> Config:
    """The configuration of a task and a model preset, with a (partial) overlay laid over both.

    Args:
        task: its name.
        preset: of the model; default: the task's.
        overlay: nested dict.
        trainable: one of `TRAINABLES`.
        autoencoder: for those that build on its latents: URL of its finished run.

    Raises:
        InputError: unknown trainable, task, preset or key (the nearest one is named); an impossible value.
    """
    presets = TRAINABLES.get(trainable) or unknown("trainable", trainable, TRAINABLES)
    chosen = TASKS.get(task) or unknown("task", task, TASKS)
    preset = preset or (chosen.model if trainable == "earthformer" else f"prediff_{task.replace('-', '_')}")
    if not preset:
        raise InputError(f"task {task} has no {trainable} preset of its own: needed --preset NAME")
    model = presets.get(preset) or unknown(f"{trainable} preset", preset, presets)
    training = TRAINING.get((trainable, preset), Training())
    config = Config(trainable, chosen, model, training, preset, _latents_of(trainable, autoencoder))
    return from_dict(_overlay(dataclasses.asdict(config), overlay or {}, ""))


def resolve_task(name: str, overlay: dict[str, Any] | None = None) -> Task:
    """A task by name, with the `task` section of an overlay laid over it: all that a baseline has.

    Raises:
        InputError: unknown task or key (the nearest one is named); an impossible value.
    """
    chosen = TASKS.get(name) or unknown("task", name, TASKS)
    merged = _overlay({"task": dataclasses.asdict(chosen)}, overlay or {}, "")
    return _validated(Task, merged["task"], "task")


def _latents_of(trainable: str, run: str | None) -> AutoencoderConfig | None:
    """The configuration of the autoencoder of a run, for those that build on one."""
    if trainable not in ON_LATENTS:
        if run is not None:
            raise InputError(f"--autoencoder {run}: {trainable} does not work on latents")
        return None
    if run is None:
        raise InputError(f"{trainable} works on latents: needed --autoencoder RUN")
    found = journal.read_record(run, "config.json", needs="config_hash")
    if found is None or found["config"]["trainable"] != "autoencoder":
        raise InputError(f"{run} is no autoencoder's run: needed what `earthformer train autoencoder` wrote")
    model: AutoencoderConfig = from_dict(found["config"]).model
    return model


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from what `dataclasses.asdict` or `config.json` holds.

    Raises:
        InputError: a key of the wrong type or an impossible value.
    """
    kind = type(next(iter(TRAINABLES[values["trainable"]].values())))
    model = _validated(kind, values["model"], "model")
    return _validated(Config, {**values, "model": model}, "")


def fields(config: Config) -> dict[str, tuple[int, int, int, int]]:
    """(T, H, W, C) of the `context` and `target` that a configuration's model is made for.

    Raises:
        InputError: a model on latents takes more context frames, or makes other frames, than the task has.
    """
    task, model = config.task, config.model
    if isinstance(model, EarthformerConfig):
        return {"context": model.context, "target": model.target}
    if isinstance(model, AutoencoderConfig):
        frame = model.frame
    else:
        assert config.autoencoder is not None
        frame = config.autoencoder.frame
        denoiser = model.denoiser if isinstance(model, PreDiffConfig) else None
        context = denoiser.context[0] if denoiser else model.context_frames
        made = (denoiser or model).target[0]
        if context > task.context or made != task.target:
            raise InputError(
                f"model {config.model_preset} takes {context} and makes {made} frames: task {task.name} has "
                f"{task.context} and needs {task.target}"
            )
    return {"context": (task.context, *frame), "target": (task.target, *frame)}


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


def _overlay(base: dict[str, Any], overlay: dict[str, Any], place: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        if key not in base:
            unknown("configuration key", f"{place}{key}", [f"{place}{name}" for name in base])
        if isinstance(base[key], dict) and isinstance(value, dict):
            merged[key] = _overlay(base[key], value, f"{place}{key}.")
        else:
            merged[key] = value
    return merged


def _validated(kind: type[T], values: dict[str, Any], place: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([place, *map(str, first["loc"])]).strip(".")
        if first["type"] == "value_error":
            said = f"configuration key {key}" if key else "configuration"
            raise InputError(f"{said}: {first['ctx']['error']}") from error
        raise InputError(f"configuration key {key} is {first['input']!r:.80}: {first['msg']}") from error


def unknown(what: str, name: str, known: Any) -> Any:
    """Refuse a name that is not among the known ones; the nearest is named."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    raise InputError(
        f"{what} {name!r} is unknown: the nearest is {near[0]!r}" if near else f"no {what} {name!r}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
