"""The main job on real radar files, in small: archive, training, forecast, scores and page."""

import pytest

from pipelines import configs
from pipelines import forecast as stage
from pipelines.plans import plan
from pipelines.prepare import prepare
from pipelines.report import report
from pipelines.score import score
from pipelines.train import train

SMALL = {
    "task": {"tiles": {"stride": 256}, "stride": [12, 12, 12]},
    "training": {"epochs": 1, "batch_size": 2, "micro_batch": 2},
}


@pytest.mark.real_data
def test_real_radar_from_files_to_page(tmp_path, real_data, ray_cluster):
    archive, run = str(tmp_path / "archive.zarr"), str(tmp_path / "run")
    prepared = prepare("radar", str(real_data / "radar"), archive, progress=False)
    assert (prepared.plan.series, len(prepared.quarantine)) == (5, 0)
    config = configs.resolve("radar", "earthformer_radar_tiny", SMALL)
    trained = train(config, archive, run, progress=False)
    assert trained.record["steps"] == trained.record["windows"]["train"] // 2
    urls = []
    for name, task in ((run, None), ("persistence", config.task)):
        urls.append(str(tmp_path / f"{len(urls)}.zarr"))
        stage.forecast(plan(name, archive, "test", task=task), urls[-1], progress=False)
    model, persistence = score(urls, archive, progress=False)
    # The held-out date alone, and a model that has begun where persistence is and moved off it.
    assert model.series == 1
    assert model.windows == persistence.windows > 0
    ratio = model.errors.result()["MSE"] / persistence.errors.result()["MSE"]
    assert 0.3 < ratio < 1.5
    assert ratio != 1
    report(urls, archive, str(tmp_path / "report.html"))
    assert "mch_20170131" in (tmp_path / "report.html").read_text(encoding="utf-8")
