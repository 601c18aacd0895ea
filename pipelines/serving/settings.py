"""What a service is made of and what it allows: the typed arguments of its Serve application."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines import configs
from pipelines.errors import InputError
from pipelines.plans import MOST_MEMBERS
from pipelines.storage import filesystem

LOOPBACK = ("127.0.0.1", "localhost")
"""Where a service without a token listens, and what it is called."""


class Settings(BaseModel):
    """Arguments of `pipelines.serve:application`, as in a Serve configuration's `args`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str = Field(description="URL of the finished run, of a denoiser (or another forecaster).")
    archives: dict[str, str] = Field(
        default_factory=dict, description="Name to URL of the archives that requests may take contexts from."
    )
    alignment: str | None = Field(None, description="URL of an alignment network's run, for guidance.")
    results: str = Field("results", description="URL of the folder where forecasts are kept.")
    keep_hours: float = Field(24.0, gt=0, description="How long a forecast is kept after it has ended.")
    token_file: str | None = Field(None, description="File whose first line is the bearer token.")

    replicas: int = Field(1, ge=1, description="Replicas of the model; with min_replicas, at most.")
    min_replicas: int | None = Field(None, ge=0, description="Scale with the queue, down to so many.")
    idle_seconds: float = Field(300.0, ge=0, description="How long a replica may idle before it is stopped.")
    gpu: bool = Field(False, description="One GPU a replica.")
    bf16: bool = Field(False, description="The denoiser in bfloat16.")
    chunk: int = Field(8, ge=1, le=1024, description="Members that a replica draws at once.")

    max_members: int = Field(1000, ge=2, le=MOST_MEMBERS)
    max_steps: int = Field(250, ge=1, description="Calls of the denoiser a member.")
    max_events: int = Field(32, ge=0)
    max_quantiles: int = Field(9, ge=0)
    max_body_mb: float = Field(64.0, gt=0, description="Size of a request.")
    max_seconds: float = Field(3600.0, gt=0, description="Deadline of a forecast that asks for none.")
    max_running: int = Field(4, ge=1, description="Forecasts at a time.")
    max_waiting: int = Field(16, ge=0, description="Forecasts that wait for their turn; more get a 503.")
    drain_seconds: float = Field(60.0, ge=0, description="What is under way may take so long at shutdown.")

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "Settings":
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}: needed at most replicas, {self.replicas}")
        return self


def named(urls: Sequence[str]) -> dict[str, str]:
    """Archives by name, of `NAME=URL` or of URLs, whose last part then gives the name."""
    found = {}
    for text in urls:
        name, separator, url = text.partition("=")
        if not separator:
            name, url = PurePosixPath(text.rstrip("/")).stem, text
        if name in found:
            raise InputError(f"two archives are named {name!r}: needed NAME=URL to tell them apart")
        found[name] = url
    return found


def resolve(path: str | None, given: Mapping[str, Any], assignments: list[str]) -> Settings:
    """Settings from a file, over which assignments and then what was given lie.

    Raises:
        InputError: an unreadable file, an unknown setting (the nearest is named), an impossible value.
    """
    values = configs.read_overlay(path, assignments)
    values |= {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in Settings.model_fields:
            configs.unknown("setting", name, Settings.model_fields)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"no {name} is given: needed --{name}") from error
        if first["type"] == "value_error":
            raise InputError(str(first["ctx"]["error"])) from error
        raise InputError(f"{name} is {first['input']!r:.80}: {first['msg']}") from error


def first_line(path: str) -> str:
    """The token of a file.

    Raises:
        InputError: it cannot be read, or is too short to be one.
    """
    fs, name = filesystem(path)
    try:
        token: str = fs.cat_file(name).decode().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path} cannot be read: {error}") from error
    if len(token) < 16:
        raise InputError(
            f"token file {path} has {len(token)} characters in its first line: needed 16 or more"
        )
    return token
