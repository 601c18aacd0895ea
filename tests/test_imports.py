"""cluster → pipelines → earthformer, never the other way; the science knows nothing of Ray or files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "earthformer": {"pipelines", "cluster", "ray", "xarray", "zarr", "fsspec", "pathlib", "os"},
    "pipelines": {"cluster"},
    "pipelines/archives": {"cluster", "ray"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_direction(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & FORBIDDEN[package], file.name
