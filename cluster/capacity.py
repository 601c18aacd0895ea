"""What a Ray cluster has, and whether it can ever do what is asked of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray.util.state import list_nodes

from pipelines.errors import InputError

UNITS = {"memory": 1e6}


@dataclass(frozen=True)
class Need:
    """So many equal bundles of resources, at the same time."""

    what: str
    each: Mapping[str, float]
    count: int


def nodes(address: str) -> list[dict[str, float]]:
    """The resources of each node that is up."""
    found = list_nodes(address, detail=True, filters=[("state", "=", "ALIVE")], limit=10_000)
    return [dict(node.resources_total) for node in found]


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
