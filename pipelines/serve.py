"""The service on Ray Serve: a gateway that speaks HTTP, and replicas of the model.

`application` builds it from typed arguments, for `earthformer serve` as for `serve deploy`.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipelines import engine
from pipelines.errors import InputError
from pipelines.serving import api
from pipelines.serving.model import Model
from pipelines.serving.sampler import Sampler
from pipelines.serving.service import AHEAD, Service, threads
from pipelines.serving.settings import LOOPBACK, Settings, first_line

NAME = "earthformer"
SWITCH_SECONDS = 5e-4
PROXY_SECONDS = 1.0
MOST_REQUESTS = 1000
"""Connections at a time; forecasts have limits of their own."""


@serve.ingress()
class Gateway:
    """Speaks HTTP, splits forecasts into chunks, and folds what the replicas draw."""

    def __init__(self, settings: Settings, sampler: DeploymentHandle) -> None:
        engine.quiet()
        # Requests pass through several threads, each of which waits for those that fold and write to let go.
        sys.setswitchinterval(SWITCH_SECONDS)
        self.service = Service(settings, sampler)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return api.build(self.service)

    async def drain(self) -> None:
        """Take no more forecasts, let those under way end, and answer who waits for them."""
        await self.service.stop()
        for _ in range(50):
            if self.service.answering == 0:
                break
            await asyncio.sleep(0.1)
        # What is answered has yet to be passed on by the proxy, which may end before.
        await asyncio.sleep(PROXY_SECONDS)


def application(settings: Settings) -> Application:
    """The Serve application; `serve deploy` calls it with a configuration's `args`."""
    absolute = settings.model_copy(
        update={
            "run": engine.absolute(settings.run),
            "alignment": engine.absolute(settings.alignment) if settings.alignment else None,
            "results": engine.absolute(settings.results),
            "archives": {name: engine.absolute(url) for name, url in settings.archives.items()},
            "token_file": engine.absolute(settings.token_file) if settings.token_file else None,
        }
    )
    same: dict[str, Any] = {"max_ongoing_requests": MOST_REQUESTS, "health_check_period_s": 5}
    each: dict[str, Any] = {
        **same,
        "ray_actor_options": {"num_gpus": 1} if settings.gpu else {"num_cpus": 0.5},
    }
    if settings.min_replicas is None:
        each["num_replicas"] = settings.replicas
    else:
        each["autoscaling_config"] = {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.replicas,
            "target_ongoing_requests": AHEAD,
            "upscale_delay_s": 2,
            "downscale_delay_s": settings.idle_seconds,
        }
    sampler: Any = serve.deployment(name="sampler", **each)(Sampler)
    gateway: Any = serve.deployment(
        name="gateway",
        **same,
        max_queued_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
    )(Gateway)
    model = sampler.bind(absolute.run, absolute.alignment, settings.gpu, threads(settings))
    built: Application = gateway.bind(absolute, model)
    return built


@dataclass(frozen=True)
class Running:
    """A service on this process's cluster."""

    settings: Settings
    gateway: DeploymentHandle
    stopping: threading.Event

    def until_stopped(self) -> None:
        """Wait for SIGTERM or SIGINT; then let what is under way end, and stop."""
        self.stopping.wait()
        self.gateway.drain.remote().result(timeout_s=self.settings.drain_seconds + 20)
        # Not all of Serve: on a cluster others may have applications, and alone it ends with this process.
        serve.delete(NAME)


def run(settings: Settings, host: str, port: int) -> Running:
    """Start the service on this process's cluster; returns when it answers.

    Raises:
        InputError: it would be open to others without a token; the run or an archive is not as needed.
    """
    if host not in LOOPBACK and settings.token_file is None:
        raise InputError(f"--host {host} lets others in: needed --token-file beside it")
    if settings.token_file is not None:
        first_line(settings.token_file)
    # What is wrong with the arguments is said here, in one line, rather than by a replica.
    Model.open(settings)
    # Ray has its workers give way to all else; of ours only the replicas of the model shall.
    os.environ.setdefault("RAY_worker_niceness", "0")
    engine.connect(settings.replicas)
    # After Ray's own handlers, and before anybody can ask for anything.
    stopping = signalled()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    gateway = serve.run(application(settings), name=NAME, route_prefix="/")
    return Running(settings, gateway, stopping)


def signalled() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second one ends the process at once."""
    found = threading.Event()

    def heard(number: int, _: FrameType | None) -> None:
        found.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return found
