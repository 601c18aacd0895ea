"""What is wrong with a store, and what it holds, for people."""

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zarr

from pipelines.archives import UNREADABLE, records, store, why
from pipelines.storage import filesystem, read_all, read_json, zarr_store


def validate(url: str) -> list[str]:
    """Read everything back; one line a problem: what is missing, differs from its checksum or is unreadable.

    Raises:
        InputError: there is no store at `url`.
    """
    config, done = records.config_record(url), records.read(url)
    problems = list(_template_problems(url, config))
    missing = [shard for shard in range(config["shards"]) if shard not in done]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        problems.append(f"{len(missing)} of {config['shards']} shards have no record: {some}")
    elif not records.is_complete(url):
        problems.append(f"{records.COMPLETE} is missing or cut off")
    # Two at a time: one is read while another is decompressed, and no more than that is held in memory.
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda item: list(_shard_problems(url, *item)), sorted(done.items())):
            problems += found
    return problems


def _template_problems(url: str, config: Mapping[str, Any]) -> Iterator[str]:
    if records.identity_hash(config) != config["config_hash"]:
        yield f"{records.CONFIG} does not have the hash that it names, {config['config_hash']}"
    template = read_json(url, records.TEMPLATE)
    if template is None:
        yield f"{records.TEMPLATE} is missing or cut off"
        return
    for name, text in read_all(url, list(template["crc32"])).items():
        expected = template["crc32"][name]
        if text is None:
            yield f"{name} is missing"
        elif zlib.crc32(text) != expected:
            yield f"{name} has CRC-32 {zlib.crc32(text):08x}: needed {expected:08x}"


def _shard_problems(url: str, shard: int, record: Mapping[str, Any]) -> Iterator[str]:
    for part in record["regions"]:
        region = {d: slice(*bounds) for d, bounds in part["region"].items()}
        for name, expected in part["crc32"].items():
            where = f"shard {shard}, " + f"{part['group']}/{name}".lstrip("/")
            try:
                found = store.stored_crc32(url, part["group"], name, region)
            except UNREADABLE as error:
                yield f"{where} cannot be read: {why(error)}"
                continue
            if found != expected:
                yield f"{where} has CRC-32 {found:08x}: needed {expected:08x}"


def describe(url: str) -> str:
    """What a store holds and how far it is, finished or not, for people.

    Raises:
        InputError: there is no store at `url`, or its metadata are damaged.
    """
    config, done = records.config_record(url), read_json(url, records.COMPLETE)
    fs, path = filesystem(url)
    lines = [
        f"{url}: {config['config']['kind']}, configuration {config['config_hash']}, "
        f"{fs.du(path) / 1e6:.1f} MB"
    ]
    if read_json(url, records.TEMPLATE) is None:
        return "\n".join([*lines, "not complete: its template is cut off; run the same command again"])
    if done is None:
        lines.append(records.unfinished(url, config["shards"], len(records.pending(url, config["shards"]))))
    else:
        lines.append(
            f"complete since {done['finished']}: {config['shards']} shards, code {done['code_version']}"
        )
        counts = dict(done.get("counts", {}))
        dropped = counts.pop("dropped", {})
        lines.append(", ".join(f"{n} {what}" for what, n in counts.items()) + left_out(dropped))
    lines.append(str(store.open_unfinished(url)))
    names = zarr.open_group(zarr_store(url), mode="r").group_keys()
    for name in sorted(set(names) - {"records"}):
        group = store.open_unfinished(url, name)
        lines.append(f"{name}: " + "; ".join(f"{k} {dict(v.sizes)} {v.dtype}" for k, v in group.items()))
    return "\n".join(lines)


def left_out(dropped: Mapping[str, int]) -> str:
    """`; left out: …`, from counts of catalogue rows by reason; empty when none are."""
    reasons = ", ".join(f"{n} rows ({reason})" for reason, n in dropped.items() if n)
    return f"; left out: {reasons}" if reasons else ""
