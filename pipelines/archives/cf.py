"""Where the pixels of a gridded variable lie in time and space, by the CF conventions and by PROJ."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyproj
import xarray as xr

from pipelines.errors import InputError

METRES = {"m": 1.0, "metre": 1.0, "meter": 1.0, "metres": 1.0, "meters": 1.0, "km": 1000.0}


def axes_of(rate: xr.DataArray) -> tuple[str, str, str]:
    """Names of the time, y and x dimensions, in whatever order they are; others are of size 1."""
    found = {}
    for dim in map(str, rate.dims):
        attrs = rate[dim].attrs
        standard = str(attrs.get("standard_name", "")).removeprefix("projection_").removeprefix("grid_")
        words = [str(word).lower() for word in (attrs.get("axis", ""), standard, dim)]
        if rate[dim].dtype.kind == "M" or not {"t", "time"}.isdisjoint(words):
            found["time"] = dim
        elif any(word.startswith(("y", "lat", "north")) for word in words):
            found["y"] = dim
        elif any(word.startswith(("x", "lon", "east")) for word in words):
            found["x"] = dim
        elif rate.sizes[dim] > 1:
            found[dim] = dim
    if set(found) != {"time", "y", "x"}:
        sizes = ", ".join(f"{dim} ({size})" for dim, size in rate.sizes.items())
        raise InputError(f"{rate.name} has dimensions {sizes}: needed time, y and x")
    return found["time"], found["y"], found["x"]


def grid_of(
    dataset: xr.Dataset, rate: xr.DataArray, axes: tuple[str, str, str]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixel centres, and PROJ string in metres (empty on latitudes and longitudes)."""
    y, x = (rate[axis] for axis in axes[1:])
    mapping = str(rate.attrs.get("grid_mapping", rate.encoding.get("grid_mapping", ""))).partition(":")[0]
    if mapping in dataset.variables:
        proj = _projection(dataset[mapping].attrs)
    elif str(y.attrs.get("units") or y.name).lower().startswith(("degree", "lat")):
        proj = ""
    else:
        missing = f"grid_mapping {mapping!r} is absent" if mapping else f"{rate.name} has no grid_mapping"
        raise InputError(f"{missing}: needed a projection, or latitudes and longitudes as dimensions")
    if not proj:
        return y.values.astype(float), x.values.astype(float), ""
    proj, unit = in_metres(proj)
    values = []
    for axis in (y, x):
        units = str(axis.attrs.get("units", ""))
        if units and units not in METRES:
            raise InputError(f"{axis.name} has units {units!r}: needed m or km")
        values.append(axis.values * METRES.get(units, unit))
    return values[0], values[1], proj


def _projection(attrs: Mapping[str, Any]) -> str:
    """PROJ string of a grid mapping; empty for latitudes and longitudes."""
    text = next((str(attrs[key]) for key in ("proj4", "proj4_params", "proj4_string") if key in attrs), None)
    crs = pyproj.CRS.from_user_input(text) if text else pyproj.CRS.from_cf(dict(attrs))
    if crs.is_geographic and not crs.is_derived:
        return ""
    if not crs.is_projected:
        raise InputError(f"grid mapping {crs.name!r}: needed a projection, or latitudes and longitudes")
    with warnings.catch_warnings():
        # PROJ strings know no names and areas of use.
        warnings.simplefilter("ignore", UserWarning)
        return text or str(crs.to_proj4())


def in_metres(proj: str) -> tuple[str, float]:
    """A PROJ string in metres, and the metres of its unit: KNMI's Earth, and so its grid, is in kilometres.

    Raises:
        ValueError: the string is not a projection.
    """
    parts = dict(part.lstrip("+").partition("=")[::2] for part in proj.split())
    unit = 1.0
    if float(parts.get("a", parts.get("R", 6.4e6))) < 1e5:
        unit = 1000.0
        for key in ("a", "b", "R", "x_0", "y_0"):
            if key in parts:
                parts[key] = f"{float(parts[key]) * unit:.10g}"
    elif parts.get("units", "m") != "m" or "to_meter" in parts:
        unit = float(parts.pop("to_meter", METRES.get(parts.get("units", "m"), np.nan)))
        parts["units"] = "m"
    proj = " ".join(f"+{k}={v}" if v else f"+{k}" for k, v in parts.items())
    if not np.isfinite(unit) or not pyproj.CRS.from_proj4(proj).is_projected:
        raise ValueError(f"{proj!r} is no projection in metres or kilometres")
    return proj, unit
