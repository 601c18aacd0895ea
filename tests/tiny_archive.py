"""Archives in this process, without Ray."""

from pipelines.archives import Plan, store
from pipelines.archives.store import Archive


def built(plan: Plan, url: str) -> Archive:
    """The archive of a plan, as `prepare` writes it, in this process."""
    store.create(url, plan.groups, config=plan.config, shards=len(plan.shards))
    quarantine = []
    for number, shard in enumerate(plan.shards):
        regions, bad = shard.decode()
        written = [
            store.region_record(r.group, r.region, store.write_region(url, r.group, r.arrays, r.region))
            for r in regions
        ]
        store.write_record(url, number, {"regions": written})
        quarantine += [{"series": b.series, "file": b.file, "reason": b.reason} for b in bad]
    store.complete(url, {"counts": {}, "quarantine": quarantine})
    return store.open_archive(url)
