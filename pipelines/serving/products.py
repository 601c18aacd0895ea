"""Files made of a forecast: NetCDF, zipped Zarr, and maps."""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import xarray as xr

from pipelines import maps
from pipelines.configs import unknown
from pipelines.errors import InputError
from pipelines.plots import rendered
from pipelines.storage import filesystem
from pipelines.tasks import Task


def of_event(found: xr.Dataset, name: str) -> xr.Dataset:
    """One event's `probability`, `ci_low` and `ci_high` of a forecast.

    Raises:
        InputError: it has no such event.
    """
    known = {
        str(event): (prefix, number)
        for prefix in ("", "regional_")
        if f"{prefix}event" in found
        for number, event in enumerate(found[f"{prefix}event"].values)
    }
    if name not in known:
        unknown("event", name, known)
    prefix, number = known[name]
    names = [f"{prefix}{what}" for what in ("probability", "ci_low", "ci_high")]
    chosen = found[[*names, "n_members"]].isel({f"{prefix}event": number})
    return chosen.rename({each: each.removeprefix(prefix) for each in names})


def at_lead(field: xr.DataArray, lead_time: float | None) -> xr.DataArray:
    """A field at one lead time, in minutes or months; default: the last.

    Raises:
        InputError: the forecast has no such lead time.
    """
    leads = field["lead_time"].values
    known = leads / np.timedelta64(1, "m") if leads.dtype.kind == "m" else leads.astype(float)
    if lead_time is None:
        return field.isel(lead_time=-1)
    if lead_time not in known:
        needed = ", ".join(f"{lead:g}" for lead in known)
        raise InputError(f"lead_time is {lead_time:g}: needed one of {needed}")
    return field.isel(lead_time=int(np.flatnonzero(known == lead_time)[0]))


def png(field: xr.DataArray, title: str, task: Task) -> bytes:
    """A map of a field (y, x): probabilities in theirs, all else in the variable's colours."""
    ydim, xdim = map(str, field.dims)
    y, x = (field[dim].values.astype(float) for dim in (ydim, xdim))
    colours = maps.probabilities() if field.name == "probability" else maps.palette(task)
    view = maps.View.of(y, x, metres=field[xdim].attrs.get("units") == "m")
    values = np.ma.masked_invalid(field.values.astype(float))
    return rendered(maps.draw(view, [maps.Row("", [values], [title])], colours), "png")


def netcdf(found: xr.Dataset) -> bytes:
    """A dataset as NetCDF 4."""
    plain = found.load().drop_encoding()
    for variable in plain.variables.values():
        variable.attrs = {k: v for k, v in variable.attrs.items() if k not in ("_FillValue", "coordinates")}
    with tempfile.NamedTemporaryFile(suffix=".nc") as file:
        plain.to_netcdf(file.name, engine="h5netcdf")
        return Path(file.name).read_bytes()


def zarr_zip(url: str) -> str:
    """A finished store as a zip for `zarr.storage.ZipStore`: path of a file that the caller deletes."""
    fs, path = filesystem(url)
    with (
        tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file,
        zipfile.ZipFile(file, "w") as packed,
    ):
        for name in sorted(fs.find(path)):
            packed.writestr(name.removeprefix(f"{path}/"), fs.cat_file(name))
    return file.name
