"""A Ray cluster of several nodes on this machine, in a process of its own.

The first node is the head, with the dashboard that jobs are sent to. The process prints one line of JSON when
it is up, and ends when its standard input does.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_service import free_port


@dataclass(frozen=True)
class Cluster:
    """Where it is, and how to be let in."""

    dashboard: str
    address: str
    """Of its GCS, for RAY_ADDRESS."""
    raylets: list[int]
    """Processes of its nodes, the head's first."""
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to be let in."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**outside, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[Cluster]:
    """A cluster of nodes with so many processors each."""
    token = secrets.token_hex(32)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # A job is `python …`: that of the tests.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # A node that is killed is missed within seconds.
    environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    # As `engine.connect` has it: a process that has imported PyTorch is kept.
    environment |= {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, cpus)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield Cluster(**json.loads(line), token=token)
                return
        raise AssertionError("the cluster did not start")
    finally:
        process.stdin.close()
        process.wait(60)


def _own() -> dict[str, int]:
    """Of each node, so that they do not take one another's."""
    return {"object_store_memory": 200_000_000, "dashboard_agent_listen_port": free_port()}


def main() -> None:
    from ray.cluster_utils import Cluster as Nodes

    port = free_port()
    head = {"include_dashboard": True, "dashboard_port": port, "dashboard_host": "127.0.0.1"}
    first, *others = map(int, sys.argv[1:])
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": first, **head, **_own()})
    for count in others:
        nodes.add_node(num_cpus=count, **_own())
    nodes.wait_for_nodes()
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes.list_all_nodes()]
    said = {"dashboard": f"http://127.0.0.1:{port}", "address": nodes.address, "raylets": raylets}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    nodes.shutdown()


if __name__ == "__main__":
    main()
