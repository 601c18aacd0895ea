"""Raw archives in the real formats from simple dynamics, so that everything runs with no download.

Every event, source and sequence has its own random stream from (seed, number): the same pixels come out
whatever else is written.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyproj
import scipy.ndimage
import xarray as xr

from pipelines.archives.catalog import PROJ
from pipelines.archives.sevir import EXTENT_M, FIRST_MINUTE, FRAME_MINUTES, FRAMES, MODALITIES
from pipelines.errors import InputError

# ---------------------------------------------------------------------------------------------- storms


def storms(rng: np.random.Generator, frames: int, size: int, *, margin: float = 0.7) -> np.ndarray:
    """Encoded VIL of one event, uint8 (time, y, x): cells that are born, drift, grow, decay and die.

    A cell is A(t) exp(-dx²/2sx² - dy²/2sy²) that drifts with the event's slowly turning wind, mostly towards
    the east-north-east at 30 to 55 km/h as storms of the mid-latitudes do; the sum over cells is a matrix
    product of their profiles along y and x. Texture drifts along.
    """
    scale = size / 384
    heading, speed = rng.normal(0.3, 0.4), rng.uniform(2.5, 4.5) * scale
    angles = heading + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, frames)
    drift = np.cumsum(np.stack([np.sin(angles), np.cos(angles)], 1) * speed, axis=0)

    clusters = rng.uniform(-margin * size, (1 + margin) * size, (rng.integers(14, 26), 2))
    core = rng.random(220) < 0.75
    count = len(core)
    home = clusters[rng.integers(0, len(clusters), count)]
    origin = home + rng.normal(0, np.where(core, 22, 45)[:, None] * scale, (count, 2))
    width = np.where(core[:, None], rng.uniform(7, 16, (count, 2)), rng.uniform(18, 42, (count, 2))) * scale
    peak = np.where(core, rng.gamma(4.0, 34.0, count), rng.uniform(25, 70, count))
    own = rng.normal(0, 0.2 * scale, (count, 2))
    middle = rng.uniform(-0.2 * frames, 1.2 * frames, count)
    life = rng.uniform(20, 50, count) * frames / FRAMES

    texture = _texture(rng, size, 5 * scale)
    axis = np.arange(size)
    out = np.empty((frames, size, size), np.uint8)
    for t in range(frames):
        age = (t - middle) / life
        alive = np.abs(age) < 1
        amplitude = peak[alive] * np.cos(age[alive] * np.pi / 2) ** 2
        centre = origin[alive] + drift[t] + own[alive] * t
        profiles = [
            np.exp(-(((axis[None] - centre[:, k, None]) / width[alive, k, None]) ** 2) / 2) for k in (0, 1)
        ]
        field = (profiles[0] * amplitude[:, None]).T @ profiles[1]
        moved = np.roll(texture, np.rint(drift[t]).astype(int), (0, 1))[:size, :size]
        # Saturation as in nature and in the encoding: strong cores flatten out below 254.
        out[t] = 254 * np.tanh(np.maximum(field * moved - 9, 0) / 190)
    return out


def _texture(rng: np.random.Generator, size: int, width: float) -> np.ndarray:
    noise = rng.standard_normal((2 * size, 2 * size), np.float32)
    smooth = scipy.ndimage.gaussian_filter(noise, max(width, 0.5), mode="wrap")
    return np.exp(0.28 * smooth / smooth.std())


# ----------------------------------------------------------------------------------------------- SEVIR


def write_sevir(
    folder: str | Path,
    *,
    events: int = 24,
    seed: int = 0,
    modalities: Sequence[str] = ("vil",),
    size: int = 384,
    frames: int = FRAMES,
) -> None:
    """Write `CATALOG.csv` and HDF5 files in SEVIR's layout, a file a half-year and modality.

    An event at a time is held in memory. The catalogue is written last; what was there before is overwritten.

    Args:
        folder: where.
        events: how many; a third before July 2018, the rest over the three half-years after.
        seed: of the whole archive.
        modalities: image types; all follow from the event's VIL.
        size: pixels a side of VIL, even; the other images keep their ratio to it. Flashes are always on
            48 × 48.
        frames: steps of 5 minutes.

    Raises:
        InputError: no event, or an unknown image type.
    """
    unknown = [name for name in modalities if name not in MODALITIES]
    if events < 1 or unknown or not modalities:
        found = f"{events} events" if events < 1 else f"modality {', '.join(unknown) or 'none'}"
        raise InputError(f"{found}: needed at least one event, and some of {', '.join(MODALITIES)}")
    catalog = Path(folder) / "CATALOG.csv"
    catalog.unlink(missing_ok=True)
    spans = [("2018", "0101_0630"), ("2018", "0701_1231"), ("2019", "0101_0630"), ("2019", "0701_1231")]
    parts = np.array_split(np.arange(events), [round(events * f) for f in (0.3, 0.6, 0.8)])
    rows: list[dict[str, Any]] = []
    for (year, span), numbers in zip(spans, parts, strict=True):
        if len(numbers):
            rows += _write_sevir_files(Path(folder), year, span, numbers, seed, modalities, size, frames)
    table = pd.DataFrame(rows).sort_values(["img_type", "id"], kind="stable")
    table.to_csv(catalog.with_suffix(".part"), index=False)
    catalog.with_suffix(".part").rename(catalog)


def _write_sevir_files(
    folder: Path,
    year: str,
    span: str,
    numbers: np.ndarray,
    seed: int,
    modalities: Sequence[str],
    size: int,
    frames: int,
) -> list[dict[str, Any]]:
    ids = [f"S{800000 + n:06d}" for n in numbers]
    sides = {n: 48 if n == "lght" else size * MODALITIES[n].size // 384 for n in modalities}
    rows = []
    with ExitStack() as stack:
        files = {}
        for name, side in sides.items():
            file_name = f"{name}/{year}/SEVIR_{name.upper()}_STORMEVENTS_{year}_{span}.h5"
            path = folder / "data" / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(h5py.File(path, "w"))
            file["id"] = np.array(ids, dtype="S10")
            if name != "lght":
                shape, dtype = (len(numbers), side, side, frames), MODALITIES[name].dtype
                chunks = (1, *shape[1:])
                file.create_dataset(name, shape, dtype, chunks=chunks, compression="gzip", compression_opts=1)
            files[name] = (file_name, file)
        for place, number in enumerate(map(int, numbers)):
            rng = np.random.default_rng([seed, number])
            event = _event_row(rng, number, year, span, frames)
            vil = storms(rng, frames, size)
            for name, (file_name, file) in files.items():
                # A stream of its own, lest an image depend on which others are written.
                own = np.random.default_rng([seed, number, list(MODALITIES).index(name)])
                if name == "lght":
                    values = file[ids[place]] = _flashes(own, vil)
                else:
                    values = _seen(name, vil, sides[name], own).transpose(1, 2, 0)
                    file[name][place] = values
                rows.append(
                    {
                        "id": ids[place],
                        "file_name": file_name,
                        "file_index": place,
                        "img_type": name,
                        **event,
                        "size_x": sides[name],
                        "size_y": sides[name],
                        "height_m": EXTENT_M,
                        "width_m": EXTENT_M,
                        "data_min": values.min() if values.size else 0,
                        "data_max": values.max() if values.size else 0,
                        "pct_missing": 0.0,
                    }
                )
    return rows


def _event_row(rng: np.random.Generator, number: int, year: str, span: str, frames: int) -> dict[str, Any]:
    """The catalogue columns that an event's modalities share."""
    first_month = 1 if span.startswith("01") else 7
    when = pd.Timestamp(f"{year}-{first_month:02d}-01") + pd.Timedelta(minutes=int(rng.integers(0, 260_000)))
    x, y = rng.uniform(-1_500_000, 1_100_000), rng.uniform(-1_000_000, 800_000)
    to_degrees = pyproj.Transformer.from_crs(PROJ, pyproj.CRS(PROJ).geodetic_crs, always_xy=True)
    corners = [to_degrees.transform(x + d, y + d) for d in (0.0, EXTENT_M)]
    return {
        "time_utc": when.strftime("%Y-%m-%d %H:%M:%S"),
        "minute_offsets": ":".join(str(FIRST_MINUTE + FRAME_MINUTES * k) for k in range(frames)),
        "episode_id": 100000 + number,
        "event_id": 800000 + number,
        "event_type": "Thunderstorm Wind",
        "llcrnrlat": corners[0][1],
        "llcrnrlon": corners[0][0],
        "urcrnrlat": corners[1][1],
        "urcrnrlon": corners[1][0],
        "proj": PROJ,
    }


def _seen(name: str, vil: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    if name == "vil":
        return vil
    size = vil.shape[-1]
    if side > size:
        seen = np.repeat(np.repeat(vil, side // size, 1), side // size, 2)
    else:
        seen = vil.reshape(len(vil), side, size // side, side, size // side).max((2, 4))
    level = seen.astype(np.float32) / 254
    noise = rng.normal(0, 1, level.shape[1:]).astype(np.float32)
    if name == "vis":
        return np.clip((0.15 + 0.75 * level + 0.02 * noise) * 1e4, 0, 1e4).astype(np.int16)
    warm, cold = (-25.0, -65.0) if name == "ir069" else (20.0, -70.0)
    return ((warm + (cold - warm) * np.sqrt(level) + 0.5 * noise) * 100).astype(np.int16)


def _flashes(rng: np.random.Generator, vil: np.ndarray) -> np.ndarray:
    """Flashes (n, 5) in strong cells: seconds, lat, lon, and x, y on 48 × 48 pixels."""
    strong = (vil > 180) & (rng.random(vil.shape, np.float32) < 0.01)
    t, y, x = (index.astype(float) for index in np.nonzero(strong))
    seconds = (FIRST_MINUTE + FRAME_MINUTES * (t + rng.random(len(t)))) * 60
    x, y = ((index + rng.random(len(t))) * MODALITIES["lght"].size / vil.shape[-1] for index in (x, y))
    order = np.argsort(seconds)
    return np.stack([seconds, 38 + y * 0.07, -98 + x * 0.09, x, y], axis=1)[order]


# ----------------------------------------------------------------------------------------------- ENSO


def write_enso(
    folder: str | Path,
    *,
    seed: int = 0,
    cmip6: tuple[int, int] = (3, 20),
    cmip5: tuple[int, int] = (4, 20),
    soda_years: int = 16,
) -> None:
    """Write `CMIP_train.nc`, `CMIP_label.nc`, `SODA_train.nc` and `SODA_label.nc` in the ICAR-ENSO layout.

    A delayed oscillator T' = T - T³/3 - a T(t - d) with noise drives an equatorial pattern; row y holds
    the 36 months of years y to y + 2, so that successive rows overlap by 24.

    Args:
        folder: where.
        seed: of the whole archive.
        cmip6: models and rows (years) of each, written first, model after model.
        cmip5: the same.
        soda_years: rows of the reanalysis.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(kind, model, years) for kind, (n, years) in ((6, cmip6), (5, cmip5)) for model in range(n)]
    fields, labels = zip(
        *(_ocean(np.random.default_rng([seed, kind, model]), years) for kind, model, years in runs),
        strict=True,
    )
    attrs = {
        "cmip6_models": cmip6[0],
        "cmip6_years": cmip6[1],
        "cmip5_models": cmip5[0],
        "cmip5_years": cmip5[1],
    }
    _write_icar(folder, "CMIP", np.concatenate(fields), np.concatenate(labels), attrs)
    _write_icar(folder, "SODA", *_ocean(np.random.default_rng([seed, 0, 0]), soda_years), {})


def _ocean(rng: np.random.Generator, years: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of SST anomaly (years, 36, 24, 72) in K and of the Niño3.4 label (years, 36)."""
    months = 12 * (years + 2)
    index = np.zeros(months + 60)
    index[:8] = rng.normal(0, 0.5, 8)
    for t in range(7, len(index) - 1):
        season = 1 + 0.3 * np.cos(2 * np.pi * (t - 11) / 12)
        tendency = season * (0.18 * index[t] - 0.05 * index[t] ** 3 - 0.16 * index[t - 7])
        index[t + 1] = index[t] + tendency + rng.normal(0, 0.18)
    index = index[60:]
    lat, lon = np.arange(-55, 61, 5)[:, None], np.arange(0, 360, 5)[None]
    east = np.exp(-((lat / 9) ** 2) - ((lon - 235) / 38.0) ** 2)
    west = np.exp(-((lat / 14) ** 2) - ((lon - 160) / 30.0) ** 2)
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (months, 24, 72)), (1.0, 1.0, 1.5), mode="nearest")
    lagged = np.roll(index, 5)
    lagged[:5] = index[0]
    field = index[:, None, None] * east - 0.45 * lagged[:, None, None] * west + 0.25 * noise / noise.std()
    land = (np.abs(lat) > 15) & (((lon > 15) & (lon < 40)) | ((lon > 285) & (lon < 300)))
    field = np.where(land, 0.0, field).astype(np.float32)
    nino = field[:, 10:13, 38:49].mean((1, 2))
    smooth = np.convolve(np.pad(nino, (0, 2), mode="edge"), np.ones(3) / 3, mode="valid")
    rows = np.arange(years)[:, None] * 12 + np.arange(36)
    return field[rows], smooth[rows].astype(np.float32)


def _write_icar(folder: Path, name: str, sst: np.ndarray, label: np.ndarray, attrs: dict[str, int]) -> None:
    dims = ("year", "month", "lat", "lon")
    coords = {
        "year": np.arange(1, len(sst) + 1),
        "month": np.arange(1, 37),
        "lat": np.arange(-55.0, 61.0, 5.0),
        "lon": np.arange(0.0, 360.0, 5.0),
    }
    variables = {
        "sst": (dims, sst),
        "t300": (dims, 0.6 * sst),
        "ua": (dims, 0.8 * np.roll(sst, 4, axis=3)),
        "va": (dims, 0.2 * np.roll(sst, 2, axis=2)),
    }
    xr.Dataset(variables, coords, attrs).to_netcdf(folder / f"{name}_train.nc")
    labels = {"nino": (("year", "month"), label)}
    xr.Dataset(labels, {k: coords[k] for k in ("year", "month")}).to_netcdf(folder / f"{name}_label.nc")


# ----------------------------------------------------------------------------------------------- radar


def write_radar(
    folder: str | Path, *, sequences: int = 4, seed: int = 0, size: int = 192, frames: int = 40
) -> None:
    """Write radar sequences in mm/h, a file each, on days a month apart, in the project's HDF5 layout.

    The radar stands south-west of the middle, and its disc leaves the north-eastern corner uncovered.

    Raises:
        InputError: no sequence.
    """
    if sequences < 1:
        raise InputError(f"{sequences} sequences: needed at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.mgrid[:size, :size] / size
    uncovered = np.hypot(row - 0.6, column - 0.4) > 0.75
    for number in range(sequences):
        rng = np.random.default_rng([seed, number])
        level = storms(rng, frames, size).astype(np.float32)
        rate = np.where(level > 8, 0.1 * np.exp(level / 45), 0.0)
        stored = np.rint(rate[:, ::-1] * 100).astype(np.uint16)
        stored[:, uncovered] = 65535
        start = np.datetime64("2016-01-15T06:00", "m") + np.timedelta64(30 * 24 * 60 * number, "m")
        times = start + np.arange(frames) * np.timedelta64(FRAME_MINUTES, "m")
        with h5py.File(folder / f"synthetic_{start.astype('datetime64[D]').item():%Y%m%d}.h5", "w") as file:
            data = file.create_dataset("rate", data=stored, chunks=(1, size, size), compression="gzip")
            data.attrs.update(
                {"cadence_minutes": 5, "fill_value": 65535, "scale_factor": 0.01, "units": "mm/h"}
            )
            file["time_utc"] = np.array([str(t) for t in times], dtype="S20")
            file.attrs["projection"] = PROJ
            file.attrs["ext"] = np.array([0.0, 0.0, size * 1000.0, size * 1000.0])
            file.attrs["px"] = np.array([1000.0, 1000.0])
            file.attrs["window384_row_col"] = np.array([0, 0])
