"""Training on a cluster of three nodes, all of it on S3: nodes go, the store stalls, and nothing changes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from test_train import OVERLAY, begun, outcome, same
from tiny_cluster import cluster

from pipelines import configs, journal, runs
from pipelines.archives import synthetic
from pipelines.prepare import prepare

TRAINING = {
    "task": OVERLAY["task"],
    # Noise, and micro-batches that three workers cannot share evenly.
    "model": {**OVERLAY["model"], "feed_forward": {"dropout": 0.1}},
    # Slower than in `test_train`, where a rounding error grows a hundredfold in as many steps.
    "training": {"batch_size": 4, "micro_batch": 1, "epochs": 2, "log_steps": 1, "learning_rate": 5e-4},
}
EPOCH = 13
STEPS = 26
"""Two epochs of thirteen steps: 54 training windows, of which 52 make whole batches."""


@pytest.fixture(scope="module")
def archive(s3, tmp_path_factory, ray_cluster) -> str:
    folder = tmp_path_factory.mktemp("cluster_train")
    synthetic.write_sevir(folder / "raw", events=30, seed=1, size=48)
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


def test_a_node_is_lost_and_the_store_stalls(nodes, s3, archive, undisturbed, tmp_path):
    run = "s3://private/train/lost"
    process = training(nodes, archive, run, tmp_path, "1:3")
    until(lambda: steps(run)[-1:] >= [3], process)
    os.kill(s3.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(s3.pid, signal.SIGCONT)
    until(lambda: steps(run)[-1:] >= [EPOCH + 2], process)
    kill_node(nodes.raylets.pop())
    finish(process, run, undisturbed)
    shown = earthformer(nodes, "inspect", run)
    assert f"complete: {STEPS} steps in 2 epochs" in shown.communicate()[0]


def test_a_node_that_is_to_go_is_not_waited_for(nodes, s3, archive, undisturbed, tmp_path):
    run = "s3://private/train/drained"
    process = training(nodes, archive, run, tmp_path, "1:2")
    until(lambda: steps(run), process)
    last = nodes.raylets.pop()
    drain(nodes, last, seconds=15)
    # Before the epoch's end there is no other checkpoint.
    (found,) = until(lambda: journal.checkpoints(run), process)
    assert found["step"] < EPOCH
    assert found["score"] is None
    kill_node(last)
    finish(process, run, undisturbed)


def earthformer(nodes, *words) -> subprocess.Popen:
    environment = {
        **nodes.environment,
        "RAY_ADDRESS": nodes.address,
        # Look often, so that the test is short.
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def training(nodes, archive: str, run: str, folder: Path, workers: str) -> subprocess.Popen:
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(TRAINING))
    words = ["--task", "sevir", "--preset", "earthformer_sevir_tiny", "--config", str(overlay)]
    words += ["--archive", archive, "--run", run, "--workers", workers]
    return earthformer(nodes, "train", "earthformer", *words)


def steps(run: str) -> list[int]:
    return [line["step"] for line in journal.read_metrics(run)]


def finish(process: subprocess.Popen, run: str, undisturbed: str) -> None:
    """Wait for the end: it is the one of a run that nothing happened to."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"{STEPS} steps in 2 epochs" in said
    assert steps(run) == list(range(1, STEPS + 1))
    same(outcome(run), outcome(undisturbed), 2e-3)
    assert runs.open_run(run).module()


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
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if found := holds():
            return found
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("it did not come to that")
