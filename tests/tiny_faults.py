"""A way to a server on which things go wrong: it answers for it, stalls, and drops connections.

It stands before an S3 server, in threads of this process, and counts what passes.
"""

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class Faults(ThreadingHTTPServer):
    """The server's place for its clients; `share` of the requests go wrong, and all wait `delay` seconds."""

    daemon_threads = True

    def __init__(self, upstream: int, share: float, seed: int, delay: float) -> None:
        self.upstream, self.share, self.random, self.delay = upstream, share, random.Random(seed), delay
        self.lock, self.done, self.sent = threading.Lock(), Counter(), 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fate(self) -> str:
        """What becomes of the next request."""
        with self.lock:
            faults = ("503", "500", "stalled", "refused", "dropped")
            fate = self.random.choice(faults) if self.random.random() < self.share else "well"
            self.done[fate] += 1
            return fate

    def handle_error(self, *_: object) -> None:
        """Clients go away, as they are made to."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faults

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _pass(self) -> None:
        fate = self.server.fate()
        if fate == "refused":
            # Before the body is read, so that a client that sends one is cut off.
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fate in ("503", "500"):
            self._answer(int(fate), {}, SLOW_DOWN if fate == "503" else BROKEN)
            return
        time.sleep(0.5 if fate == "stalled" else self.server.delay)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        found = upstream.getresponse()
        content = found.read()
        upstream.close()
        headers = {
            k: v for k, v in found.getheaders() if k.lower() not in ("transfer-encoding", "connection")
        }
        self._answer(found.status, headers, content, cut=fate == "dropped")

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers) and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        part = content[: len(content) // 2] if cut else content
        with self.server.lock:
            self.server.sent += len(part)
        self.wfile.write(part)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


@contextlib.contextmanager
def faults(upstream: int, share: float = 0.0, seed: int = 0, delay: float = 0.0) -> Iterator[Faults]:
    """A proxy of the server at a port of this machine."""
    server = Faults(upstream, share, seed, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
