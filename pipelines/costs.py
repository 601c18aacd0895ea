"""What a job will take: bytes, tasks, memory and hours, judging by a part that was measured; its price."""

import resource
from dataclasses import dataclass

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import InputError, one_line

HOUR = 3600.0


class Prices(BaseModel):
    """What a provider takes, in one currency."""

    model_config = ConfigDict(extra="forbid")

    currency: str = "USD"
    cpu_hour: float = Field(0.0, ge=0)
    """Of one processor; what a GPU's machine has of them is in `gpu_hour`."""
    gpu_hour: float = Field(0.0, ge=0)
    read_gb: float = Field(0.0, ge=0)
    """Of transfer from the source."""
    stored_gb_month: float = Field(0.0, ge=0)
    get_per_1000: float = Field(0.0, ge=0)
    put_per_1000: float = Field(0.0, ge=0)


def read_prices(path: str) -> Prices:
    """A price table in YAML.

    Raises:
        InputError: it cannot be read, or holds something else than prices.
    """
    try:
        with fsspec.open(path, "rt") as file:
            return Prices.model_validate(yaml.safe_load(file) or {})
    except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = ".".join(map(str, first["loc"])) or "the table"
            raise InputError(
                f"prices {path}: {what} is {first['input']!r}, {first['msg'].lower()}; needed "
                f"{', '.join(Prices.model_fields)}"
            ) from error
        raise InputError(f"prices {path} cannot be read: {one_line(error)}") from error


@dataclass(frozen=True)
class Work:
    """What is still to be done."""

    tasks: int
    read_bytes: float
    """From the source, as it is stored there."""
    written_bytes: float
    """As it will be stored."""
    gets: float
    puts: float
    """Requests to an object store, if source and target are in one."""
    memory_bytes: float
    """Of a task's process, at most."""
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    hours: float = 0.0
    """From begin to end by so many `workers`, once Ray is up."""
    workers: int = 1

    def rows(self, prices: Prices | None = None) -> dict[str, str]:
        """For people: a name and a text each."""
        used = [
            f"{n:.3g} {what}-hours" for n, what in ((self.cpu_hours, "CPU"), (self.gpu_hours, "GPU")) if n
        ]
        rows = {
            "read": f"{size(self.read_bytes)}, {self.gets:.0f} requests",
            "write": f"{size(self.written_bytes)}, {self.puts:.0f} requests",
            "tasks": f"{self.tasks}, {size(self.memory_bytes)} of memory each",
            "time": f"{' and '.join(used) or 'none'}, {duration(self.hours)} by {self.workers} worker(s)",
        }
        if prices is not None:
            rows["cost"] = self.cost(prices)
        return rows

    def cost(self, prices: Prices) -> str:
        """Its price, and what that is made up of."""
        parts = {
            "computing": self.cpu_hours * prices.cpu_hour + self.gpu_hours * prices.gpu_hour,
            "requests": (self.gets * prices.get_per_1000 + self.puts * prices.put_per_1000) / 1000,
            "transfer": self.read_bytes / 1e9 * prices.read_gb,
        }
        said = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
        month = self.written_bytes / 1e9 * prices.stored_gb_month
        return f"{sum(parts.values()):.2f} {prices.currency} ({said}), and {month:.2f} a month to keep it"


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(count: float) -> str:
    """Bytes in MB, GB or TB."""
    for unit, name in ((1e13, "TB"), (1e10, "GB")):
        if count >= unit:
            return f"{count / (unit / 10):.1f} {name}"
    return f"{count / 1e6:.1f} MB"


def duration(hours: float) -> str:
    """Hours in seconds, minutes, hours or days."""
    for unit, name in ((48.0, "days"), (2.0, "h"), (1 / 30, "min")):
        if hours >= unit:
            return f"{hours * {'days': 1 / 24, 'h': 1, 'min': 60}[name]:.1f} {name}"
    return f"{hours * HOUR:.0f} s"
