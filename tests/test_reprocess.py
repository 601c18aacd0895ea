"""Campaigns: what is done is not done again, and what fails stops what needs it alone."""

import shutil
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.archives import checks, records, synthetic
from pipelines.reprocess import read_campaign, steps

CAMPAIGN = """
out: OUT
prepare:
  one: {kind: sevir-lr, source: RAW, shard_mb: 0}
  two: {kind: sevir-lr, source: RAW2, shard_mb: 0}
forecast:
  persistence: {forecaster: persistence, task: sevir-lr, split: train, limit: 4}
  displaced:
    {forecaster: displaced, task: sevir-lr, split: train, limit: 4, members: 2, keep_members: true, of: [one]}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    for name, seed in (("raw", 1), ("raw2", 2)):
        synthetic.write_sevir(folder / name, events=6, seed=seed, size=144)
    return folder


@pytest.fixture
def earthformer(monkeypatch, capsys):
    """The command, in this process: exit code, output and errors."""

    def run(*words: object):
        monkeypatch.setattr(sys, "argv", ["earthformer", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def written(folder: Path, raw: Path, text: str = CAMPAIGN) -> Path:
    given = text.replace("RAW2", str(raw / "raw2")).replace("RAW", str(raw / "raw"))
    (folder / "c.yaml").write_text(given.replace("OUT", str(folder / "out")))
    return folder / "c.yaml"


def test_a_campaign_is_the_commands_that_one_would_type(tmp_path, raw):
    commands = [step.words for step in steps(read_campaign(str(written(tmp_path, raw))))]
    verbs = ["prepare", "forecast", "forecast", "report", "prepare", "forecast", "report"]
    assert [words[0] for words in commands] == verbs
    out = tmp_path / "out"
    assert commands[2] == (
        *("forecast", "--forecaster", "displaced", "--task", "sevir-lr", "--split", "train"),
        *("--limit", "4", "--members", "2", "--keep-members"),
        *("--archive", f"{out}/one.zarr", "--out", f"{out}/one/displaced.zarr"),
    )


def test_it_is_done_once_and_goes_on(tmp_path, raw, ray_cluster, in_process, earthformer):
    config, out = written(tmp_path, raw), tmp_path / "out"
    code, said, _ = earthformer("reprocess", "--config", config, "--dry-run")
    assert code == 0
    assert f"needs {out}/one.zarr, not there yet" in said
    assert not out.exists()
    code, said, err = earthformer("reprocess", "--config", config)
    assert (code, err) == (0, "")
    assert said.count("shards written") == 2
    assert (out / "one.html").exists()
    assert (out / "two.html").exists()
    for url in ("one.zarr", "one/displaced.zarr", "two/persistence.zarr"):
        assert checks.validate(str(out / url)) == []
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    code, said, _ = earthformer("reprocess", "--config", config)
    assert code == 0
    assert said.count("shards were there") == 2
    assert said.count("all there before") == 3 + 2
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    (out / "one/persistence.zarr/records/000000.json").unlink()
    (out / "one/persistence.zarr" / records.COMPLETE).unlink()
    code, said, _ = earthformer("reprocess", "--config", config)
    assert (code, said.count("all there before")) == (0, 2 + 2)


def test_what_fails_stops_what_needs_it_alone(tmp_path, raw, ray_cluster, in_process, earthformer):
    gone = shutil.copytree(raw / "raw", tmp_path / "gone")
    config = written(tmp_path, raw, CAMPAIGN.replace("source: RAW,", f"source: {gone},"))
    (gone / "CATALOG.csv").unlink()
    code, _, err = earthformer("reprocess", "--config", config)
    assert code == 2
    assert err.count("\n") == 1
    out = tmp_path / "out"
    assert f"4 of 7 steps were not done, the first {out}/one.zarr: {gone}/CATALOG.csv is absent" in err
    assert (out / "two.html").exists()
    assert not (out / "one").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("limit: 4", "limmit: 4"), "forecast: No such option: --limmit"),
        (("of: [one]", "of: [ona]"), "forecast.displaced.of 'ona' is unknown: the nearest is 'one'"),
        (("prepare:", "prepar:"), "prepare: field required"),
        (("kind: sevir-lr, source", "source"), "Missing argument"),
        (("out: OUT", "out: [1]"), "out: input should be a valid string"),
    ],
)
def test_a_campaign_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path, raw, earthformer, change, told
):
    code, _, err = earthformer("reprocess", "--config", written(tmp_path, raw, CAMPAIGN.replace(*change)))
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
