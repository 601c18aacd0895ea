"""What workers say: metrics where Prometheus looks for them, and log lines of JSON with ids."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml

from pipelines import telemetry
from pipelines.archives import records, synthetic
from pipelines.prepare import prepare
from pipelines.serving.metrics import Metrics

CLUSTER = Path(__file__).parents[1] / "cluster"
EVENTS = 5


@pytest.fixture(scope="module")
def archive(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("telemetry")
    synthetic.write_sevir(folder / "raw", events=EVENTS, seed=4, size=48)
    url = str(folder / "a.zarr")
    prepare("sevir", str(folder / "raw"), url, shard_mb=0, progress=False)
    return url


def scraped() -> str:
    """What the node tells Prometheus, once it tells of us."""
    (node,) = ray.nodes()
    where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(60):
        with urllib.request.urlopen(where, timeout=10) as answer:
            text = answer.read().decode()
        if "earthformer_shards_pending" in text and "earthformer_shard_seconds_bucket" in text:
            return text
        time.sleep(0.5)
    raise AssertionError(f"nothing of ours in {text[:2000]}")


def test_the_dashboard_and_the_alerts_name_metrics_that_there_are(archive):
    text = scraped()
    shards = re.findall(r'^ray_earthformer_shards_total\{[^}]*stage="prepare"[^}]*\} (\S+)$', text, re.M)
    assert sum(map(float, shards)) >= EVENTS
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    rules = yaml.safe_load((CLUSTER / "prometheus-rules.yaml").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    there = set(re.findall(r"^# TYPE (\w+)", text + Metrics().text().decode(), re.M))
    # Where nothing has gone wrong yet there is nothing to tell.
    there.add("ray_earthformer_quarantined_series_total")
    for name in re.findall(r"\b(?:ray_)?(?:earthformer|node|object)_\w+", " ".join(asked)):
        assert re.sub(r"_bucket$", "", name) in there, name


def test_log_lines_are_json_with_job_stage_and_shard(archive):
    logs = Path(_logs())
    found = []
    for file in logs.glob("worker-*.err"):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("{") and json.loads(line).get("store") == archive:
                found.append(json.loads(line))
    assert sorted(line["shard"] for line in found) == list(range(EVENTS))
    for line in found:
        assert (line["message"], line["stage"], line["items"]) == ("shard written", "prepare", 1)
        assert line["job_id"] == ray.get_runtime_context().get_job_id()
        assert line["read_bytes"] > 0
        assert {"task_id", "node_id", "worker_id"} <= line.keys()
    assert len(records.read(archive)) == EVENTS


def _logs() -> str:
    from ray._private.worker import _global_node

    return str(_global_node.get_logs_dir_path())


def test_without_a_terminal_progress_is_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telemetry, "_pending", lambda: type("Gauge", (), {"set": lambda *_, **__: None})())

    def rows():
        for _ in range(10):
            now[0] += 25
            yield {"items": 5, "bytes": 1_000_000_000}

    assert len(list(telemetry.progress(rows(), 10, "prepare"))) == 10
    assert capsys.readouterr().out.splitlines() == [
        "prepare: 3/10 shards, 0.2/s, 40 MB/s, 3 min to go",
        "prepare: 6/10 shards, 0.2/s, 40 MB/s, 2 min to go",
        "prepare: 9/10 shards, 0.2/s, 40 MB/s, 0 min to go",
    ]
