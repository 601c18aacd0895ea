"""Training on a cluster of three nodes, all of it on S3: nodes go, the store stalls, and nothing changes."""

import os
import re
import signal
import subprocess
import sys
import time
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
    # Noise, and as many micro-batches as three workers cannot share evenly.
    "model": {**OVERLAY["model"], "feed_forward": {"dropout": 0.1}},
    "training": {"batch_size": 4, "micro_batch": 1, "epochs": 6, "log_steps": 1},
}
STEPS = 24
EPOCH = 4


@pytest.fixture(scope="module")
def archive(s3, tmp_path_factory, ray_cluster) -> str:
    folder = tmp_path_factory.mktemp("cluster_train")
    synthetic.write_sevir(folder / "raw", events=10, seed=1, size=48)
    prepare("sevir", str(folder / "raw"), "s3://private/train/archive.zarr", progress=False)
    return "s3://private/train/archive.zarr"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, archive) -> str:
    """URL of a run that was trained in one go, by one rank."""
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    config = configs.resolve("sevir", "earthformer_sevir_tiny", TRAINING)
    assert list(begun(config, archive, run).steps())[-1] == STEPS
    return run


@pytest.fixture(scope="module")
def nodes(s3):
    with cluster(1, 1, 1) as found:
        yield found


def node_id(raylet: int) -> str:
    return next(
        word.partition("=")[2] for word in psutil.Process(raylet).cmdline() if word.startswith("--node_id=")
    )


def kill_node(raylet: int) -> None:
    """As when a machine's power goes: its raylet and all that it has started."""
    family = [psutil.Process(raylet), *psutil.Process(raylet).children(recursive=True)]
    for member in family:
        member.kill()


def until(holds, process: subprocess.Popen):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if found := holds():
            return found
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("waited too long")


def test_nodes_go_and_the_store_stalls(nodes, s3, archive, undisturbed, tmp_path):
    run, overlay = "s3://private/train/run", tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(TRAINING))
    command = [sys.executable, "-m", "pipelines.cli", "train", "earthformer", "--task", "sevir"]
    command += ["--preset", "earthformer_sevir_tiny", "--config", str(overlay)]
    command += ["--archive", archive, "--run", run, "--workers", "1:3"]
    environment = {
        **nodes.environment,
        "RAY_ADDRESS": nodes.address,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    T = time.time()
    until(lambda: len(journal.read_metrics(run)) >= 1, process)
    print("first", time.time() - T)
    until(lambda: len(journal.read_metrics(run)) >= 5, process)
    print("fifth", time.time() - T)
    os.kill(s3.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(s3.pid, signal.SIGCONT)
    kill_node(nodes.raylets[2])
    print("killed", time.time() - T, journal.read_metrics(run)[-1], [r["step"] for r in journal.checkpoints(run)])
    n = len(journal.read_metrics(run))
    out, err = process.communicate(timeout=300)
    print("done", time.time() - T)
    print(out, err)
    assert process.returncode == 0
    same(outcome(run), outcome(undisturbed), 2e-3)
