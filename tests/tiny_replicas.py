"""Replicas of a forecaster without processes of their own."""

import contextlib

import pytest
import torch

from pipelines import engine


@contextlib.contextmanager
def replicas_in_process():
    """Shards are made in this process, where none is at stake: a replica takes ten seconds to start."""
    threads, processors = torch.get_num_threads(), engine.cores()

    def replicate(replica, arguments, shards, label, workers, gpu, progress=True):
        # As many threads as a replica has, for the same last digits.
        made = replica(**arguments, threads=max(1, processors // workers), device="cpu")
        return [made({"shard": shard}) for shard in shards]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "replicate", replicate)
        yield
    torch.set_num_threads(threads)
