"""What a forecast says of itself in JSON: how it stands, and its probabilities with their intervals."""

import math
from typing import Any

import numpy as np
import xarray as xr

from pipelines.ensembles import LEVEL, interval
from pipelines.regions import Grid
from pipelines.serving.forecast import Forecast
from pipelines.serving.model import Model


def status(forecast: Forecast, model: Model) -> dict[str, Any]:
    """All of it, of a forecast that is under way or has just ended."""
    reduction, asked, drawing = forecast.tally.reduction, forecast.asked, forecast.job.drawing
    samples, grid = forecast.context.samples, forecast.job.bound.grid
    init = samples.times[0, model.task.context - 1]
    said: dict[str, Any] = {
        "id": forecast.id,
        "status": forecast.status,
        "error": forecast.error or None,
        "members": {
            "asked": forecast.ensemble.members,
            "drawn": reduction.n,
            "failed": reduction.failed,
            "smallest_resolvable": 1 / reduction.n if reduction.n else None,
        },
        "interval": LEVEL,
        "events": probabilities(forecast),
        "context": {**forecast.context.said, "init_time": str(init.astype("datetime64[s]"))},
        "lead_times": _leads(samples.lead_times),
        "levels": {
            "thresholds": forecast.job.levels.thresholds,
            "radii_km": forecast.job.levels.radii,
            "units": model.task.units,
        },
        "grid": {
            "shape": grid.shape,
            "pixel_km": grid.pixel_km(0),
            "row0": row0(grid),
        },
        "seed": asked.seed,
        "seeds": forecast.seeds[: forecast.tally.drawn].tolist(),
        "sampler": {"name": drawing.sampler, "steps": drawing.steps},
        "guidance": None,
        "run_hash": model.run.hash,
        "timings": {**forecast.timings, "device_seconds": forecast.sampling_seconds},
        "keep_members": forecast.ensemble.keep_members,
    }
    if drawing.alignment is not None:
        known = forecast.tally.achieved[np.isfinite(forecast.tally.achieved)]
        said["guidance"] = {
            "deviations": drawing.deviations,
            "strength": drawing.strength,
            "alignment_hash": drawing.alignment_hash,
            "requested": _number(forecast.tally.requested),
            "achieved": _number(known.mean()) if len(known) else None,
        }
    return said


def probabilities(forecast: Forecast) -> list[dict[str, Any]]:
    """Of each event: its probability, or of a field its highest one and where, with intervals."""
    found = forecast.tally.reduction.probabilities()
    bound, said, numbers = forecast.job.bound, [], {"": 0, "regional_": 0}
    for event in bound.events:
        prefix = "regional_" if event.scalar else ""
        number = numbers[prefix]
        numbers[prefix] += 1
        here = {name: found[f"{prefix}{name}"][number] for name in ("probability", "ci_low", "ci_high")}
        one: dict[str, Any] = {"name": event.event.name, "kind": "region" if event.scalar else "field"}
        if event.scalar:
            said.append({**one, **{name: _number(value) for name, value in here.items()}})
            continue
        known = np.isfinite(here["probability"])
        one |= {"mean": _number(here["probability"][known].mean()) if known.any() else None, "highest": None}
        if known.any():
            row, column = np.unravel_index(np.nanargmax(here["probability"]), known.shape)
            one["highest"] = {
                **{name: _number(value[row, column]) for name, value in here.items()},
                **place(bound.grid, int(row), int(column)),
            }
        said.append(one)
    return said


def place(grid: Grid, row: int, column: int) -> dict[str, Any]:
    """A pixel, and where its centre lies in degrees."""
    lon, lat = grid.degrees(0, np.array([row]), np.array([column]))
    return {"row": row, "column": column, "lon": _number(lon[0]), "lat": _number(lat[0])}


def row0(grid: Grid) -> str:
    """Where a grid's first row lies."""
    return "south" if grid.step[0] > 0 else "north"


def point(found: xr.Dataset, row: int, column: int) -> dict[str, Any]:
    """At one pixel, of each radius, threshold and lead time: the probability with its interval.

    Args:
        found: of a forecast, without the dimension of windows.
        row: of the pixel.
        column: of the pixel.
    """
    y, x = found["exceedance"].dims[-2:]
    here = found[["exceedance", "exceedance_known"]].isel({y: row, x: column}).load()
    k, n = xr.broadcast(here["exceedance"], here["exceedance_known"])
    n = n.transpose(*k.dims)
    low, high = interval(k.values, n.values)
    share = k.values / np.where(n.values > 0, n.values, np.nan)
    where = [name for name in ("y_origin", "x_origin", "proj") if name in found.coords]
    grid = Grid.of(found[[*where, y, x]].reset_coords(where).expand_dims("window"))
    return {
        **place(grid, row, column),
        "members": int(n.values.max(initial=0)),
        "radii_km": found["exceedance_radius"].values.tolist(),
        "thresholds": found["exceedance_threshold"].values.tolist(),
        "lead_times": _leads(found["lead_time"].values),
        **{
            name: [[[_number(v) for v in line] for line in plane] for plane in values]
            for name, values in (("probability", share), ("ci_low", low), ("ci_high", high))
        },
    }


def _leads(lead_times: np.ndarray) -> list[float]:
    """In minutes; ENSO: months."""
    if lead_times.dtype.kind == "m":
        return [float(lead) for lead in lead_times / np.timedelta64(1, "m")]
    return [float(lead) for lead in lead_times]


def _number(value: Any) -> float | None:
    """JSON knows no NaN."""
    return float(value) if math.isfinite(value) else None
