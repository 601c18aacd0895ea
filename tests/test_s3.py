"""Object storage: what is at s3:// is what is on a disk, whatever goes wrong on the way."""

import dataclasses
import re
import sys

import fsspec
import numpy as np
import pytest
import s3fs
import xarray as xr
from tiny_archive import built, timeless
from tiny_faults import faults
from tiny_forecast import write_run

from earthformer.presets import EARTHFORMERS
from pipelines import cli, storage
from pipelines.archives import checks, radar, sevir, store, synthetic
from pipelines.prepare import prepare
from pipelines.tasks import TASKS

EVENTS = 6
RAW = "s3://public/sevir"


@pytest.fixture(scope="module")
def raw(tmp_path_factory, s3):
    """A raw archive, here and at `RAW`."""
    folder = tmp_path_factory.mktemp("s3") / "sevir"
    synthetic.write_sevir(folder, events=EVENTS, seed=6, size=192, modalities=("vil", "lght"))
    fsspec.filesystem("s3").put(str(folder), RAW, recursive=True)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory, raw, ray_cluster):
    """An archive of it, an event a shard."""
    url = str(tmp_path_factory.mktemp("local") / "a.zarr")
    prepare("sevir", str(raw), url, modalities=("vil", "lght"), shard_mb=0, progress=False)
    return url


def forget() -> None:
    """Nothing that was learned of buckets and servers holds."""
    storage._is_public.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def ask(monkeypatch):
    """Have S3 asked in another way from now on: at another endpoint, with another key, or with none."""

    def otherwise(**environment: str | None) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
        forget()

    yield otherwise
    monkeypatch.undo()
    forget()


def files(url: str) -> dict[str, bytes]:
    fs, path = storage.fresh(url)
    return timeless({n.removeprefix(f"{path}/"): fs.cat_file(n) for n in fs.find(path)})


def assert_same(url: str, other: str) -> None:
    ours, theirs = files(url), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_an_archive_is_the_same_there(raw, local):
    url = "s3://private/a.zarr"
    prepare("sevir", RAW, url, modalities=("vil", "lght"), shard_mb=0, progress=False)
    assert checks.validate(url) == []
    assert_same(url, local)
    xr.testing.assert_identical(xr.open_zarr(url).load(), xr.open_zarr(local).load())


def test_a_public_bucket_is_read_without_a_key(raw, local, ask):
    ask(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert sevir.plan(RAW).series == EVENTS
    # Or where one's own key is of no use.
    ask(AWS_ACCESS_KEY_ID="another", AWS_SECRET_ACCESS_KEY="another")
    regions, bad, sources, _ = sevir.plan(RAW).shards[0].decode()
    assert bad == []
    assert np.array_equal(regions[0].arrays["vil"], store.Archive(local).array("", "vil")[:])
    assert set(sources) == {str(event) for event in store.Archive(local).root["event"].values}


def earthformer(capfd, *arguments: str) -> tuple[int, str, str]:
    """The command's exit code, output and errors."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["earthformer", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    said = capfd.readouterr()
    return int(left.value.code or 0), said.out, said.err


def refused(capfd, *arguments: str) -> str:
    """The one line of a refusal."""
    code, _, said = earthformer(capfd, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", said), said
    return said


CAMPAIGN = """
out: {out}
prepare:
  lr: {{kind: sevir-lr, source: {base}/raw, shard_mb: 0}}
forecast:
  earthformer: {{run: {base}/run, split: train, limit: 3}}
"""


def test_every_stage_is_the_same_there(tmp_path, s3, ray_cluster, in_process, capfd):
    task, tiny = TASKS["sevir-lr"], EARTHFORMERS["earthformer_sevir_lr_tiny"]
    model = dataclasses.replace(tiny, context=(7, 48, 48, 1), target=(6, 48, 48, 1))
    synthetic.write_sevir(tmp_path / "raw", events=6, seed=3, size=144)
    write_run(str(tmp_path / "run"), task, model)
    for name in ("raw", "run"):
        fsspec.filesystem("s3").put(str(tmp_path / name), f"s3://private/lr/{name}", recursive=True)
    outs = {str(tmp_path): str(tmp_path / "out"), "s3://private/lr": "s3://private/lr/out"}
    for base, out in outs.items():
        (tmp_path / "c.yaml").write_text(CAMPAIGN.format(base=base, out=out))
        code, _, err = earthformer(capfd, "reprocess", "--config", str(tmp_path / "c.yaml"))
        assert (code, err) == (0, ""), err
    here, there = outs.values()
    assert_same(f"{there}/lr.zarr", f"{here}/lr.zarr")
    ours, theirs = (xr.open_zarr(f"{out}/lr/earthformer.zarr").load() for out in (there, here))
    assert checks.validate(f"{there}/lr/earthformer.zarr") == []
    xr.testing.assert_equal(ours, theirs)
    page = fsspec.filesystem("s3").cat_file(f"{there}/lr.html").decode()
    assert "CSI-M" in page
    code, said, _ = earthformer(
        capfd, "lineage", f"{there}/lr/earthformer.zarr", "--chunk", "vil/c/0/0/0/0/0"
    )
    assert code == 0
    assert "s3://private/lr/run" in said


def test_what_cannot_be_reached_is_one_line(raw, ask, capfd, monkeypatch):
    once = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", once)
    ask()
    assert "s3://nobody-has-this/a.zarr is not a store" in refused(
        capfd, "validate", "s3://nobody-has-this/a.zarr"
    )
    arguments = ["prepare", "sevir", "--source", "s3://private/none", "--archive", "s3://private/b.zarr"]
    assert "s3://private/none/CATALOG.csv is absent" in refused(capfd, *arguments)
    ask(AWS_ACCESS_KEY_ID="another")
    assert "PermissionError" in refused(capfd, "validate", "s3://private/a.zarr")
    ask(AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "127.0.0.1:9" in refused(capfd, "validate", "s3://private/a.zarr")
    assert "127.0.0.1:9" in refused(
        capfd, "prepare", "sevir", "--source", RAW, "--archive", "s3://private/b.zarr"
    )


def test_no_more_is_read_than_the_chunks_that_are_wanted(tmp_path, s3, ask):
    synthetic.write_sevir(tmp_path / "big", events=8, seed=1)
    fsspec.filesystem("s3").put(str(tmp_path / "big"), "s3://public/big", recursive=True)
    with faults(s3.port) as proxy:
        ask(AWS_ENDPOINT_URL=proxy.url)
        shards = sevir.plan("s3://public/big", shard_mb=16).shards
        before = proxy.sent
        sources = [shard.decode().sources for shard in shards[1:3]]
        sent = proxy.sent - before
    needed = sum(n for of in sources for each in of.values() for source in each for _, n in source.ranges)
    assert needed > 4_000_000
    assert needed < sent <= 1.1 * needed


def test_a_file_is_one_request(s3, ask):
    contents = {f"records/{n}.json": b"{}" for n in range(20)}
    storage.write_all("s3://private/small", contents)
    with faults(s3.port) as proxy:
        ask(AWS_ENDPOINT_URL=proxy.url)
        storage.filesystem("s3://private/small")
        before = proxy.done["well"]
        assert storage.read_all("s3://private/small", [*contents, "absent"]) == {**contents, "absent": None}
        assert proxy.done["well"] - before == len(contents) + 1


def test_a_store_under_load_is_asked_again_until_all_is_there(raw, local, s3, ask):
    url = "s3://private/faults.zarr"
    with faults(s3.port, share=0.25, seed=1) as proxy:
        ask(AWS_ENDPOINT_URL=proxy.url)
        built(sevir.plan(RAW, modalities=("vil", "lght"), shard_mb=0), url)
    ask(AWS_ENDPOINT_URL=s3.endpoint)
    assert min(proxy.done[fate] for fate in ("503", "500", "stalled", "refused", "dropped")) > 0
    assert_same(url, local)
    assert checks.validate(url) == []


def test_radar_is_read_there_too(tmp_path, s3):
    synthetic.write_radar(tmp_path / "radar", sequences=2, seed=5, size=160, frames=30)
    fsspec.filesystem("s3").put(str(tmp_path / "radar"), "s3://public/radar", recursive=True)
    there, here = radar.plan("s3://public/radar"), radar.plan(str(tmp_path / "radar"))
    assert there.contents == here.contents
    for ours, theirs in zip(there.shards, here.shards, strict=True):
        assert np.array_equal(
            ours.decode().regions[0].arrays["rate"], theirs.decode().regions[0].arrays["rate"]
        )
