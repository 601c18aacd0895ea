"""From xarray and Dask: stores opened lazily, and computed with on the cluster that the pipeline runs on."""

import os
import shutil
import signal

import dask
import dask.array
import dask.dataframe
import numpy as np
import pandas as pd
import pytest
import ray
import xarray as xr
from tiny_archive import built
from tiny_scored import write_reduced

from pipelines import engine
from pipelines.archives import records, sevir, store, synthetic
from pipelines.errors import InputError
from pipelines.series import Window
from pipelines.tasks import TASKS

EVENTS = 5


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive of two modalities, two events a shard but for the last."""
    folder, modalities = tmp_path_factory.mktemp("dask"), ("vil", "ir069")
    synthetic.write_sevir(folder / "raw", events=EVENTS, seed=3, size=72, modalities=modalities)
    archive = built(
        sevir.plan(str(folder / "raw"), modalities=modalities, shard_mb=1), str(folder / "a.zarr")
    )
    assert archive.array("", "vil").shards == (2, 49, 72, 72)
    return archive


def processes(values: dask.array.Array) -> set[int]:
    """Where the tasks of an array's chunks run."""

    def where(block: np.ndarray) -> np.ndarray:
        return np.full((len(block),), os.getpid())

    rest = list(range(1, values.ndim))
    return set(dask.array.map_blocks(where, values, dtype=int, drop_axis=rest).compute().tolist())


# ------------------------------------------------------------------------------------------ opening


@pytest.mark.parametrize("chunks", ["shards", "chunks"])
def test_dasks_chunks_are_those_of_the_store(archive, chunks):
    opened = store.open_dataset(archive.url, chunks=chunks)
    for name in ("vil", "ir069"):
        assert opened[name].data.chunksize == getattr(archive.array("", name), chunks)
    xr.testing.assert_identical(opened.load(), xr.open_zarr(archive.url, chunks=None).load())
    # As xarray decodes it: not the bytes and counts that are stored.
    assert opened["vil"].dtype == np.float32
    np.testing.assert_allclose(opened["ir069"], archive.array("", "ir069")[:] / 100, rtol=1e-6)


def test_a_shard_is_a_task_that_reads_it_when_it_is_asked_for(tmp_path, archive):
    shutil.copytree(archive.url, tmp_path / "a.zarr")
    opened = store.open_dataset(str(tmp_path / "a.zarr"))["vil"]
    (tmp_path / "a.zarr/vil/c/1/0/0/0").unlink()
    found = opened.compute()
    assert np.isnan(found[2:4]).all()
    whole = archive.array("", "vil")[:]
    for rows in (slice(0, 2), slice(4, 5)):
        np.testing.assert_array_equal(found[rows], whole[rows])


def test_xarray_alone_has_the_parts_of_shards_as_chunks(archive):
    for opened in (xr.open_zarr(archive.url), xr.open_zarr(archive.url, chunks={})):
        assert opened["vil"].chunks[0] == (1,) * EVENTS


def test_forecasts_open_as_archives_do(tmp_path, archive):
    keys = [Window(str(event), 0) for event in archive.root["event"].values[:3]]
    task = TASKS["sevir"]
    members = np.random.default_rng(0).uniform(0, 254, (3, 4, task.target, 72, 72)).astype(np.float32)
    url = write_reduced(str(tmp_path / "f.zarr"), task, archive, keys, members, keep_members=True)
    for chunks, size in (("shards", (1, 4)), ("chunks", (1, 1))):
        opened = store.open_dataset(url, chunks=chunks)
        assert opened["vil"].data.chunksize[:2] == size
        assert opened["vil_mean"].data.chunksize[0] == 1
        np.testing.assert_allclose(opened["vil"].mean("member"), opened["vil_mean"], rtol=1e-5)


def test_groups_have_chunks_of_their_own(showers):
    opened = store.open_dataset(showers.url, "alpha", chunks="shards")
    stored = showers.array("alpha", "rate")
    assert opened["rate"].data.chunksize == tuple(np.minimum(stored.shards, stored.shape))
    assert np.isnan(opened["rate"][:, :2]).all()


def test_what_cannot_be_opened_is_refused(tmp_path, archive):
    with pytest.raises(InputError, match="chunks 'auto' are unknown: needed shards or chunks"):
        store.open_dataset(archive.url, chunks="auto")
    shutil.copytree(archive.url, tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / records.COMPLETE).unlink()
    with pytest.raises(InputError, match=r"a\.zarr is not complete: 3 of 3 shards are there"):
        store.open_dataset(str(tmp_path / "a.zarr"))


# --------------------------------------------------------------------------------------- the cluster


def test_a_climatology_is_computed_by_the_clusters_workers(archive, ray_cluster):
    opened = store.open_dataset(archive.url)
    raw = archive.array("", "vil")[:].astype(float)
    with engine.dask_on_cluster():
        mean, spread = dask.compute(opened["vil"].mean("event"), opened["ir069"].std(("event", "time")))
        there = processes(opened["vil"].data)
    np.testing.assert_allclose(mean, np.where(raw == 255, np.nan, raw).mean(0), rtol=1e-5)
    np.testing.assert_allclose(spread, archive.array("", "ir069")[:].std((0, 1)) / 100, rtol=1e-4)
    assert os.getpid() not in there
    assert there


def test_outside_dask_is_as_it_was(ray_cluster):
    ones = dask.array.ones((4, 4), chunks=2)

    def state() -> list[object]:
        kept = [dask.config.get(key, None) for key in ("scheduler", "dataframe.shuffle.method")]
        return [*kept, dask.persist, dask.array.Array.persist]

    before = state()
    with engine.dask_on_cluster():
        inside = state()
        with engine.dask_on_cluster():
            assert state() == inside
        assert state() == inside
    assert state() == before
    assert inside[:2] != before[:2]
    with pytest.raises(RuntimeError), engine.dask_on_cluster():
        raise RuntimeError
    assert state() == before
    assert processes(ones) == {os.getpid()}
    assert processes((ones + 1).persist()) == {os.getpid()}


def test_what_is_persisted_stays_in_the_cluster(ray_cluster):
    with engine.dask_on_cluster():
        twos = (dask.array.ones((4, 4), chunks=2) + 1).persist()
        assert {type(value) for value in dict(twos.dask).values()} == {ray.ObjectRef}
        assert twos.sum().compute() == 32


def test_tables_are_shuffled_without_a_common_disk(ray_cluster):
    table = pd.DataFrame({"month": np.arange(60) % 12, "rain": np.arange(60.0)})
    parts = dask.dataframe.from_pandas(table, npartitions=4)
    with engine.dask_on_cluster():
        found = parts.shuffle("month").map_partitions(lambda part: part.groupby("month").sum()).compute()
    pd.testing.assert_frame_equal(found.sort_index(), table.groupby("month").sum(), check_index_type=False)


def test_an_error_comes_as_itself(ray_cluster):
    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError(5, "the disk is gone")

    with engine.dask_on_cluster(), pytest.raises(OSError, match=r"^\[Errno 5\] the disk is gone$"):
        dask.array.ones((4, 4), chunks=2).map_blocks(fail, dtype=float).compute()


def test_a_killed_worker_costs_nothing(tmp_path, ray_cluster):
    def die_once(block: np.ndarray) -> np.ndarray:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return block + 1

    zeros = dask.array.zeros((8, 8), chunks=4)
    with engine.dask_on_cluster():
        # With `meta`, or Dask would try the function in this process.
        found = zeros.map_blocks(die_once, meta=np.empty((0, 0))).sum().compute()
    assert (tmp_path / "died").exists()
    assert found == 64


def test_tasks_that_hold_every_processor_may_compute_with_dask(ray_cluster):
    @ray.remote
    def task(size: int) -> float:
        with engine.dask_on_cluster():
            return float(dask.array.ones((size, size), chunks=2).sum().compute())

    busy = int(ray.cluster_resources()["CPU"])
    assert ray.get([task.remote(4) for _ in range(busy)], timeout=300) == [16.0] * busy
