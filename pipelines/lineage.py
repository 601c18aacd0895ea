"""Where the values of a chunk are from: source file and bytes, or windows and run; by what code, and when."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr

from pipelines.archives import records, store
from pipelines.errors import InputError
from pipelines.storage import join, read_json, zarr_store


@dataclass(frozen=True)
class Place:
    """A chunk's part of a variable."""

    group: str
    name: str
    region: Mapping[str, slice]


def lineage(url: str, chunk: str) -> dict[str, Any]:
    """What a chunk of an archive or a forecast is made of, for JSON.

    Args:
        url: of the store, finished or not.
        chunk: the key of an object, such as `vil/c/3/0/0/0`, or, without the `c`, the index of one of the
            smaller chunks that it holds, such as `vil/57/0/0/0`.

    Raises:
        InputError: there is no such store, variable or chunk, or it is not written yet.
    """
    config = records.config_record(url)
    place = _place(url, chunk)
    number, record = _record(url, place)
    found = {
        "store": url,
        "kind": config["config"]["kind"],
        "chunk": chunk,
        "region": {dim: [s.start, s.stop] for dim, s in place.region.items()},
        "shard": number,
        **{name: record.get(name) for name in ("written", "code_version")},
        "config_hash": config["config_hash"],
    }
    if found["kind"] == "forecast":
        return found | _of_forecast(url, place, config["config"])
    names = [place.group] if place.group else _series_within(url, place)
    return found | {"series": _of_series(record, names)}


def _place(url: str, chunk: str) -> Place:
    *path, last = chunk.strip("/").split("/")
    index = [last]
    while path and path[-1].isdigit():
        index.insert(0, path.pop())
    whole = bool(path) and path[-1] == "c"
    group, name = "/".join(path[: -1 - whole]), path[-1 - whole] if len(path) > whole else ""
    if not name or not last.isdigit():
        raise InputError(f"chunk {chunk!r}: needed VARIABLE/c/0/0/0, as objects are named, or VARIABLE/0/0/0")
    try:
        array = zarr.open_array(zarr_store(url), path=f"{group}/{name}".lstrip("/"), mode="r")
    except (FileNotFoundError, zarr.errors.NodeTypeValidationError) as error:
        raise InputError(f"{url} has no variable {f'{group}/{name}'.lstrip('/')}") from error
    size = array.shards if whole and array.shards else array.chunks
    at = [int(part) for part in index]
    counts = [math.ceil(n / each) for n, each in zip(array.shape, size, strict=True)]
    if len(at) != len(counts) or any(i >= n for i, n in zip(at, counts, strict=True)):
        raise InputError(f"{url} has no chunk {chunk}: needed an index within {' × '.join(map(str, counts))}")
    parts = zip(store.dimensions(array), at, size, array.shape, strict=True)
    return Place(group, name, {str(d): slice(i * n, min((i + 1) * n, most)) for d, i, n, most in parts})


def _record(url: str, place: Place) -> tuple[int, dict[str, Any]]:
    """The shard that wrote a place, and what its record says."""
    for number, record in sorted(records.read(url).items()):
        for part in record["regions"]:
            within = (
                place.region[dim].start < stop and start < place.region[dim].stop
                for dim, (start, stop) in part["region"].items()
            )
            if part["group"] == place.group and place.name in part["crc32"] and all(within):
                return number, record
    raise InputError(
        f"{url} has no record of who wrote {place.name}: it is not written yet, or is a coordinate; needed a "
        "chunk of a variable that is"
    )


def _series_within(url: str, place: Place) -> list[str]:
    """Names of the series along the first dimension."""
    first = next(iter(place.region.values()))
    return list(records.series(url))[first]


def _of_series(record: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    def files(name: str) -> Iterator[dict[str, Any]]:
        for file, ranges in record.get("sources", {}).get(name, ()):
            yield {"file": join(record["source"], file), "bytes": ranges}

    reasons = {row["series"]: row["reason"] for row in record.get("quarantine", ())}
    return [
        {"name": name, "sources": list(files(name))}
        | ({"quarantined": reasons[name]} if name in reasons else {})
        for name in names
    ]


def _of_forecast(url: str, place: Place, config: Mapping[str, Any]) -> dict[str, Any]:
    whole = store.load_coordinates(store.open_unfinished(url))
    chosen = whole.isel({dim: s for dim, s in place.region.items() if dim in whole.dims})
    windows = [_window(chosen.isel(window=i)) for i in range(chosen.sizes["window"])]
    names = sorted({window["series"] for window in windows})
    trained = read_json(whole.attrs["run"], "run.json") or {}
    said = {name: trained[name] for name in ("code_version", "finished") if name in trained}
    return {
        "run": {"url": whole.attrs["run"], "run_hash": config["run_hash"], **said},
        "windows": windows,
        "archive": _of_archive(whole.attrs["archive"], config["archive_hash"], names),
    }


def _window(one: xr.Dataset) -> dict[str, Any]:
    return {
        "window": int(one["window"]),
        "series": str(one["series"].values),
        "start": int(one["start"]),
        "init_time": str(one["init_time"].values.astype("datetime64[s]")),
        "seeds": np.atleast_1d(one["seed"].values).tolist(),
    }


def _of_archive(url: str, digest: str, names: Sequence[str]) -> dict[str, Any]:
    """The series of an archive that a forecast was made from, if it is still the same."""
    found: dict[str, Any] = {"store": url, "config_hash": digest, "series": []}
    record = read_json(url, records.CONFIG) or {"config_hash": None}
    if record["config_hash"] != digest:
        return found | {"config_hash_now": record["config_hash"]}
    for number, each in sorted(records.read(url).items()):
        mine = [name for name in names if name in each.get("sources", ())]
        found["series"] += [
            one | {"shard": number, "written": each.get("written"), "code_version": each.get("code_version")}
            for one in _of_series(each, mine)
        ]
    return found


# --------------------------------------------------------------------------------------------- for people


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `lineage` found, as text."""
    place = ", ".join(f"{dim} {first}-{stop - 1}" for dim, (first, stop) in found["region"].items())
    yield f"{found['chunk']} of {found['store']}: {place}"
    yield f"  shard {found['shard']}, {_made(found)}, configuration {found['config_hash']}"
    for window in found.get("windows", ()):
        seeds = window["seeds"]
        drawn = f"{len(seeds)} members of seeds {seeds[0]} …" if len(seeds) > 1 else f"seed {seeds[0]}"
        at = f"{window['series']} from frame {window['start']}, init time {window['init_time']}"
        yield f"  window {window['window']}: {at}, {drawn}"
    if "run" in found:
        run = found["run"]
        yield f"  run {run['run_hash']}: {run['url']}" + (f", {_made(run)}" if "finished" in run else "")
    archive = found.get("archive", found)
    if "archive" in found:
        yield f"  archive {archive['config_hash']}: {archive['store']}"
    if "config_hash_now" in archive:
        yield (
            f"    is another by now, {archive['config_hash_now']}"
            if archive["config_hash_now"]
            else "    is gone"
        )
    for series in archive["series"]:
        by = f" (shard {series['shard']}, {_made(series)})" if "shard" in series else ""
        bad = f": quarantined, {series['quarantined']}" if "quarantined" in series else ""
        yield f"    {series['name']}{by}{bad}"
        for source in series["sources"]:
            yield f"      {source['file']}{_bytes(source['bytes'])}"


def _made(record: Mapping[str, Any]) -> str:
    return f"{record.get('written') or record.get('finished')} by code {record['code_version']}"


def _bytes(ranges: Sequence[Sequence[int]]) -> str:
    if not ranges:
        return ", all of it"
    first = ", ".join(f"{start}-{start + size - 1}" for start, size in ranges[:4])
    return f", bytes {first}" + (f" and {len(ranges) - 4} more ranges" if len(ranges) > 4 else "")
