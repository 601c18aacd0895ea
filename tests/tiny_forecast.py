"""Forecasts of known values under the template of `earthformer forecast`, and runs that nobody trained."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from earthformer.config import EarthformerConfig
from earthformer.forecasters import EarthformerForecaster
from pipelines import configs, forecast_store, plans, runs, storage, windows
from pipelines.archives import records, store
from pipelines.archives.store import Archive
from pipelines.series import Window
from pipelines.tasks import Task


def write_forecast(
    url: str,
    task: Task,
    archive: Archive,
    keys: Sequence[Window],
    values: np.ndarray,
    *,
    forecaster: str = "persistence",
    shard_windows: int = 2,
    split: str = "test",
    archive_hash: str | None = None,
    finish: bool = True,
) -> str:
    """Write `values` (window, member, lead_time, y, x) as a finished forecast; returns its URL."""
    planned = plans.Plan(
        task=task,
        forecaster=forecaster,
        run=forecaster,
        run_hash=records.config_hash({"run": forecaster}),
        archive=archive,
        keys=tuple(keys),
        split=split,
        seed=0,
        shard_windows=min(shard_windows, len(keys)),
        ensemble=plans.Ensemble(members=values.shape[1], keep_members=True),
    )
    config = planned.config | {
        "archive_hash": archive_hash or archive.config_hash,
        "values": float(np.nanmean(values)),
    }
    store.create(url, {"": forecast_store.template(planned)}, config=config, shards=planned.shards)
    for shard in range(planned.shards):
        region = {"window": planned.shard(shard)}
        part = {task.variable: values[region["window"]].astype(np.float32)}
        crc32 = store.write_region(url, "", part, region)
        records.write(url, shard, {"regions": [store.region_record("", region, crc32)]})
        if not finish:
            return url
    records.complete(url, {"counts": {"windows": len(keys), "members": values.shape[1]}})
    return url


def persist(task: Task, archive: Archive, keys: Sequence[Window]) -> np.ndarray:
    """The last frame of the context, repeated: (window, 1, lead_time, y, x)."""
    last = windows.read(task, archive, keys)["context"][:, -1:, ..., 0].astype(np.float32)
    return np.repeat(last, task.target, axis=1)[:, None]


def write_run(url: str, task: Task, model: EarthformerConfig, seed: int = 0) -> str:
    """Write a finished run of the weights that a model starts from; returns its hash."""
    config = configs.Config("earthformer", task, model)
    runs.start(url, config, {})
    torch.manual_seed(seed)
    weights = safetensors.torch.save(EarthformerForecaster(model, task.scaling).state_dict())
    Path(url, "weights.safetensors").write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    run_hash = hashlib.sha256((config.hash + digest).encode()).hexdigest()[:16]
    record = {"config_hash": config.hash, "run_hash": run_hash, "weights_sha256": digest}
    storage.write_json(url, "run.json", record)
    return run_hash
