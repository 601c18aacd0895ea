"""Verbs as jobs of a real cluster of three nodes, and what is refused before anything is sent."""

import re
import subprocess
import sys
import time

import pytest
from tiny_cluster import cluster

from cluster import submit as stage
from cluster.capacity import Need, refuse_impossible
from pipelines import cli
from pipelines.archives import checks, synthetic
from pipelines.errors import InputError

EVENTS = 6


@pytest.fixture(scope="module")
def nodes():
    with cluster(1, 1, 1) as found:
        yield found


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submit")
    synthetic.write_sevir(folder / "raw", events=EVENTS, seed=4, size=48)
    return folder / "raw"


def submitted(nodes, *words, cwd=None, **environment):
    """`earthformer submit …`, and what it said."""
    command = [sys.executable, "-m", "cluster.cli", "submit", "--address", nodes.dashboard, *map(str, words)]
    how = {"capture_output": True, "text": True, "timeout": 200, "cwd": cwd}
    return subprocess.run(command, env=nodes.environment | environment, **how)


def prepare(raw, archive, *more):
    return ["prepare", "sevir", "--source", raw, "--archive", archive, "--shard-mb", 0, *more]


def test_a_verb_runs_on_the_cluster_as_it_does_here(nodes, raw, tmp_path, ray_cluster):
    from pipelines.prepare import prepare as here

    done = submitted(nodes, "--wait", "--", *prepare(raw, tmp_path / "a.zarr"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{EVENTS}/{EVENTS} shards written" in done.stdout
    assert re.search(r"^prepare-\d{8}-\d{6}-\w{4}: succeeded after \d+ s$", done.stderr, re.MULTILINE)
    assert checks.validate(str(tmp_path / "a.zarr")) == []
    here("sevir", str(raw), str(tmp_path / "b.zarr"), shard_mb=0, progress=False)
    shards = [path.relative_to(tmp_path / "b.zarr") for path in (tmp_path / "b.zarr").glob("vil/c/*/0/0/0")]
    assert len(shards) == EVENTS
    for shard in shards:
        assert (tmp_path / "a.zarr" / shard).read_bytes() == (tmp_path / "b.zarr" / shard).read_bytes()


def test_it_ends_as_the_job_does(nodes, tmp_path):
    failed = submitted(nodes, "--wait", "--", *prepare(tmp_path / "none", tmp_path / "a.zarr"))
    assert failed.returncode == 2
    assert "none/CATALOG.csv is absent" in failed.stdout
    assert ": failed after " in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr


def test_jobs_are_listed_followed_and_stopped(nodes, raw, tmp_path):
    sent = submitted(nodes, "--", *prepare(raw, tmp_path / "a.zarr"))
    job = re.match(r"(\S+): sent", sent.stdout)[1]
    for _ in range(100):
        stood = submitted(nodes, "status", job)
        if ": pending" not in stood.stdout:
            break
        time.sleep(0.5)
    assert ": running" in stood.stdout, stood
    assert stood.returncode == 0
    assert submitted(nodes, "stop", job).stdout == f"{job}: is being stopped\n"
    assert submitted(nodes, "logs", job).returncode == 1
    ended = submitted(nodes, "status", job)
    assert (ended.returncode, ended.stdout.split(":")[1].split()[0]) == (1, "stopped")
    assert ended.stdout.splitlines()[1].startswith("earthformer prepare sevir --source ")
    listed = submitted(nodes, "list").stdout
    assert job in listed
    unknown = submitted(nodes, "status", "nothing")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "nothing" in unknown.stderr


def test_what_cannot_be_is_not_sent(nodes, raw, tmp_path):
    train = ["train", "earthformer", "--task", "sevir", "--archive", "s3://a/b", "--run", "s3://a/r"]
    forecast = ["forecast", "--run", "s3://a/r", "--archive", "s3://a/b", "--out", "s3://a/f"]
    for words, message in (
        (
            [*train, "--workers", "4"],
            "4 times a worker of train of 1 CPU each, and the cluster's 3 nodes hold 3",
        ),
        ([*train, "--gpu"], "a worker of train needs 1 GPU, and the largest of 3 nodes has 0 GPU"),
        (
            prepare(raw, tmp_path / "a", "--memory-mb", 10**7),
            "needs 10000000 MB of memory, and the largest of",
        ),
        (prepare(raw, "a.zarr"), "--archive a.zarr lies here: needed a URL, or an absolute path"),
        ([*forecast, "--events", "e.yaml"], "--events e.yaml is not in the cluster: needed --working-dir"),
    ):
        refused = submitted(nodes, "--", *words)
        assert refused.returncode == 2, words
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    for words, message in (
        (["prepar", "sevir"], "No such command 'prepar'"),
        ([*train, "--worker", "2"], "No such option: --worker"),
        (["train", "earthformer"], "Missing option '--archive'"),
    ):
        refused = submitted(nodes, "--", *words)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert "forecast" not in submitted(nodes, "list").stdout


def test_a_cluster_that_is_not_there_or_wants_its_token_is_one_line(nodes):
    for more, message in (
        ({"RAY_AUTH_MODE": "disabled"}, "wants its token: needed RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "wrong" * 10}, "wants its token"),
    ):
        refused = submitted(nodes, "list", **more)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    command = [sys.executable, "cluster/submit.py", "--address", "http://127.0.0.1:1", "list"]
    absent = subprocess.run(command, capture_output=True, text=True, timeout=60, env=nodes.environment)
    assert absent.returncode == 2
    assert absent.stderr == (
        "error: no Ray cluster answers at http://127.0.0.1:1: needed the address of its dashboard\n"
    )


def test_files_that_a_verb_names_are_sent_along(tmp_path):
    (tmp_path / "e.yaml").write_text("[]")
    words = ["forecast", "--run", "s3://a/r", "--archive", "/a/b", "--out", "s3://a/f", "--events", "e.yaml"]
    given = cli.parse(words)
    stage.check_paths(given, str(tmp_path))
    with pytest.raises(InputError, match="is not in /: needed --working-dir FOLDER with it"):
        stage.check_paths(given, "/")
    chained = cli.parse(["inspect", "zip://::raw.zip"])
    with pytest.raises(InputError, match=r"--url zip://::raw\.zip lies here"):
        stage.check_paths(chained, None)


def test_of_training_the_fewest_workers_must_have_room():
    train = ["train", "earthformer", "--task", "sevir", "--archive", "s3://a/b", "--run", "s3://a/r"]
    reserve = {"cpus": 0.0, "gpus": 0.0, "memory_mb": 0.0}
    for asked, count in (("4", 4), ("2:8", 2)):
        (need,) = stage.needs("train", cli.parse([*train, "--workers", asked]), reserve)
        assert need.count == count
    with pytest.raises(InputError, match="--workers 2-8: needed a number, or"):
        list(stage.needs("train", cli.parse([*train, "--workers", "2-8"]), reserve))


def test_room_is_counted_in_whole_bundles():
    have = [{"CPU": 3.0, "memory": 8e9}, {"CPU": 1.0, "GPU": 2.0, "memory": 2e9}]
    refuse_impossible([Need("a", {"CPU": 1.0}, 4), Need("b", {"GPU": 1.0}, 2)], have)
    with pytest.raises(
        InputError, match="3 times a of 2 CPU each, and the cluster's 2 nodes hold 1 at a time"
    ):
        refuse_impossible([Need("a", {"CPU": 2.0}, 3)], have)
    with pytest.raises(InputError, match="a needs 9000 MB of memory, and the largest of 2 nodes has 8000 MB"):
        refuse_impossible([Need("a", {"memory": 9e9}, 1)], have)
    with pytest.raises(InputError, match="the cluster's 2 nodes hold 0"):
        refuse_impossible([Need("a", {"GPU": 1.0, "memory": 4e9}, 1)], have)
