"""`/health`, `/metrics` and `/v1/models`."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport.serve import errors
from rgexport.serve.server import server_of

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def healthy(request: Request) -> JSONResponse:
    problems = server_of(request).health.problems()
    if not problems:
        return JSONResponse({"status": "ok"})
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    error = errors.error_object(reason, errors.SERVER)
    return JSONResponse({"status": "error", "reason": reason} | error, 503)


async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model_card(name) for name in server_of(request).models]}


async def model(request: Request, name: str) -> dict[str, Any]:
    if name not in server_of(request).models:
        raise errors.NotFound(f"there is no model {name!r} here", "model")
    return _model_card(name)


def metrics(request: Request) -> PlainTextResponse:
    return PlainTextResponse(server_of(request).metrics.text(), media_type=_METRICS_TYPE)


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rgexport"}
