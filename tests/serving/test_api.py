"""The API on a real server: what it answers is what `earthformer forecast` writes."""

import base64
import io
import json
import re

import httpx
import numpy as np
import pytest
import xarray as xr
import yaml
import zarr
from tiny_service import EVENTS

from pipelines import cli, client
from pipelines.archives import checks, store
from pipelines.ensembles import dilate, disk, interval
from pipelines.errors import InputError
from pipelines.events import parse_events
from pipelines.forecast import forecast
from pipelines.plans import Drawing, Ensemble, plan


def wait(http, **request):
    answer = http.post("/v1/forecasts", params={"wait": "true"}, json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def opened(answer) -> xr.Dataset:
    assert answer.status_code == 200, answer.text
    return xr.open_dataset(io.BytesIO(answer.content), engine="h5netcdf").load()


@pytest.fixture(scope="module")
def batch(served, tmp_path_factory) -> xr.Dataset:
    """The same forecast by the batch path, in the same chunks, by as many replicas with as many threads."""
    url = str(tmp_path_factory.mktemp("batch") / "forecast.zarr")
    ensemble = Ensemble(
        16, events=parse_events(served.request()["events"], "test"), quantiles=(0.5,), keep_members=True
    )
    planned = plan(
        served.runs["denoiser"],
        served.archive,
        "test",
        limit=1,
        ensemble=ensemble,
        drawing=Drawing(steps=2),
    )
    forecast(planned, url, batch_size=4, workers=2, progress=False)
    return xr.open_zarr(url).isel(window=0).load()


def test_a_forecast_on_demand_is_that_of_the_batch_path_to_the_bit(served, http, batch):
    status = wait(http, **served.request(quantiles=[0.5], keep_members=True))
    found = opened(http.get(f"/v1/forecasts/{status['id']}/result"))
    for name in (
        "vil",
        "vil_mean",
        "vil_stdev",
        "vil_quantile",
        "probability",
        "ci_low",
        "ci_high",
        "n_members",
    ):
        np.testing.assert_array_equal(found[name], batch[name], err_msg=name)
    assert found["seed"].values.tolist() == batch["seed"].values.tolist() == status["seeds"]
    assert found["init_time"] == batch["init_time"]
    assert found["valid_time"].values.tolist() == batch["valid_time"].values.tolist()


def test_progress_is_told_after_every_chunk_and_ends_with_the_result(served, http):
    for accept, parse in (
        ("application/x-ndjson", lambda lines: [json.loads(line) for line in lines]),
        (
            "text/event-stream",
            lambda lines: [json.loads(line[6:]) for line in lines if line.startswith("data: ")],
        ),
    ):
        with http.stream(
            "POST", "/v1/forecasts", json=served.request(), headers={"Accept": accept}
        ) as answer:
            assert answer.headers["content-type"].startswith(accept)
            told = parse(list(answer.iter_lines()))
        drawn = [status["members"]["drawn"] for status in told]
        assert drawn == sorted(drawn)
        assert drawn[-1] == 16
        assert {4, 8} & set(drawn)
        assert told[-1]["status"] == "complete"
        assert all(status["status"] in ("waiting", "running") for status in told[:-1])
        rain = told[-1]["events"][0]["highest"]
        assert rain["ci_low"] <= rain["probability"] <= rain["ci_high"]


@pytest.fixture(scope="module")
def kept(served) -> dict:
    """A finished forecast whose members were kept."""
    with httpx.Client(base_url=served.url, timeout=120) as client:
        return wait(client, **served.request(keep_members=True, quantiles=[0.1, 0.9], seed=3))


def test_a_forecast_is_there_to_be_read_in_parts(http, kept):
    where = f"/v1/forecasts/{kept['id']}"
    whole = opened(http.get(f"{where}/result"))
    found = opened(http.get(f"{where}/probability", params={"event": "near"}))
    np.testing.assert_array_equal(found["probability"], whole["probability"].sel(event="near"))
    assert {"ci_low", "ci_high", "n_members"} <= set(found)
    np.testing.assert_array_equal(opened(http.get(f"{where}/mean"))["vil_mean"], whole["vil_mean"])
    ninety = opened(http.get(f"{where}/quantile", params={"q": 0.9}))
    np.testing.assert_array_equal(ninety["vil_quantile"], whole["vil_quantile"].sel(quantile=0.9))
    for part in ("probability?event=rain&format=png", "mean?format=png&lead_time=20", "members/2?format=png"):
        assert http.get(f"{where}/{part}").content.startswith(b"\x89PNG")
    assert http.get(f"{where}/mean", headers={"Accept": "image/png"}).headers["content-type"] == "image/png"
    highest = kept["events"][0]["highest"]
    assert highest["probability"] == pytest.approx(float(whole["probability"].sel(event="rain").max()))


def test_a_member_drawn_again_is_the_one_that_was_kept_to_the_bit(served, http, kept):
    without = wait(http, **served.request(seed=3))
    for k in (0, 6, 15):
        again = opened(http.get(f"/v1/forecasts/{without['id']}/members/{k}"))
        there = opened(http.get(f"/v1/forecasts/{kept['id']}/members/{k}"))
        np.testing.assert_array_equal(again["vil"], there["vil"])
        assert int(again["seed"]) == int(there["seed"]) == kept["seeds"][k]


def test_a_member_of_another_model_is_not_drawn_again(served, http):
    number = wait(http, **served.request())["id"]
    path = served.results / number / "request.json"
    request = json.loads(path.read_text())
    path.write_text(json.dumps(request | {"identity": "another"}))
    answer = http.get(f"/v1/forecasts/{number}/members/0")
    assert answer.status_code == 409
    assert "was made by another model" in answer.json()["detail"][0]["msg"]
    assert http.get(f"/v1/forecasts/{number}/mean").status_code == 200


def test_the_zarr_opens_with_xarray_and_its_checksums_match(served, http, kept, tmp_path):
    path = tmp_path / "result.zip"
    path.write_bytes(http.get(f"/v1/forecasts/{kept['id']}/result", params={"format": "zarr"}).content)
    with zarr.storage.ZipStore(path, mode="r") as packed:
        found = xr.open_zarr(packed, chunks=None).load()
    assert found["vil"].dims == ("window", "member", "lead_time", "y", "x")
    assert found.attrs["Conventions"] == "CF-1.11"
    assert checks.validate(str(served.results / kept["id"] / "forecast.zarr")) == []


def test_exceedances_are_counts_of_members(http, kept):
    where = f"/v1/forecasts/{kept['id']}"
    vil = opened(http.get(f"{where}/result"))["vil"].values
    for radius in kept["levels"]["radii_km"]:
        for threshold in kept["levels"]["thresholds"]:
            asked = {"threshold": threshold, "radius": radius}
            found = http.get(f"{where}/exceedance", params=asked).json()
            counts = np.frombuffer(base64.b64decode(found["counts"]), "<u2").reshape(found["shape"])
            hits = vil >= threshold
            if radius:
                wide = disk(radius, tuple(kept["grid"]["pixel_km"]))
                hits = np.stack([dilate(each, wide) for each in hits])
            np.testing.assert_array_equal(counts, hits.sum(0))
    point = http.get(f"{where}/point", params={"row": 5, "column": 7}).json()
    highest = kept["events"][0]["highest"]
    same = http.get(f"{where}/point", params={"row": highest["row"], "column": highest["column"]}).json()
    assert (same["lon"], same["lat"]) == pytest.approx((highest["lon"], highest["lat"]))
    assert point["probability"][0][0][1] == pytest.approx((vil[:, 1, 5, 7] >= 16).mean())
    low, high = interval(np.array([(vil[:, 1, 5, 7] >= 16).sum()]), np.array([16]))
    assert [point["ci_low"][0][0][1], point["ci_high"][0][0][1]] == pytest.approx([low[0], high[0]])


def test_members_are_drawn_until_the_interval_is_narrow(served, http):
    never = [{"name": "never", "variable": "vil", "threshold": 1e6, "units": "1"}]
    found = wait(http, **served.request(members=64, until_ci=0.1, events=never))
    assert found["members"]["drawn"] == 32
    assert found["events"][0]["highest"]["ci_high"] / 2 <= 0.1


def test_a_guided_forecast_says_what_was_asked_and_what_came(served, http):
    guided = wait(http, **served.request(guidance={"deviations": 4}))
    assert guided["guidance"]["deviations"] == 4
    found = opened(http.get(f"/v1/forecasts/{guided['id']}/result"))
    assert guided["guidance"]["achieved"] == pytest.approx(float(found["functional_achieved"].mean()))
    assert guided["guidance"]["requested"] == pytest.approx(float(found["functional_requested"]))
    assert found.attrs["deviations"] == 4


def test_what_the_service_is_and_how_it_fares(served, http):
    model = http.get("/v1/models").json()["models"][0]
    assert model["archives"] == ["storms"]
    assert model["context"] == [3, 48, 48]
    assert http.get("/healthz").text == "ok"
    assert http.get("/readyz").status_code == 200
    listed = http.get("/v1/archives/storms/events").json()
    assert listed["of"] == len(listed["windows"])
    assert listed["windows"][0]["event"] == served.window["event"]
    frames = http.post("/v1/context", json=served.window).json()
    assert frames["shape"] == [3, 48, 48]
    assert [len(frames["times"]), len(frames["valid_times"])] == [3, 2]
    assert frames["row0"] == "south"
    assert http.post("/v1/events/validate", json={"events": EVENTS}).json() == {"events": ["rain", "near"]}
    assert "swagger" in http.get("/docs").text.lower()
    wait(http, **served.request())
    told = http.get("/metrics").text
    for name in (
        "forecasts_waiting",
        "forecasts_running",
        "members_total",
        "chunk_seconds_bucket",
        "retries",
    ):
        assert f"earthformer_{name}" in told or f"earthformer_chunk_{name}" in told
    assert re.search(r'earthformer_forecasts_ended_total\{status="complete"\} [1-9]', told)


def test_the_client_returns_a_dataset_and_the_command_prints_it(served, capsys, tmp_path):
    found, status = client.request(
        served.url, event=served.window["event"], members=8, steps=2, events=parse_events(EVENTS, "test")
    )
    assert found.sizes["event"] == 2
    assert int(found["n_members"]) == 8
    assert status["status"] == "complete"
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(EVENTS))
    words = ["request", "--url", served.url, "--event", served.window["event"], "--members", "8"]
    words += ["--steps", "2", "--events", str(tmp_path / "events.yaml"), "--out", str(tmp_path / "f.nc")]
    cli.app(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert re.search(r"rain .*%.* %? ?.*field mean|field mean[\s\S]*rain .*\d\.\d%", said)
    place = status["events"][0]["highest"]
    cli.app([*words[:-2], "--at", str(place["lon"]), str(place["lat"])], standalone_mode=False)
    assert re.search(r"rain .*in its region", capsys.readouterr().out)
    assert "complete, 8 members (they can tell no less than 12.5%)" in said
    again = xr.open_dataset(tmp_path / "f.nc", engine="h5netcdf").load()
    np.testing.assert_array_equal(again["vil_mean"], found["vil_mean"])
    with pytest.raises(
        InputError, match=f"no event is given: needed one of archive storms, such as {served.window['event']}"
    ):
        client.request(served.url)
    with pytest.raises(InputError, match="the service answers 422: context event 'nowhere' is unknown"):
        client.request(served.url, event="nowhere")
    with pytest.raises(InputError, match="needed a running `earthformer serve`"):
        client.request("http://127.0.0.1:1", event="e")


def test_a_context_may_come_with_the_request(served, http, ensemble_archive):
    frames = http.post("/v1/context", json=served.window).json()
    pixels = np.frombuffer(base64.b64decode(frames["data"]), frames["dtype"]).reshape(frames["shape"])
    place = store.open_archive(ensemble_archive).root
    row = list(place["event"].values).index(served.window["event"])
    y, x = (place[name].values + float(place[f"{name[0]}_origin"][row]) for name in place["vil"].dims[-2:])
    proj, times = place["crs"].attrs["proj4"], frames["times"][:3]
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    inline = {"npy": base64.b64encode(buffer.getvalue()).decode(), "times": times, "units": "1"}
    inline |= {"proj": proj, "y": y.tolist(), "x": x.tolist()}
    one = wait(http, **served.request(context=inline, keep_members=True))
    dataset = xr.Dataset(
        {
            "vil": (("time", "y", "x"), pixels, {"units": "1", "grid_mapping": "crs"}),
            "crs": ((), 0, {"proj4": proj}),
        },
        coords={
            "time": np.array(times, "datetime64[ns]"),
            "y": ("y", y, {"units": "m", "standard_name": "projection_y_coordinate"}),
            "x": ("x", x, {"units": "m", "standard_name": "projection_x_coordinate"}),
        },
    )
    other, _ = client.request(
        served.url,
        context=dataset,
        members=16,
        steps=2,
        events=parse_events(EVENTS, "test"),
        keep_members=True,
    )
    found = opened(http.get(f"/v1/forecasts/{one['id']}/result"))
    np.testing.assert_array_equal(found["vil"], other["vil"])
    referenced = wait(http, **served.request())
    assert one["context"]["init_time"] == referenced["context"]["init_time"]
    here, there = (status["events"][0]["highest"] for status in (one, referenced))
    assert here["probability"] == pytest.approx(there["probability"], abs=0.4)
    assert found["y_origin"] == pytest.approx(float(y[0]))
