"""`earthformer serve` as its own process: who may come in, how it stops, and what it is built from."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from tiny_service import Served, free_port

from pipelines import cli, serve
from pipelines.errors import InputError
from pipelines.serving.settings import Settings, named, resolve

TOKEN = "correct-horse-battery-staple"
CONFIG = Path(__file__).parents[2] / "cluster" / "serve.yaml"


@pytest.fixture(scope="module")
def started(tmp_path_factory, ensemble_archive, ensemble_runs):
    """The command, running, and its process."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    (folder / "token").write_text(TOKEN + "\n")
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--run", ensemble_runs["denoiser"]]
    command += ["--archive", f"storms={ensemble_archive}", "--results", str(folder / "results")]
    command += ["--token-file", str(folder / "token"), "--port", str(port), "--set", "drain_seconds=60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(900):
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    window = {"archive": "storms", "event": "S800008", "start": 0}
    yield process, Served(url, ensemble_archive, ensemble_runs, folder / "results", window)
    process.kill()


def test_nobody_comes_in_without_the_token(started):
    _, served = started
    asked = served.request(members=2)
    with httpx.Client(base_url=served.url, timeout=60) as http:
        for headers in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer é".encode()},
        ):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/forecasts")):
                answer = http.request(method, path, headers=headers, json=asked if method == "POST" else None)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert TOKEN not in answer.text
        for path in ("/", "/healthz", "/readyz", "/docs"):
            assert http.get(path).status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_it_listens_on_loopback_alone(started):
    _, served = started
    port = int(served.url.rpartition(":")[2])
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not address.startswith("127."):
            with socket.socket() as other, pytest.raises(OSError, match="refused"):
                other.connect((address, port))


def test_at_shutdown_what_is_under_way_ends_and_nothing_else_begins(started):
    process, served = started
    right = {"Authorization": f"Bearer {TOKEN}"}

    async def asks():
        async with httpx.AsyncClient(base_url=served.url, timeout=120, headers=right) as http:
            asked = served.request(members=32, steps=8)
            under_way = asyncio.create_task(http.post("/v1/forecasts", params={"wait": "true"}, json=asked))
            while "running 1.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            answers = []
            while not under_way.done():
                try:
                    answers.append((await http.post("/v1/forecasts", json=asked)).status_code)
                except httpx.TransportError:
                    answers.append(503)
                await asyncio.sleep(0.2)
            return await under_way, answers

    answer, others = asyncio.run(asks())
    assert answer.status_code == 200
    assert answer.json()["status"] == "complete"
    assert others[-1] == 503
    assert process.wait(120) == 0
    said = process.stdout.read()
    assert "Traceback" not in said, said


def test_a_second_signal_ends_what_a_first_one_asks_to_stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopping = serve.signalled()
        assert not stopping.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stopping.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_it_is_open_to_others_only_with_a_token(ensemble_runs, capsys, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("short\n")
    for words, message in (
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in: needed --token-file beside it"),
        (["--token-file", str(tmp_path / "token")], "has 5 characters in its first line: needed 16 or more"),
        (["--token-file", str(tmp_path / "none")], "cannot be read"),
        (["--run", ensemble_runs["autoencoder"]], "is a run of autoencoder: needed one of a denoiser"),
        (["--run", str(tmp_path)], "is not a run"),
        (["--set", "max_member=3"], "setting 'max_member' is unknown: the nearest is 'max_members'"),
        (["--set", "max_members=1"], "max_members is 1: Input should be greater than or equal to 2"),
        (["--archive", "a=x", "--archive", "a=y"], "two archives are named 'a'"),
        (["--archive", str(tmp_path)], "is not a store"),
    ):
        monkeypatch.setattr("sys.argv", ["earthformer", "serve", "--run", ensemble_runs["denoiser"], *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_settings_say_what_is_wrong_with_them():
    assert named(["demo/archive.zarr", "b=s3://x/y"]) == {"archive": "demo/archive.zarr", "b": "s3://x/y"}
    with pytest.raises(InputError, match="no run is given: needed --run"):
        resolve(None, {}, [])
    with pytest.raises(InputError, match="min_replicas is 3: needed at most replicas, 1"):
        resolve(None, {"run": "r"}, ["min_replicas=3"])


def test_the_configuration_for_serve_deploy_builds_the_application():
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (one,) = config.applications
    assert one.import_path == "pipelines.serve:application"
    settings = Settings.model_validate(one.args)
    assert settings.token_file is not None
    built = serve.application(settings)
    sampler = built._bound_deployment.init_args[1]._bound_deployment
    assert sampler.ray_actor_options["num_gpus"] == 1
    assert sampler._deployment_config.autoscaling_config.min_replicas == 0
    assert sampler._deployment_config.autoscaling_config.max_replicas == 8
