"""Drivers, workers and nodes are killed at any moment, and what comes out is as if nothing had happened."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny_archive import built, timeless
from tiny_cluster import cluster

from pipelines.archives import checks, sevir, synthetic

EVENTS = 90
KILLS = {"prepare": 20, "forecast": 4}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def nodes():
    # Nothing runs on the head, which stays.
    with cluster(0, 1, 1) as found:
        yield found


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "raw"
    synthetic.write_sevir(folder, events=EVENTS, seed=4, size=96)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory, raw):
    """An archive that was made undisturbed, an event a shard."""
    url = tmp_path_factory.mktemp("kills") / "whole.zarr"
    built(sevir.plan(str(raw), shard_mb=0), str(url))
    return url


def files(folder: Path) -> dict[str, bytes]:
    return timeless({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


class Watch:
    """Sees when each shard is done, and whether it is done again."""

    def __init__(self, url: Path) -> None:
        self.url, self.seen, self.over = url, {}, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def stats(self) -> dict[str, int]:
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for record in self.url.glob("records/0*.json"):
                found[record.name] = record.stat().st_mtime_ns
        return found

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            for name, when in self.stats().items():
                self.seen.setdefault(name, when)


def command(nodes, verb: str, *arguments: object) -> subprocess.Popen:
    """A driver that joins the cluster."""
    words = [sys.executable, "-m", "pipelines.cli", verb, *map(str, arguments)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(words, env=nodes.environment | {"RAY_ADDRESS": nodes.address}, **how)


def workers(nodes) -> list[psutil.Process]:
    """Processes that are at a shard, or wait for one."""
    found = []
    for raylet in nodes.raylets[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if re.search(r"_write_shard|_Replica", "".join(child.cmdline()[:1])):
                        found.append(child)
    return found


def kill(nodes, what: str, driver: subprocess.Popen, chance: random.Random) -> bool:
    """Whether there was such a thing to kill."""
    if what == "driver":
        driver.kill()
        driver.communicate()
        return True
    # A worker that is busy, or a node with one.
    while not (busy := workers(nodes)):
        if driver.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 0.5))
    if what == "worker":
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(busy).kill()
        return True
    lost = nodes.raylets.pop(chance.randrange(1, len(nodes.raylets)))
    os.kill(lost, signal.SIGKILL)
    nodes.add(1)
    return True


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("verb", ["prepare", "forecast"])
def test_any_number_of_kills_changes_nothing(tmp_path, nodes, raw, archive, verb):
    chance, killed, rounds = random.Random(7), [], 0
    kinds = [chance.choice(["driver", "worker", "node"]) for _ in range(KILLS[verb])]
    assert set(kinds) == {"driver", "worker", "node"}
    while len(killed) < KILLS[verb]:
        url, rounds = tmp_path / f"{rounds}.zarr", rounds + 1
        if verb == "prepare":
            words = ["sevir", "--source", raw, "--archive", url, "--shard-mb", 0]
        else:
            more = ["--task", "sevir", "--members", 2, "--split", "train", "--limit", 40, "--workers", 2]
            words = ["--forecaster", "displaced", "--archive", archive, "--out", url, *more]
        with Watch(url) as watch:
            driver = command(nodes, verb, *words)
            while driver.poll() is None and len(killed) < KILLS[verb]:
                before = len(watch.stats())
                patience = chance.uniform(0, 8)
                until = time.monotonic() + patience
                # At any moment of its start, or soon after it has done something.
                while driver.poll() is None and time.monotonic() < until and len(watch.stats()) == before:
                    time.sleep(0.05)
                what = kinds[len(killed)]
                if driver.poll() is None and kill(nodes, what, driver, chance):
                    killed.append(what)
                    if what == "driver":
                        driver = command(nodes, verb, *words)
            out, err = driver.communicate(timeout=300)
            assert (driver.returncode, err) == (0, ""), out
        assert watch.stats() == watch.seen
        assert checks.validate(str(url)) == []
        if verb == "prepare":
            assert files(url) == files(archive)
        elif rounds == 1:
            first = files(url)
        else:
            assert files(url) == first
    if verb == "forecast":
        whole = command(nodes, verb, *words[:-10], "--out", tmp_path / "whole.zarr", *more)
        assert whole.wait(300) == 0
        assert files(tmp_path / "whole.zarr") == first


def test_two_commands_at_once_share_the_work(tmp_path, nodes, raw, archive):
    url = tmp_path / "a.zarr"
    words = ["sevir", "--source", raw, "--archive", url, "--shard-mb", 0]
    both = [command(nodes, "prepare", *words) for _ in range(2)]
    ended = [(*driver.communicate(timeout=300), driver.returncode) for driver in both]
    assert [(err, code) for _, err, code in ended] == [("", 0)] * 2
    assert files(url) == files(archive)
    counts = [store_count(out) for out, *_ in ended]
    assert EVENTS <= sum(counts) < 2 * EVENTS


def store_count(said: str) -> int:
    """Shards that a command says it has written."""
    last = said.splitlines()[-1]
    return 0 if "were there" in last else int(last.split("quarantined, ")[1].split("/")[0])
