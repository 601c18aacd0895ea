"""Windows on a small grid of known place, and events on it."""

from typing import Any

import numpy as np
import xarray as xr

from pipelines.events import Event
from pipelines.regions import Region

PROJ = "+proj=laea +lat_0=52 +lon_0=5 +units=m"
"""One degree of longitude is 68.6 km near the middle, one of latitude 111 km."""


def placed(
    height: int,
    width: int,
    corners: tuple[tuple[float, float], ...] = ((0.0, 0.0),),
    *,
    step: tuple[float, float] = (-1000.0, 1000.0),
    proj: str = PROJ,
) -> xr.Dataset:
    """What `windows.placement` gives for windows whose first pixels lie at `corners` (y, x)."""
    y, x = (("window", np.array(values, dtype=float)) for values in zip(*corners, strict=True))
    return xr.Dataset(
        coords={
            "y": ("y", np.arange(height) * step[0]),
            "x": ("x", np.arange(width) * step[1]),
            "y_origin": y,
            "x_origin": x,
            "proj": ("window", np.array([proj] * len(corners))),
        }
    )


def enso_placed() -> xr.Dataset:
    """What `windows.placement` gives for ENSO."""
    return xr.Dataset(
        coords={
            "lat": ("lat", np.arange(-55.0, 65, 5, dtype=np.float32)),
            "lon": ("lon", np.arange(95.0, 335, 5, dtype=np.float32)),
        }
    )


def minutes(frames: int, step: int = 5) -> np.ndarray:
    """Lead times of a forecast."""
    return np.arange(1, frames + 1) * np.timedelta64(step, "m").astype("timedelta64[ns]")


def rain(threshold: float = 1.0, *, name: str = "rain", units: str = "mm/h", **more: Any) -> Event:
    """An event of rates."""
    return Event(name=name, variable="rate", threshold=threshold, units=units, **more)


def box(*edges: float, **more: Any) -> Region:
    """A region by west, south, east, north."""
    west, south, east, north = edges
    return Region(box=(west, south, east, north), **more)
