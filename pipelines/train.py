"""One Ray Train loop: any number of CPU or GPU workers, resumable at any step.

The order of windows depends on (seed, epoch) alone and each optimiser step's random numbers on
(seed, step, rank), so that a run which is killed and resumed takes the same steps as one that is not, and
the same global batches whatever the number of workers.
"""

import contextlib
import math
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from earthformer.forecasters import EarthformerForecaster, present
from earthformer.scores import Contingency, Errors, Nino
from pipelines import engine, runs, windows
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError
from pipelines.tasks import Task
from pipelines.windows import Window


@dataclass(frozen=True)
class Trained:
    """What a finished run reports."""

    run: str
    record: dict[str, Any]

    def __str__(self) -> str:
        record = self.record
        return (
            f"{self.run}: {record['steps']} steps in {record['epochs']} epochs, best {record['monitor']} "
            f"{record['best_score']:.4f} at step {record['best_step']}, run {record['run_hash']}"
        )


def train(
    config: runs.Config,
    archive: str,
    run: str,
    *,
    workers: int = 1,
    gpu: bool = False,
    max_failures: int = 3,
    progress: bool = True,
) -> Trained:
    """Train until the last epoch or until patience is spent; the same call resumes a run cut short.

    Args:
        config: what `runs.resolve` gave.
        archive: URL of a complete archive of the task's kind.
        run: URL of the run directory.
        workers: data-parallel workers; the global batch stays `config.training.batch_size`.
        gpu: one GPU a worker.
        max_failures: restarts of the worker group from the last checkpoint before giving up.

    Raises:
        InputError: the batch does not divide, the archive does not fit the task, or `run` holds a run of
            another configuration.
    """
    accumulation(config.training, workers)
    opened = open_archive(archive)
    counts = {split: len(windows.enumerate_windows(config.task, opened, split)) for split in ("train", "val")}
    if counts["train"] < config.training.batch_size:
        raise InputError(
            f"{archive} has {counts['train']} training windows: training.batch_size "
            f"{config.training.batch_size} needs at least as many"
        )
    provenance = {"archive": archive, "archive_hash": opened.config_hash, "windows": counts}
    if runs.start(run, config, provenance):
        return Trained(run, runs.open_run(run).record)
    engine.connect()
    result = _fit(config, archive, run, workers, gpu, max_failures, progress, counts["train"])
    return Trained(run, _finish(config, run, result, provenance))


def accumulation(training: runs.Training, workers: int) -> int:
    """Micro-batches an optimiser step on each worker.

    Raises:
        InputError: the global batch is no multiple of workers times micro-batch.
    """
    share = training.micro_batch * workers
    if training.batch_size % share:
        raise InputError(
            f"training.batch_size {training.batch_size} is no multiple of {workers} worker(s) times "
            f"training.micro_batch {training.micro_batch}"
        )
    return training.batch_size // share


def schedule_steps(training: runs.Training, train_windows: int) -> int:
    """Optimiser steps over which the learning rate runs its course.

    With `published_schedule` micro-batches are counted as windows, as the published SEVIR runs did: the
    cosine then ends at about half of the epochs and rises again.
    """
    counted = train_windows // training.micro_batch if training.published_schedule else train_windows
    return int(training.epochs * counted / training.batch_size)


def learning_rate(step: int, steps: int, training: runs.Training) -> float:
    """Linear warm-up from 0, then a cosine down to `min_lr_ratio` (Earthformer, Appendix B).

    Beyond `steps` the rate stays at its floor, unless `published_schedule` lets it rise.
    """
    warm = round(training.warmup * steps)
    peak, floor = training.learning_rate, training.learning_rate * training.min_lr_ratio
    if step < warm:
        return peak * step / warm
    if not training.published_schedule:
        step = min(step, steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay for LayerNorm parameters and for names with `bias` (relative position tables included)."""
    layer_norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    named = list(module.named_parameters())
    free = [p for name, p in named if id(p) in layer_norms or "bias" in name]
    freed = {id(p) for p in free}
    decayed = [p for _, p in named if id(p) not in freed]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------------- the driver


def _fit(
    config: runs.Config,
    archive: str,
    run: str,
    workers: int,
    gpu: bool,
    max_failures: int,
    progress: bool,
    train_windows: int,
) -> ray.train.Result:
    parent, _, name = engine.absolute(run).rstrip("/").rpartition("/")
    cores = engine.cores()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "config": asdict(config),
            "archive": engine.absolute(archive),
            "run": engine.absolute(run),
        },
        # Ray Data's read tasks need slots beside the workers, so these never claim all of a small machine.
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": min(1.0, cores / (2 * workers)), **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    steps = config.training.epochs * (train_windows // config.training.batch_size)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, steps, stop), daemon=True)
    if progress:
        watcher.start()
    try:
        return trainer.fit()
    finally:
        stop.set()
        if progress:
            watcher.join()


def _watch(run: str, steps: int, stop: threading.Event) -> None:
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("starting workers", total=steps)
        while not stop.wait(1.0):
            lines = runs.read_metrics(run)
            if lines:
                said = "  ".join(f"{k} {v:.4g}" for k, v in _latest(lines).items())
                bar.update(task, completed=lines[-1]["step"], description=said)


def _latest(lines: list[dict[str, Any]]) -> dict[str, float]:
    merged: dict[str, Any] = {}
    for line in lines[-50:]:
        merged.update(line)
    return {k: merged[k] for k in ("loss", "windows_per_s", "CSI-M", "C-Nino3.4-M") if k in merged}


def _finish(
    config: runs.Config, run: str, result: ray.train.Result, provenance: dict[str, Any]
) -> dict[str, Any]:
    best, metrics = max(result.best_checkpoints or [], key=lambda pair: pair[1]["score"])
    with best.as_directory() as folder:
        weights = (Path(folder) / "weights.safetensors").read_bytes()
    last = result.metrics or metrics
    record = {
        "config_hash": config.hash,
        "monitor": config.task.monitor,
        "best_score": metrics["score"],
        "best_step": metrics["step"],
        "steps": last["step"],
        "epochs": last["epoch"],
        "worker_peak_rss_mb": last["peak_rss_mb"],
        **provenance,
    }
    return runs.complete(run, weights, record)


# ----------------------------------------------------------------------------------------- the worker


def _worker(loop: dict[str, Any]) -> None:
    """Runs on every rank."""
    engine.quiet()
    config = runs.from_dict(loop["config"])
    archive = open_archive(loop["archive"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, engine.cores() // context.get_local_world_size()))
    torch.manual_seed(config.training.seed)
    forecaster = EarthformerForecaster(config.model, config.task.scaling)
    state = _restore(forecaster)
    # Some published tensors (the last encoder layer's global updates) cannot affect the output.
    model = ray.train.torch.prepare_model(
        forecaster, parallel_strategy_kwargs={"find_unused_parameters": True} if world > 1 else None
    )
    optimiser = torch.optim.AdamW(parameter_groups(forecaster, config.training.weight_decay))
    if state.optimiser is not None:
        optimiser.load_state_dict(state.optimiser)
    log = runs.Metrics(loop["run"], state.step) if rank == 0 else None
    compiled = torch.compile(model) if config.training.compile else model
    fit = _Fit(config, archive, rank, world, device, forecaster, compiled, optimiser, log, state)
    fit.run()


@dataclass
class _State:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_score: float = -math.inf
    stale: int = 0
    optimiser: dict[str, Any] | None = None


def _restore(forecaster: nn.Module) -> _State:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return _State()
    with checkpoint.as_directory() as folder:
        weights = safetensors.torch.load_file(Path(folder) / "weights.safetensors")
        runs.load_weights(forecaster, weights, str(checkpoint.path))
        return _State(**torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True))


@dataclass
class _Fit:
    config: runs.Config
    archive: Archive
    rank: int
    world: int
    device: torch.device
    forecaster: EarthformerForecaster
    model: Any
    """The forecaster, in `DistributedDataParallel` and `torch.compile` where they are on."""
    optimiser: torch.optim.Optimizer
    log: runs.Metrics | None
    state: _State

    def run(self) -> None:
        training = self.config.training
        train = windows.enumerate_windows(self.config.task, self.archive, "train")
        steps = len(train) // training.batch_size
        while self.state.epoch < training.epochs and self.state.stale < training.patience:
            order = windows.epoch_order(train, training.seed, self.state.epoch)
            for batches in self._steps(order, steps):
                self._step(batches, len(train))
                self.state.step_in_epoch += 1
                every = training.checkpoint_steps
                if every and self.state.step % every == 0 and self.state.step_in_epoch < steps:
                    # Not validated: never the best, but where a restart goes on.
                    self._report(score=-math.inf, validated={})
            self.state.epoch += 1
            self.state.step_in_epoch = 0
            if self.state.epoch % training.validate_every == 0 or self.state.epoch == training.epochs:
                self._validate()

    def _steps(self, order: list[Window], steps: int) -> Iterator[list[dict[str, Tensor]]]:
        """This rank's micro-batches of each global batch that the epoch has left."""
        training = self.config.training
        share = training.batch_size // self.world
        mine = [
            window
            for step in range(self.state.step_in_epoch, steps)
            for window in order[step * training.batch_size :][self.rank * share : (self.rank + 1) * share]
        ]
        batches = windows.batches(self.config.task, self.archive, mine, training.micro_batch, self.device)
        many = accumulation(training, self.world)
        while len(step := [batch for _, batch in zip(range(many), batches, strict=False)]) == many:
            yield step

    def _step(self, batches: list[dict[str, Tensor]], train_windows: int) -> None:
        training, step = self.config.training, self.state.step
        began = time.perf_counter()
        rate = learning_rate(step, schedule_steps(training, train_windows), training)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # Dropout's numbers follow from where we are, so that a resumed run repeats them.
        torch.manual_seed(int(np.random.SeedSequence([training.seed, step, self.rank]).generate_state(1)[0]))
        self.model.train()
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            held = self.world > 1 and i < len(batches) - 1
            with self.model.no_sync() if held else contextlib.nullcontext(), self._autocast():
                loss = self.model(batch) / len(batches)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.forecaster.parameters(), training.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.state.step += 1
        if self.state.step % training.log_steps == 0:
            if self.world > 1:
                torch.distributed.all_reduce(total)
                total /= self.world
            if self.log:
                speed = training.batch_size / (time.perf_counter() - began)
                self.log.write(
                    self.state.step,
                    {
                        "epoch": self.state.epoch,
                        "loss": float(total),
                        "grad_norm": float(norm),
                        "learning_rate": rate,
                        "windows_per_s": speed,
                    },
                )

    @torch.inference_mode()
    def _validate(self) -> None:
        task = self.config.task
        mine = windows.enumerate_windows(task, self.archive, "val")[self.rank :: self.world]
        self.model.eval()
        states: list[Any] = []
        done = 0
        for batch in windows.batches(task, self.archive, mine, self.config.training.micro_batch, self.device):
            count = len(batch["context"])
            seeds = torch.zeros(count, 1, dtype=torch.int64)
            with self._autocast():
                forecast = self.forecaster.forecast(batch["context"], seeds)[:, 0]
            truth = torch.where(present(batch["target"]), batch["target"].float(), torch.nan)
            part = validation_states(
                task, self.archive, mine[done : done + count], forecast.cpu(), truth.cpu()
            )
            states = [a + b for a, b in zip(states, part, strict=True)] if states else part
            done += count
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(gathered, states)
            per_rank = [parts for parts in gathered if parts]
            states = [sum(parts[1:], parts[0]) for parts in zip(*per_rank, strict=True)]
        validated = summarise(task, states)
        score = validated[task.monitor]
        self.state.stale = 0 if score > self.state.best_score else self.state.stale + 1
        self.state.best_score = max(score, self.state.best_score)
        self._report(score, validated)

    def _report(self, score: float, validated: dict[str, float]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        metrics = {"epoch": self.state.epoch, "score": score, "peak_rss_mb": round(peak), **validated}
        if self.log:
            self.log.write(self.state.step, metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                weights = {k: v.detach().cpu().contiguous() for k, v in self.forecaster.state_dict().items()}
                safetensors.torch.save_file(weights, Path(folder) / "weights.safetensors")
                self.state.optimiser = self.optimiser.state_dict()
                torch.save(vars(self.state), Path(folder) / "state.pt")
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": self.state.step, **metrics}, checkpoint=checkpoint)

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)


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
