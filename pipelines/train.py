"""Training on Ray Train: any number of CPU or GPU workers, resumable at any step."""

import contextlib
import errno
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import configs, engine, journal, latents, loop, runs, windows
from pipelines.archives.store import Archive, open_archive
from pipelines.errors import InputError, boundary_error


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
    config: configs.Config,
    archive: str,
    run: str,
    *,
    autoencoder: str | None = None,
    workers: int | tuple[int, int] = 1,
    gpu: bool = False,
    max_failures: int = 3,
    progress: bool = True,
) -> Trained:
    """Train until the last epoch or until patience is spent; the same call resumes a run cut short.

    Args:
        config: what `configs.resolve` gave.
        archive: URL of a complete archive of the task's kind.
        run: URL of the run directory, on a store that all nodes share.
        autoencoder: for trainables on latents: URL of the autoencoder's finished run.
        workers: data-parallel workers, or the fewest and the most of them: then as many as the cluster has
            room for, at the start and whenever nodes come or go. The global batch stays
            `config.training.batch_size`, and every step is the same whatever their number.
        gpu: one GPU a worker.
        max_failures: restarts of the worker group from the last checkpoint before giving up; those for nodes
            whose end was announced do not count.
        progress: a bar, and a line a validation.

    Raises:
        InputError: there are more workers than micro-batches, the archive does not fit task or model, `run`
            holds a run of another configuration or archive, or training diverged.
    """
    fewest, most = (workers, workers) if isinstance(workers, int) else workers
    for number in (fewest, most):
        loop.micro_batches(config.training, 0, number)
    if fewest > most:
        raise InputError(f"from {fewest} to {most} workers asked: needed the smaller number first")
    opened = open_archive(archive)
    counts = _check(config, opened)
    provenance = {"archive": archive, "archive_hash": opened.config_hash, "windows": counts}
    if autoencoder is not None:
        source = runs.open_run(autoencoder)
        _check_source(config, source, opened)
        provenance |= {"autoencoder": autoencoder, "autoencoder_hash": source.hash}
    if runs.start(run, config, provenance):
        return Trained(run, runs.open_run(run).record)
    done = journal.checkpoints(run)
    if not (done and done[-1]["finished"]):
        if autoencoder is not None:
            latents.take_autoencoder(run, source)
        engine.connect()
        if latents.stored(config):
            latents.encode(config, opened, engine.absolute(run), workers=most, gpu=gpu, progress=progress)
        _fit(config, archive, run, workers, gpu, max_failures, progress, counts["train"])
    return Trained(run, runs.complete(run, config, provenance))


def _check_source(config: configs.Config, source: runs.Run, archive: Archive) -> None:
    """Refuse an autoencoder of other fields, or one that may have seen what this run is to be tested on."""
    mine, theirs = config.task, source.config.task
    for name in ("variable", "scaling", "splits"):
        found, needed = getattr(theirs, name), getattr(mine, name)
        if found != needed:
            raise InputError(f"{source.url} was trained with task.{name} {found}: needed {needed}, as here")
    trained_on = source.record.get("archive_hash")
    if trained_on != archive.config_hash:
        raise InputError(f"{source.url} was trained on archive {trained_on}: needed {archive.config_hash}")


def _check(config: configs.Config, archive: Archive) -> dict[str, int]:
    """Windows of each split, once archive, task and model are known to fit."""
    keys = {split: windows.enumerate_windows(config.task, archive, split) for split in ("train", "val")}
    if len(keys["train"]) < config.training.batch_size:
        raise InputError(
            f"{archive.url} has {len(keys['train'])} training windows: training.batch_size "
            f"{config.training.batch_size} needs at least as many"
        )
    runs.build(config)
    pixels = windows.read(config.task, archive, keys["train"][:1])
    found = {name: fields.shape[1:] for name, fields in pixels.items()}
    for name, needed in configs.fields(config).items():
        if found[name] != needed:
            raise InputError(
                f"{archive.url} gives task {config.task.name} a {name} of shape {found[name]}, model "
                f"{config.model_preset} has {needed}: needed the same (T, H, W, C)"
            )
    return {split: len(windows_of) for split, windows_of in keys.items()}


def _fit(
    config: configs.Config,
    archive: str,
    run: str,
    workers: int | tuple[int, int],
    gpu: bool,
    max_failures: int,
    progress: bool,
    train_windows: int,
) -> None:
    fewest = workers if isinstance(workers, int) else workers[0]
    steps = config.training.epochs * (train_windows // config.training.batch_size)
    shown = _shown(run, config.monitor, steps) if progress else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as scratch, shown:
        trainer = ray.train.torch.TorchTrainer(
            loop.work,
            train_loop_config={
                "config": asdict(config),
                "archive": engine.absolute(archive),
                "run": engine.absolute(run),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=cast(Any, workers),
                use_gpu=gpu,
                resources_per_worker=_resources(fewest, gpu),
                # GPUs that share a machine talk fastest; processors that share one wait for one another.
                placement_strategy="PACK" if gpu else "SPREAD",
            ),
            run_config=ray.train.RunConfig(
                # Checkpoints are the run's own: Ray's controller, on this node, leaves nothing worth keeping.
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                callbacks=cast(Any, [_GiveUp()]),
            ),
        )
        try:
            trainer.fit()
        except ray.train.ControllerError as error:
            cause = _hopeless(error)
            if cause is None:
                raise
            raise cause from error


class _GiveUp(ray.train.UserCallback):
    """Ends a run that would fail again in the same way, without the restarts that others get."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in filter(None, map(_hopeless, worker_exceptions.values())):
            raise error


def _hopeless(error: Exception) -> Exception | None:
    """What is wrong with the input or the disk, if that is what a worker failed of."""
    cause = boundary_error(error)
    full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return cause if isinstance(cause, InputError) or full else None


def _resources(fewest: int, gpu: bool) -> dict[str, float]:
    """What each worker claims: a processor, or its share of them where there are fewer than must be."""
    cluster = ray.cluster_resources()
    if gpu and cluster.get("GPU", 0) < fewest:
        warnings.warn(f"the cluster has {cluster.get('GPU', 0):.0f} GPUs: waiting for {fewest}", stacklevel=2)
    share = (cluster.get("CPU", 0) or engine.cores()) / fewest
    # Ray counts how often a claim goes into what a node has: of halves it does so exactly.
    return {"CPU": min(1.0, 2.0 ** math.floor(math.log2(share))), **({"GPU": 1.0} if gpu else {})}


@contextlib.contextmanager
def _shown(run: str, monitor: str, steps: int) -> Iterator[None]:
    """While training runs, a bar of its steps and a line for each validation."""
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, monitor, steps, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(run: str, monitor: str, steps: int, stop: threading.Event) -> None:
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    seen = max((line["step"] for line in journal.read_metrics(run)), default=0)
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("starting workers", total=steps)
        stopped = False
        while not stopped:
            stopped = stop.wait(1.0)
            try:
                lines = journal.read_metrics(run)
            except Exception:
                # A store that does not answer is the workers' affair: they try again, or say so.
                continue
            for line in lines:
                if line["step"] > seen and monitor in line:
                    bar.console.print(f"step {line['step']}: {_said(line, monitor)}", highlight=False)
                    seen = line["step"]
            if lines:
                bar.update(task, completed=lines[-1]["step"], description=_said(lines[-1], "loss"))


def _said(line: dict[str, float], first: str) -> str:
    shown = dict.fromkeys((first, "loss", "windows_per_s"))
    return ", ".join(f"{name.replace('_per_', '/')} {line[name]:.4g}" for name in shown)
