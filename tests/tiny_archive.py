"""Archives in this process, without Ray: of plans, with templates alone, and of a few radar sequences."""

import dataclasses
import re
from collections.abc import Mapping

import h5py
import numpy as np
import xarray as xr

from pipelines import prepare
from pipelines.archives import Plan, radar, records, store
from pipelines.archives.store import Archive
from pipelines.tasks import TASKS, Task, Tiles

_PASSING = re.compile(rb'"(written|finished|source)": "[^"]*"')
METRES = "+proj=laea +lat_0=38 +lon_0=-98 +units=m +a=6370997.0 +ellps=sphere"


def built(plan: Plan, url: str) -> Archive:
    """The archive of a plan, as `prepare` writes it, in this process."""
    store.create(url, plan.groups, config=plan.config, shards=len(plan.shards), contents=plan.contents)
    for number, shard in enumerate(plan.shards):
        prepare.write_shard(number, shard, url)
    counts = {"series": plan.series, "frames": plan.frames, "dropped": dict(plan.dropped)}
    records.complete(url, {"counts": counts, "quarantine": records.quarantined(url)})
    return store.open_archive(url)


def timeless(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a store without what its records say of when, and from which folder, it was made."""
    return {n: _PASSING.sub(b"", text) if n.startswith("records/") else text for n, text in files.items()}


def bare(url: str, kind: str, root: xr.Dataset, quarantine: tuple[str, ...] = ()) -> Archive:
    """An archive of metadata alone."""
    store.create(url, {"": root}, config={"kind": kind}, shards=0)
    rows = [{"series": name, "file": "f", "reason": "r"} for name in quarantine]
    records.complete(url, {"counts": {}, "quarantine": rows})
    return store.open_archive(url)


def bare_sevir(url: str, times: Mapping[str, object], kind: str = "sevir", **more) -> Archive:
    frames, step, variable = (49, 5, "vil") if kind == "sevir" else (25, 10, "vil")
    minutes = np.arange(frames).astype("timedelta64[ns]") * 60_000_000_000 * step
    return bare(
        url,
        kind,
        xr.Dataset(
            {variable: (("event", "time"), np.zeros((len(times), frames), np.uint8))},
            coords={
                "event": ("event", np.array(list(times))),
                "time_utc": ("event", np.array(list(times.values()), "datetime64[ns]")),
                "time": ("time", minutes),
            },
        ),
        **more,
    )


def bare_enso(url: str, months: Mapping[str, int], **more) -> Archive:
    return bare(
        url,
        "enso",
        xr.Dataset(
            {"sst": ("source", np.zeros(len(months), np.float32))},
            coords={
                "source": ("source", np.array(list(months))),
                "n_months": ("source", np.array(list(months.values()))),
                "first_month": ("source", np.array([""] * len(months))),
            },
        ),
        **more,
    )


def changed(task: str, **values) -> Task:
    return dataclasses.replace(TASKS[task], **values)


def sequence(folder, name, start, rate, *, cadence=5, pixel=1000.0, **attrs):
    """A radar sequence in the project's layout: `rate` (time, y, x) in counts of 0.01 mm/h."""
    times = np.datetime64(start, "m") + np.arange(len(rate)) * np.timedelta64(cadence, "m")
    height, width = rate.shape[1:]
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["rate"] = rate.astype(np.uint16)
        said = {"cadence_minutes": cadence, "fill_value": 65535, "scale_factor": 0.01, "units": "mm/h"}
        file["rate"].attrs.update({**said, **attrs})
        file["time_utc"] = np.array([str(t) for t in times], dtype="S20")
        file.attrs["projection"] = METRES
        file.attrs["ext"] = np.array([0.0, 0.0, width * pixel, height * pixel])
        file.attrs["px"] = np.array([pixel, pixel])


SMALL = changed("radar", context=2, target=2, stride=(2, 2, 2), tiles=Tiles(size=8, stride=4))


def showers(folder) -> Archive:
    """Sequences of 16 × 24 pixels on three days, and two that do not fit `SMALL`."""
    rng = np.random.default_rng(5)
    for day, name in ((3, "charlie"), (1, "alpha"), (2, "bravo")):
        rate = rng.integers(0, 2000, (9, 16, 24))
        rate[:, :2] = 65535
        sequence(folder / "raw", name, f"2016-05-0{day}T10:00", rate)
    sequence(folder / "raw", "delta", "2016-05-04T10:00", np.ones((9, 16, 24)), cadence=2)
    sequence(folder / "raw", "echo", "2016-05-05T10:00", np.ones((9, 6, 24)))
    (folder / "raw" / "foxtrot.h5").write_bytes(b"no radar")
    return built(radar.plan(str(folder / "raw")), str(folder / "archive.zarr"))
