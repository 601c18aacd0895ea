"""The layout of a Forecast Zarr: variables, coordinates and CF attributes, before any value is made."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dask.array
import numpy as np
import torch
import xarray as xr

from pipelines.baselines import BASELINES
from pipelines.ensembles import LEVEL
from pipelines.events import NINO34, Bound, BoundEvent, plain_units
from pipelines.exceedances import Levels
from pipelines.plans import Drawing, Ensemble, Plan, Samples
from pipelines.series import Window
from pipelines.tasks import TASKS, Task


def member_seeds(seed: int, keys: Sequence[Window], members: int) -> torch.Tensor:
    """Seeds (B, M), int64: each follows from (forecast seed, window, member) alone."""
    rows = []
    for key in keys:
        name = key.series.encode()
        identity = [seed, len(name), *name, key.start, *(key.tile or ())]
        states = [np.random.SeedSequence([*identity, m]).generate_state(1, np.uint64) for m in range(members)]
        rows.append(np.concatenate(states) >> 1)
    return torch.from_numpy(np.array(rows, dtype=np.uint64).astype(np.int64))


def template(planned: Plan) -> xr.Dataset:
    """Metadata and coordinates of the forecast; its values are not computed."""
    task, archive = planned.task, planned.archive
    return layout(
        planned.samples(),
        planned.ensemble,
        seed=planned.seed,
        drawing=planned.drawing,
        shard_windows=planned.shard_windows,
        attrs={
            "title": f"{planned.forecaster} forecast of {task.variable}, {task.name} {planned.split} windows",
            "task": task.name,
            "forecaster": planned.forecaster,
            "run": planned.run,
            "run_hash": planned.run_hash,
            "archive": archive.url,
            "archive_hash": archive.config_hash,
            "split": planned.split,
            "seed": planned.seed,
            "history": command(planned),
        },
    )


def layout(
    samples: Samples,
    ensemble: Ensemble,
    *,
    seed: int,
    drawing: Drawing | None,
    attrs: Mapping[str, Any],
    shard_windows: int = 1,
    shard_members: int | None = None,
    levels: Levels | None = None,
) -> xr.Dataset:
    """Metadata and coordinates of a forecast of any windows; its values are not computed.

    Args:
        samples: its windows.
        ensemble: what of their members is written.
        seed: of the forecast; members' seeds derive from it.
        drawing: of a diffusion model.
        attrs: global attributes beside those that every forecast has.
        shard_windows: windows of a shard.
        shard_members: members of a shard; default: all.
        levels: thresholds and radii whose exceedances are counted.
    """
    task, keys = samples.task, samples.keys
    coords = _coordinates(samples, ensemble.members, seed)
    grid = {str(dim): size for dim, size in samples.place.sizes.items() if dim != "window"}
    variables: dict[str, xr.Variable] = {}
    if ensemble.kept:
        each = (ensemble.members, task.target, *grid.values())
        shape = (len(keys), *each)
        variables[task.variable] = xr.Variable(
            ("window", "member", "lead_time", *grid),
            dask.array.zeros(shape, dtype=np.float32, chunks=shape),
            attrs=dict(samples.attrs),
            encoding={
                "chunks": (1, 1, *shape[2:]),
                "shards": (shard_windows, shard_members or ensemble.members, *each[1:]),
                "_FillValue": np.float32("nan"),
            },
        )
    if ensemble.reduced:
        bound = samples.bind(ensemble.events)
        reduced = reductions(bound, len(keys), shard_windows, samples.attrs, ensemble.quantiles)
        variables |= {str(name): variable.variable for name, variable in reduced.data_vars.items()}
        coords |= {str(name): coord.variable for name, coord in reduced.coords.items()}
    if levels is not None:
        counted = exceedances(levels, samples, len(keys), shard_windows)
        variables |= {str(name): variable.variable for name, variable in counted.data_vars.items()}
        coords |= {str(name): coord.variable for name, coord in counted.coords.items()}
    if drawing is not None and drawing.alignment is not None:
        variables |= _functional(len(keys), ensemble.members, shard_windows)
    for variable in variables.values():
        auxiliary = [
            name
            for name, coord in xr.Dataset(coords=coords).coords.items()
            if name not in coord.dims and set(coord.dims) <= set(variable.dims) and coord.dims
        ]
        variable.attrs["coordinates"] = " ".join(sorted(map(str, auxiliary)))
    return xr.Dataset(variables, coords=coords, attrs={"Conventions": "CF-1.11", **attrs} | _drawing(drawing))


def command(planned: Plan) -> str:
    """The command that makes this forecast again, but for its `--out` and options at their defaults.

    The events are named, not said: they are in the forecast's `records/config.json`.
    """
    ensemble, drawing = planned.ensemble, planned.drawing
    trained = planned.run not in BASELINES
    options: dict[str, Any] = {
        "run": planned.run if trained else None,
        "forecaster": None if trained else planned.run,
        "task": None if trained else planned.task.name,
        "archive": planned.archive.url,
        "split": planned.split,
        "every": planned.every if planned.every != 1 else None,
        "limit": planned.limit,
        "seed": planned.seed or None,
        "max-members" if ensemble.until_ci else "members": ensemble.members if ensemble.members > 1 else None,
        "until-ci": ensemble.until_ci,
        "events": "EVENTS.yaml" if ensemble.events else None,
        "quantiles": ",".join(map(str, ensemble.quantiles)) or None,
    }
    flags = {"keep-members": ensemble.keep_members}
    if drawing is not None:
        options |= {"sampler": drawing.sampler, "steps": drawing.steps, "alignment": drawing.alignment}
        options |= {"deviations": drawing.deviations or None, "strength": drawing.strength}
        flags |= {"bf16": drawing.precision == "bf16", "compile": drawing.compile}
    said = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    said += [f"--set {shlex.quote(change)}" for change in ([] if trained else _changes(planned.task))]
    return " ".join(["earthformer forecast", *said, *(f"--{name}" for name, asked in flags.items() if asked)])


def _changes(task: Task) -> list[str]:
    """What of a task is not as its name has it, as `--set` takes it."""
    named, own = asdict(TASKS.get(task.name, task)), asdict(task)
    return [f"task.{key}={json.dumps(value)}" for key, value in own.items() if value != named[key]]


def _coordinates(samples: Samples, members: int, seed: int) -> dict[str, Any]:
    task, keys, times = samples.task, samples.keys, samples.times
    lead = {"standard_name": "forecast_period", "long_name": "time since init_time"}
    months = {"units": "months"} if task.step_minutes is None else {}
    coords: dict[str, Any] = {
        **{str(name): value for name, value in samples.place.coords.items()},
        "window": ("window", np.arange(len(keys)), {"long_name": "sample, in evaluation order"}),
        "member": ("member", np.arange(members), {"standard_name": "realization"}),
        "lead_time": ("lead_time", samples.lead_times, lead | months),
        "series": ("window", np.array([k.series for k in keys]), {"long_name": "series of the archive"}),
        "start": (
            "window",
            np.array([k.start for k in keys]),
            {"long_name": "index of the context's first frame in the series"},
        ),
        "init_time": (
            "window",
            times[:, task.context - 1],
            {"standard_name": "forecast_reference_time", "long_name": "time of the context's last frame"}
            | _calendar(task),
        ),
        "valid_time": (
            ("window", "lead_time"),
            times[:, task.context :],
            {"standard_name": "time", "long_name": "time of the forecast frame"} | _calendar(task),
        ),
        "seed": (
            ("window", "member"),
            member_seeds(seed, keys, members).numpy(),
            {"long_name": "seed of the member's random numbers"},
        ),
    }
    for axis, what, of in ((0, "tile_y", "row"), (1, "tile_x", "column")):
        corners = np.array([k.tile[axis] if k.tile else -1 for k in keys])
        said = {"long_name": f"first {of} of the tile in the series' grid; -1: no tile"}
        coords[what] = ("window", corners, said)
    return coords


def _functional(count: int, members: int, shard_windows: int) -> dict[str, xr.Variable]:
    """What knowledge alignment asked of the forecast, and what each member made of it."""
    found = {}
    for name, dims, said in (
        ("functional_requested", ("window",), "value of the functional that was asked for"),
        ("functional_achieved", ("window", "member"), "value of the functional of each member"),
    ):
        shape = (count, members)[: len(dims)]
        found[name] = xr.Variable(
            dims,
            dask.array.zeros(shape, dtype=np.float32, chunks=shape),
            attrs={"long_name": said, "units": "1", "comment": "of the scaled field, 0-1"},
            encoding={"chunks": (shard_windows, *shape[1:]), "_FillValue": np.float32("nan")},
        )
    return found


def _drawing(drawing: Drawing | None) -> dict[str, Any]:
    if drawing is None:
        return {}
    found: dict[str, Any] = {"sampler": drawing.sampler, "sampler_steps": drawing.steps}
    if drawing.alignment is not None:
        found |= {"alignment": drawing.alignment, "alignment_hash": drawing.alignment_hash}
        found |= {"deviations": drawing.deviations, "guidance_strength": drawing.strength}
    return found


def _calendar(task: Task) -> dict[str, str]:
    if task.step_minutes is not None:
        return {}
    return {"comment": "nominal for climate models: their years have no date, and count from January 1700"}


# ------------------------------------------------------------------------------------------- reductions


def reductions(
    bound: Bound,
    windows: int,
    shard_windows: int,
    attrs: Mapping[str, Any],
    quantiles: Sequence[float] = (),
) -> xr.Dataset:
    """Variables and coordinates of a store of `Reduction.result`s; its values are not computed.

    Args:
        bound: what is asked.
        windows: their number.
        shard_windows: windows of a shard.
        attrs: CF attributes of the task's variable (`windows.attributes`).
        quantiles: as the reductions are given.

    Returns:
        Every variable's first dimension is `window`; spatial dimensions and `lead_time` are the forecast's,
        whose coordinates are the caller's to add.
    """
    name, dims = bound.task.variable, bound.grid.dims
    what = str(attrs.get("long_name", name))
    field = ("lead_time", *dims)
    sizes = dict(zip(field, (len(bound.lead_times), *bound.grid.shape), strict=True))
    coords: dict[str, Any] = {}

    def lay_out(
        of: Sequence[str], attrs: Mapping[str, Any], whole: int, dtype: type = np.float32
    ) -> xr.Variable:
        """`whole`: how many of the last dimensions a chunk holds."""
        each = tuple(sizes[dim] for dim in of)
        encoding: dict[str, Any] = {"chunks": (shard_windows, *each)}
        if whole:
            encoding["chunks"] = (*[1] * (1 + len(of) - whole), *each[len(of) - whole :])
            encoding["shards"] = (shard_windows, *each)
        if dtype is np.float32:
            encoding["_FillValue"] = np.float32("nan")
        zeros = dask.array.zeros((windows, *each), dtype=dtype, chunks=(windows, *each))
        return xr.Variable(("window", *of), zeros, attrs=dict(attrs), encoding=encoding)

    moments = {key: value for key, value in attrs.items() if key in ("units", "standard_name")}
    found = {
        f"{name}_mean": lay_out(
            field,
            moments | {"long_name": f"ensemble mean of {what}", "cell_methods": "realization: mean"},
            3,
        ),
        f"{name}_stdev": lay_out(
            field,
            moments
            | {
                "long_name": f"ensemble standard deviation of {what}",
                "cell_methods": "realization: standard_deviation",
                "comment": "of the population that the members are a sample of (n - 1)",
            },
            3,
        ),
        "n_members": lay_out(
            (), {"long_name": "members that count, all independent", "units": "1"}, 0, np.int32
        ),
        "failed_members": lay_out(
            (), {"long_name": "members without a finite value, left out", "units": "1"}, 0, np.int32
        ),
        "smallest_resolvable": lay_out(
            (), {"long_name": "smallest probability above 0 that n_members can tell", "units": "1"}, 0
        ),
    }
    if len(quantiles):
        sizes["quantile"] = len(quantiles)
        coords["quantile"] = ("quantile", np.asarray(quantiles, np.float64), {"units": "1"})
        found[f"{name}_quantile"] = lay_out(
            ("quantile", *field), moments | {"long_name": f"ensemble quantile of {what}"}, 3
        )
    for prefix, events, of in (("", bound.fields, dims), ("regional_", bound.regional, ())):
        if not events:
            continue
        dim = f"{prefix}event"
        sizes[dim] = len(events)
        coords |= _event_coords(prefix, events, bound)
        for key, said in (
            ("probability", "probability of the event: the fraction of members that have it"),
            ("ci_low", f"lower end of the probability's {LEVEL:.0%} confidence interval"),
            ("ci_high", f"upper end of the probability's {LEVEL:.0%} confidence interval"),
        ):
            extra = {"ancillary_variables": f"{prefix}ci_low {prefix}ci_high n_members"}
            said_of = {"long_name": said, "units": "1"} | (extra if key == "probability" else {})
            found[f"{prefix}{key}"] = lay_out((dim, *of), said_of, len(of))
    return xr.Dataset(found, coords=coords)


def exceedances(levels: Levels, samples: Samples, windows: int, shard_windows: int) -> xr.Dataset:
    """Variables and coordinates of a store of `Exceedances`; its values are not computed."""
    grid = {str(dim): size for dim, size in samples.place.sizes.items() if dim != "window"}
    sizes = {
        "exceedance_radius": len(levels.radii),
        "exceedance_threshold": len(levels.thresholds),
        "lead_time": samples.task.target,
        **grid,
    }
    name = str(samples.attrs.get("long_name", samples.task.variable))
    said = {
        "exceedance": (tuple(sizes), f"members whose {name} is at least the threshold within the radius"),
        "exceedance_known": (tuple(sizes)[2:], f"members that have a {name}"),
    }
    variables = {}
    for variable, (dims, text) in said.items():
        shape = (windows, *(sizes[dim] for dim in dims))
        variables[variable] = xr.Variable(
            ("window", *dims),
            dask.array.zeros(shape, dtype=np.uint16, chunks=shape),
            attrs={"long_name": text, "units": "1"},
            encoding={
                "chunks": (*[1] * (len(shape) - 3), *shape[-3:]),
                "shards": (shard_windows, *shape[1:]),
            },
        )
    units = {"units": samples.task.units}
    coords = {
        "exceedance_radius": ("exceedance_radius", np.array(levels.radii), {"units": "km"}),
        "exceedance_threshold": ("exceedance_threshold", np.array(levels.thresholds), units),
    }
    return xr.Dataset(variables, coords=coords)


def _event_coords(prefix: str, events: Sequence[BoundEvent], bound: Bound) -> dict[str, Any]:
    """What each event is, along `event` or `regional_event`."""
    asked = [event.event for event in events]
    units = [plain_units(event.units) for event in asked]
    same = {"units": units[0]} if len(set(units)) == 1 else {}
    leads = [(bound.lead_times[e.frames.start], bound.lead_times[e.frames.stop - 1]) for e in events]
    months = {} if bound.lead_times.dtype.kind == "m" else {"units": "months"}
    found: dict[str, tuple[Any, dict[str, str]]] = {
        "event": ([e.name for e in asked], {"long_name": "name of the event"}),
        "variable": ([e.variable for e in asked], {"long_name": "variable compared with the threshold"}),
        "comparison": ([e.comparison for e in asked], {"long_name": "of variable and threshold"}),
        "threshold": ([e.threshold for e in asked], {"long_name": "threshold of the event", **same}),
        "threshold_units": (units, {"long_name": "units of threshold"}),
        "lead_from": ([first for first, _ in leads], {"long_name": "first lead time", **months}),
        "lead_to": ([last for _, last in leads], {"long_name": "last lead time", **months}),
        "duration": (
            [e.duration for e in asked],
            {"long_name": "successive frames that must have the event", "units": "1"},
        ),
        "accumulated": (
            [int(e.accumulated) for e in asked],
            {"long_name": "1: the threshold is of the sum over the lead times", "units": "1"},
        ),
        "radius": (
            [e.radius for e in asked],
            {"long_name": "the event is anywhere within this distance", "units": "km"},
        ),
    }
    if prefix:
        regions = [e.region for e in asked]
        found["reduce"] = (
            [f"fraction {r.fraction:g}" if r and r.fraction else r.reduce if r else NINO34 for r in regions],
            {"long_name": "how the region's pixels give one answer"},
        )
        found["region"] = ([str(r) if r else NINO34 for r in regions], {"long_name": "extent in degrees"})
    return {
        f"{prefix}{name}": (f"{prefix}event", np.array(values), said)
        for name, (values, said) in found.items()
    }
