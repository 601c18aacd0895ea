"""What a Ray cluster has, now or when it has grown, and whether that is enough for what is asked of it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.clusters import NODE_GROUP
from pipelines.errors import InputError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LONE = re.compile(r"node_[0-9a-f]{56}")
"""The type of a node that has none, as Ray reports it where nothing grows."""
PLENTY = 1e15


@dataclass(frozen=True)
class Need:
    """So many equal bundles of resources, at the same time."""

    what: str
    each: Mapping[str, float]
    count: int


def check(needs: Sequence[Need], client: "JobSubmissionClient", file: str | None = None) -> str:
    """Refuse what a cluster can never do; returns in words what could not be told, or nothing.

    The dashboard knows the nodes that are up, and not what an autoscaler may add to them.

    Args:
        needs: what is asked for.
        client: of the cluster.
        file: the cluster's own YAML, to count the nodes that it has when it has grown.

    Raises:
        InputError: a node, or all of them, are too small; the file describes no cluster.
    """
    from ray.util.state import list_nodes

    if file is not None:
        refuse_impossible(needs, grown(file))
        return ""
    # Were Ray to leave out the dead ones, it would complain of an answer that is not whole.
    known = list_nodes(client.get_address(), detail=True, limit=10_000)
    up = [node for node in known if node.state == "ALIVE"]
    try:
        refuse_impossible(needs, [node.resources_total for node in up])
    except InputError as error:
        status = client._do_request("GET", "/api/cluster_status").json()
        if not grows([node.labels or {} for node in up], status):
            raise
        found, _, _ = str(error).partition(": needed")
        return f"{found}; it may grow by itself, and whether far enough was not checked: --cluster-file does"
    return ""


def refuse_impossible(needs: Iterable[Need], nodes: Sequence[Mapping[str, float]]) -> None:
    """
    Raises:
        InputError: no node has as much of a resource as one bundle needs, or all nodes hold too few bundles.
    """
    for need in needs:
        for name, amount in need.each.items():
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if amount > most:
                raise InputError(
                    f"{need.what} needs {_amount(name, amount)}, and the largest of {len(nodes)} nodes has "
                    f"{_amount(name, most)}: needed fewer, or a larger cluster"
                )
        room = sum(min(int(node.get(n, 0.0) / a) for n, a in need.each.items()) for node in nodes)
        if room < need.count:
            each = " and ".join(_amount(name, amount) for name, amount in need.each.items())
            raise InputError(
                f"{need.count} times {need.what} of {each} each, and the cluster's {len(nodes)} nodes hold "
                f"{room} at a time: needed fewer, or a larger cluster"
            )


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e6:.0f} MB of memory" if name == "memory" else f"{amount:g} {name}"


# ---------------------------------------------------------------------------------------------- growth


def grows(labels: Iterable[Mapping[str, str]], status: Mapping[str, Any]) -> bool:
    """Whether something may add nodes to a cluster.

    Args:
        labels: of its nodes. Ray's autoscaler (v2) names the group of each, and so does KubeRay without one.
        status: what the dashboard's `/api/cluster_status` answers. Ray's former autoscaler (v1) reports which
            type each node has; so does Ray without one, and then each node is its own type.
    """
    report = (status["data"].get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = (report.get("nodeTypeMapping") or {}).values()
    return any(NODE_GROUP in each for each in labels) or not all(map(LONE.fullmatch, types))


def grown(file: str) -> list[dict[str, float]]:
    """The resources of each node that a cluster has at most, by its own YAML.

    There is plenty of what the file says nothing about, such as what a cloud's machine has.

    Raises:
        InputError: the file is neither KubeRay's RayCluster nor one of Ray's cluster launcher.
    """
    needed = "needed one KubeRay RayCluster, or a file of Ray's cluster launcher"
    if not Path(file).is_file():
        raise InputError(f"--cluster-file {file} is absent: {needed}")
    try:
        documents = yaml.safe_load_all(Path(file).read_text())
        configs = [_config(document) for document in documents if _is_cluster(document)]
    except Exception as error:  # of as many kinds as there are ways to write such a file wrongly
        why = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(f"--cluster-file {file} cannot be read ({why}): {needed}") from error
    if len(configs) != 1:
        raise InputError(f"--cluster-file {file} describes {len(configs)} clusters: {needed}")
    (config,) = configs
    found = []
    for name, kind in config["available_node_types"].items():
        count = min(kind["max_workers"], config["max_workers"]) + (name == config["head_node_type"])
        # Of KubeRay's pods memory alone may be left unsaid; a launcher asks its cloud for the rest.
        unsaid = ("memory",) if config["provider"]["type"] == "kuberay" else ("CPU", "GPU", "memory")
        found += count * [{**dict.fromkeys(unsaid, PLENTY), **kind["resources"]}]
    return found


def _is_cluster(document: Any) -> bool:
    return isinstance(document, dict) and (
        document.get("kind") == "RayCluster" or "available_node_types" in document
    )


def _config(document: dict[str, Any]) -> dict[str, Any]:
    # Ray's own reading of both, by which its autoscaler acts.
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import prepare_config

    if document.get("kind") != "RayCluster":
        return prepare_config(document)
    document["metadata"].setdefault("namespace", "default")
    return _derive_autoscaling_config_from_ray_cr(document)
