"""What a client may ask for: the bodies of requests, checked field by field."""

from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Discriminator, Field, Tag

from earthformer.samplers import SAMPLERS
from pipelines.plans import Drawing

Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Referenced(_Asked):
    """A context that lies in one of the service's archives."""

    archive: Name = Field(description="One of the names that `GET /v1/models` lists.")
    event: Name = Field(description="Series of the archive: SEVIR event, radar sequence, ENSO source.")
    start: int = Field(0, ge=0, le=10**9, description="Index of the context's first frame in the event.")
    tile: tuple[int, int] | None = Field(None, description="Radar: first row and column of the tile.")


class Inline(_Asked):
    """A context that comes with the request, as NumPy's or as a zipped Zarr's bytes, in base64.

    A Zarr carries its times, axes, units and projection; beside an array of NumPy they are said here.
    """

    npy: Base64Bytes | None = Field(None, description="A .npy file of (T, H, W) in the task's units.")
    zarr_zip: Base64Bytes | None = Field(
        None, description="A zipped Zarr (version 3) of one variable (time, y, x), with CF attributes."
    )
    times: list[Name] | None = Field(None, max_length=1000, description="Of each frame, ISO 8601, UTC.")
    units: Name | None = Field(None, description="Of the values; the task's, or what converts to them.")
    proj: Annotated[str, Field(max_length=1000)] | None = Field(
        None, description="PROJ string of the grid; needed where events have regions or radii."
    )
    y: list[Finite] | None = Field(None, max_length=4096, description="Centres of the rows, in metres.")
    x: list[Finite] | None = Field(None, max_length=4096, description="Centres of the columns, in metres.")


def _kind(asked: Any) -> str:
    given = asked if isinstance(asked, dict) else {}
    referenced = isinstance(asked, Referenced) or not {"npy", "zarr_zip"} & set(given)
    return "inline" if isinstance(asked, Inline) or not referenced else "reference"


Wanted = Annotated[
    Annotated[Referenced, Tag("reference")] | Annotated[Inline, Tag("inline")], Discriminator(_kind)
]


class Guidance(_Asked):
    """Knowledge alignment: the forecast's functional is asked to be mu + n sigma."""

    deviations: Finite = Field(0.0, ge=-100, le=100, description="n")
    strength: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] | None = Field(
        None, description="Default: the alignment network's own."
    )


class ForecastRequest(_Asked):
    """An ensemble forecast of one context."""

    context: Wanted
    members: int | None = Field(None, ge=2, description="How many; with `until_ci` at most.")
    until_ci: float | None = Field(
        None, gt=0, lt=0.5, description="Draw until no event's interval has a larger half-width."
    )
    events: list[dict[str, Any]] = Field(
        default_factory=list, description="As in the events' YAML; polygons as GeoJSON."
    )
    quantiles: list[Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=list)
    keep_members: bool = Field(False, description="Store every member, rather than draw it again when asked.")
    sampler: Literal["ddpm", "ddim", "dpm++", "unipc"] = "dpm++"
    steps: int = Field(Drawing.steps, ge=1, description="Calls of the denoiser a member.")
    guidance: Guidance | None = None
    seed: int = Field(0, ge=0, lt=2**63, description="Members follow from it, and from nothing else.")
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="In seconds from now: what there is by then is returned, marked as partial."
    )


class EventsRequest(_Asked):
    """Events to be checked, against a context if one is given."""

    events: list[dict[str, Any]]
    context: Wanted | None = None


assert SAMPLERS == ("ddpm", "ddim", "dpm++", "unipc")
