"""The HTTP interface, OpenAI's with llama-server's additions, and the server that runs it."""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from rgexport._version import __version__
from rgexport.chat.from_artifact import open_model
from rgexport.chat.model import Model
from rgexport.errors import RequestError
from rgexport.progress import print_error, warn
from rgexport.serve import endpoints, errors
from rgexport.serve.bodies import JsonRoute
from rgexport.serve.guards import Guard, Origins, Record, protocol
from rgexport.serve.host_names import ANY, authority_of
from rgexport.serve.server import Server, ServerSettings
from rgexport.serve.text_process import TextProcess, open_encoder

ENDPOINTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/v1/chat/completions", endpoints.chat),
    ("POST", "/v1/completions", endpoints.complete),
    ("POST", "/tokenize", endpoints.tokenize),
    ("POST", "/detokenize", endpoints.detokenize),
    ("POST", "/apply-template", endpoints.apply_template),
    ("GET", "/slots", endpoints.slots),
    ("POST", "/slots/{slot}", endpoints.act),
    ("GET", "/health", endpoints.healthy),
    ("GET", "/v1/models", endpoints.models),
    ("GET", "/v1/models/{name}", endpoints.model),
    ("GET", "/metrics", endpoints.metrics),
)
"""Method, path and function, whose argument `body` is the parsed body of a request."""
_SWITCH_SECONDS = 0.001
"""Switch interval of the interpreter: the scheduler needs the lock several times in each step."""
_ANSWER_SECONDS = 1.0
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_OTHER_FILES = 256  # open files of a server beside its connections


def create_app(
    models: Mapping[str, Model], settings: ServerSettings, text_process: TextProcess | None = None
) -> FastAPI:
    """Returns the app; long texts are read in `text_process`, without one in threads."""
    server = Server(models, settings, text_process)

    app = FastAPI(
        title="rgexport",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
    )
    app.state.server = server
    app.router.route_class = JsonRoute
    errors.install(app)
    for method, path, function in ENDPOINTS:
        kind = PlainTextResponse if function is endpoints.metrics else JSONResponse
        app.add_api_route(
            path, function, methods=[method], response_model=None, response_class=kind
        )
    _add_middlewares(app, server)
    return app


def _add_middlewares(app: FastAPI, server: Server) -> None:
    """Adds them from the inside out: CORS headers must be on what `Guard` refuses, too."""
    settings = server.settings
    app.add_middleware(Guard, api_key=settings.api_key, body_bytes=settings.body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[endpoints.AFFINITY],
        )
    app.add_middleware(Origins, hosts=settings.allowed_hosts, pages=settings.cors_origins)
    app.add_middleware(Record, metrics=server.metrics, log=settings.log)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=[*settings.trusted_proxies])


def open_models(artifacts: list[Path], **options: Any) -> dict[str, Model]:
    resolved = [path.resolve() for path in artifacts]
    for path in artifacts:
        if resolved.count(path.resolve()) > 1:
            raise RequestError(f"{path} is given twice")
    models: dict[str, Model] = {}
    try:
        for path in artifacts:
            model = open_model(path, chat=False, **options)
            names = [model.name] if len(artifacts) == 1 else [path.name, str(path)]
            models[next(name for name in names if name not in models)] = model
    except RequestError:
        for model in models.values():
            model.close()
        raise
    return models


def serve(models: dict[str, Model], artifacts: list[Path], settings: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM; then running replies end, and states are on the disk."""
    text_process = TextProcess(
        {
            name: partial(open_encoder, path, model.identity, settings.limits.prompt_tokens)
            for (name, model), path in zip(models.items(), artifacts, strict=True)
        }
    )
    opened = _listen(settings.host, settings.port)
    address = authority_of(settings.host, opened.getsockname()[1])
    print_error(f"{', '.join(models)} at http://{address}/v1 (Ctrl-C ends)")
    if settings.api_key is None and settings.host not in _LOOPBACK:
        warn("whoever reaches this address can use it; --api-key keeps others out")
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # existing objects stay; scanning them delayed some first tokens by 30 ms
    hosts = {*settings.allowed_hosts, *_own_names(settings.host, settings.api_key)}
    app = create_app(models, replace(settings, allowed_hosts=(*hosts,)), text_process)
    server: Server = app.state.server
    server.health.start()
    try:
        _run(_Server(_config(app, settings)), opened)
    finally:
        server.health.close()
        server.grammar_thread.close()
        text_process.close()
        with ThreadPoolExecutor() as pool:  # at once: each may wait for a disk
            list(pool.map(Model.close, models.values()))


class _Server(uvicorn.Server):
    """Ends running answers with an error, shortly before uvicorn cancels them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = (self.config.timeout_graceful_shutdown or 0) - _ANSWER_SECONDS
        timer = asyncio.get_running_loop().call_later(seconds, self._stop_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _stop_answers(self) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        server: Server = app.state.server
        for exchange in list(server.exchanges):
            exchange.stop()


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    _allow_files(settings.connections.most + _OTHER_FILES)
    return uvicorn.Config(
        app,
        http=protocol(settings.connections),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app decides, see `Settings.trusted_proxies`
        timeout_graceful_shutdown=max(1, settings.grace_seconds),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
        lifespan="off",
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {authority_of(host, port)}: {error.strerror}; change --host/--port"
        ) from None


def _own_names(host: str, api_key: str | None) -> set[str]:
    if host in _LOOPBACK:
        return {"localhost"}
    machine = socket.gethostname().lower()
    return {ANY} if api_key else {"localhost", host.lower(), machine, f"{machine}.local"}


def _allow_files(count: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < count:
            most = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _run(server: uvicorn.Server, opened: socket.socket) -> None:
    """Runs; the signal that ends it is not raised again."""
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in previous:
        signal.signal(kind, signal.SIG_IGN)
    try:
        server.run(sockets=[opened])
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
