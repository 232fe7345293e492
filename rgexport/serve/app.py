"""The HTTP interface: OpenAI's, with llama-server's additions."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport._version import __version__
from rgexport.chat.model import Model
from rgexport.serve import completions, endpoints, errors
from rgexport.serve.bodies import JsonRoute
from rgexport.serve.middleware import Guard, Origins, Record
from rgexport.serve.monitoring import Health
from rgexport.serve.server import Server, ServerSettings
from rgexport.serve.text_process import TextProcess


class Endpoint(NamedTuple):
    """A route; the function's argument `body` is the parsed body of a request."""

    method: str
    path: str
    function: Callable[..., Any]
    response_class: type[Response] = JSONResponse


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", completions.chat),
    Endpoint("POST", "/v1/completions", completions.complete),
    Endpoint("POST", "/tokenize", endpoints.tokenize),
    Endpoint("POST", "/detokenize", endpoints.detokenize),
    Endpoint("POST", "/apply-template", endpoints.apply_template),
    Endpoint("GET", "/slots", endpoints.slots),
    Endpoint("POST", "/slots/{slot}", endpoints.act),
    Endpoint("GET", "/health", endpoints.healthy),
    Endpoint("GET", "/v1/models", endpoints.models),
    Endpoint("GET", "/v1/models/{name}", endpoints.model),
    Endpoint("GET", "/metrics", endpoints.metrics, PlainTextResponse),
)


def create_app(
    models: Mapping[str, Model],
    settings: ServerSettings,
    *,
    text_process: TextProcess | None = None,
    health: Health | None = None,
) -> FastAPI:
    """Returns the app that serves these models.

    Without a process for long texts they are read in threads.
    """
    server = Server(models, settings, text_process, health)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.grammar_thread.close()

    app = FastAPI(
        title="rgexport",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
        lifespan=lifespan,
    )
    app.state.server = server
    app.router.route_class = JsonRoute
    errors.install(app)
    for endpoint in ENDPOINTS:
        app.add_api_route(
            endpoint.path,
            endpoint.function,
            methods=[endpoint.method],
            response_model=None,
            response_class=endpoint.response_class,
        )
    _add_middlewares(app, server)
    return app


def _add_middlewares(app: FastAPI, server: Server) -> None:
    """Adds them from the inside out: CORS headers must be on what `Guard` refuses, too."""
    settings = server.settings
    app.add_middleware(Guard, api_key=settings.api_key, body_bytes=settings.body_bytes)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[completions.AFFINITY],
        )
    app.add_middleware(Origins, hosts=settings.allowed_hosts, pages=settings.cors_origins)
    app.add_middleware(Record, metrics=server.metrics, log=settings.log)
    if settings.trusted_proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=[*settings.trusted_proxies])
