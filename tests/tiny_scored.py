"""What the tests of scores and of the page share: a small SEVIR archive, and an ensemble of known quality."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines import forecast_store, plans
from pipelines.archives import records, store, synthetic
from pipelines.archives.store import Archive
from pipelines.ensembles import Reduction
from pipelines.events import Event
from pipelines.prepare import prepare
from pipelines.series import Window
from pipelines.tasks import Task


def sevir(folder: Path, *, events: int, seed: int) -> Archive:
    """An archive of 48 × 48 pixels; needs Ray."""
    synthetic.write_sevir(folder / "raw", events=events, seed=seed, size=48)
    prepare("sevir", str(folder / "raw"), str(folder / "archive.zarr"), progress=False)
    return store.open_archive(str(folder / "archive.zarr"))


def calibrated(truth: np.ndarray, members: int, *, seed: int = 0, sigma: float = 20.0) -> np.ndarray:
    """Members (N, M, T, H, W) of which the truth (N, T, H, W) could be one.

    Truth and members lie around a centre by errors of one distribution, so that ranks are flat and the spread
    is the error.
    """
    rng = np.random.default_rng(seed)
    errors = rng.normal(0, sigma, (len(truth), members + 1, *truth.shape[1:])).astype(np.float32)
    return truth[:, None] - errors[:, :1] + errors[:, 1:]


def write_reduced(
    url: str,
    task: Task,
    archive: Archive,
    keys: Sequence[Window],
    values: np.ndarray,
    *,
    events: Sequence[Event] = (),
    keep_members: bool = False,
) -> str:
    """Write `values` (window, member, lead_time, y, x) as `earthformer forecast --members` does."""
    planned = plans.Plan(
        task=task,
        forecaster="prediff",
        run="prediff",
        run_hash=records.config_hash({"run": "prediff"}),
        archive=archive,
        keys=tuple(keys),
        split="test",
        seed=0,
        shard_windows=1,
        ensemble=plans.Ensemble(members=values.shape[1], events=tuple(events), keep_members=keep_members),
    )
    config = {**planned.config, "values": float(np.nanmean(values))}
    store.create(url, {"": forecast_store.template(planned)}, config=config, shards=planned.shards)
    for index, members in enumerate(values):
        reduction = Reduction(planned.bound(), index)
        reduction.add(members)
        found = reduction.result() | ({task.variable: members} if keep_members else {})
        region = {"window": slice(index, index + 1)}
        crc32 = store.write_region(url, "", {name: value[None] for name, value in found.items()}, region)
        records.write(url, index, {"regions": [store.region_record("", region, crc32)]})
    records.complete(url, {"counts": {"windows": len(keys), "members": values.shape[1]}})
    return url
