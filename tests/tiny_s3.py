"""A real S3 server on this machine (SeaweedFS), in a process of its own.

It has one user, who may do everything, and two buckets: `private`, and `public`, which anybody may read and
list without a key. The process prints the number of the server's when it is up, and ends when its input does.
"""

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tiny_service import free_port

BUCKETS = ("private", "public")
PORTS = (
    "s3.port.grpc",
    *(f"{part}.port{kind}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")),
)


@dataclass
class S3:
    """Where it is, or will be, and how to be let in."""

    port: int
    key: str = field(default_factory=lambda: secrets.token_hex(10))
    secret: str = field(default_factory=lambda: secrets.token_hex(20))
    pid: int = 0
    """Of the server, once it is up."""

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process in which `s3://private/…` is to be here."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Without a key nobody is to be asked for one.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Meanwhile it takes what is sent, and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def reserved() -> S3:
    """A place for a server, to be told to other processes before it is up.

    Its port is none of those that the system gives to whoever asks for any.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return S3(port)
    raise AssertionError("no free port")


@contextlib.contextmanager
def serving(s3: S3) -> Iterator[S3]:
    """The server, at the place that was reserved for it."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(s3.port)],
        env=os.environ | s3.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        s3.pid = int(process.stdout.readline() or 0)
        assert s3.pid, "the S3 server did not start"
        yield s3
    finally:
        process.stdin.close()
        process.wait(60)


def _command(folder: str, port: int, others: list[int]) -> list[str]:
    user = {"name": "admin", "actions": ["Admin"]}
    key = {"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    anybody = {"name": "anonymous", "actions": ["Read:public", "List:public"]}
    config = Path(folder) / "s3.json"
    config.write_text(json.dumps({"identities": [{**user, "credentials": [key]}, anybody]}))
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 256,
        "volume.max": 0,
        "filer.localSocket": f"{folder}/filer.sock",
        "s3.localSocket": f"{folder}/s3.sock",
        "s3.config": config,
        "s3.port": port,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **dict(zip(PORTS, others, strict=True)),
    }
    weed = str(Path(sys.executable).parent / "weed")
    return [weed, "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]


def _wait(s3: S3, server: subprocess.Popen) -> None:
    import fsspec

    while server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{s3.endpoint}/healthz", timeout=5).close()
            break
        time.sleep(0.05)
    fs = fsspec.filesystem("s3")
    for bucket in BUCKETS:
        fs.mkdir(bucket)
        # The first file of a bucket waits until there is room for it.
        fs.pipe_file(f"{bucket}/up", b"")
        fs.rm_file(f"{bucket}/up")


def main() -> None:
    s3, others = S3(int(sys.argv[1])), [free_port() for _ in PORTS]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        server = subprocess.Popen(_command(folder, s3.port, others), cwd=folder, stdout=log, stderr=log)
        try:
            _wait(s3, server)
            print(server.pid, flush=True)
            sys.stdin.read()
        finally:
            # It takes long to say goodbye to itself, and nothing of it is to stay.
            server.kill()
            server.wait()
            for port in others:
                for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    socket_file.unlink()


if __name__ == "__main__":
    main()
