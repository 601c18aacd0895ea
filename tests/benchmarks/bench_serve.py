"""What HTTP costs: members a second through the service beside the same members drawn in a bare loop.

    make demo
    python tests/benchmarks/bench_serve.py --run demo/runs/denoiser --archive demo/archive.zarr

For 1 and 2 replicas and each number of members, in turn: the service draws them (one request, streamed), then
as many processes as replicas draw the same seeds in the same chunks with as many threads, and do nothing with
them. Also the time to the first probability, the gateway's memory, and a minute of 50 clients.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import numpy as np
import psutil
import torch

from earthformer.forecasters import drawn, prepared
from pipelines import plans, runs, series, windows
from pipelines.archives.store import open_archive
from pipelines.forecast_store import member_seeds
from pipelines.plans import Drawing

EVENTS = [
    {"name": f"≥ {threshold}", "variable": "vil", "threshold": threshold, "units": "1", "radius": 6}
    for threshold in (74, 133, 181)
]


def bare(arguments: argparse.Namespace) -> None:
    """Draw every n-th chunk of the members, and print how long it took and the longest chunk."""
    torch.set_num_threads(arguments.threads)
    run, key = runs.open_run(arguments.run), _key(arguments)
    drawing = plans.checked(Drawing(steps=arguments.steps), run)
    forecaster = run.forecaster()
    plans.set_up(forecaster, drawing, None)
    context = windows.read_context(run.config.task, open_archive(arguments.archive), key)
    seeds = member_seeds(0, [key], arguments.bare)
    chunks = torch.split(seeds, arguments.chunk, 1)[arguments.offset :: arguments.stride]
    drawn(forecaster, prepared(forecaster, torch.from_numpy(context)), chunks[0])  # warm
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    known = prepared(forecaster, torch.from_numpy(context))
    for chunk in chunks:
        drawn(forecaster, known, chunk)
    print(time.perf_counter() - began, flush=True)


def _key(arguments: argparse.Namespace) -> series.Window:
    task = runs.open_run(arguments.run).config.task
    return windows.enumerate_windows(task, open_archive(arguments.archive), "test")[0]


def bare_seconds(arguments: argparse.Namespace, members: int, replicas: int) -> float:
    """Seconds of the slowest of as many processes as replicas, started together."""
    threads = max(1, len(os.sched_getaffinity(0)) // replicas)
    same = [sys.executable, __file__, "--run", arguments.run, "--archive", arguments.archive]
    same += ["--chunk", str(arguments.chunk), "--steps", str(arguments.steps), "--bare", str(members)]
    each = [
        subprocess.Popen(
            [*same, "--threads", str(threads), "--stride", str(replicas), "--offset", str(offset)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for offset in range(replicas)
    ]
    for process in each:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in each:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in each)


class Service:
    """`earthformer serve` on this machine."""

    def __init__(self, arguments: argparse.Namespace, replicas: int, folder: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = ["earthformer", "serve", "--run", arguments.run, "--archive", f"a={arguments.archive}"]
        command += ["--results", folder, "--replicas", str(replicas), "--chunk", str(arguments.chunk)]
        self.process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
        while True:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.5)
        inside = psutil.Process(self.process.pid).children(recursive=True)
        self.gateway = next(p for p in inside if ":gateway" in " ".join(p.cmdline()[:1]))
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while True:
                self.peak = max(self.peak, self.gateway.memory_info().rss)
                time.sleep(0.05)

    def draw(self, asked: dict) -> tuple[float, float, dict]:
        """Seconds to the end and to the first probability, and the last status."""
        began, first, status = time.perf_counter(), 0.0, {}
        accept = {"Accept": "application/x-ndjson"}
        with httpx.stream(
            "POST", f"{self.url}/v1/forecasts", json=asked, headers=accept, timeout=None
        ) as answer:
            for line in answer.iter_lines():
                status = json.loads(line)
                if status["members"]["drawn"] and not first:
                    first = time.perf_counter() - began
        assert status["status"] == "complete", status
        return time.perf_counter() - began, first, status

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


async def load(url: str, asked: dict, clients: int, seconds: float) -> None:
    """Print the answers by kind (right ones are those of a forecast made alone), and how fast a 503 is."""
    found: collections.Counter = collections.Counter()
    turned_away: list[float] = []
    everyone = httpx.Limits(max_connections=None)

    async def client(http: httpx.AsyncClient, right: list, stop: float) -> None:
        while time.monotonic() < stop:
            began = time.monotonic()
            answer = await http.post("/v1/forecasts", params={"wait": "true"}, json=asked)
            if answer.status_code == 503:
                turned_away.append(time.monotonic() - began)
                found["503"] += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]))
            else:
                whole = answer.status_code == 200 and answer.json()["events"] == right
                found["right" if whole else "wrong"] += 1

    # One client for all connections: to make each takes 50 ms of a processor.
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=everyone) as http:
        right = (await http.post("/v1/forecasts", params={"wait": "true"}, json=asked)).json()["events"]
        stop = time.monotonic() + seconds
        await asyncio.gather(*(client(http, right, stop) for _ in range(clients)))
    half, most = np.quantile(turned_away, [0.5, 0.99])
    print(
        f"    {clients} clients for {seconds:.0f} s: {dict(found)}; a 503 after {half:.2f} s, 99 % within "
        f"{most:.2f} s, all within {max(turned_away):.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True)
    parser.add_argument("--archive", required=True)
    parser.add_argument("--members", default="32,128,512")
    parser.add_argument("--replicas", default="1,2")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--bare", type=int, default=0, help=argparse.SUPPRESS)
    for name, default in (("threads", 2), ("stride", 1), ("offset", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments)
        return
    key = _key(arguments)
    asked = {"context": {"archive": "a", "event": key.series, "start": key.start}, "steps": arguments.steps}
    asked |= {"events": EVENTS}
    for replicas in map(int, arguments.replicas.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            service = Service(arguments, replicas, folder)
            service.draw(asked | {"members": 8 * replicas})
            for members in map(int, arguments.members.split(",")):
                service.peak = 0
                seconds, first, status = service.draw(asked | {"members": members})
                peak = service.peak
                alone = bare_seconds(arguments, members, replicas)
                chunk = status["timings"]["device_seconds"] / -(-members // arguments.chunk)
                print(
                    f"{replicas} replicas, {members:4d} members: {members / seconds:6.2f} members/s by HTTP, "
                    f"{members / alone:6.2f} in a bare loop ({seconds / alone - 1:+.1%}); first probability "
                    f"after {first:.2f} s = {first / chunk:.2f} chunks; gateway at most {peak / 1e6:.0f} MB",
                    flush=True,
                )
            if arguments.seconds:
                asked_often = asked | {"members": 8}
                asyncio.run(load(service.url, asked_often, 50, arguments.seconds / 3))
                before = service.gateway.memory_info().rss
                asyncio.run(load(service.url, asked_often, 50, arguments.seconds))
                after = service.gateway.memory_info().rss
                print(f"    gateway {before / 1e6:.0f} → {after / 1e6:.0f} MB", flush=True)
            service.stop()


if __name__ == "__main__":
    main()
