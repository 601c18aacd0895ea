"""What every training worker runs: the optimiser, its schedule, and the loop over epochs.

The order of windows depends on (seed, epoch) alone and the random numbers of a micro-batch on (seed, step,
its place in the global batch), so that a run which is killed and resumed takes the same steps as one that is
not, whatever the number of workers before and after.
"""

import contextlib
import math
import os
import resource
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn

from earthformer.forecasters import Forecaster, Trainable, TrainableByLoss, present
from earthformer.scores import Contingency, Errors, Nino
from pipelines import configs, engine, journal, latents, runs, windows
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError
from pipelines.series import Window
from pipelines.tasks import Task

CALIBRATION_WINDOWS = 64
"""Training windows that are looked at before the first step, by trainables that measure something of them."""


def micro_batches(training: configs.Training, rank: int, workers: int) -> range:
    """Which micro-batches of each global batch are a worker's; where they do not divide, some have one more.

    Raises:
        InputError: no workers, or more than there are micro-batches; a global batch that these do not divide.
    """
    if workers < 1:
        raise InputError(f"{workers} workers asked: needed at least 1")
    batch, micro = training.batch_size, training.micro_batch
    if batch % micro:
        raise InputError(f"training.batch_size {batch} is no multiple of training.micro_batch {micro}")
    many = batch // micro
    if workers > many:
        raise InputError(
            f"{workers} workers asked, and training.batch_size {batch} makes {many} micro-batches of "
            f"training.micro_batch {micro}: needed at least one for each worker"
        )
    return range(rank * many // workers, (rank + 1) * many // workers)


def schedule_steps(training: configs.Training, train_windows: int) -> int:
    """Optimiser steps over which the learning rate runs its course.

    With `published_schedule` micro-batches are counted as windows, as the published SEVIR runs did: the
    cosine then ends at about half of the epochs and rises again.
    """
    counted = train_windows // training.micro_batch if training.published_schedule else train_windows
    return int(training.epochs * counted / training.batch_size)


def learning_rate(step: int, steps: int, training: configs.Training) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio` (Earthformer, Appendix B).

    Beyond `steps` the rate stays at its floor, unless `published_schedule` lets it rise.
    """
    warm = round(training.warmup * steps)
    peak, floor = training.learning_rate, training.learning_rate * training.min_lr_ratio
    if step < warm:
        return peak * (training.warmup_start + (1 - training.warmup_start) * step / warm)
    if not training.published_schedule:
        step = min(step, steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for LayerNorm parameters and for names with `bias` (relative position tables included)."""
    layer_norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    free = [p for name, p in named if id(p) in layer_norms or "bias" in name]
    freed = {id(p) for p in free}
    decayed = [p for _, p in named if id(p) not in freed]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------- the loop


def work(loop: dict[str, Any]) -> None:
    """One rank of a Ray Train group: trains from the run's last checkpoint to the end.

    Args:
        loop: `config` (a `configs.Config` as a dict), `archive` and `run`, URLs that hold on every node.

    Raises:
        InputError: what `begin` and `Loop.steps` raise; run or archive out of sight from this node.
    """
    engine.quiet()
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if ranks.device.type == "cpu":
        torch.set_num_threads(max(1, engine.cores() // context.get_local_world_size()))
    if journal.read_record(loop["run"], "config.json", needs="config_hash") is None:
        raise InputError(f"{loop['run']} is out of sight from a worker: needed a store that all nodes share")
    config = configs.from_dict(loop["config"])
    begun = begin(config, open_archive(loop["archive"]), loop["run"], ranks)
    # Where Ray does not watch out for notices, to ask at every step is time lost.
    noticed = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0"
    for _ in begun.steps():
        # That a node is about to be taken away, as spot machines are, Ray Train tells all ranks at the same
        # step. When it is gone, the others begin at this checkpoint.
        if not noticed and ray.train.get_preemption_info() is not None:
            begun.save()
            noticed = True


@dataclass(frozen=True)
class Ranks:
    """This process's place among all that train one model."""

    rank: int
    world: int
    device: torch.device

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the ranks, all of which must call this."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return float(value) / self.world

    def add_up(self, sums: list[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, all of which must call this."""
        if self.world > 1:
            for tensor in sums:
                torch.distributed.all_reduce(tensor)

    def gather(self, states: list[Any]) -> list[list[Any]]:
        """Every rank's states, all of which must call this."""
        if self.world == 1:
            return [states]
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, states)
        return gathered


def begin(config: configs.Config, archive: Archive, run: str, ranks: Ranks) -> "Loop":
    """The loop where the run's last checkpoint left it, or at the start.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    torch.manual_seed(config.training.seed)
    trainable = runs.build(config)
    state, optimiser_state = _State(), None
    records = journal.checkpoints(run)
    if records:
        weights, saved = journal.load_checkpoint(run, records[-1])
        runs.load_weights(trainable, weights, f"{run}, checkpoint of step {records[-1]['step']},")
        optimiser_state = saved.pop("optimiser")
        state = _State(**saved)
    elif config.trainable in configs.ON_LATENTS:
        latents.load_autoencoder(trainable, run)
    model: nn.Module = trainable.to(ranks.device)
    if ranks.world > 1:
        # Some published tensors (the last encoder layer's global updates) cannot affect the output.
        model = ray.train.torch.prepare_model(
            model, parallel_strategy_kwargs={"find_unused_parameters": True}
        )
    groups = parameter_groups(trainable, config.training.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=config.training.betas)
    if optimiser_state is not None:
        optimiser.load_state_dict(optimiser_state)
    compiled = torch.compile(model) if config.training.compile else model
    metrics = journal.Metrics(run, state.step) if ranks.rank == 0 else None
    return Loop(config, archive, run, ranks, trainable, compiled, optimiser, state, metrics)


@dataclass
class _State:
    """Where training stands; saved with every checkpoint, beside the optimiser's own state.

    The schedule and all random numbers follow from `step`.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_score: float = -math.inf
    stale: int = 0


@dataclass
class _Interval:
    """What has happened since the last line of the metrics."""

    steps: int = 0
    loss: Tensor | float = 0.0
    """Sum over the steps."""
    began: float = field(default_factory=time.perf_counter)


@dataclass
class Loop:
    """Optimiser steps, with validations, checkpoints and metrics where they are due."""

    config: configs.Config
    archive: Archive
    run_url: str
    ranks: Ranks
    trainable: Trainable
    model: Any
    """The trainable, in `DistributedDataParallel` and `torch.compile` where they are on."""
    optimiser: torch.optim.Optimizer
    state: _State
    metrics: journal.Metrics | None
    """On rank 0."""

    def __post_init__(self) -> None:
        task = self.config.task
        self.train_windows = windows.enumerate_windows(task, self.archive, "train")
        self.val_windows = windows.enumerate_windows(task, self.archive, "val")
        self.epoch_steps = len(self.train_windows) // self.config.training.batch_size
        self.mine = micro_batches(self.config.training, self.ranks.rank, self.ranks.world)
        self.saved = self.state.step
        self.interval = _Interval()
        self.last: dict[str, float] = {}

    def steps(self) -> Iterator[int]:
        """Train to the end; yields each step's number once it, and all that was due after it, is done.

        Raises:
            InputError: loss, gradient or validation score is no finite number.
        """
        training, state = self.config.training, self.state
        if state.step == 0:
            order = windows.epoch_order(self.train_windows, training.seed, 0)
            self.trainable.calibrate(self._read(order[:CALIBRATION_WINDOWS]))
        while not self._finished():
            for batches in self._batches():
                self._step(batches)
                state.step_in_epoch += 1
                if state.step_in_epoch == self.epoch_steps:
                    state.epoch, state.step_in_epoch = state.epoch + 1, 0
                    due = state.epoch % training.validate_every == 0 or state.epoch == training.epochs
                    self._save(self._validate() if due else {})
                elif training.checkpoint_steps and state.step % training.checkpoint_steps == 0:
                    self._save({})
                elif state.step % training.log_steps == 0:
                    self._log({})
                yield state.step

    def _finished(self) -> bool:
        training = self.config.training
        return self.state.epoch >= training.epochs or self.state.stale >= training.patience

    def _batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """This rank's micro-batches of each global batch that the epoch has left."""
        training, mine = self.config.training, self.mine
        order = windows.epoch_order(self.train_windows, training.seed, self.state.epoch)
        first, last = (place * training.micro_batch for place in (mine.start, mine.stop))
        keys: list[Window] = []
        for step in range(self.state.step_in_epoch, self.epoch_steps):
            start = step * training.batch_size
            keys += order[start + first : start + last]
        batches = self._read(keys)
        while len(step_batches := [b for _, b in zip(mine, batches, strict=False)]) == len(mine):
            yield step_batches

    def _read(self, keys: list[Window]) -> Iterator[dict[str, Tensor]]:
        """Batches of training windows: latents where they are stored, else fields."""
        size, device = self.config.training.micro_batch, self.ranks.device
        if latents.stored(self.config):
            return latents.batches(latents.store_of(self.run_url), keys, size, self.state.epoch, device)
        return windows.batches(self.config.task, self.archive, keys, size, device)

    def _step(self, batches: list[dict[str, Tensor]]) -> None:
        training, step = self.config.training, self.state.step
        rate = learning_rate(step, schedule_steps(training, len(self.train_windows)), training)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = torch.zeros((), device=self.ranks.device)
        # Gradients are averaged over the ranks: so weighted, they are those of the mean of all micro-batches,
        # however many of them are this rank's.
        weight = self.ranks.world * training.micro_batch / training.batch_size
        for place, batch in zip(self.mine, batches, strict=True):
            # Dropout's numbers follow from where we are, so that they are the same on any rank, at any time.
            seeds = np.random.SeedSequence([training.seed, step, place])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            held = self.ranks.world > 1 and place < self.mine[-1]
            if training.augment and not latents.stored(self.config):
                batch = augmented(batch)
            with self.model.no_sync() if held else contextlib.nullcontext():
                with self._autocast():
                    part = self.model(batch, step) * weight
                part.backward()
            loss += part.detach()
        # A part without gradients, such as an idle discriminator, has a norm of 0 on the CPU.
        parts = [
            nn.utils.clip_grad_norm_(m.parameters(), training.clip_norm).to(self.ranks.device)
            for m in self.trainable.parts()
        ]
        norm = torch.stack(parts).max()
        if not all(map(torch.isfinite, parts)):
            # Gradients are the same on all ranks, so that all come here.
            raise InputError(
                f"training diverged at step {step + 1}: loss {self.ranks.mean(loss):.6g}, gradient norm "
                f"{float(norm):.6g}; needed finite numbers: try another run with a training.learning_rate "
                f"below {training.learning_rate:g}"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.trainable.after_step()
        self.state.step += 1
        self.interval.steps += 1
        self.interval.loss += loss
        self.last = {"grad_norm": float(norm), "learning_rate": rate}

    def _log(self, more: dict[str, float]) -> None:
        """A line of metrics: the last step's, and means since the last line."""
        interval, self.interval = self.interval, _Interval()
        loss = self.ranks.mean(torch.as_tensor(interval.loss) / interval.steps)
        if self.metrics:
            seconds = time.perf_counter() - interval.began
            speed = interval.steps * self.config.training.batch_size / seconds
            values = {"epoch": self.state.epoch, "loss": loss, **self.last, "windows_per_s": speed, **more}
            self.metrics.write(self.state.step, values)

    def save(self) -> None:
        """A checkpoint of the last step, if it has none; all ranks must call this, between two steps."""
        if self.saved < self.state.step:
            self._save({})

    def _save(self, validated: dict[str, float]) -> None:
        """A checkpoint, and a line of metrics, so that lines are the same however often a run is cut."""
        if self.interval.steps:
            self._log(validated)
        self.saved = self.state.step
        if self.ranks.rank > 0:
            return
        record = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "score": self._score(validated) if validated else None,
            "finished": self._finished(),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        state = {**vars(self.state), "optimiser": self.optimiser.state_dict()}
        journal.save_checkpoint(self.run_url, self.trainable.state_dict(), state, record)

    def _score(self, validated: dict[str, float]) -> float:
        """What picks the best checkpoint: higher is better."""
        monitored = validated[self.config.monitor]
        return -monitored if self.config.monitor == configs.LOSS else monitored

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        """Score the validation split; every rank takes its share and gets the scores of all."""
        ranks = self.ranks
        mine = self.val_windows[ranks.rank :: ranks.world]
        self.model.eval()
        for sums in self.trainable.validation_sums():
            sums.zero_()
        states: list[Any] = []
        done = 0
        size = self.config.training.micro_batch
        for batch in windows.batches(self.config.task, self.archive, mine, size, ranks.device):
            keys = mine[done : done + len(next(iter(batch.values())))]
            with self._autocast():
                part = self._validated(batch, keys)
            states = [a + b for a, b in zip(states, part, strict=True)] if states else part
            done += len(keys)
        ranks.add_up(self.trainable.validation_sums())
        self.trainable.after_validation()
        shares = [share for share in ranks.gather(states) if share]
        merged = [sum(parts[1:], parts[0]) for parts in zip(*shares, strict=True)]
        if self.config.monitor == configs.LOSS:
            total, count = merged
            validated = {configs.LOSS: total / count}
        else:
            validated = summarise(self.config.task, merged)
        score = self._score(validated)
        if not math.isfinite(score):
            raise InputError(
                f"the validation score {self.config.monitor} is {score} at step {self.state.step}: needed a "
                "finite number; is anything observed in the validation split?"
            )
        self.state.stale = 0 if score > self.state.best_score else self.state.stale + 1
        self.state.best_score = max(score, self.state.best_score)
        return validated

    def _validated(self, batch: dict[str, Tensor], keys: list[Window]) -> list[Any]:
        """Score states of a batch's forecasts, or the sum and count of its losses."""
        if self.config.monitor == configs.LOSS:
            seeds = torch.tensor([zlib.crc32(repr(key).encode()) for key in keys])
            losses = cast(TrainableByLoss, self.trainable).validation_loss(batch, seeds)
            return [float(losses.double().sum()), len(keys)]
        forecast = cast(Forecaster, self.trainable).forecast(batch["context"], torch.zeros(len(keys), 1))[
            :, 0
        ]
        truth = torch.where(present(batch["target"]), batch["target"].float(), torch.nan)
        return validation_states(self.config.task, self.archive, keys, forecast.cpu(), truth.cpu())

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=bf16)


def augmented(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each window (T, H, W, C) of a batch turned and mirrored at random, context and target alike."""
    turns = torch.randint(8, (len(batch["context"]),)).tolist()
    return {
        name: torch.stack([latents.turned(field, turn) for field, turn in zip(fields, turns, strict=True)])
        for name, fields in batch.items()
    }


def validation_states(
    task: Task, archive: Archive, keys: list[Window], forecast: Tensor, truth: Tensor
) -> list[Any]:
    """Score states of some validation windows; forecast and truth (B, T, H, W, 1) in native units."""
    errors = Errors.of(forecast, truth, scale=task.error_scale)
    if task.archive == "enso":
        labels = torch.from_numpy(windows.read_nino(task, archive, keys))
        return [Nino.of(forecast[..., 0], labels), errors]
    return [Contingency.of(forecast, truth, thresholds=task.thresholds), errors]


def summarise(task: Task, states: list[Any]) -> dict[str, float]:
    """The monitored score and the MSE of the merged states."""
    skill, errors = states
    return {task.monitor: float(skill.result()[task.monitor]), "MSE": float(errors.result()["MSE"])}
