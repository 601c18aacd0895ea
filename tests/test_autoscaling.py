"""A cluster that is scaled down to its head: Ray's own autoscaler starts nodes for what is submitted.

What dashboards say was recorded from Ray 2.60: of a cluster with the former autoscaler, and one without any.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_cluster import cluster

from cluster.capacity import PLENTY, Need, grown, grows, refuse_impossible
from pipelines.archives import checks, synthetic
from pipelines.errors import InputError

FOLDER = Path(__file__).parents[1] / "cluster"
LONE = "606c71ee2a037bc085628be6a784c1fcad436308f821e56adbd7157b"
STILL = {
    "result": True,
    "msg": "Got cluster status.",
    "data": {
        "autoscalingError": None,
        "clusterStatus": {
            "autoscalerReport": {
                "activeNodes": {"node606C71Ee2A037Bc085628Be6A784C1Fcad436308F821E56Adbd7157B": 1},
                "pendingNodes": [],
                "pendingLaunches": {},
                "nodeTypeMapping": {LONE: f"node_{LONE}"},
                "legacy": True,
            },
        },
    },
}
V1 = {
    "data": {
        "clusterStatus": {
            "autoscalerReport": {
                "activeNodes": {},
                "pendingNodes": [],
                "nodeTypeMapping": {
                    "fffffffffffffffffffffffffffffffffffffffffffffffffff00000": "ray.head.default"
                },
                "legacy": True,
            }
        }
    }
}
SILENT = {"data": {"autoscalingStatus": None, "autoscalingError": None, "clusterStatus": None}}
GPU = {"GPU": 1.0}


def test_what_grows_is_told_from_what_does_not():
    own = {"ray.io/node-id": LONE}
    assert not grows([own], STILL)
    assert not grows([own], SILENT)
    assert grows([own], V1)
    # The autoscaler of today reports nothing to the dashboard; its nodes have a group.
    assert grows([own, {**own, "ray.io/node-group": "cpu"}], SILENT)


def test_a_cluster_is_counted_as_large_as_its_file_lets_it_grow():
    nodes = grown(str(FOLDER / "raycluster.yaml"))
    assert len(nodes) == 1 + 100 + 16
    refuse_impossible([Need("a", GPU, 16), Need("b", {"CPU": 4.0, "memory": 16e9}, 116)], nodes)
    with pytest.raises(InputError, match="17 times a of 1 GPU each, and the cluster's 117 nodes hold 16 at"):
        refuse_impossible([Need("a", GPU, 17)], nodes)
    with pytest.raises(InputError, match="a needs 70000 MB of memory, and the largest of 117 nodes has"):
        refuse_impossible([Need("a", {"memory": 7e10}, 1)], nodes)
    nodes = grown(str(FOLDER / "aws.yaml"))
    refuse_impossible([Need("a", GPU, 8), Need("b", {"CPU": 8.0, "memory": 1e12}, 40)], nodes)
    with pytest.raises(
        InputError, match="9 times a of 1 GPU each, and the cluster's 41 nodes hold 8 at a time"
    ):
        refuse_impossible([Need("a", GPU, 9)], nodes)


def test_what_a_file_does_not_say_is_no_reason_to_refuse(tmp_path):
    config = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    config["max_workers"] = 3
    config["available_node_types"]["gpu"]["resources"] = {}
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(config))
    nodes = grown(str(tmp_path / "aws.yaml"))
    assert sorted(node["GPU"] for node in nodes) == 4 * [0] + 3 * [PLENTY]
    document = yaml.safe_load((FOLDER / "raycluster.yaml").read_text())
    container = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["resources"] = {"limits": {"cpu": "3500m"}}
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump_all([None, {"kind": "Secret"}, document]))
    assert grown(str(tmp_path / "ray.yaml"))[1] == {"CPU": 4, "memory": PLENTY}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"cannot be read \(ParserError"),
        ("[1, 2]", "describes 0 clusters"),
        ("kind: RayJob", "describes 0 clusters"),
        ("kind: RayCluster\nmetadata: {name: a}", r"cannot be read \(KeyError 'spec'\)"),
        ("available_node_types: {a: {}}", r"cannot be read \(KeyError 'provider'\)"),
    ],
)
def test_a_file_of_no_cluster_is_one_line(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"--cluster-file .*c\.yaml {message}.*: needed one KubeRay Ray"):
        grown(str(file))
    with pytest.raises(InputError, match="--cluster-file /nowhere is absent: needed one KubeRay RayCluster"):
        grown("/nowhere")


def test_work_is_sent_to_a_cluster_that_has_yet_to_grow(tmp_path):
    synthetic.write_sevir(tmp_path / "raw", events=2, seed=4, size=48)
    train = ["train", "earthformer", "--task", "sevir", "--archive", "s3://a/b", "--run", "s3://a/r", "--gpu"]
    prepare = ["prepare", "sevir", "--source", tmp_path / "raw", "--archive", tmp_path / "a.zarr"]
    with cluster(0, grows=1) as small:

        def submitted(*words):
            command = [sys.executable, "-m", "cluster.cli", "submit", "--address", small.dashboard]
            how = {"capture_output": True, "text": True, "timeout": 300, "env": small.environment}
            return subprocess.run([*command, *map(str, words)], **how)

        done = submitted("--wait", "--", *prepare)
        assert done.returncode == 0, done.stdout + done.stderr
        warning, ended = done.stderr.splitlines()
        assert warning == (
            "warning: a worker of prepare needs 1 CPU, and the largest of 1 nodes has 0 CPU; it may grow by "
            "itself, and whether far enough was not checked: --cluster-file does"
        )
        assert "succeeded" in ended
        assert checks.validate(str(tmp_path / "a.zarr")) == []
        refused = submitted("--cluster-file", FOLDER / "aws.yaml", "--", *train, "--workers", 9)
        assert refused.returncode == 2
        assert refused.stderr == (
            "error: 9 times a worker of train of 1 GPU each, and the cluster's 41 nodes hold 8 at a time: "
            "needed fewer, or a larger cluster\n"
        )
