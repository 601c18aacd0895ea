"""Training on a cluster, all of it on S3: nodes and the driver go, the store stalls, and nothing changes."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from test_train import OVERLAY, begun, outcome
from tiny_cluster import cluster

from pipelines import configs, journal, runs
from pipelines.archives import synthetic
from pipelines.errors import InputError
from pipelines.prepare import prepare

TRAINING = {
    "task": OVERLAY["task"],
    # Noise, and micro-batches that three workers cannot share evenly.
    "model": {**OVERLAY["model"], "feed_forward": {"dropout": 0.1}},
    # Slower than in `test_train`, where a rounding error grows a hundredfold in as many steps.
    "training": {"batch_size": 4, "micro_batch": 1, "epochs": 2, "log_steps": 1, "learning_rate": 5e-4},
}
EPOCH = 9
STEPS = 18
"""Two epochs of nine steps, of 36 training windows."""


@pytest.fixture(scope="module")
def archive(s3, tmp_path_factory, ray_cluster) -> str:
    folder = tmp_path_factory.mktemp("cluster_train")
    synthetic.write_sevir(folder / "raw", events=20, seed=1, size=48)
    prepare("sevir", str(folder / "raw"), "s3://private/train/archive.zarr", progress=False)
    return "s3://private/train/archive.zarr"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, archive) -> str:
    """URL of a run that was trained in one go, by one rank, on a disk."""
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    config = configs.resolve("sevir", "earthformer_sevir_tiny", TRAINING)
    assert list(begun(config, archive, run).steps()) == list(range(1, STEPS + 1))
    return run


@pytest.fixture(scope="module")
def nodes(s3):
    with cluster(1, 1, 1) as found:
        yield found


def test_nodes_and_the_driver_go_and_the_store_stalls(nodes, s3, archive, undisturbed, tmp_path):
    run, (_, second, third) = "s3://private/train/run", nodes.raylets
    with training(nodes, archive, run, tmp_path, "1:3") as process:
        until(lambda: steps(run), process)
        with s3.stalled():
            drain(nodes, third, seconds=15)
        # With notice: before the epoch's end there is no other checkpoint.
        (found,) = until(lambda: journal.checkpoints(run), process)
        assert found["step"] < EPOCH
        assert found["score"] is None
        kill_node(third)
        # Without: what was done since the epoch's end is done again.
        until(lambda: steps(run)[-1:] > [EPOCH + 1], process)
        kill_node(second)
        # One step may have been under way when it went.
        reached = steps(run)[-1]
        until(lambda: steps(run)[-1] > reached + 1, process)
        process.kill()
    with pytest.raises(InputError, match="is not complete"):
        runs.open_run(run)
    # Not elastic: for three minutes Ray holds for the dead driver what it wanted for its workers.
    with training(nodes, archive, run, tmp_path, "1") as process:
        said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{STEPS} steps in 2 epochs" in said
    assert f"complete: {STEPS} steps in 2 epochs" in runs.describe(run)
    assert steps(run) == list(range(1, STEPS + 1))

    # A step too many or too few changes weights by up to 5e-4, another batch the loss by a tenth.
    (weights, lines), (needed, others) = outcome(run), outcome(undisturbed)
    torch.testing.assert_close(weights, needed, rtol=0, atol=1e-4)
    for line, other in zip(lines, others, strict=True):
        assert line["learning_rate"] == other["learning_rate"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


@contextlib.contextmanager
def training(nodes, archive: str, run: str, folder: Path, workers: str) -> Iterator[subprocess.Popen]:
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(TRAINING))
    command = [sys.executable, "-m", "pipelines.cli", "train", "earthformer", "--task", "sevir"]
    command += ["--preset", "earthformer_sevir_tiny", "--config", str(overlay)]
    command += ["--archive", archive, "--run", run, "--workers", workers]
    environment = {
        **nodes.environment,
        "RAY_ADDRESS": nodes.address,
        # Look often, so that the test is short.
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3",
    }
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def steps(run: str) -> list[int]:
    return [line["step"] for line in journal.read_metrics(run)]


def drain(nodes, raylet: int, seconds: int) -> None:
    """Say that a node goes, as who has a spot machine's notice does."""
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    words += ["--node-id", re.search(r"--node_id=(\w+)", " ".join(psutil.Process(raylet).cmdline()))[1]]
    words += ["--deadline-remaining-seconds", str(seconds), "--address", nodes.address]
    ray = Path(sys.executable).parent / "ray"
    subprocess.run([ray, "drain-node", *words], env=nodes.environment, check=True)


def kill_node(raylet: int) -> None:
    """As when a machine's power goes: its raylet, and all that it has started."""
    node = psutil.Process(raylet)
    for member in [node, *node.children(recursive=True)]:
        member.kill()


def until(holds: Callable, process: subprocess.Popen):
    """What a condition gives, once it holds."""
    while not (found := holds()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return found
