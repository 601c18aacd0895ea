"""The HTTP API over a `Service`."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipelines import series, windows
from pipelines.errors import InputError
from pipelines.serving import products, summaries
from pipelines.serving.asked import EventsRequest, ForecastRequest, Referenced
from pipelines.serving.door import Door, RefusedQuery, answer, answer_errors
from pipelines.serving.forecast import ENDED, Forecast
from pipelines.serving.service import LATE, STOPPED, Service, WithoutResult
from pipelines.serving.settings import LOOPBACK, first_line

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
"""The page asks nobody but this service for anything."""
SSE, NDJSON = "text/event-stream", "application/x-ndjson"
NETCDF, PNG = "application/x-netcdf", "image/png"

router = APIRouter()


def build(service: Service) -> FastAPI:
    """The application over a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="earthformer",
        version="1",
        summary="Ensemble forecasts on demand, and probabilities of events with their intervals.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    token = service.settings.token_file
    if token is None:
        # Another site's page may have its own name point here, and read what it likes.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    app.add_middleware(
        Door,
        service=service,
        token=first_line(token) if token else None,
        most_bytes=int(service.settings.max_body_mb * 1e6),
    )
    app.include_router(router)
    answer_errors(app)
    return app


async def _service(request: Request) -> Service:
    # Asynchronous, though it waits for nothing: FastAPI calls what is not in a thread, at every request.
    service: Service = request.app.state.service
    return service


Behind = Annotated[Service, Depends(_service)]
FORMS: dict[int | str, dict[str, Any]] = {
    status: {"description": said}
    for status, said in {
        400: "The body is no text.",
        401: "The token is missing or wrong.",
        404: "There is no such forecast.",
        409: "The forecast has no result, or none yet.",
        410: "The forecast has expired.",
        413: "The body is too large.",
        422: "A field is wrong; `loc` says which, `msg` why.",
        503: "No room: try again after `Retry-After` seconds.",
        504: "The deadline passed before there was a member.",
    }.items()
}


def _responses(*statuses: int | str, **more: Any) -> dict[int | str, dict[str, Any]]:
    found = {status: FORMS[status] for status in (401, 422, *statuses)}
    if more:
        found[200] = {"content": {kind: {} for kind in more["content"]}}
    return found


@router.post("/v1/forecasts", status_code=202, responses=_responses(400, 409, 413, 503, 504))
async def create(
    asked: ForecastRequest,
    service: Behind,
    wait: Annotated[bool, Query(description="Answer when it has ended; a disconnect cancels it.")] = False,
    accept: Annotated[str, Header()] = "application/json",
) -> Response:
    """Begin an ensemble forecast.

    Answers 202 with its id; with `?wait=true` 200 with its result; and where `text/event-stream` or
    `application/x-ndjson` is accepted, its status after every chunk of members until it has ended.
    """
    kind = next((kind for kind in (SSE, NDJSON) if kind in accept), None)
    forecast = await service.submit(asked, attached=wait or kind is not None)
    where = {"Location": f"/v1/forecasts/{forecast.id}"}
    if kind is not None:
        return StreamingResponse(_told(service, forecast, kind), headers=where, media_type=kind)
    if not wait:
        return JSONResponse({"id": forecast.id, "status": forecast.status}, 202, where)
    assert forecast.task is not None
    try:
        await asyncio.shield(forecast.task)
    except asyncio.CancelledError:
        await asyncio.shield(service.drop(forecast))
        raise
    status = await service.status(forecast.id)
    if status["status"] == "cancelled":
        raise WithoutResult("was cancelled")
    if status["error"] == STOPPED:
        return answer(503, [], STOPPED, {"Retry-After": "10"})
    if status["status"] == "failed":
        late = status["error"] == LATE
        return answer(504 if late else 500, ["body", "deadline"] if late else [], status["error"])
    return JSONResponse(status, 200, where)


async def _told(service: Service, forecast: Forecast, kind: str) -> AsyncIterator[str]:
    """The stream of a forecast that belongs to its connection."""
    try:
        async for line in _lines(service.follow(forecast.id), kind):
            yield line
    finally:
        await asyncio.shield(service.drop(forecast))


async def _lines(statuses: AsyncIterator[dict[str, Any]], kind: str) -> AsyncIterator[str]:
    async for status in statuses:
        brief = {
            name: value for name, value in status.items() if name != "seeds" or status["status"] in ENDED
        }
        text = json.dumps(brief, allow_nan=False)
        ended = "ended" if status["status"] in ENDED else "progress"
        yield f"event: {ended}\ndata: {text}\n\n" if kind == SSE else f"{text}\n"


@router.get("/v1/forecasts/{id}", responses=_responses(404, 410))
async def read(id: str, service: Behind, accept: Annotated[str, Header()] = "application/json") -> Response:
    """How a forecast stands: members, probabilities with intervals, timings, seeds, hash of the run.

    Where `text/event-stream` or `application/x-ndjson` is accepted, after every chunk until it has ended.
    """
    status = await service.status(id)
    kind = next((kind for kind in (SSE, NDJSON) if kind in accept), None)
    if kind is not None:
        return StreamingResponse(_lines(service.follow(id), kind), media_type=kind)
    return JSONResponse(status)


@router.delete("/v1/forecasts/{id}", status_code=204, responses=_responses(404, 410))
async def cancel(id: str, service: Behind) -> Response:
    """Cancel a forecast, and free the replicas; one that has ended stays as it is."""
    await service.cancel(id)
    return Response(status_code=204)


async def _as_png(
    format: Annotated[
        Literal["netcdf", "png"] | None, Query(description="Default: as accepted, else NetCDF.")
    ] = None,
    accept: Annotated[str, Header()] = NETCDF,
) -> bool:
    return format == "png" or (format is None and PNG in accept)


AsPng = Annotated[bool, Depends(_as_png)]
Lead = Annotated[float | None, Query(description="Of a PNG, in minutes or months; default: the last.")]
FILES = _responses(404, 409, 410, content=(NETCDF, PNG))


@router.get("/v1/forecasts/{id}/probability", responses=FILES)
async def probability(id: str, event: str, service: Behind, as_png: AsPng) -> Response:
    """An event's probability with its interval, so far or in the end: a map as PNG, or NetCDF."""
    found = await service.dataset(id)
    chosen = await _in_thread("event", products.of_event, found, event)
    if not as_png:
        return await _file(products.netcdf, chosen)
    if chosen["probability"].ndim < 2:
        return answer(422, ["query", "format"], f"{event!r} has a single probability: needed netcdf")
    title = f"{event}, {int(chosen['n_members'])} members"
    return await _file(products.png, chosen["probability"], title, service.model.task, kind=PNG)


@router.get("/v1/forecasts/{id}/mean", responses=FILES)
async def mean(id: str, service: Behind, as_png: AsPng, lead_time: Lead = None) -> Response:
    """Mean and standard deviation of the ensemble."""
    found, name = await service.dataset(id), service.model.task.variable
    names = [f"{name}_mean", f"{name}_stdev"]
    return await _field(found[names], names[0], "mean", service, as_png, lead_time)


@router.get("/v1/forecasts/{id}/quantile", responses=FILES)
async def quantile(id: str, q: float, service: Behind, as_png: AsPng, lead_time: Lead = None) -> Response:
    """One of the quantiles that were asked for."""
    found, name = await service.dataset(id), f"{service.model.task.variable}_quantile"
    known = found["quantile"].values.tolist() if name in found else []
    if q not in known:
        needed = ", ".join(map(str, known)) or "a forecast that was asked for quantiles"
        return answer(422, ["query", "q"], f"is {q}: needed {needed}")
    chosen = found[[name]].sel(quantile=q)
    return await _field(chosen, name, f"quantile {q:g}", service, as_png, lead_time)


@router.get("/v1/forecasts/{id}/members/{k}", responses=FILES)
async def member(id: str, k: int, service: Behind, as_png: AsPng, lead_time: Lead = None) -> Response:
    """One member: as it was kept, else drawn again by its seed, to the same bits."""
    status = await service.finished(id)
    drawn = status["members"]["drawn"] + status["members"]["failed"]
    if not 0 <= k < drawn:
        return answer(404, ["path", "k"], f"is {k}: needed 0 to {drawn - 1}")
    found, name = await service.stored(id), service.model.task.variable
    if name in found:
        field = found[name].isel(member=k)
    else:
        like = found[f"{name}_mean"]
        field = like.copy(data=await service.redrawn(id, k)).rename(name)
        field = field.assign_coords(member=k, seed=int(found["seed"].values[k]))
        field.attrs = {name: value for name, value in like.attrs.items() if name == "units"}
    chosen = field.to_dataset(name=name).assign_attrs(found.attrs)
    return await _field(chosen, name, f"member {k}", service, as_png, lead_time)


@router.get(
    "/v1/forecasts/{id}/result", responses=_responses(404, 409, 410, content=(NETCDF, "application/zip"))
)
async def result(
    id: str, service: Behind, format: Annotated[Literal["netcdf", "zarr"], Query()] = "netcdf"
) -> Response:
    """The whole result: NetCDF, or a zipped Zarr."""
    await service.finished(id)
    if format == "netcdf":
        return await _file(products.netcdf, await service.stored(id))
    path = await asyncio.to_thread(products.zarr_zip, service.results.store(id))
    gone = BackgroundTask(Path(path).unlink)
    return FileResponse(path, media_type="application/zip", filename=f"{id}.zarr.zip", background=gone)


@router.get("/v1/forecasts/{id}/exceedance", responses=_responses(404, 409, 410))
async def exceedance(
    id: str, service: Behind, threshold: float | None = None, radius: float = 0.0
) -> Response:
    """How many members reach a standard threshold within a radius (km), at each lead time and pixel.

    `counts` and `known`, members that have a value, are little-endian uint16 of `shape`, in base64.
    """
    found = await service.dataset(id)
    thresholds, radii = (found[f"exceedance_{name}"].values.tolist() for name in ("threshold", "radius"))
    threshold = thresholds[0] if threshold is None else threshold
    for name, value, known in (("threshold", threshold, thresholds), ("radius", radius, radii)):
        if value not in known:
            return answer(422, ["query", name], f"is {value:g}: needed one of {', '.join(map(str, known))}")
    chosen = found[["exceedance", "exceedance_known"]].isel(
        exceedance_radius=radii.index(radius), exceedance_threshold=thresholds.index(threshold)
    )
    loaded = await asyncio.to_thread(chosen.load)
    return JSONResponse(
        {
            "threshold": threshold,
            "radius_km": radius,
            "members": int(found["n_members"]),
            "shape": list(loaded["exceedance"].shape),
            "counts": _base64(loaded["exceedance"].values, "<u2"),
            "known": _base64(loaded["exceedance_known"].values, "<u2"),
        }
    )


@router.get("/v1/forecasts/{id}/point", responses=_responses(404, 409, 410))
async def point(id: str, row: int, column: int, service: Behind) -> Response:
    """At one pixel: the probability of each standard threshold, radius and lead time, with its interval."""
    found = await service.dataset(id)
    for name, value, size in zip(("row", "column"), (row, column), service.model.grid, strict=True):
        if not 0 <= value < size:
            return answer(422, ["query", name], f"is {value}: needed 0 to {size - 1}")
    return JSONResponse(await asyncio.to_thread(summaries.point, found, row, column))


@router.post("/v1/events/validate", responses=_responses(400, 413))
async def validate(asked: EventsRequest, service: Behind) -> dict[str, list[str]]:
    """Whether events can be asked: of the model's task, and of a context if one is given."""
    return {"events": await asyncio.to_thread(service.model.validate, asked)}


@router.post("/v1/context", responses=_responses(400, 413))
async def context(asked: Referenced, service: Behind) -> dict[str, Any]:
    """The frames that a forecast would begin from, in base64, with their times."""
    found = await asyncio.to_thread(service.model.context, asked)
    pixels, samples = found.pixels[0, ..., 0], found.samples
    times = [str(time.astype("datetime64[s]")) for time in samples.times[0]]
    return {
        "shape": list(pixels.shape),
        "dtype": pixels.dtype.name,
        "data": _base64(pixels, pixels.dtype.newbyteorder("<")),
        "times": times[: len(pixels)],
        "valid_times": times[len(pixels) :],
        "row0": summaries.row0(samples.bind(()).grid),
    }


@router.get("/v1/models", responses=_responses())
async def models(service: Behind) -> dict[str, Any]:
    """What this service forecasts with and from, and what it allows."""
    task, limits = service.model.task, service.settings
    return {
        "models": [
            {
                "name": "prediff",
                "run_hash": service.model.run.hash,
                "task": task.name,
                "variable": task.variable,
                "units": task.units,
                "context": [task.context, *service.model.grid],
                "target": [task.target, *service.model.grid],
                "step_minutes": task.step_minutes,
                "thresholds": list(task.thresholds),
                "guidance": service.model.guiding.alignment_hash,
                "archives": sorted(service.model.archives),
                "chunk": limits.chunk,
            }
        ],
        "limits": {
            name: value for name, value in limits.model_dump().items() if name.startswith(("max_", "keep_"))
        },
    }


@router.get("/v1/archives/{name}/events", responses=_responses(404))
async def events(
    name: str,
    service: Behind,
    split: Literal["train", "val", "test"] = "test",
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """Contexts of an archive: the windows of a split."""
    if name not in service.model.archives:
        return answer(404, ["path", "name"], f"{name!r:.40} is unknown: `GET /v1/models` lists the archives")
    keys = await asyncio.to_thread(_windows, service, name, split)
    shown = [{"event": key.series, "start": key.start, "tile": key.tile} for key in keys[:limit]]
    return JSONResponse({"windows": shown, "of": len(keys)})


@lru_cache(maxsize=16)
def _windows(service: Service, name: str, split: str) -> list[series.Window]:
    try:
        return windows.enumerate_windows(service.model.task, service.model.archives[name], split)
    except InputError as error:
        raise RefusedQuery("split", str(error)) from error


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Whether the process lives."""
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse, responses={503: FORMS[503]})
async def readyz(service: Behind) -> Response:
    """Whether a forecast would be accepted and drawn."""
    ready = not service.draining and await service.ready()
    return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses={401: FORMS[401]})
async def metrics(service: Behind) -> Response:
    """Queue, chunk latency, members, retries and device seconds, for Prometheus."""
    return PlainTextResponse(service.metrics.text().decode(), media_type="text/plain; version=0.0.4")


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """The page."""
    text = await asyncio.to_thread(PAGE.read_text, encoding="utf-8")
    return HTMLResponse(
        text, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    )


# ----------------------------------------------------------------------------------------------- answers


def _base64(values: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


async def _in_thread(field: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a query asks for; what is wrong with it is wrong with this field."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except InputError as error:
        raise RefusedQuery(field, str(error)) from error


async def _field(
    chosen: xr.Dataset, name: str, title: str, service: Service, as_png: bool, lead_time: float | None
) -> Response:
    if not as_png:
        return await _file(products.netcdf, chosen)
    field = await _in_thread("lead_time", products.at_lead, chosen[name], lead_time)
    return await _file(products.png, await asyncio.to_thread(field.load), title, service.model.task, kind=PNG)


async def _file(make: Callable[..., bytes], *arguments: Any, kind: str = NETCDF) -> Response:
    return Response(await asyncio.to_thread(make, *arguments), media_type=kind)
