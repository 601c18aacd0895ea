"""Scoring a forecast: what it counts, what it writes, what it refuses; the same however it is sharded."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import scoringrules
import torch
import zarr
from rich.console import Console
from tiny_forecast import persist, write_forecast
from tiny_scored import calibrated, sevir, write_reduced

from earthformer.scores import Nino, nino34
from pipelines import score as stage
from pipelines import storage, verification, windows
from pipelines.archives import checks, store, synthetic
from pipelines.errors import InputError
from pipelines.prepare import prepare
from pipelines.score import ScoreCard, check_comparable, saved, score
from pipelines.series import Window
from pipelines.sheets import labels, sheets, tables
from pipelines.tasks import TASKS

TASK = TASKS["sevir"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory, ray_cluster):
    return sevir(tmp_path_factory.mktemp("score"), events=5, seed=3)


@pytest.fixture(scope="module")
def keys(archive):
    return [Window(str(e), start) for e in archive.root["event"].values[:2] for start in (0, 12, 24)][:5]


@pytest.fixture(scope="module")
def truth(archive, keys):
    return windows.read(TASK, archive, keys)["target"][..., 0].astype(np.float32)


@pytest.fixture(scope="module")
def blurred(truth):
    """A forecast that is neither right nor wrong, with a patch missing."""
    wave = 1 + 0.5 * np.sin(np.arange(truth.size).reshape(truth.shape) / 7)
    values = (truth * wave)[:, None]
    values[0, 0, :, :8, :8] = np.nan
    return values


@pytest.fixture(scope="module")
def forecasts(tmp_path_factory, archive, keys, blurred):
    """URLs of persistence and of the forecast `blurred`."""
    folder = tmp_path_factory.mktemp("forecasts")
    persistence = write_forecast(str(folder / "p.zarr"), TASK, archive, keys, persist(TASK, archive, keys))
    other = write_forecast(
        str(folder / "e.zarr"), TASK, archive, keys, blurred, forecaster="earthformer", shard_windows=3
    )
    return [persistence, other]


@pytest.fixture(scope="module")
def cards(forecasts, archive):
    return score(forecasts, archive.url, progress=False)


def test_scores_are_those_of_all_windows_at_once(cards, truth, blurred):
    card, forecast = cards[1], blurred[:, 0]
    valid = ~np.isnan(forecast)
    for i, threshold in enumerate(TASK.thresholds):
        yes, was = (forecast >= threshold) & valid, (truth >= threshold) & valid
        for ours, theirs in ((card.counts[0].hits, yes & was), (card.counts[0].false_alarms, yes & ~was)):
            np.testing.assert_array_equal(ours[i], theirs.sum((0, 2, 3)))
    squared = ((forecast - truth)[valid].astype(np.float64) / 255) ** 2
    assert card.errors.result()["MSE"] == pytest.approx(squared.mean(), rel=1e-6)
    assert int(card.errors.count.sum()) == valid.sum()
    assert [counts.pool for counts in card.counts] == [1, 4, 16]
    assert card.lead_times == tuple(range(5, 65, 5))
    assert (card.windows, card.series, card.members) == (5, 2, 1)


def test_shards_and_repetition_do_not_matter(tmp_path, cards, archive, keys, blurred):
    url = write_forecast(
        str(tmp_path / "f.zarr"), TASK, archive, keys, blurred, forecaster="earthformer", shard_windows=1
    )
    (again,) = score([url], archive.url, out=str(tmp_path / "scores.json"), progress=False)
    assert [c.to_dict() for c in again.counts] == [c.to_dict() for c in cards[1].counts]
    assert again.errors.result() == pytest.approx(cards[1].errors.result(), rel=1e-12)
    (written,) = json.loads((tmp_path / "scores.json").read_text())
    assert written["scores"]["pooled"]["CSI-M"] == again.result()["pooled"]["CSI-M"]
    assert storage.read_json(url, stage.RECORD) is None


def test_cards_lie_beside_the_forecasts(cards, forecasts, archive):
    for card, url in zip(cards, forecasts, strict=True):
        text = json.dumps(storage.read_json(url, stage.RECORD))
        assert "NaN" not in text
        again = saved(url, archive.url)
        assert again is not None
        assert again.to_dict() == card.to_dict()
        assert again.task == TASK
    assert checks.validate(forecasts[0]) == []


def test_cards_of_other_code_or_forecasts_are_not_taken(tmp_path, cards, archive, keys, blurred):
    url = write_forecast(str(tmp_path / "f.zarr"), TASK, archive, keys, blurred[:, :1] + 1)
    assert saved(url, archive.url) is None
    storage.write_json(url, stage.RECORD, cards[1].to_dict())
    assert saved(url, archive.url) is None
    own = dataclasses.replace(cards[1], forecast_hash=store.Archive(url).config_hash)
    storage.write_json(url, stage.RECORD, {**own.to_dict(), "code_version": "0.0.0"})
    assert saved(url, archive.url) is None
    storage.write_json(url, stage.RECORD, {**own.to_dict(), "format": 1})
    assert saved(url, archive.url) is None
    storage.write_json(url, stage.RECORD, own.to_dict())
    assert saved(url, archive.url) is not None


def test_missing_observations_and_ensembles(tmp_path, archive, keys, truth):
    # The truth of the first window loses a corner; the members' mean is the truth.
    copy = tmp_path / "archive.zarr"
    shutil.copytree(archive.url, copy)
    event = archive.positions("event")[keys[0].series]
    first = keys[0].start + TASK.context
    vil = zarr.open_array(str(copy), path="vil")
    vil[event, first : first + TASK.target, :4, :4] = 255
    damaged = store.open_archive(str(copy))
    spread = np.stack([truth - 9, truth, truth + 9], axis=1)
    url = write_forecast(str(tmp_path / "f.zarr"), TASK, damaged, keys, spread, forecaster="prediff")
    (card,) = score([url], str(copy), progress=False)
    assert card.label == "prediff (mean of 3)"
    # Windows of one event overlap, so that others may have lost some of these frames as well.
    after = windows.read(TASK, damaged, keys)["target"]
    assert int(card.errors.count.sum()) == (after != 255).sum() < truth.size
    assert card.errors.result()["MSE"] == pytest.approx(0, abs=1e-12)
    assert card.counts[0].result()["CSI-16"] == pytest.approx(1, abs=1e-4)
    assert card.counts[0].result()["bias-16"] == pytest.approx(1, abs=1e-4)


def test_enso_is_scored_against_its_labels(tmp_path, ray_cluster):
    synthetic.write_enso(tmp_path / "raw", seed=1)
    prepare("enso", str(tmp_path / "raw"), str(tmp_path / "enso.zarr"), progress=False)
    enso, task = store.open_archive(str(tmp_path / "enso.zarr")), TASKS["enso"]
    source = str(enso.root["source"].values[0])
    chosen = [Window(source, start) for start in range(0, 60, 3)]
    values = persist(task, enso, chosen)
    url = write_forecast(str(tmp_path / "f.zarr"), task, enso, chosen, values, shard_windows=7)
    (card,) = score([url], enso.url, progress=False)
    labels = torch.from_numpy(windows.read_nino(task, enso, chosen))
    whole = Nino.of(torch.from_numpy(values[:, 0]), labels).result()
    assert card.nino is not None
    assert card.nino.result() == pytest.approx(whole, rel=1e-9)
    assert card.counts == ()
    assert card.lead_times == tuple(range(1, 15))
    assert ScoreCard.from_dict(json.loads(json.dumps(card.to_dict()))).result() == card.result()
    index, errors, probabilistic = sheets([card])
    assert index.columns[1:] == ("C-Nino3.4-M", "C-Nino3.4-WM", "RMSE (K)")
    assert errors.columns[1] == "MSE ×10⁻³ (normalised SST)"
    assert probabilistic.columns[-1] == "Niño3.4 CRPS (K)"


# -------------------------------------------------------------------------------------------- ensembles


@pytest.fixture(scope="module")
def members(truth):
    """A calibrated ensemble, of which one member has failed in one window and another misses a corner."""
    values = calibrated(truth, 6)
    values[1, 4], values[2, 3, :, :9, :5] = np.nan, np.inf
    return values


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, archive, keys, members):
    folder = tmp_path_factory.mktemp("ensemble")
    return write_forecast(str(folder / "m.zarr"), TASK, archive, keys, members, forecaster="prediff")


@pytest.fixture(scope="module")
def ensemble_card(ensemble, archive):
    return score([ensemble], archive.url, progress=False)[0]


def test_an_ensemble_is_scored_by_its_members(ensemble_card, members, truth):
    found = ensemble_card.probabilistic
    valid = np.ones(truth.shape, dtype=bool)
    valid[2, :, :9, :5] = False
    assert int(found.crps.count.sum()) == int(ensemble_card.errors.count.sum()) == valid.sum()
    assert (found.failed, ensemble_card.members) == (1, 6)
    crps = 0.0
    for n in range(len(truth)):
        alive = [m for m in range(6) if (n, m) != (1, 4)]
        x, y = np.moveaxis(members[n, alive], 0, -1)[valid[n]], truth[n][valid[n]]
        crps += scoringrules.crps_ensemble(y, x, estimator="nrg").sum() / 255
    assert found.crps.result()["CRPS"] == pytest.approx(crps / valid.sum(), rel=1e-5)
    assert found.spread.result()["spread-skill"] == pytest.approx(1, abs=0.01)
    share = found.ranks.count.sum(0) / found.ranks.count.sum()
    np.testing.assert_allclose(share, 1 / 7, atol=0.006)
    # Members by themselves, the mean by itself: the mean is smoother, and has more of the middle.
    each = sum(
        int((members[n, m] >= 74)[valid[n]].sum())
        for n in range(len(truth))
        for m in range(6)
        if (n, m) != (1, 4)
    )
    # Where one member misses a corner, the others are still forecasts there.
    each += sum(int((members[2, m] >= 74)[~valid[2]].sum()) for m in range(6) if m != 3)
    counts = found.member_counts[0]
    assert int((counts.hits + counts.false_alarms)[1].sum()) == each
    assert found.member_fss.result()["FSS 16 px-74"] != found.fss.result()["FSS 16 px-74"]


def test_a_single_forecast_is_an_ensemble_of_one(cards):
    for card in cards:
        found = card.probabilistic
        assert found.crps.result() == {"CRPS": pytest.approx(card.errors.result()["MAE"], rel=1e-6)}
        counts, likely = card.counts[0], found.brier.contingency()
        assert torch.equal(counts.hits, likely.hits)
        assert torch.equal(counts.false_alarms, likely.false_alarms)
        wrong = (counts.misses + counts.false_alarms).sum(1).double() / found.brier.count.sum((1, 2))
        np.testing.assert_allclose(found.brier.per_threshold()["Brier"], wrong, rtol=1e-9)
        assert (found.ranks, found.spread, found.member_counts) == (None, None, ())


def test_the_mean_leaves_failed_members_out(ensemble, archive, members):
    read = stage.open_forecast(ensemble, archive).read(1, 2)[0, ..., 0]
    np.testing.assert_allclose(read, np.delete(members[1], 4, 0).mean(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("how", ["shards of one window", "strips of rows", "members one by one"])
def test_probabilities_do_not_depend_on_shards_or_memory(
    tmp_path, monkeypatch, ensemble_card, archive, keys, members, how
):
    if how == "shards of one window":
        url = write_forecast(
            str(tmp_path / "f.zarr"), TASK, archive, keys, members, forecaster="prediff", shard_windows=1
        )
        found = score([url], archive.url, progress=False)[0].probabilistic
    else:
        url = write_forecast(str(tmp_path / "f.zarr"), TASK, archive, keys, members, forecaster="prediff")
        name = "WINDOW_BYTES" if how == "strips of rows" else "GROUP"
        monkeypatch.setattr(verification, name, 6 * 12 * 48 * 7 * 4 if name == "WINDOW_BYTES" else 1)
        source = stage.open_forecast(url, archive)
        blank = stage._card(source)
        row = {"forecast": 0, "first": 0, "last": len(keys)}
        card = stage._score_shard(row, [source], [blank], archive)["card"]
        found = ScoreCard.from_dict(json.loads(card)).probabilistic
    assert found.brier.to_dict()["count"] == ensemble_card.probabilistic.brier.to_dict()["count"]
    if how != "strips of rows":  # Ties fall otherwise.
        assert found.ranks.to_dict() == ensemble_card.probabilistic.ranks.to_dict()
    for name, scores in ensemble_card.probabilistic.result().items():
        if name != "ranks":
            assert found.result()[name] == pytest.approx(scores, rel=1e-9, nan_ok=True)


def test_a_forecast_that_kept_its_mean_alone_is_scored_by_that(
    tmp_path, ensemble_card, archive, keys, members
):
    whole = np.where(np.isfinite(members), members, np.nan)
    url = write_reduced(str(tmp_path / "f.zarr"), TASK, archive, keys, whole)
    source = stage.open_forecast(url, archive)
    assert (source.name, source.members) == ("vil_mean", 1)
    (card,) = score([url], archive.url, progress=False)
    # What one member misses has a mean of the others: here alone it is scored.
    extra = int(card.errors.count.sum()) - int(ensemble_card.errors.count.sum())
    assert extra == 12 * 9 * 5
    assert card.errors.result()["MSE"] == pytest.approx(ensemble_card.errors.result()["MSE"], rel=0.01)
    assert card.probabilistic.ranks is None
    assert card.label == card.member_label == "prediff (mean of 6)"


def test_an_ensemble_stands_beside_a_single_forecast(ensemble_card, cards):
    text = shown([cards[0], ensemble_card])
    assert "…" not in text
    for name in (
        "prediff (mean of 6)",
        "prediff (6 members)",
        "each member by itself",
        "fair CRPS",
        "spread/error",
        "Brier ×10⁻³",
        "ROC area",
        "CSI p≥50%",
        "FSS 16",
        "1 members of prediff (6 members) hold no value: failed, or not drawn",
    ):
        assert name in " ".join(text.split()), name
    probabilistic = next(s for s in sheets([cards[0], ensemble_card]) if s.title.endswith(": probabilistic"))
    assert (1, 1) in probabilistic.best
    assert probabilistic.rows[0][2] == "–"
    again = ScoreCard.from_dict(json.loads(json.dumps(ensemble_card.to_dict())))
    assert again.to_dict() == ensemble_card.to_dict()


def test_enso_ensembles_have_a_crps_of_the_index(tmp_path, ray_cluster):
    synthetic.write_enso(tmp_path / "raw", seed=2)
    prepare("enso", str(tmp_path / "raw"), str(tmp_path / "enso.zarr"), progress=False)
    enso, task = store.open_archive(str(tmp_path / "enso.zarr")), TASKS["enso"]
    source = str(enso.root["source"].values[0])
    chosen = [Window(source, start) for start in range(0, 60, 20)]
    sst = windows.read(task, enso, chosen)["target"][..., 0].astype(np.float32)
    values = sst[:, None] + np.array([-0.5, 0.0, 1.0], np.float32)[None, :, None, None, None]
    url = write_forecast(str(tmp_path / "f.zarr"), task, enso, chosen, values, forecaster="prediff")
    (card,) = score([url], enso.url, progress=False)
    labels = windows.read_nino(task, enso, chosen)
    index = nino34(torch.from_numpy(values).flatten(0, 1).double()).reshape(3, 3, -1).numpy()
    theirs = scoringrules.crps_ensemble(labels, np.moveaxis(index, 1, -1), estimator="nrg").mean()
    assert card.probabilistic.nino_crps.result()["CRPS"] == pytest.approx(theirs, rel=1e-6)
    assert card.probabilistic.brier is None
    again = ScoreCard.from_dict(json.loads(json.dumps(card.to_dict())))
    assert again.to_dict() == card.to_dict()


# --------------------------------------------------------------------------------------------- refusals


def test_a_forecast_of_another_archive_is_refused(tmp_path, archive, keys, blurred):
    url = write_forecast(
        str(tmp_path / "f.zarr"), TASK, archive, keys, blurred, archive_hash="0123456789abcdef"
    )
    with pytest.raises(InputError, match=f"0123456789abcdef, .*{archive.config_hash}.*needed the archive"):
        score([url], archive.url)


def test_an_unfinished_forecast_is_refused(tmp_path, archive, keys, blurred):
    url = write_forecast(str(tmp_path / "f.zarr"), TASK, archive, keys, blurred, finish=False)
    with pytest.raises(InputError, match="is not complete: 1 of 3 shards"):
        score([url], archive.url)


def test_what_is_no_forecast_is_refused(tmp_path, archive, forecasts):
    with pytest.raises(InputError, match=r"is a sevir archive: needed what `earthformer forecast` wrote"):
        score([archive.url], archive.url)
    with pytest.raises(InputError, match="is not a store"):
        score([str(tmp_path)], archive.url)
    with pytest.raises(InputError, match="is a forecast: needed an archive"):
        score(forecasts, forecasts[0])
    with pytest.raises(InputError, match="at least one"):
        score([], archive.url)


def test_other_windows_and_tasks_are_not_put_beside(tmp_path, archive, keys, blurred, forecasts, cards):
    fewer = write_forecast(str(tmp_path / "fewer.zarr"), TASK, archive, keys[:4], blurred[:4])
    with pytest.raises(InputError, match="its 4 test windows are not the same as the other's 5 test windows"):
        score([forecasts[0], fewer], archive.url)
    other = dataclasses.replace(TASK, thresholds=(16.0, 74.0))
    with pytest.raises(InputError, match=r"thresholds \(16.0, 74.0\), task sevir has \(16.0, 74.0, 133.0"):
        check_comparable([cards[0], dataclasses.replace(cards[1], task=other)])
    with pytest.raises(InputError, match="archive 0123 is not"):
        check_comparable([cards[0], dataclasses.replace(cards[1], archive_hash="0123")])


def test_a_damaged_forecast_is_one_line(tmp_path, archive, keys, blurred):
    url = write_forecast(str(tmp_path / "f.zarr"), TASK, archive, keys, blurred)
    shard = next(path for path in (tmp_path / "f.zarr" / "vil" / "c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    source = stage.open_forecast(url, archive)
    with pytest.raises(InputError, match=r"f\.zarr, windows 0 to 4, cannot be read: .*validate"):
        source.read(0, 5)


# ----------------------------------------------------------------------------------------------- tables


def shown(cards: list[ScoreCard], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    for table in tables(cards):
        console.print(table)
    return console.file.getvalue()


def test_tables_name_their_protocol_and_fit_a_terminal(cards):
    text = shown(cards)
    assert "protocol “pooled”" in text
    assert "protocol “frame-averaged”" in text
    assert "MSE ×10⁻³ (0–1 scale)" in text
    assert "…" not in text
    for name in ("persistence", "earthformer", "CSI 4×4", "CSI 16×16", "POD", "SUCR", "bias", "≥219"):
        assert name in text
    assert f"{cards[0].counts[0].result()['CSI-M']:.4f}" in text
    assert f"{cards[1].counts[2].under('frame-averaged').result()['CSI-74']:.4f}" in text


def test_the_best_is_marked_where_there_is_one(cards):
    pooled = sheets(cards)[0]
    csi = [card.counts[0].result()["CSI-M"] for card in cards]
    assert (int(np.argmax(csi)), 2) in pooled.best
    assert (int(np.argmin(csi)), 2) not in pooled.best
    assert not sheets(cards[:1])[0].best
    assert not sheets([cards[0], dataclasses.replace(cards[0], run_hash="abcdef012345")])[0].best


def test_what_never_occurs_is_a_dash(cards):
    def never(card: ScoreCard) -> ScoreCard:
        cleared = []
        for counts in card.counts:
            zeroed = [c.clone() for c in (counts.hits, counts.misses, counts.false_alarms)]
            for c in zeroed:
                c[-1] = 0
            hits, misses, false_alarms = zeroed
            cleared.append(dataclasses.replace(counts, hits=hits, misses=misses, false_alarms=false_alarms))
        return dataclasses.replace(card, counts=tuple(cleared))

    pooled = sheets([never(card) for card in cards])[0]
    assert {row[-1] for row in pooled.rows} == {"–"}
    assert "no such events" in pooled.note
    bias = [row for row in pooled.rows if row[0] == "bias"]
    assert bias[0][2] == "–"
    csi = [row for row in pooled.rows if row[0] == "CSI"]
    assert csi[0][2] != "–"


def test_two_runs_of_one_forecaster_are_told_apart(cards):
    twins = [cards[1], dataclasses.replace(cards[1], forecast_hash="abcdef0123456789")]
    assert labels(twins) == [f"earthformer {cards[1].forecast_hash[:6]}", "earthformer abcdef"]


def test_other_pools_are_not_tabled_together(cards):
    swapped = dataclasses.replace(cards[1], counts=cards[1].counts[::-1])
    with pytest.raises(ValueError, match="pool 16 cannot be put beside pool 1"):
        sheets([cards[0], swapped])
