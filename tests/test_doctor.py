"""Each point of `earthformer doctor`, where all is well and where it is not; the nodes of a real cluster."""

import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
import zarr
from tiny_cluster import cluster

from cluster import doctor as stage
from cluster.findings import Finding
from cluster.nodes import compared, dashboard
from pipelines.version import code_version

ROOT = Path(__file__).parents[1]
POINTS = ["Python", "packages", "GPU", "/dev/shm", "disk for Ray", "disk", "memory", "open files"]
POINTS += ["S3 credentials"]


def ran(*words, cwd=None, files=None, **environment):
    """`earthformer doctor …`, allowed so many open files, in an environment of no cluster."""
    outside = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "AWS_"))}
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    how = {"capture_output": True, "text": True, "timeout": 200, "cwd": cwd, "preexec_fn": limit}
    command = [sys.executable, "-m", "cluster.cli", "doctor", *map(str, words)]
    return subprocess.run(command, env={**outside, "AWS_EC2_METADATA_DISABLED": "true"} | environment, **how)


def points(done):
    return {row["point"]: row for row in json.loads(done.stdout)}


def distribution(folder, name, version, *lines):
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    text = "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines])
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text + "\n")


def script(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder)


# -------------------------------------------------------------------------------------- this machine


def test_a_machine_where_all_is_well(tmp_path):
    keys = {"AWS_ACCESS_KEY_ID": "AKIAHUSH", "AWS_SECRET_ACCESS_KEY": "hush"}
    (tmp_path / "a").touch()
    done = ran("--json", "--url", tmp_path, "--url", tmp_path / "new" / "er", "--write", cwd=tmp_path, **keys)
    assert done.returncode == 0, done
    assert "hush" not in (done.stdout + done.stderr).lower()
    found = points(done)
    urls = [f"{what} {url}" for url in (tmp_path, tmp_path / "new/er") for what in ("list", "write")]
    assert list(found) == [*POINTS, *urls, "cluster", "nodes"]
    assert all(row.keys() == {"point", "state", "found", "needed"} for row in found.values())
    assert found["Python"]["found"] == sys.version.split()[0]
    assert found["S3 credentials"]["found"].startswith("from env")
    assert found[urls[0]]["found"] == "1 entries"
    assert found[urls[2]]["state"] == "warning"
    assert found[urls[3]]["state"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {found[name]["state"] for name in ("cluster", "nodes")} == {"not checked"}
    assert "--address" in found["cluster"]["needed"]


def test_a_machine_where_nothing_is(tmp_path):
    needs = ["Requires-Python: >=99", "Requires-Dist: zarr>=99", "Requires-Dist: ray>=2"]
    needs += ["Requires-Dist: nothing-of-the-kind==1.5", 'Requires-Dist: pysteps>=99; extra == "steps"']
    distribution(tmp_path, "earthformer_ray", "0.1.0", *needs)
    path = script(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H200, 580.1'")
    done = ran(
        *("--url", "http://me:hush@127.0.0.1:1/x", "--url", "/proc", "--write"),
        *("--address", "http://127.0.0.1:1"),
        RAY_ADDRESS="127.0.0.1:1",
        cwd=tmp_path,
        files=512,
        PYTHONPATH=str(ROOT),
        PATH=f"{path}{os.pathsep}{os.environ['PATH']}",
        AWS_ACCESS_KEY_ID="AKIAHUSH",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 1, done
    assert "hush" not in (done.stdout + done.stderr).lower()
    assert "Traceback" not in done.stderr
    lines = {line[12:].partition(": ")[0]: line for line in done.stdout.splitlines()}
    for point, state, said in (
        ("Python", "fails", "needed Python >=99"),
        ("packages", "fails", "needed pip install 'zarr>=99' 'nothing-of-the-kind==1.5'"),
        ("packages", "fails", "nothing-of-the-kind is missing"),
        ("GPU", "fails", "NVIDIA H200, 580.1, "),
        (
            "GPU",
            "fails",
            "a driver for CUDA" if torch.version.cuda else "pip install --force-reinstall torch==",
        ),
        ("open files", "warning", "512 at most; needed 4096 or more: ulimit -n 8192"),
        ("S3 credentials", "fails", "PartialCredentialsError"),
        ("list http://…@127.0.0.1", "fails", "Cannot connect"),
        ("list /proc", "ok", " entries"),
        ("write /proc", "fails", "Error"),
        ("cluster", "fails", "no Ray cluster answers at http://127.0.0.1:1; needed the address of its"),
        ("nodes", "fails", "nobody listens at 127.0.0.1:1; needed the address of a Ray cluster"),
    ):
        line = next(line for name, line in lines.items() if name.startswith(point))
        assert line.startswith(f"{state:<11} {point}"), line
        assert said in line


def test_wrong_options_are_refused():
    refused = ran("--write")
    assert (refused.returncode, refused.stderr) == (2, "error: --write alone: needed --url URL to write to\n")
    assert ran("--wite").returncode == 2


@pytest.fixture
def full(monkeypatch):
    """Makes every file system one with so many bytes free of 100 GB."""

    def make(free):
        values = list(os.statvfs("/"))
        # f_bsize, f_frsize, f_blocks, f_bfree, f_bavail
        values[:5] = [1, 1, 10**11, int(free), int(free)]
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))

    return make


def test_too_little_room_is_told(full, tmp_path, monkeypatch):
    full(2e9)
    assert stage.shared_memory().state == "ok"
    assert stage.disk(str(tmp_path)) == Finding(
        "warning", f"2.0 GB free of 100.0 GB in {tmp_path}", "10.0 GB or more"
    )
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = stage.spill_disk()
    assert (found.state, found.found) == ("fails", f"2.0 GB free of 100.0 GB in {tmp_path}")
    assert found.needed.startswith("5% free")
    full(64e6)
    found = stage.shared_memory()
    assert found.state == "warning"
    assert "0.1 GB free, and Ray's object store of 1.1 GB" in found.found
    assert "--shm-size=2g" in found.needed
    full(2e10)
    assert {stage.disk().state, stage.spill_disk().state} == {"ok"}


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: 20e9)
    for used, state in ((19.5e9, "fails"), (17e9, "warning"), (10e9, "ok")):
        monkeypatch.setattr("ray._private.utils.get_used_memory", lambda used=used: used)
        assert stage.memory().state == state


def test_a_gpu_that_pytorch_cannot_use_is_told(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("PyTorch sees a GPU")
    monkeypatch.setenv("PATH", script(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H200, 470.1'"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = stage.gpu()
    assert found.state == "fails"
    assert "a driver for CUDA 13.0" in found.needed
    script(tmp_path / "bin", "nvidia-smi", "echo 'no driver is loaded' >&2; exit 9")
    assert stage.gpu() == Finding("fails", "nvidia-smi: no driver is loaded", "a driver that runs")


def test_it_runs_where_ray_and_pytorch_do_not(tmp_path):
    for name in ("ray", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')\n")
    where = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "RAY_ADDRESS": "127.0.0.1:1"}
    done = ran("--json", "--url", "nothing://a", **where)
    assert done.returncode == 1, done
    found = points(done)
    assert {point for point in POINTS if found[point]["state"] == "not checked"} == {
        "GPU",
        "/dev/shm",
        "memory",
    }
    assert found["GPU"]["found"] == "ImportError: torch is broken"
    assert found["list nothing://a"]["state"] == "fails"
    assert found["list nothing://a"]["needed"] == "a path or an fsspec URL"
    for point in ("cluster", "nodes"):
        assert (found[point]["state"], found[point]["found"]) == ("fails", "ImportError: ray is broken")


def test_code_that_was_sent_along_has_no_requirements(monkeypatch):
    monkeypatch.setattr(stage, "DISTRIBUTION", "nothing-of-the-kind")
    found = dict(itertools.islice(stage.look([], False, None), 2))
    why = "PackageNotFoundError: No package metadata was found for nothing-of-the-kind"
    assert found == {"Python": Finding("not checked", why), "packages": Finding("not checked", why)}


# ---------------------------------------------------------------------------------------- the cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes, the second with another zarr, another state of our code and a clock that is slow."""
    other = tmp_path_factory.mktemp("other")
    distribution(other, "zarr", "1.0")
    (other / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 100\n")
    (other / "pipelines").mkdir()
    (other / "pipelines" / "__init__.py").touch()
    (other / "pipelines" / "version.py").write_text("code_version = lambda: '0.0.1+abc'\n")
    with cluster(1, 1, last={"PYTHONPATH": f"{other}{os.pathsep}{ROOT}"}) as found:
        yield found


def alive(nodes):
    """How many nodes there are."""
    headers = {"Authorization": f"Bearer {nodes.token}"}
    with urlopen(Request(f"{nodes.dashboard}/api/v0/nodes", headers=headers)) as said:
        return sum(node["state"] == "ALIVE" for node in json.load(said)["data"]["result"]["result"])


def test_nodes_that_differ_are_told(nodes, tmp_path):
    how = {name: value for name, value in nodes.environment.items() if name.startswith("RAY_")}
    done = ran("--json", cwd=tmp_path, RAY_ADDRESS=nodes.address, **how)
    assert done.returncode == 1, done
    found = points(done)
    assert found["cluster"]["state"] == "ok"
    assert nodes.dashboard in found["cluster"]["found"]
    assert found["nodes"]["state"] == "fails"
    said = found["nodes"]["found"].split("; ")
    assert len({text.partition("): ")[0] for text in said}) == 1
    assert [text.partition("): ")[2] for text in said] == [
        f"zarr 1.0, here {zarr.__version__}",
        f"earthformer 0.0.1+abc, here {code_version()}",
        "its clock is -100 s off",
    ]
    assert found["nodes"]["needed"] == "the same versions everywhere, time by NTP"
    # Without it all nodes are alike, also as a job sees them.
    os.kill(nodes.raylets[-1], signal.SIGKILL)
    while alive(nodes) > 1:
        time.sleep(0.5)
    command = [sys.executable, "-m", "cluster.cli", "submit", "--address", nodes.dashboard, "--wait", "--"]
    sent = subprocess.run(
        [*command, "doctor"], capture_output=True, text=True, timeout=200, env=nodes.environment
    )
    assert sent.returncode == 0, sent
    assert "ok          nodes: 1, all with the versions that are here, room in /dev/shm" in sent.stdout


def test_a_wrong_token_is_told(nodes):
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 10}
    done = ran("--json", "--address", nodes.dashboard, **wrong)
    assert done.returncode == 1
    found = points(done)
    assert (found["cluster"]["state"], found["nodes"]["state"]) == ("fails", "not checked")
    assert "wants its token" in found["cluster"]["found"]
    assert found["cluster"]["needed"].startswith("RAY_AUTH_MODE=token")


class Other(BaseHTTPRequestHandler):
    """The dashboard of a cluster of other versions."""

    def do_GET(self):
        meta = {"result": True, "data": {"rayVersion": "2.59.0", "pythonVersion": "3.12.1"}}
        said = {"version": "4", "ray_version": "2.59.0"} if self.path == "/api/version" else meta
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_):
        pass


def test_a_cluster_of_other_versions_is_told(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = dashboard(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        logging.disable(logging.NOTSET)
    assert found.state == "fails"
    assert "has Ray 2.59.0, Python 3.12.1, here is Ray 2" in found.found


def test_a_node_with_little_shared_memory_or_another_clock_is_told():
    here = {"versions": {"Python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}, "shm": 64e6}
    there = {**here, "span": (1000.0, 1001.0)}
    # A clock is off only if it cannot have been read in between.
    for told, off in ((1000.5, None), (999.0, None), (1003.0, None), (990.0, "-10 s"), (1006.4, "+5 s")):
        found = list(compared(here, {**there, "time": told}, 60e6))
        assert [each.found for each in found] == ([f"its clock is {off} off"] if off else [])
    (found,) = compared(here, {**there, "time": 1000.5}, 1e9)
    assert (found.state, found.found) == ("warning", "0.1 GB of /dev/shm for an object store of 1.0 GB")
    versions = {"Python": "3.12.0", "ray": "2.60.0", "torch": "2.14.0"}
    found = compared(here, {**there, "versions": versions, "time": 1000.5}, 1e6)
    assert [(each.state, each.found) for each in found] == [
        ("fails", "Python 3.12.0, here 3.11.7"),
        ("warning", "torch 2.14.0, here 2.13.0"),
    ]
