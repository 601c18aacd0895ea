"""Who comes in with how much, and what errors look like from outside."""

import secrets
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.contexts import Refused
from pipelines.serving.service import Overloaded, Service, Unknown, WithoutResult

OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
"""Paths that need no token: they tell nothing of any forecast."""


class Door:
    """Lets in who has the token, with no more than is allowed; ASGI, so that nothing is read before."""

    def __init__(self, app: ASGIApp, service: Service, token: str | None, most_bytes: int) -> None:
        self.app, self.service, self.token, self.most = app, service, token, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.service.answering += 1
        try:
            await self._admit(scope, receive, send)
        finally:
            self.service.answering -= 1

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.token and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, b"Bearer " + self.token.encode()):
                needs = {"WWW-Authenticate": "Bearer"}
                said = "needed Authorization: Bearer TOKEN"
                await answer(401, ["header", "Authorization"], said, needs)(scope, receive, send)
                return
        length = headers.get(b"content-length", b"0")
        large = answer(413, ["body"], f"is too large: needed {self.most} bytes or less")
        if not length.isdigit() or int(length) > self.most:
            await large(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # A body without a stated length may go on and on. What is raised here becomes another error.
            if seen > self.most:
                raise ValueError("too large")
            return message

        async def unless_large(message: Message) -> None:
            if seen <= self.most:
                await send(message)

        await self.app(scope, counted, unless_large)
        if seen > self.most:
            await large(scope, receive, send)


class RefusedQuery(Refused):
    """A field of the query is wrong, rather than of the body."""


def answer(status: int, where: list[Any], said: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """What all errors look like: FastAPI's own form."""
    return JSONResponse({"detail": [{"loc": where, "msg": said}]}, status, headers)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    place = "query" if isinstance(error, RefusedQuery) else "body"
    return answer(422, [place, *error.field.split(".")], str(error))


def _unknown(request: Request, error: Exception) -> Response:
    return answer(410 if getattr(error, "expired", False) else 404, ["path", "id"], str(error))


def _without_result(request: Request, error: Exception) -> Response:
    return answer(409, ["path", "id"], str(error))


def _overloaded(request: Request, error: Exception) -> Response:
    return answer(503, [], str(error), {"Retry-After": str(getattr(error, "retry_after", 1))})


def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Without the input: it may be large, and may be what JSON cannot say.
    found = [{"loc": [*each["loc"]], "msg": each["msg"], "type": each["type"]} for each in error.errors()]
    return JSONResponse({"detail": found}, 422)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer(error.status_code, ["path" if error.status_code == 404 else "body"], str(error.detail))


def _broken(request: Request, error: Exception) -> Response:
    return answer(500, [], "an internal error; the service's log has more")


def answer_errors(app: FastAPI) -> None:
    """Have every error of an application answered like this, and none with a stack trace."""
    for kind, handler in (
        (Refused, _refused),
        (Unknown, _unknown),
        (WithoutResult, _without_result),
        (Overloaded, _overloaded),
        (RequestValidationError, _malformed),
        (HTTPException, _http),
        (Exception, _broken),
    ):
        app.add_exception_handler(kind, handler)
