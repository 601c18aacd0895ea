"""What the tests of the service share."""

import socket
from dataclasses import dataclass
from pathlib import Path

EVENTS = [
    {"name": "rain", "variable": "vil", "threshold": 60, "units": "1"},
    {"name": "near", "variable": "vil", "threshold": 60, "units": "1", "radius": 6, "lead_time": [10, 10]},
]


@dataclass(frozen=True)
class Served:
    """Where the service is, and what it is made of."""

    url: str
    archive: str
    """URL of the archive, whose name is `storms`."""
    runs: dict[str, str]
    results: Path
    window: dict[str, object]
    """A context to ask for."""

    def request(self, **more: object) -> dict[str, object]:
        """A small forecast."""
        return {"context": self.window, "members": 16, "steps": 2, "events": EVENTS, **more}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
