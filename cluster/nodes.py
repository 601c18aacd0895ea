"""Checks of a cluster: its dashboard, and whether all of its nodes have what this machine has."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.findings import Finding, State, gb

PACKAGES = ("ray", "torch", "numpy", "xarray", "zarr", "dask")
"""Whose versions are compared, besides Python's and our own."""
ALIKE = {"Python", "ray", "earthformer"}
"""Where these differ tasks may not run; where others do, results may."""
SKEW_SECONDS = 2.0
NODE_SECONDS = 60.0


def dashboard(address: str | None) -> Finding:
    """Whether the cluster's dashboard answers, and of which versions it is."""
    if not (address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")):
        return Finding("not checked", "none is named", "RAY_ADDRESS, or --address, to look at one")
    import ray

    from cluster.submit import connected

    with connected(address) as client:
        said = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
        where = client.get_address()
    there = f"Ray {said['rayVersion']}, Python {said['pythonVersion']}"
    here = f"Ray {ray.__version__}, Python {platform.python_version()}"
    if here != there:
        return Finding("fails", f"{where} has {there}, here is {here}", "the same versions on both sides")
    return Finding("ok", f"{where} answers, {there}")


def nodes() -> Finding:
    """Whether all nodes of the cluster of RAY_ADDRESS have what this machine has, and the same time."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local") or address.startswith("http"):
        inside = "RAY_ADDRESS=HEAD:6379 on one of them, or `earthformer submit --wait -- doctor`"
        return Finding("not checked", "no cluster is named that can be joined from here", inside)
    import ray

    from pipelines import engine

    engine.connect()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    facts = _facts()
    # The second time the workers are up, so that an answer is soon there.
    answers = _answers(facts, list(alive))
    answers |= _answers(facts, [node for node, answer in answers.items() if isinstance(answer, dict)])
    here, wrong = facts(PACKAGES), []
    for node, about in alive.items():
        answer = answers.get(node, TimeoutError(f"no answer within {NODE_SECONDS:.0f} s"))
        if isinstance(answer, dict):
            seen = list(compared(here, answer, about["Resources"].get("object_store_memory", 0)))
        else:
            said = f"{type(answer).__name__} {answer}".splitlines()[0]
            seen = [Finding("fails", said, "nodes that run tasks")]
        where = f"{about['NodeManagerAddress']} ({node[:6]})"
        wrong += [Finding(each.state, f"{where}: {each.found}", each.needed) for each in seen]
    if not wrong:
        same = "the versions that are here, room in /dev/shm and the same time"
        return Finding("ok", f"{len(alive)}, all with {same}")
    state: State = "fails" if any(each.state == "fails" for each in wrong) else "warning"
    needed = dict.fromkeys(each.needed for each in wrong)
    return Finding(state, "; ".join(each.found for each in wrong), ", ".join(needed))


def _facts() -> Callable[[Sequence[str]], dict[str, Any]]:
    """What to ask a node. Made here, so that Ray sends the whole of it: a node may lack this module."""

    def facts(names: Sequence[str]) -> dict[str, Any]:
        import platform
        import shutil
        import time
        from importlib import metadata

        versions = {"Python": platform.python_version()}
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "none"
        try:
            from pipelines.version import code_version

            versions["earthformer"] = code_version()
        except ImportError:
            versions["earthformer"] = "none"
        return {"versions": versions, "shm": shutil.disk_usage("/dev/shm").total, "time": time.time()}

    return facts


def _answers(facts: Callable[..., dict[str, Any]], to: Sequence[str]) -> dict[str, Any]:
    """By node: its facts, with the `span` of time here in which they were told, or an error."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(facts)
    begun, until = time.time(), time.monotonic() + NODE_SECONDS
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            PACKAGES
        ): node
        for node in to
    }
    found: dict[str, Any] = {}
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            break
        (reference,) = ready
        try:
            found[asked.pop(reference)] = {**ray.get(reference), "span": (begun, time.time())}
        except ray.exceptions.RayError as error:
            found[asked.pop(reference)] = error
    return found


def compared(here: dict[str, Any], there: dict[str, Any], store: float) -> Iterator[Finding]:
    """What is wrong with a node, by what it says, and by the bytes of its object store."""
    for name, version in here["versions"].items():
        found = there["versions"][name]
        if found != version:
            state: State = "fails" if name in ALIKE else "warning"
            yield Finding(state, f"{name} {found}, here {version}", "the same versions everywhere")
    if there["shm"] < store:
        found = f"{gb(there['shm'])} of /dev/shm for an object store of {gb(store)}"
        yield Finding("warning", found, "--shm-size, or on Kubernetes an emptyDir in memory")
    begun, ended = there["span"]
    off = max(there["time"] - ended, 0.0) or min(there["time"] - begun, 0.0)
    if abs(off) > SKEW_SECONDS:
        yield Finding("warning", f"its clock is {off:+.0f} s off", "time by NTP")
