"""The layout of a Forecast Zarr: variables, coordinates and CF attributes, before any value is made."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import dask.array
import numpy as np
import torch
import xarray as xr

from pipelines import ensembles, windows
from pipelines.baselines import BASELINES
from pipelines.plans import Plan, lead_times
from pipelines.tasks import TASKS, Task
from pipelines.windows import Window


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
    task, archive, keys, ensemble = planned.task, planned.archive, planned.keys, planned.ensemble
    coords = _coordinates(planned)
    attrs = windows.attributes(task, archive, keys[0])
    grid = {str(dim): size for dim, size in _place(planned).sizes.items() if dim != "window"}
    variables: dict[str, xr.Variable] = {}
    if ensemble.kept:
        each = (ensemble.members, task.target, *grid.values())
        shape = (len(keys), *each)
        variables[task.variable] = xr.Variable(
            ("window", "member", "lead_time", *grid),
            dask.array.zeros(shape, dtype=np.float32, chunks=shape),
            attrs=attrs,
            encoding={
                "chunks": (1, 1, *shape[2:]),
                "shards": (planned.shard_windows, *each),
                "_FillValue": np.float32("nan"),
            },
        )
    if ensemble.reduced:
        reduced = ensembles.template(
            planned.bound(), len(keys), planned.shard_windows, attrs, ensemble.quantiles
        )
        variables |= {str(name): variable.variable for name, variable in reduced.data_vars.items()}
        coords |= {str(name): coord.variable for name, coord in reduced.coords.items()}
    if planned.drawing is not None and planned.drawing.alignment is not None:
        variables |= _functional(planned)
    for variable in variables.values():
        auxiliary = [
            name
            for name, coord in xr.Dataset(coords=coords).coords.items()
            if name not in coord.dims and set(coord.dims) <= set(variable.dims) and coord.dims
        ]
        variable.attrs["coordinates"] = " ".join(sorted(map(str, auxiliary)))
    return xr.Dataset(
        variables,
        coords=coords,
        attrs={
            "Conventions": "CF-1.11",
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
        }
        | _drawing(planned),
    )


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


def _place(planned: Plan) -> xr.Dataset:
    return windows.placement(planned.task, planned.archive, planned.keys)


def _coordinates(planned: Plan) -> dict[str, Any]:
    task, keys, members = planned.task, planned.keys, planned.ensemble.members
    times = windows.frame_times(task, planned.archive, keys)
    lead = {"standard_name": "forecast_period", "long_name": "time since init_time"}
    months = {"units": "months"} if task.step_minutes is None else {}
    coords: dict[str, Any] = {
        **{str(name): value for name, value in _place(planned).coords.items()},
        "window": ("window", np.arange(len(keys)), {"long_name": "sample, in evaluation order"}),
        "member": ("member", np.arange(members), {"standard_name": "realization"}),
        "lead_time": ("lead_time", lead_times(task, times[0]), lead | months),
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
            member_seeds(planned.seed, keys, members).numpy(),
            {"long_name": "seed of the member's random numbers"},
        ),
    }
    for axis, what, of in ((0, "tile_y", "row"), (1, "tile_x", "column")):
        corners = np.array([k.tile[axis] if k.tile else -1 for k in keys])
        said = {"long_name": f"first {of} of the tile in the series' grid; -1: no tile"}
        coords[what] = ("window", corners, said)
    return coords


def _functional(planned: Plan) -> dict[str, xr.Variable]:
    """What knowledge alignment asked of the forecast, and what each member made of it."""
    count, members = len(planned.keys), planned.ensemble.members
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
            encoding={"chunks": (planned.shard_windows, *shape[1:]), "_FillValue": np.float32("nan")},
        )
    return found


def _drawing(planned: Plan) -> dict[str, Any]:
    drawing = planned.drawing
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
    return {"comment": "nominal: model years have no date, and count from January 1700"}
