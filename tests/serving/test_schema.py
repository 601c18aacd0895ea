"""The API against its own OpenAPI schema: whatever is sent, no 500, and what the schema says."""

import json
import subprocess
import sys

import httpx

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_nothing_that_is_sent_breaks_the_service(served, tmp_path):
    # A forecast to be asked for, so that what lies behind its id is reached as well.
    known = httpx.post(
        f"{served.url}/v1/forecasts?wait=true", json=served.request(quantiles=[0.5]), timeout=60
    )
    values = {"id": known.json()["id"], "name": "storms", "event": "rain", "q": 0.5}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (tmp_path / "schemathesis.toml").write_text("\n".join(["[parameters]", *lines]))
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
    command += [
        "--checks",
        CHECKS,
        "--max-examples",
        "10",
        "--max-time",
        "40",
        "--phases",
        "coverage,fuzzing",
    ]
    command += ["--generation-deterministic", "--no-shrink"]
    command += ["--suppress-health-check", "all", "--request-timeout", "30", "--no-color"]
    done = subprocess.run(
        [*command, "--report-json-path", str(report)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert json.loads(report.read_text())
    assert httpx.get(f"{served.url}/readyz").status_code == 200
