"""Looks at a machine and at the cluster that it is to use, and says what to do: `earthformer doctor`."""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.findings import Finding, State, gb
from cluster.nodes import dashboard, nodes
from pipelines import cli
from pipelines.errors import InputError

DISTRIBUTION = "earthformer-ray"
FULL = 0.95
"""Of disk and memory: Ray stores nothing on a disk that is fuller, and kills workers where memory is."""
LEAST_DISK, LEAST_MEMORY = 10e9, 4e9
"""Bytes: an archive with its runs and forecasts; a local Ray with its object store and a worker."""
LEAST_FILES, MOST_FILES = 4096, 65_536
"""Open files: Ray warns below the first, and raises its own limit to the second where it may."""
COLOURS = {"ok": "green", "warning": "yellow", "fails": "bold red", "not checked": "dim"}


def doctor(
    url: Annotated[list[str] | None, typer.Option(metavar="URL", help="To list; repeat for more.")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write a small object to each URL too, and delete it.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard; default: that of RAY_ADDRESS.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Check this machine, storage and a cluster, and say what to do; exit code 1 when something fails."""
    if write and not url:
        raise InputError("--write alone: needed --url URL to write to")
    rows = []
    for point, finding in look(url or [], write, address):
        rows.append({"point": point, **asdict(finding)})
        if not as_json:
            state = f"[{COLOURS[finding.state]}]{finding.state:<11}[/]"
            said = f"{point}: {finding.found}" + (f"; needed {finding.needed}" if finding.needed else "")
            cli.console.print(f"{state} {escape(said)}", highlight=False, soft_wrap=True)
    if as_json:
        cli.console.print_json(json.dumps(rows))
    if any(row["state"] == "fails" for row in rows):
        raise typer.Exit(1)


def look(urls: Sequence[str], write: bool, address: str | None) -> Iterator[tuple[str, Finding]]:
    """Each point and what was found, one after another."""
    here: dict[str, Callable[[], Finding]] = {
        "Python": python,
        "packages": packages,
        "GPU": gpu,
        "/dev/shm": shared_memory,
        "disk for Ray": spill_disk,
        "disk": disk,
        "memory": memory,
        "open files": open_files,
        "S3 credentials": credentials,
    }
    for point, check in here.items():
        yield point, _seen(check, "not checked")
    # What is not to be reached is not to be used either.
    there: dict[str, Callable[[], Finding]] = {}
    for url in urls:
        there[f"list {_masked(url)}"] = partial(listed, url)
        if write:
            there[f"write {_masked(url)}"] = partial(written, url)
    there |= {"cluster": partial(dashboard, address), "nodes": nodes}
    for point, check in there.items():
        yield point, _seen(check, "fails")


def _seen(check: Callable[[], Finding], otherwise: State) -> Finding:
    try:
        return check()
    except InputError as error:
        found, *needed = re.split("[:;] needed ", str(error), maxsplit=1)
        return Finding("fails", _masked(found), *needed)
    except Exception as error:  # of as many kinds as there are machines
        return Finding(otherwise, _masked(" ".join(f"{type(error).__name__}: {error}".split())))


def _masked(text: str) -> str:
    """Without a password that a URL holds."""
    return re.sub(r"//[^/@\s]*@", "//…@", text)


# ---------------------------------------------------------------------------------------- this machine


def python() -> Finding:
    """Whether this Python is one that the installed package takes."""
    from packaging.specifiers import SpecifierSet

    wanted, found = metadata.metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    return Finding("ok", found) if fits else Finding("fails", found, f"Python {wanted}")


def packages() -> Finding:
    """Whether what the installed package requires is there, in versions that it takes."""
    from packaging.requirements import Requirement

    found, wrong, install = [], [], []
    for need in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = _version(need.name)
        if have and need.specifier.contains(have, prereleases=True):
            found.append(f"{need.name} {have}")
        else:
            wrong.append(f"{need.name} {have or 'is missing'}")
            install.append(f"'{need.name}{need.specifier}'")
    if wrong:
        return Finding("fails", ", ".join(wrong), f"pip install {' '.join(install)}")
    return Finding("ok", ", ".join(found))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> Finding:
    """Whether PyTorch sees the GPUs that are there."""
    import torch

    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("ok", ", ".join(f"{count} {name}" for name, count in names.items()))
    if shutil.which("nvidia-smi") is None:
        return Finding("ok", "none, so that all runs on processors")
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    what = "; ".join((said.stdout or said.stderr).strip().splitlines())
    if said.returncode:
        return Finding("fails", f"nvidia-smi: {what}", "a driver that runs")
    if torch.version.cuda is None:
        release, _, _ = torch.__version__.partition("+")
        wheel = f"its CUDA wheel: pip install --force-reinstall torch=={release} (no --index-url)"
        return Finding("fails", f"{what}, and PyTorch {torch.__version__} is a build for CPUs", wheel)
    newer = f"a driver for CUDA {torch.version.cuda}, or a wheel for an older one; in a container, --gpus all"
    return Finding("fails", f"{what}, which PyTorch {torch.__version__} cannot use", newer)


def shared_memory() -> Finding:
    """Whether the object store of a local Ray fits."""
    from pipelines.engine import OBJECT_STORE_BYTES

    free = shutil.disk_usage("/dev/shm").free
    if free >= OBJECT_STORE_BYTES:
        return Finding("ok", f"{gb(free)} free")
    found = f"{gb(free)} free, and Ray's object store of {gb(OBJECT_STORE_BYTES)} goes to the disk instead"
    return Finding("warning", found, "more: in a container, --shm-size=2g")


def spill_disk() -> Finding:
    """Whether there is room where Ray puts what its object store cannot hold."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    space, found = shutil.disk_usage(folder), disk(folder)
    if space.free < (1 - FULL) * space.total:
        needed = f"{1 - FULL:.0%} free, below which Ray stores nothing, or another RAY_TMPDIR"
        return Finding("fails", found.found, needed)
    return found


def disk(folder: str = ".") -> Finding:
    """Whether there is room in a folder."""
    space = shutil.disk_usage(folder)
    found = f"{gb(space.free)} free of {gb(space.total)} in {Path(folder).resolve()}"
    if space.free < LEAST_DISK:
        return Finding("warning", found, f"{gb(LEAST_DISK)} or more")
    return Finding("ok", found)


def memory() -> Finding:
    """Whether there is memory, as Ray counts it, which kills workers by it."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total = get_system_memory()
    free = total - get_used_memory()
    found = f"{gb(free)} free of {gb(total)}"
    if free < (1 - FULL) * total:
        return Finding("fails", found, f"{1 - FULL:.0%} free, below which Ray kills workers")
    if free < LEAST_MEMORY:
        return Finding("warning", found, f"{gb(LEAST_MEMORY)} or more, and few workers (--workers)")
    return Finding("ok", found)


def open_files() -> Finding:
    """Whether Ray may open enough files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES))
    if most < LEAST_FILES:
        return Finding("warning", f"{most} at most", f"{LEAST_FILES} or more: ulimit -n {2 * LEAST_FILES}")
    return Finding("ok", f"{most} at most")


# --------------------------------------------------------------------------------------------- storage


def credentials() -> Finding:
    """Where the credentials for S3 come from, if there are any; never what they are."""
    import botocore.exceptions
    import botocore.session

    try:
        found = botocore.session.get_session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        return Finding("fails", f"{type(error).__name__}: {error}", "whole credentials, or none")
    if found is None:
        needed = "some for private buckets: AWS_ACCESS_KEY_ID, or a role; public ones are read without"
        return Finding("warning", "none", needed)
    return Finding("ok", f"from {found.method}; public buckets need none")


def listed(url: str) -> Finding:
    """Whether a URL can be listed."""
    from pipelines.storage import filesystem

    fs, path = filesystem(url)
    try:
        return Finding("ok", f"{len(fs.ls(path, detail=False))} entries")
    except FileNotFoundError:
        return Finding("warning", "nothing is there", "another URL, unless it is to be written")


def written(url: str) -> Finding:
    """Whether a URL can be written to: an object comes and goes."""
    from fsspec.implementations.local import LocalFileSystem

    from pipelines.storage import filesystem

    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        # The folder itself would be left behind.
        path = next(str(folder) for folder in (Path(path), *Path(path).parents) if folder.exists())
    name = f"{path}/.earthformer-doctor-{secrets.token_hex(4)}"
    fs.pipe_file(name, b"written by earthformer doctor")
    fs.rm_file(name)
    return Finding("ok", "written and deleted")
