"""Raw archives in the real formats from simple dynamics, so that everything runs with no download.

Every event, source and sequence has its own random stream from (seed, number): the same event comes out
whatever else is written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyproj
import scipy.ndimage
import xarray as xr

from pipelines.archives.sevir import EXTENT_M, MODALITIES, PROJ

FRAMES = 49
FRAME_MINUTES = 5


# ---------------------------------------------------------------------------------------------- storms


def storms(rng: np.random.Generator, frames: int, size: int, *, margin: float = 0.7) -> np.ndarray:
    """Encoded VIL of one event, uint8 (time, y, x): cells that are born, drift, grow, decay and die.

    A cell is A(t) exp(-dx²/2sx² - dy²/2sy²) that drifts with the event's slowly turning wind; the sum over
    cells is a matrix product of their profiles along y and x. Texture drifts along.
    """
    scale = size / 384
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(2.2, 4.5) * scale
    angles = heading + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, frames)
    drift = np.cumsum(np.stack([np.sin(angles), np.cos(angles)], 1) * speed, axis=0)

    clusters = rng.uniform(-margin * size, (1 + margin) * size, (rng.integers(14, 26), 2))
    core = rng.random(220) < 0.75
    count = len(core)
    home = clusters[rng.integers(0, len(clusters), count)]
    origin = home + rng.normal(0, np.where(core, 22, 45)[:, None] * scale, (count, 2))
    width = np.where(core[:, None], rng.uniform(4, 11, (count, 2)), rng.uniform(18, 42, (count, 2))) * scale
    peak = np.where(core, rng.gamma(4.0, 34.0, count), rng.uniform(25, 70, count))
    own = rng.normal(0, 0.35 * scale, (count, 2))
    middle = rng.uniform(-0.2 * frames, 1.2 * frames, count)
    life = rng.uniform(14, 40, count) * frames / FRAMES

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

    Args:
        folder: where.
        events: how many; half before 2019, the rest over both halves of 2019.
        seed: of the whole archive.
        modalities: image types; all follow from the event's VIL.
        size: pixels a side of VIL; the other modalities keep their ratio to it.
        frames: steps of 5 minutes.
    """
    folder = Path(folder)
    spans = [("2018", "0101_0630"), ("2018", "0701_1231"), ("2019", "0101_0630"), ("2019", "0701_1231")]
    parts = np.array_split(np.arange(events), [round(events * f) for f in (0.3, 0.6, 0.8)])
    rows: list[dict[str, Any]] = []
    for (year, span), numbers in zip(spans, parts, strict=True):
        if len(numbers):
            rows += _write_sevir_files(folder, year, span, numbers, seed, modalities, size, frames)
    pd.DataFrame(rows).sort_values(["img_type", "id"]).to_csv(folder / "CATALOG.csv", index=False)


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
    files, rows = {}, []
    for name in modalities:
        file_name = f"{name}/{year}/SEVIR_{name.upper()}_STORMEVENTS_{year}_{span}.h5"
        path = folder / "data" / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[name] = (file_name, h5py.File(path, "w"))
    for name, (_, file) in files.items():
        file["id"] = np.array(ids, dtype="S10")
        if name != "lght":
            side = size * MODALITIES[name].size // 384
            shape, dtype = (len(numbers), side, side, frames), MODALITIES[name].dtype
            file.create_dataset(
                name, shape, dtype, chunks=(1, *shape[1:]), compression="gzip", compression_opts=1
            )
    to_degrees = pyproj.Transformer.from_crs(PROJ, pyproj.CRS(PROJ).geodetic_crs, always_xy=True)
    for place, number in enumerate(numbers):
        rng = np.random.default_rng([seed, int(number)])
        first_month = 1 if span.startswith("01") else 7
        when = pd.Timestamp(f"{year}-{first_month:02d}-01") + pd.Timedelta(
            minutes=int(rng.integers(0, 260_000))
        )
        x, y = rng.uniform(-1_500_000, 1_100_000), rng.uniform(-1_000_000, 800_000)
        corners = [to_degrees.transform(x + d, y + d) for d in (0.0, EXTENT_M)]
        vil = storms(rng, frames, size)
        for name, (file_name, file) in files.items():
            side = size * MODALITIES[name].size // 384
            if name == "lght":
                file[ids[place]] = _flashes(rng, vil, side, frames)
            else:
                file[name][place] = _seen(name, vil, side, rng).transpose(1, 2, 0)
            rows.append(
                {
                    "id": ids[place],
                    "file_name": file_name,
                    "file_index": place,
                    "img_type": name,
                    "time_utc": when.strftime("%Y-%m-%d %H:%M:%S"),
                    "minute_offsets": ":".join(str(5 * k - 120) for k in range(frames)),
                    "episode_id": 100000 + int(number),
                    "event_id": 800000 + int(number),
                    "event_type": "Thunderstorm Wind",
                    "llcrnrlat": corners[0][1],
                    "llcrnrlon": corners[0][0],
                    "urcrnrlat": corners[1][1],
                    "urcrnrlon": corners[1][0],
                    "proj": PROJ,
                    "size_x": side,
                    "size_y": side,
                    "height_m": EXTENT_M,
                    "width_m": EXTENT_M,
                    "data_min": 0,
                    "data_max": int(vil.max()),
                    "pct_missing": 0.0,
                }
            )
    for _, file in files.values():
        file.close()
    return rows


def _seen(name: str, vil: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    if name == "vil":
        return vil
    size = vil.shape[-1]
    coarse = (
        vil if side >= size else vil.reshape(len(vil), side, size // side, side, size // side).max((2, 4))
    )
    fine = np.repeat(np.repeat(coarse, side // size, 1), side // size, 2) if side > size else coarse
    level = fine.astype(np.float32) / 254
    noise = rng.normal(0, 1, level.shape[1:]).astype(np.float32)
    if name == "vis":
        return np.clip((0.15 + 0.75 * level + 0.02 * noise) * 1e4, 0, 1e4).astype(np.int16)
    warm, cold = (-25.0, -65.0) if name == "ir069" else (20.0, -70.0)
    return ((warm + (cold - warm) * np.sqrt(level) + 0.5 * noise) * 100).astype(np.int16)


def _flashes(rng: np.random.Generator, vil: np.ndarray, side: int, frames: int) -> np.ndarray:
    """Flashes (n, 5) in strong cells: seconds, lat, lon, x, y."""
    block = vil.shape[-1] // side
    strong = vil.reshape(len(vil), side, block, side, block).max((2, 4)) > 180
    t, y, x = (index.astype(float) for index in np.nonzero(strong & (rng.random(strong.shape) < 0.3)))
    seconds = (t * 5 - 120) * 60 + rng.uniform(0, 300, len(t))
    within = rng.random((2, len(t)))
    return np.stack([seconds, 38 + y * 0.07, -98 + x * 0.09, x + within[0], y + within[1]], axis=1)


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
    runs = [cmip6[1]] * cmip6[0] + [cmip5[1]] * cmip5[0]
    fields, labels = zip(
        *(_ocean(np.random.default_rng([seed, n]), years) for n, years in enumerate(runs)), strict=True
    )
    attrs = {
        "cmip6_models": cmip6[0],
        "cmip6_years": cmip6[1],
        "cmip5_models": cmip5[0],
        "cmip5_years": cmip5[1],
    }
    _write_icar(folder, "CMIP", np.concatenate(fields), np.concatenate(labels), attrs)
    _write_icar(folder, "SODA", *_ocean(np.random.default_rng([seed, 10_000]), soda_years), {})


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
    """Write radar sequences in mm/h, a file each, on days a month apart; no coverage outside a disc."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size, :size] - size / 2
    uncovered = np.hypot(y, x) > 0.9 * size
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
