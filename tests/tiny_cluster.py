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
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tiny_service import free_port

STORE = 200_000_000
"""Bytes of a node's object store."""


@dataclass(frozen=True)
class Cluster:
    """Where it is, and how to be let in."""

    dashboard: str
    address: str
    """Of its GCS, for RAY_ADDRESS."""
    raylets: list[int]
    """Processes of its nodes, the head's first."""
    token: str
    process: subprocess.Popen

    def add(self, cpus: int) -> None:
        """Add a node with so many processors."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(cpus, file=self.process.stdin, flush=True)
        self.raylets.append(json.loads(self.process.stdout.readline())["raylet"])

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to be let in."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**outside, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def cluster(*cpus: int, grows: int = 0, last: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster of nodes with so many processors each; Ray adds up to `grows` with one when needed.

    The environment of the last node may have other variables.
    """
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
        [sys.executable, __file__, str(grows), json.dumps(dict(last or {})), *map(str, cpus)],
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
                yield Cluster(**json.loads(line), token=token, process=process)
                return
        raise AssertionError("the cluster did not start")
    finally:
        process.stdin.close()
        process.wait(60)


def _own() -> dict[str, int]:
    """Of each node, so that they do not take one another's."""
    return {"object_store_memory": STORE, "dashboard_agent_listen_port": free_port()}


def _autoscaler(folder: str, most: int) -> dict[str, Any]:
    """Of a head, to have Ray's autoscaler start up to so many nodes on this machine."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields
    from ray.util import get_node_ip_address

    port, head = free_port(), "f" * 51 + "00000"
    config = {
        "cluster_name": "tiny",
        "max_workers": most,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{port}",
            "head_node_id": head,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {
                "resources": {"CPU": 1, "object_store_memory": STORE},
                "node_config": {},
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 5,
        "upscaling_speed": 100,
        **_generate_legacy_autoscaling_config_fields(),
    }
    path = Path(folder) / "autoscaler.yaml"
    path.write_text(json.dumps(config))
    # As `ray up` sets them, and KubeRay.
    os.environ |= {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": "ray.head.default"}
    os.environ |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    named = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": head, "RAY_CLOUD_INSTANCE_ID": head}
    return {"gcs_server_port": port, "autoscaling_config": str(path), "env_vars": named}


def main() -> None:
    from ray.cluster_utils import Cluster as Nodes

    port = free_port()
    head = {"include_dashboard": True, "dashboard_port": port, "dashboard_host": "127.0.0.1"}
    grows, last = int(sys.argv[1]), json.loads(sys.argv[2])
    first, *others = map(int, sys.argv[3:])
    with tempfile.TemporaryDirectory() as folder:
        head |= _autoscaler(folder, grows) if grows else {}
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": first, **head, **_own()})
        for number, count in enumerate(others, start=1):
            os.environ |= last if number == len(others) else {}
            nodes.add_node(num_cpus=count, **_own())
        nodes.wait_for_nodes()
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes.list_all_nodes()]
        said = {"dashboard": f"http://127.0.0.1:{port}", "address": nodes.address, "raylets": raylets}
        print(json.dumps(said), flush=True)
        for line in sys.stdin:
            added = nodes.add_node(num_cpus=int(line), **_own())
            print(json.dumps({"raylet": added.all_processes["raylet"][0].process.pid}), flush=True)
        # The autoscaler leaves what it has started.
        monitor = psutil.Process(nodes.head_node.all_processes["monitor"][0].process.pid)
        started = monitor.children(recursive=True)
        nodes.shutdown()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main()
