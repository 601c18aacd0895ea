"""Contexts of radar and of ENSO, and what is made of members from there on, without a server."""

import base64
import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_archive import built

from earthformer.forecasters import Members
from pipelines.archives import enso, radar, synthetic
from pipelines.events import parse_events
from pipelines.exceedances import Levels
from pipelines.plans import Drawing, Ensemble
from pipelines.serving import products, summaries
from pipelines.serving.asked import ForecastRequest, Inline, Referenced
from pipelines.serving.contexts import Refused, read_context
from pipelines.serving.forecast import Forecast
from pipelines.serving.keeping import so_far
from pipelines.serving.tally import Job, Tally
from pipelines.tasks import TASKS, Tiles

RADAR = dataclasses.replace(TASKS["radar"], context=4, target=3, tiles=Tiles(size=32, stride=16))
ENSO = TASKS["enso"]
TILE = {"archive": "a", "event": "radar_00", "start": 2, "tile": (96, 32)}


@pytest.fixture(scope="module")
def rain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rain")
    synthetic.write_radar(folder / "raw", sequences=1, frames=12)
    return built(radar.plan(str(folder / "raw")), str(folder / "a.zarr"))


@pytest.fixture(scope="module")
def ocean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocean")
    synthetic.write_enso(folder / "raw", cmip6=(1, 8), cmip5=(1, 8), soda_years=6)
    return built(enso.plan(str(folder / "raw")), str(folder / "a.zarr"))


def forecast_of(context, asked, events, fields):
    """A forecast some of whose members have come from a replica, and the model as far as it is needed."""
    task = context.samples.task
    ensemble = Ensemble(len(fields), events=parse_events(events, "test"))
    job = Job(context.samples.bind(ensemble.events), Levels.of(task), (), False, Drawing())
    request = ForecastRequest.model_validate({"context": asked, "events": events})
    forecast, chunk = Forecast("id", request, context, job, ensemble, 4), Tally(job)
    chunk.add(Members(torch.from_numpy(fields[None, ..., None])))
    forecast.tally.merge(chunk.sums())
    return forecast, SimpleNamespace(task=task, run=SimpleNamespace(url="run", hash="hash"))


def test_a_tile_of_radar_and_the_same_rain_inline(rain):
    name = str(rain.root["sequence"].values[0])
    asked = Referenced.model_validate({**TILE, "event": name})
    there = read_context(asked, RADAR, (32, 32), {"a": rain}, 10**7)
    assert there.pixels.shape == (1, 4, 32, 32, 1)
    place = there.samples.place
    buffer = io.BytesIO()
    np.save(buffer, there.pixels[0, ..., 0] / 3600)
    inline = {
        "npy": base64.b64encode(buffer.getvalue()).decode(),
        "units": "mm/s",
        "times": [str(time) for time in there.samples.times[0, :4]],
        "proj": str(place["proj"].values[0]),
        "y": (place["y"].values + float(place["y_origin"][0])).tolist(),
        "x": (place["x"].values + float(place["x_origin"][0])).tolist(),
    }
    here = read_context(Inline.model_validate(inline), RADAR, (32, 32), {}, 10**7)
    np.testing.assert_allclose(here.pixels, there.pixels, rtol=1e-5)
    np.testing.assert_array_equal(here.samples.times, there.samples.times)
    for axis in ("y", "x", "y_origin", "x_origin"):
        np.testing.assert_allclose(here.samples.place[axis], place[axis])
    grids = [each.samples.bind(()).grid for each in (here, there)]
    spots = [summaries.place(grid, 3, 5) for grid in grids]
    assert spots[0] == pytest.approx(spots[1])


def test_rain_that_misses_pixels_is_refused_where_the_task_wants_none(rain):
    pixels = np.ones((4, 32, 32), np.float32)
    pixels[1, 2, 3] = np.nan
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    axis = (1000.0 * np.arange(32)).tolist()
    times = [f"2016-05-01T12:{5 * n:02d}" for n in range(4)]
    inline = {"npy": base64.b64encode(buffer.getvalue()).decode(), "units": "mm/h", "times": times}
    inline |= {"proj": "+proj=laea +lat_0=52 +lon_0=5 +units=m", "y": axis, "x": axis}
    asked = Inline.model_validate(inline)
    with pytest.raises(Refused, match="has 1 NaN values, the first at frame 1, row 2, column 3: needed none"):
        read_context(asked, RADAR, (32, 32), {}, 10**7)
    loose = dataclasses.replace(RADAR, tiles=Tiles(size=32, min_cover=0.9))
    assert np.isnan(read_context(asked, loose, (32, 32), {}, 10**7).pixels).sum() == 1


def test_what_is_made_of_rain(rain):
    asked = {**TILE, "event": str(rain.root["sequence"].values[0])}
    context = read_context(Referenced.model_validate(asked), RADAR, (32, 32), {"a": rain}, 1)
    events = [
        {"name": "rain", "variable": "rate", "threshold": 2, "units": "mm/h"},
        {"name": "near", "variable": "rate", "threshold": 5, "units": "mm/h", "radius": 3},
    ]
    fields = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((3, 32, 32), np.float32)
    forecast, model = forecast_of(context, asked, events, fields)
    found = so_far(forecast, model)
    np.testing.assert_allclose(found["probability"].sel(event="rain"), 0.5)
    assert not found["probability"].sel(event="near").any()
    point = summaries.point(found, 3, 4)
    assert point["probability"][0][point["thresholds"].index(2.0)] == [0.5] * 3
    assert point["lon"] == pytest.approx(summaries.place(forecast.job.bound.grid, 3, 4)["lon"])
    said = summaries.status(forecast, model)
    assert said["grid"]["row0"] == "north"
    assert said["lead_times"] == [5, 10, 15]
    assert said["events"][0]["highest"]["probability"] == 0.5
    one = xr.open_dataset(io.BytesIO(products.netcdf(products.of_event(found, "rain"))), engine="h5netcdf")
    assert float(one["ci_high"].max()) > 0.5
    lead = products.at_lead(found["rate_mean"], 10)
    assert products.png(lead, "mean", RADAR).startswith(b"\x89PNG")


def test_the_ocean_from_an_archive_and_inline(ocean):
    asked = {"archive": "a", "event": str(ocean.root["source"].values[0]), "start": 3}
    there = read_context(Referenced.model_validate(asked), ENSO, (24, 48), {"a": ocean}, 1)
    buffer = io.BytesIO()
    np.save(buffer, there.pixels[0, ..., 0])
    inline = {"npy": base64.b64encode(buffer.getvalue()).decode(), "units": "degC"}
    months = [str(time)[:7] for time in there.samples.times[0, : ENSO.context]]
    here = read_context(Inline.model_validate({**inline, "times": months}), ENSO, (24, 48), {}, 10**7)
    np.testing.assert_array_equal(here.pixels, there.pixels)
    np.testing.assert_array_equal(here.samples.times, there.samples.times)
    for axis in ("lat", "lon"):
        np.testing.assert_array_equal(here.samples.place[axis], there.samples.place[axis])
    gap = [*months[:-1], str(np.datetime64(months[-1], "M") + 1)]
    with pytest.raises(Refused, match="have a step of 2 month after"):
        read_context(Inline.model_validate({**inline, "times": gap}), ENSO, (24, 48), {}, 10**7)
    events = [{"name": "El Niño", "variable": "nino34", "threshold": 0.5, "units": "K", "duration": 5}]
    fields = np.ones((4, ENSO.target, 24, 48), np.float32) * np.float32([0, 0, 1, 2])[:, None, None, None]
    forecast, model = forecast_of(there, asked, events, fields)
    said = summaries.status(forecast, model)
    assert said["events"][0]["kind"] == "region"
    assert said["events"][0]["probability"] == 0.5
    found = so_far(forecast, model)
    point = summaries.point(found, 11, 20)
    assert (point["lat"], point["lon"]) == (0.0, 195.0)
    assert point["probability"][0][0] == [0.5] * ENSO.target
    assert float(products.of_event(found, "El Niño")["ci_high"]) > 0.5
