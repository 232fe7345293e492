"""Errors of the server, as OpenAI's error objects."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route

from rgexport.chat.jobs import Busy, EngineError
from rgexport.errors import RequestError, one_line
from rgexport.progress import warn

INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "rate_limit_error"
_CLIENT_CLOSED = 499
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: BUSY}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or there are too many."},
    "5XX": {"model": ErrorBody, "description": "The server or its engine failed."},
}


class Gone(Exception):
    pass


class InvalidBody(RequestError):
    """An error in the field `param` of a request's body; None for the whole body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


class NotFound(InvalidBody):
    pass


class TooLong(RequestError):
    pass


class DiskFailed(RequestError):
    """The disk of this machine failed; later it may work again."""


class ServerEnds(RequestError):
    def __init__(self) -> None:
        super().__init__("the server ends; send the request again later")


_STATUSES: dict[type[RequestError], tuple[int, str]] = {
    Busy: (429, BUSY),
    NotFound: (404, _KINDS[404]),
    TooLong: (504, SERVER),
    DiskFailed: (503, SERVER),
    ServerEnds: (503, SERVER),
    RequestError: (400, INVALID),
}
"""Error → status and type of the answer; the first match counts."""


def error_object(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": one_line(message), "type": kind, "param": param, "code": None}}


def error_response(status: int, message: str, kind: str = INVALID, **headers: str) -> JSONResponse:
    """Returns an error; names of headers have underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(error_object(message, kind), status, headers=named)


def as_error(error: Exception) -> tuple[int, dict[str, Any]]:
    if isinstance(error, EngineError):
        warn(str(error))  # not for clients: it may name files of this machine
        return 500, error_object("the engine failed; the server's log says why", SERVER)
    for kind, (status, name) in _STATUSES.items():
        if isinstance(error, kind):
            return status, error_object(str(error), name, getattr(error, "param", None))
    return 500, error_object("the server failed; its log says why", SERVER)


def invalid_body(errors: Sequence[Any]) -> InvalidBody:
    """Returns the error of the nearest type; pydantic has errors for each type of a union."""
    error = max(errors, key=lambda problem: len(problem["loc"]))  # the nearest type of a union
    # A location also has the names of a union's types.
    names = [str(part) for part in error["loc"] if part not in ("str", "int")]
    param = ".".join(part for part in names if "[" not in part)
    if not param:
        return InvalidBody("the body is not a JSON object")
    return InvalidBody(f"{param}: {error['msg']}", one_line(param))


def install(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        return await failed(request, invalid_body(problems))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        kind, detail = _KINDS.get(error.status_code, INVALID), str(error.detail)
        if error.status_code == 404:
            paths = sorted({route.path for route in app.routes if isinstance(route, Route)})
            detail = f"there is no {request.url.path} here; expected one of {', '.join(paths)}"
        body = error_object(detail, kind)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Gone)
    async def left(request: Request, error: Gone) -> Response:
        return Response(status_code=_CLIENT_CLOSED)

    @app.exception_handler(RequestError)
    async def failed(request: Request, error: RequestError) -> JSONResponse:
        status, body = as_error(error)
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(body, status, headers=headers)
