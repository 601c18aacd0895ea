"""Events: what is asked of an ensemble, checked against a task and its grid before anything is computed.

A pixel has an event in a member when its value compares with the threshold in some frame of the lead-time
range, or in `duration` successive ones, or when its accumulated amount does. With a radius, the event is at
a pixel when it is at any pixel within it. A region then asks for any of its pixels, a fraction of them, or
for the same of its mean value. Without a region an event has a field of probabilities, with one a single
probability.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import fsspec
import numpy as np
import xarray as xr
import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from earthformer.scores import NINO34_LAT, NINO34_LON
from pipelines.configs import unknown
from pipelines.errors import InputError
from pipelines.regions import Grid, Region, polygon_of
from pipelines.tasks import Task

NINO34 = "nino34"
"""A variable of ENSO tasks: the box mean's 3-month running mean, as `earthformer.scores.nino34`."""

_UNITS: dict[str, dict[str, float]] = {
    "mm h-1": {
        "mm h-1": 1.0,
        "mm min-1": 60.0,
        "mm s-1": 3600.0,
        "cm h-1": 10.0,
        "m s-1": 3.6e6,
        "in h-1": 25.4,
        "kg m-2 h-1": 1.0,
        "kg m-2 s-1": 3600.0,
    },
    # Anomalies: differences of temperature.
    "K": {"K": 1.0, "degC": 1.0},
}
"""Units that thresholds may be in, by the task's units: how many of the task's one of them is."""
_AMOUNTS = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "in": 25.4, "kg m-2": 1.0}
"""The same of what rates in mm h-1 add up to."""
_VIL = {"1": 1.0, "kg m-2": 1.0}
"""Of encoded VIL: `vil_kg_m2` converts values rather than thresholds, so that means are of kg m-2."""
_ALIASES = {"hr": "h", "hour": "h", "hours": "h", "sec": "s", "celsius": "degC", "°C": "degC", "kelvin": "K"}


@dataclass(frozen=True)
class Event:
    """One question to an ensemble."""

    name: str
    variable: str
    """The task's variable, or `nino34`."""
    threshold: float
    units: Annotated[str, BeforeValidator(str)]
    """Of the threshold: physical, such as mm/h, mm (accumulated), kg m-2, K; or 1 for encoded VIL."""
    comparison: Literal[">=", ">", "<=", "<"] = ">="
    lead_time: tuple[float, float] | None = None
    """First and last lead time, both included, in minutes (ENSO: months); none: all."""
    radius: float = 0.0
    """In km: the event is at a pixel when it is at any pixel whose centre lies within this."""
    region: Region | None = None
    duration: int = 1
    """Successive frames."""
    accumulated: bool = False
    """Compare the sum over the lead-time range, of rates times the step between frames."""

    def __post_init__(self) -> None:
        _need(bool(self.name.strip()), "name", self.name, "some text")
        # Compared as float32, after a change of units.
        _need(abs(self.threshold) < 1e30, "threshold", self.threshold, "a number below 1e30")
        _need(0 <= self.radius < math.inf, "radius", self.radius, "0 km or more")
        _need(self.duration >= 1, "duration", self.duration, "1 frame or more")
        if self.lead_time is not None:
            ordered = 0 <= self.lead_time[0] <= self.lead_time[1] < math.inf
            _need(ordered, "lead_time", list(self.lead_time), "[from, to] with 0 <= from <= to")
        _need(not (self.accumulated and self.duration > 1), "duration", self.duration, "1 beside accumulated")
        if self.region is not None and self.region.reduce == "mean":
            _need(self.radius == 0, "radius", self.radius, "0 beside a region's mean")
        if self.variable == NINO34:
            _need(self.region is None, "region", "given", f"none: {NINO34} has its own")
            _need(self.radius == 0, "radius", self.radius, f"0 for {NINO34}")
            _need(not self.accumulated, "accumulated", True, f"false for {NINO34}")

    def at(self, longitude: float, latitude: float) -> "Event":
        """The event at a place; as it is where it has a place of its own.

        Raises:
            InputError: there is no such place.
        """
        if self.region is not None or self.variable == NINO34:
            return self
        try:
            return replace(self, region=Region(point=(longitude, latitude)))
        except ValueError as error:
            raise InputError(f"event {self.name!r}: {error}") from error


def _need(holds: bool, name: str, found: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {found!r}: needed {needed}")


def read_events(url: str) -> tuple[Event, ...]:
    """Events from a YAML (or JSON) list.

    ```yaml
    - name: heavy rain nearby         # a field of probabilities
      variable: rate
      threshold: 5
      units: mm/h
      lead_time: [0, 60]              # minutes, both ends included; default: all
      radius: 5                       # km
    - name: wet hour in the city      # one probability: 10 mm over a tenth of the polygon's pixels
      variable: rate
      threshold: 10
      units: mm
      accumulated: true
      lead_time: [0, 60]
      region: {polygon: city.geojson, reduce: fraction, fraction: 0.1}
    - name: lull at the airport
      variable: rate
      comparison: <
      threshold: 0.1
      units: mm/h
      duration: 6                     # successive frames
      region: {point: [4.76, 52.31]}
    - name: El Niño
      variable: nino34
      threshold: 0.5
      units: K
      duration: 5                     # months
    ```

    A region is `box: [west, south, east, north]`, `polygon` (GeoJSON, or the path of a file of it, from this
    file's folder) or `point: [longitude, latitude]`, and `reduce` is any, fraction or mean.

    Raises:
        InputError: an absent or unreadable file, an unknown key (the nearest is named), an impossible value,
            two events of one name.
    """
    # A path's backslash is no URL's, and no polygon of a chain is looked for beside it.
    return parse_events(_read(url, "events"), url, folder=url.rpartition("/")[0] or ".")


def parse_events(values: Any, source: str, *, folder: str | None = None) -> tuple[Event, ...]:
    """Events from what YAML or JSON holds.

    Args:
        values: a list of mappings.
        source: what to call it in errors.
        folder: where the paths of polygons begin; none: paths are refused, as for requests from afar.

    Raises:
        InputError: as `read_events`.
    """
    if not isinstance(values, list | tuple) or not values:
        found = "no events" if isinstance(values, list | tuple | None) else f"a {type(values).__name__}"
        raise InputError(f"{source} holds {found}: needed a list of events")
    events = tuple(_event(value, f"{source}, event {i + 1}", folder) for i, value in enumerate(values))
    names = [event.name for event in events]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{source} holds {names.count(name)} events named {name!r}: needed one each")
    return events


def _event(values: Any, where: str, folder: str | None) -> Event:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r:.60}: needed a mapping")
    _known_keys(values, Event, where)
    if values.get("name"):
        where = f"{where} ({values['name']})"
    region = values.get("region")
    if isinstance(region, dict):
        _known_keys(region, Region, where, "region.")
        if region.get("polygon") is not None:
            values = {**values, "region": {**region, "polygon": _polygon(region["polygon"], where, folder)}}
    try:
        return TypeAdapter(Event).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"{where} has no {key}: needed one") from error
        if first["type"] == "value_error":
            raise InputError(f"{where}: {first['ctx']['error']}") from error
        raise InputError(f"{where}: {key} is {first['input']!r:.60}: {first['msg']}") from error


def _known_keys(values: dict[Any, Any], kind: Any, where: str, place: str = "") -> None:
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            unknown(f"{where}: key", f"{place}{key}", [f"{place}{name}" for name in known])


def _polygon(given: Any, where: str, folder: str | None) -> Any:
    if isinstance(given, str):
        if folder is None:
            raise InputError(f"{where}: region.polygon is a path: needed GeoJSON")
        path = given if "://" in given or given.startswith("/") else f"{folder}/{given}"
        given, where = _read(path, "polygon"), f"{where}, {given}"
    try:
        return polygon_of(given)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _read(url: str, what: str) -> Any:
    try:
        with fsspec.open(url, "rt", encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
        raise InputError(f"{what} {url} cannot be read: {' '.join(str(error).split())}") from error


# --------------------------------------------------------------------------------- bound to a forecast


@dataclass(frozen=True, eq=False)
class BoundEvent:
    """An event in the terms of a forecast."""

    event: Event
    frames: slice
    """Frames of the lead-time range; of Niño3.4, months of the index."""
    threshold: float
    """In the units of what is compared: the task's, their sum over frames if accumulated, or kg m-2."""
    kg_m2: bool
    """Values are encoded VIL, and converted before they are compared."""
    windows: np.ndarray | None
    """Which windows contain the region, bool (N,) or (1,) for all; none without a region."""

    @property
    def scalar(self) -> bool:
        """Whether the event has one probability a window rather than a field."""
        return self.event.region is not None or self.event.variable == NINO34


@dataclass(frozen=True, eq=False)
class Bound:
    """Events of one forecast: everything that a `Reduction` and its template need."""

    task: Task
    grid: Grid
    lead_times: np.ndarray
    """timedelta64, or months."""
    events: tuple[BoundEvent, ...]

    @property
    def fields(self) -> tuple[BoundEvent, ...]:
        """Events with a field of probabilities, in the order asked."""
        return tuple(bound for bound in self.events if not bound.scalar)

    @property
    def regional(self) -> tuple[BoundEvent, ...]:
        """Events with one probability a window, in the order asked."""
        return tuple(bound for bound in self.events if bound.scalar)


def bind(events: tuple[Event, ...], task: Task, place: xr.Dataset, lead_times: np.ndarray) -> Bound:
    """Check events against a task, its windows and lead times; nothing is computed.

    Args:
        events: may be empty, for mean, standard deviation and quantiles alone.
        task: of the forecast.
        place: what `windows.placement` returns for the forecast's windows.
        lead_times: (T,), timedelta64; ENSO: months.

    Raises:
        InputError: an unknown variable; a unit that does not fit it; a lead time beyond the forecast, or a
            range or duration without frames; a radius larger than the grid; a region that no window contains.
    """
    grid = Grid.of(place)
    return Bound(task, grid, lead_times, tuple(_bind(event, task, grid, lead_times) for event in events))


def _bind(event: Event, task: Task, grid: Grid, lead_times: np.ndarray) -> BoundEvent:
    known = (task.variable, NINO34) if task.archive == "enso" else (task.variable,)
    if event.variable not in known:
        unknown(f"event {event.name!r}: variable", event.variable, known)
    if event.variable == NINO34:
        _check_nino34(event, grid)
        lead_times = lead_times[:-2]
    factor, kg_m2 = _conversion(event, task)
    frames = _frames(event, lead_times)
    if event.radius:
        _check_radius(event, task, grid)
    inside = None
    if event.region is not None:
        inside = grid.contains(event.region)
        if not inside.any():
            raise InputError(
                f"event {event.name!r}: its region, {event.region}, lies wholly in none of the forecast's "
                f"windows: needed one within {grid}"
            )
    return BoundEvent(event, frames, event.threshold * factor, kg_m2, inside)


def _check_nino34(event: Event, grid: Grid) -> None:
    lat, lon = grid.y[NINO34_LAT], grid.x[NINO34_LON] % 360
    if not (np.array_equal(lat, [-5, 0, 5]) and np.array_equal(lon, np.arange(190, 245, 5))):
        raise InputError(
            f"event {event.name!r}: the grid is {grid.shape[0]} × {grid.shape[1]}, {grid}: {NINO34} needs "
            "the 24 × 48 grid of 5° from 95°E"
        )


def _conversion(event: Event, task: Task) -> tuple[float, bool]:
    """Factor from the event's units to those compared, and whether encoded VIL is converted instead."""
    units = plain_units(event.units)
    table = _UNITS.get(task.units, _VIL if task.variable == "vil" else {task.units: 1.0})
    if event.accumulated:
        if task.units != "mm h-1" or task.step_minutes is None:
            raise InputError(
                f"event {event.name!r}: {event.variable} in {task.units} adds up to nothing: accumulated "
                "needs a rate in mm h-1"
            )
        # The threshold, not every pixel, becomes a sum of rates.
        table = {name: factor * 60 / task.step_minutes for name, factor in _AMOUNTS.items()}
    if units not in table:
        what = f"an accumulated {event.variable}" if event.accumulated else event.variable
        raise InputError(
            f"event {event.name!r}: units {event.units!r} do not fit {what}: needed {', '.join(table)}"
        )
    return table[units], task.variable == "vil" and units == "kg m-2"


def unit_factor(units: str, task: Task) -> float:
    """What values in these units are multiplied by to be in the task's.

    Raises:
        InputError: they do not fit.
    """
    table, found = _UNITS.get(task.units, {task.units: 1.0}), plain_units(units)
    if found not in table:
        raise InputError(f"units {units!r} do not fit {task.variable}: needed {', '.join(table)}")
    return table[found]


def plain_units(text: str) -> str:
    """Units in one spelling: `mm/h`, `mm hr^-1` and `mm·h⁻¹` are all `mm h-1`."""
    text = re.sub(r"\*\*|\^", "", text).translate(str.maketrans("⁻−²³¹·*", "--231  "))
    text = re.sub(r"/\s*([^\W\d]+)\s*(\d*)", lambda found: f" {found[1]}-{found[2] or 1}", text)
    parts = [re.fullmatch(r"([^\d-]+)(-?\d*)", part) for part in text.split()]
    return " ".join(
        _ALIASES.get(found[1], found[1]) + found[2] if found else part
        for found, part in zip(parts, text.split(), strict=True)
    )


def _frames(event: Event, lead_times: np.ndarray) -> slice:
    monthly = lead_times.dtype.kind != "m"
    leads = lead_times if monthly else lead_times / np.timedelta64(1, "m")
    unit = "months" if monthly else "min"
    if event.lead_time is None:
        chosen = np.arange(len(leads))
    else:
        first, last = event.lead_time
        if last > leads[-1]:
            raise InputError(
                f"event {event.name!r}: lead_time is [{first:g}, {last:g}] {unit}: needed up to "
                f"{leads[-1]:g}, the last of the forecast"
            )
        chosen = np.flatnonzero((leads >= first) & (leads <= last))
        if not len(chosen):
            raise InputError(
                f"event {event.name!r}: no frame has a lead_time within [{first:g}, {last:g}] {unit}: needed "
                f"one of {', '.join(f'{lead:g}' for lead in leads)}"
            )
    if event.duration > len(chosen):
        raise InputError(
            f"event {event.name!r}: duration is {event.duration} frames, its lead_time holds {len(chosen)}: "
            "needed no more"
        )
    return slice(int(chosen[0]), int(chosen[-1]) + 1)


def _check_radius(event: Event, task: Task, grid: Grid) -> None:
    if task.archive == "enso":
        raise InputError(
            f"event {event.name!r}: radius is {event.radius:g} km: needed 0, for pixels of 5° are of many "
            "sizes in km"
        )
    extent = min(size * km for size, km in zip(grid.shape, grid.pixel_km(0), strict=True))
    if event.radius > extent:
        raise InputError(
            f"event {event.name!r}: radius is {event.radius:g} km, the grid {extent:g} km wide: needed less"
        )


def vil_kg_m2(encoded: np.ndarray) -> np.ndarray:
    """Vertically integrated liquid in kg m-2 of SEVIR's encoding (0-254), float of the same shape."""
    low = np.where(encoded <= 5, 0.0, (encoded - 2) / 90.66)
    with np.errstate(over="ignore"):  # of a member that diverged
        high = np.exp((encoded - 83.9) / 38.9)
    return np.where(encoded <= 18, low, high)
