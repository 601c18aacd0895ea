"""One state of the sources, one version, wherever they lie; another state, another."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import pipelines
from pipelines.version import code_version

ROOT = Path(__file__).parents[1]
PACKAGES = ("earthformer", "pipelines", "cluster")


def said_in(folder):
    """The version of the packages in a folder, asked where nothing at all is installed."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from pipelines.version import code_version as v"
    command = [sys.executable, "-I", "-S", "-c", f"{code}; print(v())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def copy(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_it_is_the_release_and_a_digest():
    assert re.fullmatch(re.escape(pipelines.__version__) + r"\+[0-9a-f]{12}", code_version())


def test_it_is_the_same_where_the_sources_are(copy):
    assert said_in(copy) == said_in(ROOT) == code_version()
    # What Python leaves behind, where the packages run, what no one imports.
    (copy / "pipelines" / "__pycache__").mkdir(exist_ok=True)
    (copy / "pipelines" / "__pycache__" / "version.cpython-399.pyc").write_bytes(b"old")
    (copy / "pipelines" / ".#score.py").symlink_to("nowhere")
    (copy / "pipelines" / "examples" / "events.yaml").unlink()
    shutil.rmtree(copy / "cluster")
    assert said_in(copy) == code_version()


@pytest.mark.parametrize(
    "name",
    [
        "earthformer/scores.py",
        "pipelines/archives/cf.py",
        "pipelines/serving/page.html",
        "pipelines/report.html.j2",
    ],
)
def test_any_other_source_is_another_version(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
    assert said_in(copy) != code_version()


def test_a_line_that_moves_and_a_file_that_is_renamed_are_other_versions(copy):
    first, second = copy / "earthformer" / "aaa.py", copy / "earthformer" / "aab.py"
    seen = {code_version()}
    for one, other in (("x = 1\ny = 2\n", "z = 3\n"), ("x = 1\n", "y = 2\nz = 3\n")):
        first.write_text(one)
        second.write_text(other)
        seen.add(said_in(copy))
    first.rename(copy / "earthformer" / "aa.py")
    seen.add(said_in(copy))
    assert len(seen) == 4


def test_the_wheel_has_all_sources_and_the_release(copy):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(copy / "installed")
    assert said_in(copy / "installed") == code_version()
    (metadata,) = (copy / "installed").glob("*.dist-info")
    assert PathDistribution(metadata).version == pipelines.__version__
