"""What `cluster/` holds for Kubernetes and AWS: fields and commands that exist, and parts that agree."""

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import ray
import yaml
from ray.scripts.scripts import drain_node

from pipelines.cli import parse
from pipelines.serving.settings import Settings

FOLDER = Path(__file__).parents[1] / "cluster"
KUBERNETES = "1.33"
# Fields of KubeRay's v1 API (1.5), and those it needs; `POD` is checked by Kubernetes' own schema.
POD = "a pod template"
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str, "enableK8sTokenAuth": bool, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"upscalingMode": str, "idleTimeoutSeconds": int, "resources": dict, "env": list},
    "headGroupSpec": {
        "rayStartParams": {str: str},
        "template": POD,
        "serviceType": str,
        "enableIngress": bool,
    },
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "rayStartParams": {str: str},
            "template": POD,
        }
    ],
}
KINDS = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "submissionMode": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "runtimeEnvYAML": str,
        "rayClusterSpec": CLUSTER,
        "submitterPodTemplate": POD,
    },
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER},
}
NEEDED = {
    "spec of RayCluster": {"headGroupSpec"},
    "spec of RayJob": {"entrypoint", "rayClusterSpec"},
    "spec of RayService": {"serveConfigV2", "rayClusterConfig"},
    "headGroupSpec": {"template"},
    "workerGroupSpecs": {"groupName", "minReplicas", "maxReplicas", "template"},
}


def documents():
    for file in ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml"):
        for document in yaml.safe_load_all((FOLDER / file).read_text()):
            yield pytest.param(document, id=document["metadata"]["name"] + " of " + file)


def check(found, known, where):
    """Raise where a field is unknown, of another type, or missing."""
    if known is POD:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": found["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    elif isinstance(known, type):
        assert type(found) is known, f"{where} is {found!r}"
    elif isinstance(known, list):
        assert isinstance(found, list), where
        for each in found:
            check(each, known[0], where)
    elif known == {str: str}:
        assert all(type(name) is str and type(value) is str for name, value in found.items()), where
    else:
        assert NEEDED.get(where, set()) <= found.keys(), where
        for name, value in found.items():
            assert name in known, f"{where} has no field {name}"
            check(value, known[name], name)


def clusters(document):
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("document", documents())
def test_every_field_exists(document):
    assert document["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z0-9-]{1,40}", document["metadata"]["name"])
    check(document["spec"], KINDS[document["kind"]], f"spec of {document['kind']}")


@pytest.mark.parametrize("document", documents())
def test_a_cluster_is_of_one_ray_has_its_token_and_room_for_its_objects(document):
    spec = clusters(document)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert mounted.keys() - {"/dev/shm"} <= {"/etc/earthformer"}
        assert container["livenessProbe"]["failureThreshold"] > 1
        asks_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert not asks_gpu or container["image"] == "earthformer:cuda"
        if "minReplicas" in group:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("document", documents())
def test_a_worker_that_is_taken_away_says_so_in_time(document):
    for group in clusters(document)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, option) == ("sh", "-c")
        said, waited = (shlex.split(part) for part in script.split("&&"))
        assert said[:2] == ["ray", "drain-node"]
        given = drain_node.make_context("ray drain-node", said[2:]).params
        assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        assert waited == ["sleep", str(given["deadline_remaining_seconds"])]
        # Ray's command itself takes seconds.
        assert given["deadline_remaining_seconds"] + 10 <= pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("document", [d for d in documents() if "entrypoint" in d.values[0]["spec"]])
def test_entrypoints_are_verbs_and_options_that_exist(document):
    program, *words = shlex.split(document["spec"]["entrypoint"])
    assert program == "earthformer"
    given = parse(words)
    groups = clusters(document)["workerGroupSpecs"]
    if given.get("gpu"):
        most = int(str(given["workers"]).rpartition(":")[2])
        assert sum(group["maxReplicas"] for group in groups if group["groupName"] == "gpu") >= most


def test_the_service_of_kubernetes_is_that_of_serve_deploy():
    (document,) = [d.values[0] for d in documents() if d.values[0]["kind"] == "RayService"]
    there, here = (
        yaml.safe_load(document["spec"]["serveConfigV2"]),
        yaml.safe_load((FOLDER / "serve.yaml").read_text()),
    )
    assert there == here
    (application,) = here["applications"]
    Settings.model_validate(application["args"])
    assert application["args"]["replicas"] <= clusters(document)["workerGroupSpecs"][0]["maxReplicas"]


def test_the_launcher_file_is_what_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(each.get("max_workers", 0) for each in types.values()) <= config["max_workers"]
    assert types["cpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or "RAY_AUTH_MODE=token ray start" in command


def test_the_image_is_pinned_and_not_roots():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] not in ("root", "0")
    _, *installs = "\n".join(lines).split("pip install")
    assert installs
    assert all("--constraint constraints.txt" in part.splitlines()[0] for part in installs)
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert {"constraints.txt", "earthformer", "pipelines", "cluster"} <= copied
