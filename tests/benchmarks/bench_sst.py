"""Speed and memory of an SST analysis on its way into an ENSO archive: does the file's size decide them?

    python tests/benchmarks/bench_sst.py [--months 312] [--workers 2] [--folder FOLDER]

The file is synthetic, as OISST is: 0.25°, float32 in °C, compressed a month a chunk, with land and with ice
that comes and goes (written once, and kept in FOLDER, if one is given). It is 4.1 MB a month; 312 are 1.3 GB.
Memory is the peak of a worker's resident set over its life.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import ray
import xarray as xr
from bench_prepare import peak_gb
from rich.console import Console

from pipelines import engine
from pipelines.archives import enso

STEP = 0.25


def write(path: Path, months: int) -> None:
    """A mean year, an anomaly everywhere, noise in hundredths of a degree, a continent and ice."""
    lat, lon = np.arange(-90, 90, STEP) + STEP / 2, np.arange(0, 360, STEP) + STEP / 2
    south, east = np.deg2rad(lat)[:, None], np.deg2rad(lon)
    land = (np.sin(east) > 0.6) & (np.abs(south) > 0.35)
    rng = np.random.default_rng(0)
    sst = np.empty((months, len(lat), len(lon)), np.float32)
    for month, field in enumerate(sst):
        season = np.sin(2 * np.pi * month / 12)
        field[:] = 28 * np.cos(south) ** 2 + 3 * season * np.sin(south) + rng.normal()
        field += rng.normal(0, 0.3, field.shape).round(2)
        field[land | (np.abs(south) > 1.05 + 0.09 * season)] = np.nan
    time_axis = (np.datetime64("1982-01") + np.arange(months)).astype("datetime64[ns]")
    data = xr.Dataset(
        {"sst": (("time", "lat", "lon"), sst.round(2), {"units": "degC"})},
        {"time": time_axis, "lat": lat, "lon": lon},
    )
    chunk = {"zlib": True, "complevel": 1, "chunksizes": (1, len(lat), len(lon))}
    data.to_netcdf(path, encoding={"sst": chunk})


def main() -> None:
    """Write the file, read it on a cluster, and say what it took."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--months", type=int, default=312)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where the file is kept, or is found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-sst-") as scratch:
        measure(arguments, Path(arguments.folder or scratch))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Once on a file of three years, so that the workers are up, and then."""
    files = {months: folder / f"sst-{months}.nc" for months in (36, arguments.months)}
    for months, path in files.items():
        if not path.exists():
            write(path, months)
    engine.connect(arguments.workers, address="local")
    with engine.dask_on_cluster():
        for months, path in files.items():
            start = time.perf_counter()
            enso.observed(str(path))
            seconds = time.perf_counter() - start
            family = psutil.Process().children(recursive=True)
            workers = [p for p in family if (p.cmdline() or [""])[0].startswith("ray::IDLE")]
            gigabytes = months * (180 / STEP) * (360 / STEP) * 4 / 1e9
            Console().print(
                f"{months} months, {gigabytes:.2f} GB: {seconds:.1f} s on {arguments.workers} workers, "
                f"{max(peak_gb(p.pid) for p in workers):.2f} GB a worker"
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
