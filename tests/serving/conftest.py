"""One service for all of its tests, on the suite's cluster, with a real HTTP server."""

from collections.abc import Iterator

import httpx
import pytest
from tiny_service import Served, free_port


@pytest.fixture(scope="package")
def served(tmp_path_factory, ensemble_archive, ensemble_runs) -> Iterator[Served]:
    """The service: two replicas, chunks of 4 members, at most 2 forecasts at a time and 3 that wait."""
    from ray import serve

    from pipelines import serve as stage
    from pipelines import windows
    from pipelines.archives import store
    from pipelines.runs import open_run
    from pipelines.serving.settings import Settings

    results, port = tmp_path_factory.mktemp("results"), free_port()
    settings = Settings(
        run=ensemble_runs["denoiser"],
        archives={"storms": ensemble_archive},
        alignment=ensemble_runs["alignment"],
        results=str(results),
        replicas=2,
        chunk=4,
        max_members=256,
        max_steps=64,
        max_events=8,
        max_body_mb=2,
        max_running=2,
        max_waiting=3,
        drain_seconds=5,
    )
    task = open_run(ensemble_runs["denoiser"]).config.task
    key = windows.enumerate_windows(task, store.open_archive(ensemble_archive), "test")[0]
    window = {"archive": "storms", "event": key.series, "start": key.start}
    stage.run(settings, "127.0.0.1", port)
    yield Served(f"http://127.0.0.1:{port}", ensemble_archive, ensemble_runs, results, window)
    serve.shutdown()


@pytest.fixture
def http(served) -> Iterator[httpx.Client]:
    """A client of the service."""
    with httpx.Client(base_url=served.url, timeout=120) as client:
        yield client
