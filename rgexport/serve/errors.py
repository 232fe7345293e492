"""Errors of the server, as OpenAI's error objects."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Route

from rgexport.chat.jobs import Busy, EngineError
from rgexport.errors import RequestError, one_line
from rgexport.progress import warn

INVALID = "invalid_request_error"
SERVER = "server_error"
BUSY = "rate_limit_error"
AUTHENTICATION = "authentication_error"
PERMISSION = "permission_error"
_NOT_FOUND = "not_found_error"

_CLIENT_CLOSED = 499
"""nginx's status of a request that its client gave up; nobody reads it but the log."""

_HTTP_TYPES = {401: AUTHENTICATION, 404: _NOT_FOUND, 429: BUSY}
"""Status of an `HTTPException` → type of the error object; `INVALID` for any other."""


def remove_description(schema: dict[str, Any]) -> None:
    """Removes a model's docstring from its JSON schema: it is written for readers of the code."""
    schema.pop("description", None)


class ErrorObject(BaseModel):
    """The `error` of a failed answer."""

    model_config = ConfigDict(json_schema_extra=remove_description)

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of a failed answer."""

    model_config = ConfigDict(json_schema_extra=remove_description)

    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or there are too many."},
    "5XX": {"model": ErrorBody, "description": "The server or its engine failed."},
}


class Gone(Exception):
    """The client closed its connection before the answer was complete."""


class InvalidBody(RequestError):
    """An error in the field `param` of a request's body; None for the whole body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        # Pickle rebuilds an error from its `args`: it may come from the process for long texts.
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


class NotFound(InvalidBody):
    """A request names a model or a state that the server does not have."""


class TooLong(RequestError):
    """An answer, or the reading of a long text, takes longer than its limit."""


class DiskFailed(RequestError):
    """The disk of this machine failed; later it may work again."""


class ServerEnds(RequestError):
    """The server shuts down before the answer is complete."""

    def __init__(self) -> None:
        super().__init__("the server ends; send the request again later")


_STATUSES: dict[type[RequestError], tuple[int, str]] = {
    Busy: (429, BUSY),
    NotFound: (404, _NOT_FOUND),
    TooLong: (504, SERVER),
    DiskFailed: (503, SERVER),
    ServerEnds: (503, SERVER),
    RequestError: (400, INVALID),
}
"""Error → status of the answer, and type of the error object; the first match counts."""


def error_object(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Returns the body of a failed answer; `kind` is the error object's type."""
    return {"error": {"message": one_line(message), "type": kind, "param": param, "code": None}}


def error_response(status: int, message: str, kind: str = INVALID, **headers: str) -> JSONResponse:
    """Returns a failed answer; names of headers have underscores for hyphens."""
    http_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    body = error_object(message, kind)
    return JSONResponse(body, status, headers=http_headers)


def as_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Returns the status and the body of the answer to a request that failed with `error`."""
    if isinstance(error, EngineError):
        warn(str(error))  # not for clients: it may name files of this machine
        return 500, error_object("the engine failed; the server's log says why", SERVER)

    for error_class, (status, kind) in _STATUSES.items():
        if isinstance(error, error_class):
            param = getattr(error, "param", None)
            return status, error_object(str(error), kind, param)
    return 500, error_object("the server failed; its log says why", SERVER)


def invalid_body(errors: Sequence[Any]) -> InvalidBody:
    """Returns the error of a body that pydantic refused; `errors` is not empty.

    Pydantic reports an error for each type of a union. The one with the longest location belongs
    to the type that fits best.
    """
    error = max(errors, key=_location_length)

    # A location also names types of a union, such as "str" and "list[int]".
    names = [str(part) for part in error["loc"] if part not in ("str", "int")]
    param = ".".join(name for name in names if "[" not in name)
    if not param:
        return InvalidBody("the body is not a JSON object")
    return InvalidBody(f"{param}: {error['msg']}", one_line(param))


def _location_length(error: Any) -> int:
    return len(error["loc"])


def install(app: FastAPI) -> None:
    """Lets an app answer errors with error objects."""
    app.exception_handler(RequestValidationError)(_answer_validation_error)
    app.exception_handler(HTTPException)(_answer_http_error)
    app.exception_handler(Gone)(_answer_gone)
    app.exception_handler(RequestError)(_answer_request_error)


async def _answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = []
    for problem in error.errors():
        location = problem["loc"][1:]  # without "path", "query" or "body"
        problems.append({**problem, "loc": location})
    return await _answer_request_error(request, invalid_body(problems))


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    status = error.status_code
    message = str(error.detail)
    if status == 404:
        paths = {route.path for route in request.app.routes if isinstance(route, Route)}
        expected = ", ".join(sorted(paths))
        message = f"there is no {request.url.path} here; expected one of {expected}"
    body = error_object(message, _HTTP_TYPES.get(status, INVALID))
    return JSONResponse(body, status, headers=error.headers)


async def _answer_gone(request: Request, error: Gone) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


async def _answer_request_error(request: Request, error: RequestError) -> JSONResponse:
    status, body = as_error(error)
    headers = None
    if status == 429:
        headers = {"Retry-After": "1"}
    return JSONResponse(body, status, headers=headers)
