"""A forecast of the service as a store, like any other forecast's, and as what that would hold by now."""

import time
from collections.abc import Mapping

import numpy as np
import xarray as xr

from pipelines import forecast_store
from pipelines.archives import records, store
from pipelines.serving.forecast import Forecast
from pipelines.serving.model import Model


def fold(forecast: Forecast, model: Model, url: str, sums: Mapping[str, np.ndarray]) -> None:
    """Take the next chunk in, and write its members if they are kept."""
    if forecast.ensemble.keep_members:
        region = {"window": slice(0, 1), "member": forecast.members_of(forecast.chunks_done)}
        kept = {model.task.variable: sums["fields"][None]}
        record = store.region_record("", region, store.write_region(url, "", kept, region))
        records.write(url, 1 + forecast.chunks_done, {"regions": [record]})
    forecast.tally.merge(sums)
    forecast.chunks_done += 1
    forecast.sampling_seconds += float(sums["seconds"])
    forecast.timings.setdefault("first_probability", time.time())


def layout(forecast: Forecast, model: Model) -> xr.Dataset:
    """The store's template."""
    if forecast.template is not None:
        return forecast.template
    forecast.template = forecast_store.layout(
        forecast.context.samples,
        forecast.ensemble,
        seed=forecast.asked.seed,
        drawing=forecast.job.drawing,
        attrs={
            "title": f"prediff forecast of {model.task.variable}, {model.task.name}, on demand",
            "task": model.task.name,
            "forecaster": "prediff",
            "run": model.run.url,
            "run_hash": model.run.hash,
            "context": str(forecast.context.said),
            "seed": forecast.asked.seed,
        },
        shard_members=forecast.chunk,
        levels=forecast.job.levels,
    )
    return forecast.template


def create(forecast: Forecast, model: Model, url: str) -> None:
    """Lay the store out; nothing happens where it is."""
    config = {
        "kind": "forecast",
        "id": forecast.id,
        "run_hash": model.run.hash,
        "asked": forecast.asked.model_dump(mode="json", exclude={"context"}),
        "context": forecast.context.said,
    }
    shards = 1 + (forecast.chunks if forecast.ensemble.keep_members else 0)
    store.create(url, {"": layout(forecast, model)}, config=config, shards=shards)


def write(forecast: Forecast, model: Model, url: str) -> None:
    """The whole result; its completion record last."""
    create(forecast, model, url)
    whole = {"window": slice(0, 1)}
    values = {name: each[None] for name, each in forecast.tally.result(forecast.ensemble.members).items()}
    regions = [store.region_record("", whole, store.write_region(url, "", values, whole))]
    records.write(url, 0, {"regions": regions})
    if forecast.ensemble.keep_members:
        for chunk in range(forecast.chunks_done, forecast.chunks):
            # What was not needed any more is missing, and not to be waited for.
            records.write(url, 1 + chunk, {"regions": []})
    records.complete(url, {"counts": {"windows": 1, "members": forecast.tally.reduction.n}})


def so_far(forecast: Forecast, model: Model) -> xr.Dataset:
    """What the store would hold by now, but for members."""
    laid_out = layout(forecast, model).isel(window=0)
    values = forecast.tally.result(forecast.ensemble.members)
    return laid_out.drop_vars(set(laid_out.data_vars) - set(values)).assign(
        {name: laid_out[name].copy(data=values[name].copy()) for name in values}
    )
