"""What a store says of itself: small JSON files beside its data, of which the last one completes it.

    URL/records/config.json         what the store is to hold, and the hash of it: written first
    URL/records/contents.json       its series, and what each is made of
    URL/zarr.json, URL/<variable>/  a plain Zarr v3 group, laid out whole; `xarray.open_zarr(URL)` reads it
    URL/records/template.json       the layout is written: checksums of its files
    URL/records/000012.json         shard 12 is written: its checksums, and where its values are from
    URL/records/complete.json       all shards are written: counts, quarantine

A shard is the unit of writing, of retry and of resumption: one task writes the whole of it. "The object
exists" is not "done"; its record is. A record that cannot be parsed was cut off and counts as absent.

Whatever is written twice, by a task that is retried or by two commands at once, is the same both times. So
there is no lock: commands that run at the same time share the work.
"""

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import InputError
from pipelines.storage import filesystem, listed, parsed, read_all, read_json, write_json
from pipelines.version import code_version

CONFIG, CONTENTS, TEMPLATE, COMPLETE = (
    f"records/{name}.json" for name in ("config", "contents", "template", "complete")
)
NO_SERIES: Mapping[str, str] = MappingProxyType({})


def config_hash(config: Any) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def begun(url: str, config: Mapping[str, Any], contents: Mapping[str, str] = NO_SERIES) -> bool:
    """Whether a store of this configuration has been begun at `url`; False where there is nothing yet.

    It may hold fewer series, if they are the first of `contents`: it grows.

    Raises:
        InputError: `url` holds a store of another configuration (both hashes are named), of other series, or
            other files.
    """
    found = read_json(url, CONFIG)
    if found is None:
        # The contents are the first file of a store, so that they may be all there is, or the half of them.
        names = [n for n in listed(url, "records") if not n.startswith(("contents.json", "config.json"))]
        if names or not set(listed(url)) <= {"records"}:
            raise InputError(f"{url} exists and is no store of ours: needed an empty or absent folder")
        return False
    asked = _config_record(config, contents)
    if found["config"] != _as_json(config):
        raise InputError(
            f"{url} was written under configuration {found['config_hash']}, asked is {asked['config_hash']}: "
            "needed the same configuration, or another URL"
        )
    held = dict(itertools.islice(contents.items(), found.get("series", 0)))
    if _digest(held) != found.get("contents", _digest({})):
        raise InputError(
            f"{url} {_difference(series(url), held)}: needed a source that has only gained, or another URL"
        )
    return True


def begin(url: str, config: Mapping[str, Any], shards: int, contents: Mapping[str, str]) -> str | None:
    """Say what a store is to hold, before anything else of it is there.

    Returns the hash that it goes by where its layout is still to be written, and None where it is there.

    Raises:
        InputError: as `begun`, or `url` cannot be written to.
    """
    there = begun(url, config, contents)
    asked = {**_config_record(config, contents), "shards": shards}
    template = read_json(url, TEMPLATE)
    if there and template is None and read(url):
        raise InputError(f"{url} has shards but no {TEMPLATE}: it is damaged; needed another URL")
    if not there or read_json(url, CONFIG) != _as_json(asked):
        reopen(url)
        try:
            write_json(url, CONTENTS, contents, indent=None)
            write_json(url, CONFIG, asked)
        except (NotImplementedError, ValueError) as error:  # an archive of files opened to be read, the web
            raise InputError(f"{url} cannot be written to: needed a URL of a file system that can") from error
    elif template is not None and template.get("config_hash") == asked["config_hash"]:
        return None
    return str(asked["config_hash"])


def laid_out(url: str, digest: str, crc32: Mapping[str, int]) -> None:
    """Say that the layout of a store is written, and what the CRC-32 of each of its files is."""
    write_json(url, TEMPLATE, {"config_hash": digest, "crc32": crc32})


def _config_record(config: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
    record = {"config": config, "series": len(contents), "contents": _digest(contents)}
    return {"config_hash": identity_hash(record), **record}


def hash_of(config: Mapping[str, Any], contents: Mapping[str, str] = NO_SERIES) -> str:
    """The hash that a store of this layout and these series goes by."""
    return str(_config_record(config, contents)["config_hash"])


def identity_hash(record: Mapping[str, Any]) -> str:
    """The hash that the store of a configuration record goes by."""
    if not record.get("series"):
        return config_hash(record["config"])
    return config_hash({**record["config"], "contents": record["contents"]})


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _digest(contents: Mapping[str, str]) -> str:
    return config_hash(list(contents.items()))


def _difference(held: Mapping[str, str], found: Mapping[str, str]) -> str:
    for name, of in held.items():
        if found.get(name) != of:
            return f"holds {name} of {of}, and the source has {found.get(name, 'none')}"
    return f"holds {len(held)} series, and the source has {len(found)} of them"


def series(url: str) -> dict[str, str]:
    """Name of each series of a store, finished or not, in its order, to what it is made of."""
    return (read_json(url, CONTENTS) or {}) if read_json(url, CONFIG) else {}


def config_record(url: str) -> dict[str, Any]:
    """The store's configuration, its hash and the number of its shards.

    Raises:
        InputError: there is no store at `url`.
    """
    found = read_json(url, CONFIG)
    if found is None or not {"config", "config_hash", "shards"} <= set(found):
        raise InputError(
            f"{url} is not a store: it has no {CONFIG}; needed what `prepare` or `forecast` wrote"
        )
    return found


def unfinished(url: str, shards: int, missing: int) -> str:
    """How far a store is, in one line."""
    return (
        f"{url} is not complete: {shards - missing} of {shards} shards are there; "
        "run the same command again to finish it"
    )


# ------------------------------------------------------------------------------------------- shards


def write(url: str, shard: int, record: Mapping[str, Any]) -> None:
    """Say that a shard is written. Call it after the data.

    Args:
        url: the store.
        shard: its number.
        record: holds `regions`, a list of what `region_record` returns, for `validate` to check; and, where
            what it is made of may change, `identity`.
    """
    said = {"code_version": code_version(), "written": _now()}
    write_json(url, _record_name(shard), {**record, **said}, indent=None)


def _record_name(shard: int) -> str:
    return f"records/{shard:06d}.json"


def read(url: str) -> dict[int, dict[str, Any]]:
    """The records of all shards that are done, by number."""
    names = [name for name in listed(url, "records") if re.fullmatch(r"\d+\.json", name)]
    texts = read_all(url, [f"records/{name}" for name in sorted(names)])
    found = {int(name[len("records/") : -len(".json")]): parsed(text) for name, text in texts.items()}
    return {shard: record for shard, record in found.items() if record is not None and "regions" in record}


def is_written(url: str, shard: int, identity: str | None = None) -> bool:
    """Whether a shard is done, and is made of this."""
    record = read_json(url, _record_name(shard))
    return record is not None and "regions" in record and record.get("identity") == identity


def remove(url: str, shard: int) -> None:
    """Have a shard written once more."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(f"{path}/{_record_name(shard)}")


def pending(url: str, shards: int) -> list[int]:
    """Shards that are still to be written."""
    done = read(url)
    return [shard for shard in range(shards) if shard not in done]


def complete(url: str, summary: Mapping[str, Any], done: Mapping[int, Any] | None = None) -> None:
    """Write the completion record.

    Args:
        url: the store.
        summary: what the record adds: `counts`, and `quarantine` (rows of `series`, `file`, `reason`).
        done: what `read` said, if it has been asked.

    Raises:
        InputError: a shard has no record.
    """
    config, done = config_record(url), read(url) if done is None else done
    missing = [shard for shard in range(config["shards"]) if shard not in done]
    if missing:
        raise InputError(unfinished(url, config["shards"], len(missing)))
    _sweep(url)
    record = {
        "config_hash": config["config_hash"],
        "shards": config["shards"],
        "code_version": code_version(),
        "finished": _now(),
        **summary,
    }
    write_json(url, COMPLETE, record)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def reopen(url: str) -> None:
    """Take the completion record away: shards whose records were removed are about to be written again."""
    fs, path = filesystem(url)
    if is_complete(url):
        fs.rm_file(f"{path}/{COMPLETE}")


def _sweep(url: str) -> None:
    """Remove what killed writers left: Zarr writes a local file under another name first."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        for name in fs.find(path):
            if name.endswith(".partial"):
                fs.rm_file(name)


def is_complete(url: str) -> bool:
    """Whether the completion record is there."""
    return read_json(url, COMPLETE) is not None


def quarantined(url: str) -> list[dict[str, str]]:
    """The series that could not be read, each once: rows of `series`, `file` and `reason`.

    Of an unfinished store, those found so far.
    """
    done = read_json(url, COMPLETE)
    return quarantine_of(read(url)) if done is None else list(done.get("quarantine", ()))


def quarantine_of(done: Mapping[int, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same, from what `read` said."""
    rows = [row for _, record in sorted(done.items()) for row in record.get("quarantine", ())]
    return list({row["series"]: row for row in reversed(rows)}.values())[::-1]
