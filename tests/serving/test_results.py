"""Where results are kept, and what a request says of itself: without a server."""

import base64
import json
import time

import numpy as np
import pytest

from pipelines.serving.asked import ForecastRequest
from pipelines.serving.results import ID, Results, new_id


@pytest.fixture(params=["local", "memory", "s3"])
def results(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
    places = {"local": str(tmp_path), "memory": f"memory://{new_id()}", "s3": f"s3://private/{new_id()}"}
    return Results(places[request.param], 1.0)


def test_ids_cannot_be_guessed_and_are_no_paths(results):
    numbers = {new_id() for _ in range(1000)}
    assert len(numbers) == 1000
    assert all(ID.fullmatch(number) for number in numbers)
    for number in ("..", "a/b", "", "A" * 23):
        with pytest.raises(ValueError, match="id"):
            results.folder(number)


def test_a_forecast_is_unfinished_until_its_status_is_written(results):
    number = new_id()
    assert results.unfinished() == []
    results.accept(number, {"asked": {}})
    assert results.unfinished() == [number]
    assert results.progress(number) is None
    results.checkpoint(number, 3, {"mean": np.arange(4.0), "n": np.array(12)})
    chunks, sums = results.progress(number)
    assert (chunks, sums["n"], sums["mean"].tolist()) == (3, 12, [0, 1, 2, 3])
    results.end(number, {"status": "complete"})
    assert results.unfinished() == []
    assert results.progress(number) is None
    assert results.status(number)["status"] == "complete"


def test_a_checkpoint_that_was_cut_off_is_none(tmp_path):
    results, number = Results(str(tmp_path), 1.0), new_id()
    results.checkpoint(number, 3, {"n": np.array(12)})
    path = tmp_path / number / "sums.npz"
    path.write_bytes(path.read_bytes()[:-30])
    assert results.progress(number) is None


def test_expiry_leaves_a_trace_and_then_none(results, monkeypatch):
    old, young, running = new_id(), new_id(), new_id()
    for number in (old, young, running):
        results.accept(number, {})
    results.end(old, {"status": "complete"})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3000)
    results.end(young, {"status": "complete"})
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    for _ in range(2):
        results.sweep()
        assert results.expired(old)
        assert results.status(old) is None
        assert not results.expired(young)
        assert results.unfinished() == [running]
    monkeypatch.setattr(time, "time", lambda: now + 7300)
    results.sweep()
    assert not results.expired(old)
    assert results.request(old) is None
    assert results.expired(young)
    # Another service, or this one after a restart, knows as much.
    Results(results.url, 1.0).sweep()
    assert results.expired(young)
    assert results.unfinished() == [running]


def test_a_request_that_was_kept_is_the_one_that_came():
    content = base64.b64encode(bytes(range(256))).decode()
    asked = ForecastRequest.model_validate(
        {"context": {"npy": content, "times": ["2019-01-01"]}, "guidance": {"deviations": 4}, "seed": 2**62}
    )
    kept = json.loads(json.dumps(asked.model_dump(mode="json")))
    assert ForecastRequest.model_validate(kept) == asked
    assert asked.context.npy == bytes(range(256))
