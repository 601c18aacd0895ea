"""What a run writes on its way, so that it can be followed, and go on after a kill at any moment.

RUN/metrics.jsonl            one line a logging interval, one a checkpoint
RUN/tensorboard/             the same for TensorBoard
RUN/checkpoints/00000162/    of step 162: weights.safetensors, state.pt and, written last, record.json;
                             the best and the last checkpoint are kept
"""

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipelines.errors import InputError
from pipelines.storage import filesystem, read_json, write_whole


def save_checkpoint(
    run: str, weights: dict[str, Tensor], state: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write a checkpoint, its record last; then drop all checkpoints but the best and the last.

    Args:
        run: URL of the run directory.
        weights: the model's state dict.
        state: what else training needs to go on, as `torch.save` takes it.
        record: `step`, `epoch`, `score` (None where there was no validation), `finished`, `peak_rss_mb`.
    """
    folder = f"{run}/{_folder(record)}"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    parts = {"weights.safetensors": safetensors.torch.save(on_cpu), "state.pt": buffer.getvalue()}
    for name, content in parts.items():
        write_whole(folder, name, content)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    write_whole(folder, "record.json", json.dumps({**record, "sha256": sha256}, indent=1).encode())
    _prune(run)


def checkpoints(run: str) -> list[dict[str, Any]]:
    """The records of a run's finished checkpoints, in the order of their steps."""
    found = (read_record(folder, "record.json", needs="sha256") for folder in _folders(run))
    return [record for record in found if record is not None]


def best(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with the highest validation score, the earliest among equals; None without a validation."""
    validated = [record for record in records if record["score"] is not None]
    return max(validated, key=lambda record: (record["score"], -record["step"]), default=None)


def load_checkpoint(run: str, record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's weights and state, on the CPU.

    Raises:
        InputError: a file is absent or damaged.
    """
    weights, state = (read_part(run, record, name) for name in ("weights.safetensors", "state.pt"))
    loaded = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    return safetensors.torch.load(weights), loaded


def read_part(run: str, record: dict[str, Any], name: str) -> bytes:
    """A file of a checkpoint.

    Raises:
        InputError: it is absent or damaged.
    """
    return read_checked(
        f"{run}/{_folder(record)}",
        name,
        record["sha256"][name],
        "delete that folder, and the same `earthformer train` command goes on from the checkpoint before it, "
        "or from the start",
    )


def _folder(record: dict[str, Any]) -> str:
    return f"checkpoints/{record['step']:08d}"


def _folders(run: str) -> list[str]:
    fs, path = filesystem(run)
    # Object stores' listings are cached, and other processes write here.
    fs.invalidate_cache()
    try:
        names = fs.ls(f"{path}/checkpoints", detail=False)
    except FileNotFoundError:
        return []
    return sorted(f"{run}/checkpoints/{name.rstrip('/').rpartition('/')[2]}" for name in names)


def _prune(run: str) -> None:
    records = checkpoints(run)
    keep = {f"{run}/{_folder(record)}" for record in (records[-1], best(records)) if record is not None}
    for folder in set(_folders(run)) - keep:
        fs, path = filesystem(folder)
        # Without its record, what a kill leaves of it does not look like a checkpoint.
        if fs.exists(f"{path}/record.json"):
            fs.rm_file(f"{path}/record.json")
        fs.rm(path, recursive=True)


# --------------------------------------------------------------------------------------------- metrics


class Metrics:
    """A run's `metrics.jsonl` and TensorBoard folder, written by one process at a time."""

    def __init__(self, run: str, step: int) -> None:
        self.run = run
        # What a killed run logged after its last checkpoint is about to be done again.
        self.lines = [line for line in read_metrics(run) if line["step"] <= step]
        # Events are appended to a file, which object stores cannot do.
        self.events = tempfile.TemporaryDirectory()
        self.board = SummaryWriter(self.events.name, purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line; the files are written whole, since object stores cannot append."""
        self.lines.append({"step": step, **values})
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_whole(self.run, "metrics.jsonl", text.encode())
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        for file in Path(self.events.name).iterdir():
            write_whole(f"{self.run}/tensorboard", file.name, file.read_bytes())


def read_metrics(run: str) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; none where there is no such file."""
    fs, path = filesystem(run)
    try:
        return [json.loads(line) for line in fs.cat_file(f"{path}/metrics.jsonl").splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


# ----------------------------------------------------------------------------------------------- files


def read_record(url: str, name: str, *, needs: str) -> dict[str, Any] | None:
    """A JSON object that has the key `needs`; None where it is absent, cut off or someone else's."""
    found = read_json(url, name)
    return found if found is not None and needs in found else None


def read_checked(url: str, name: str, sha256: str, remedy: str) -> bytes:
    """A file with that digest.

    Raises:
        InputError: it is absent or damaged; the message ends with `remedy`.
    """
    fs, path = filesystem(url)
    try:
        content = bytes(fs.cat_file(f"{path}/{name}"))
    except FileNotFoundError as error:
        raise InputError(f"{url}/{name} is absent: {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(f"{url}/{name} has SHA-256 {found[:16]}, recorded is {sha256[:16]}: {remedy}")
    return content
