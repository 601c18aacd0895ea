"""Fixtures shared by the whole suite: one Ray cluster, and the folder of parity numbers and real data."""

import os
from pathlib import Path

# Threads that spin while they wait stall whoever shares the processors, as the suite's processes do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

SHARED = Path(os.environ.get("EARTHFORMER_SHARED", Path(__file__).parents[2] / "shared"))


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is absent: set EARTHFORMER_SHARED to the folder that holds parity/ and data/")
    return path


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of the published numbers (`parity/earthformer`, `parity/prediff`)."""
    return _existing(SHARED / "parity")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real radar, SST and catalogue files."""
    return _existing(SHARED / "data")


@pytest.fixture(scope="session")
def s3_place():
    """Where `s3` is, or will be: the environment says so, here and in what is started from now on."""
    import tiny_s3

    place = tiny_s3.reserved()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in place.environment.items():
            environment.setenv(name, value)
        yield place


@pytest.fixture(scope="session")
def s3(s3_place):
    """The suite's one S3 server: `s3://private` and `s3://public`, which anybody may read, are there."""
    import tiny_s3

    with tiny_s3.serving(s3_place) as served:
        yield served


@pytest.fixture(scope="session")
def ray_cluster(s3_place):
    """The suite's one Ray cluster."""
    import ray

    from pipelines import engine

    engine.connect(workers=2, address="local")
    yield
    ray.shutdown()


@pytest.fixture
def in_process():
    """As `replicas_in_process`."""
    from tiny_replicas import replicas_in_process

    with replicas_in_process():
        yield


@pytest.fixture(scope="session")
def showers(tmp_path_factory):
    """A radar archive: sequences of 16 × 24 pixels on three days."""
    import tiny_archive

    return tiny_archive.showers(tmp_path_factory.mktemp("showers"))


@pytest.fixture(scope="session")
def ensemble_archive(tmp_path_factory, ray_cluster) -> str:
    """URL of an archive of ten synthetic events, 48 × 48 pixels."""
    from pipelines.archives import synthetic
    from pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("ensembles")
    synthetic.write_sevir(folder / "raw", events=10, seed=1, size=144)
    prepare("sevir-lr", str(folder / "raw"), str(folder / "archive.zarr"), progress=False)
    return str(folder / "archive.zarr")


@pytest.fixture(scope="session")
def ensemble_runs(tmp_path_factory, ensemble_archive) -> dict[str, str]:
    """URLs of tiny runs on it by trainable: autoencoder, denoiser, alignment."""
    from tiny_prediff import trained
    from tiny_replicas import replicas_in_process

    folder, archive = tmp_path_factory.mktemp("trainings"), ensemble_archive
    found = {"autoencoder": trained("autoencoder", archive, str(folder / "autoencoder"))}
    with replicas_in_process():
        for name in ("denoiser", "alignment"):
            found[name] = trained(name, archive, str(folder / name), found["autoencoder"])
    return found
