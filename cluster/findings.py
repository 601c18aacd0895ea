"""What a check of a machine or of a cluster says."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "fails", "not checked"]


@dataclass(frozen=True)
class Finding:
    """What was seen of a point, and what to do about it."""

    state: State
    found: str
    needed: str = ""


def gb(size: float) -> str:
    """A size of so many bytes, in words."""
    return f"{size / 1e9:.1f} GB"
