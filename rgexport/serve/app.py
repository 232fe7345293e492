"""The HTTP interface: OpenAI's, with llama-server's additions."""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport._version import __version__
from rgexport.chat.model import Model
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Reply
from rgexport.errors import RequestError
from rgexport.serve import errors, texts
from rgexport.serve.answers import Answer
from rgexport.serve.bodies import JsonRoute
from rgexport.serve.clients import Client, client_of
from rgexport.serve.compiling import Compiler
from rgexport.serve.exchange import EventStream, Exchange, Limits, Work, until_gone
from rgexport.serve.grammar import Grammars
from rgexport.serve.health import Health
from rgexport.serve.metrics import Metrics
from rgexport.serve.middleware import Guard, Record
from rgexport.serve.named_states import NamedStates
from rgexport.serve.offload import Offload, kind_of
from rgexport.serve.origins import Origins
from rgexport.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    SlotRequest,
    TemplateRequest,
    TokenizeRequest,
)
from rgexport.serve.slots import ClientSlots, slot_after, slot_from
from rgexport.serve.text_process import TextProcess, with_prompts
from rgexport.serve.works import chat_works, completion_works, messages_of

AFFINITY = "X-Conversation"
"""Header whose value is the same for all turns of a conversation, for a load balancer."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        api_key: what clients must present; None lets all in.
        cors_origins: origins of web pages that may use it; `*` for all.
        allowed_hosts: names that requests may give the server, beside addresses; `*` for all.
        limits: what a request may cost.
        body_bytes: largest request.
        saved: the folder of states that clients name; None for none.
        most_saved: most states of a client in it.
        saved_bytes: most bytes of the states of all clients.
        log: whether there is a line per request.
        share_prefixes: whether a client's prompts go on from what other clients have sent, and
            states with names are everybody's.
        trusted_proxies: addresses whose X-Forwarded-For header says who the client is.
    """

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("localhost",)
    limits: Limits = field(default_factory=Limits)
    body_bytes: int = 8 << 20
    saved: Path | None = None
    most_saved: int = 100
    saved_bytes: int = 10 << 30
    log: bool = True
    share_prefixes: bool = False
    trusted_proxies: tuple[str, ...] = ()


class Server:
    """The models that are served, by name."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self.models, self.settings = dict(models), settings
        self.metrics = Metrics(self.models)
        self.slots = ClientSlots()
        self.saved = NamedStates(
            settings.saved, most=settings.most_saved, max_bytes=settings.saved_bytes
        )
        self.compiler = Compiler()
        for model in self.models.values():
            model.most_tokens = settings.limits.prompt_tokens
        self._grammars = {
            name: Grammars(model.tokenizer, model.vocab_size) for name, model in self.models.items()
        }

    def model(self, name: str) -> tuple[str, Model]:
        """A model by its name; the only one by any.

        Raises:
            NotFound: there are several, and none of this name.
        """
        if len(self.models) == 1:
            name = next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise errors.NotFound(
                f"there is no model {name!r} here; expected one of {known}", "model"
            )
        return name, self.models[name]

    async def with_grammar(self, name: str, works: list[Work], request: Request) -> list[Work]:
        """Returns the works of a request to a model with masks, if they have a grammar.

        Raises:
            Busy: too many grammars wait.
            Gone: the client has left.
            RequestError: the grammar cannot be used.
        """
        if (source := works[0].grammar) is None:
            return works
        until_left = partial(until_gone, request)
        compiled = await self.compiler.compile(self._grammars[name], source, until_left)
        return [replace(w, options=replace(w.options, mask=compiled.mask())) for w in works]

    def client(self, request: Request) -> Client:
        """Returns the client of a request."""
        settings = self.settings
        return client_of(request, settings.api_key, is_sharing=settings.share_prefixes)


def create_app(
    models: Mapping[str, Model],
    settings: Settings,
    *,
    text_process: TextProcess | None = None,
    health: Health | None = None,
) -> FastAPI:
    """Returns the app that serves these models.

    Args:
        models: the models by name.
        settings: how it is set up.
        text_process: a process for long texts; they are read in threads if there is none.
        health: the check of the models; a new one if there is none.
    """
    server = Server(models, settings)
    if text_process:
        for name, model in models.items():
            model.elsewhere = partial(text_process.call, with_prompts, name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.compiler.close()

    app = FastAPI(
        title="rgexport",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
        lifespan=lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.offload = Offload(text_process)
    app.state.exchanges = WeakSet[Exchange]()
    errors.install(app)
    _generation_routes(app, server)
    _text_routes(app, server)
    _state_routes(app, server)
    _status_routes(app, server, health or Health(models))
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
            expose_headers=[AFFINITY],
        )
    app.add_middleware(Origins, hosts=settings.allowed_hosts, pages=settings.cors_origins)
    app.add_middleware(Record, metrics=server.metrics, log=settings.log)
    if settings.trusted_proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=[*settings.trusted_proxies])


def _generation_routes(app: FastAPI, server: Server) -> None:
    limits, offload = server.settings.limits, app.state.offload

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        name, model = server.model(body.model)
        answer = Answer(name, model.tokenizer, chat=True, logprobs=body.logprobs, n=body.n)
        return await _respond(request, body, answer, chat_works)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        name, model = server.model(body.model)
        logprobs = body.logprobs is not None
        answer = Answer(name, model.tokenizer, chat=False, logprobs=logprobs, n=body.n)
        return await _respond(request, body, answer, completion_works)

    async def _respond(
        request: Request, body: Generation, answer: Answer, make_works: Callable[..., list[Work]]
    ) -> Response:
        client, model = server.client(request), server.models[answer.model]
        kind = kind_of(len(await request.body()))
        works = await offload.run(kind, request, make_works, model, body, client, limits)
        works = await server.with_grammar(answer.model, works, request)

        def finished(reply: Reply) -> None:
            slot = slot_after(works[0].prompt, reply)
            server.slots.put(client.owner, answer.model, body.id_slot, slot)

        exchange = Exchange(request, model, answer, works, limits, finished)
        app.state.exchanges.add(exchange)
        await exchange.start()
        headers = {AFFINITY: _affinity(works[0].prompt)}
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(exchange, headers, with_usage=with_usage)
        return JSONResponse(await exchange.whole(), headers=headers)


def _text_routes(app: FastAPI, server: Server) -> None:
    async def answer(
        request: Request, name: str, size: int, function: Callable[..., bytes], *args: Any
    ) -> Response:
        name, model = server.model(name)
        content = await app.state.offload.with_prompts(request, name, model, size, function, *args)
        return Response(content, media_type="application/json")

    @app.post("/tokenize", response_model=None)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        size = len(body.content)
        return await answer(request, body.model, size, texts.tokens, body.content, body.add_special)

    @app.post("/detokenize", response_model=None)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        return await answer(request, body.model, len(body.tokens), texts.text, body.tokens)

    @app.post("/apply-template", response_model=None)
    async def apply_template(request: Request, body: TemplateRequest) -> Response:
        size, messages = len(await request.body()), messages_of(body.messages)
        return await answer(request, body.model, size, texts.template, messages)


def _state_routes(app: FastAPI, server: Server) -> None:
    @app.get("/slots", response_model=None)
    async def slots(request: Request) -> list[dict[str, Any]]:
        return [
            {"id": number, "model": name, "n_prompt_tokens": slot.count}
            for name, number, slot in server.slots.of(server.client(request).owner)
        ]

    @app.post("/slots/{slot}", response_model=None)
    async def act(
        request: Request,
        slot: int,
        action: Literal["save", "restore", "erase"],
        body: SlotRequest | None = None,
    ) -> dict[str, Any]:
        body, client = body or SlotRequest(), server.client(request)
        model_name, model = server.model(body.model)
        key, name = (client.owner, model_name, slot), body.filename
        if action == "erase" and name is None:
            erased = server.slots.pop(*key)
            return {"id_slot": slot, "n_erased": erased.count if erased else 0}
        if name is None:
            raise RequestError("filename: it is missing; give a name for the state")
        answer: dict[str, Any] = {"id_slot": slot, "filename": name}
        if action == "erase":
            await server.saved.erase(client, name)
            return answer
        if action == "restore":
            saved = await server.saved.restore(client, name, model)
            if restored := slot_from(saved):
                server.slots.put(*key, restored)
            return answer | {"n_restored": saved.position}
        await server.saved.require_room(client, name)
        if (seen := server.slots.get(*key)) is None:
            raise RequestError(f"slot {slot} has seen nothing yet; nothing is saved")
        ids = await app.state.offload.run("long", request, seen.ids, model)
        state = await model.astate(ids[:-1] or ids, client=client.name, namespace=client.namespace)
        saved = model.saved_state(ids, state, seen.messages)
        written = await server.saved.save(client, name, model, saved)
        return answer | {"n_saved": saved.position, "n_written": written}


def _status_routes(app: FastAPI, server: Server, health: Health) -> None:
    @app.get("/health", response_model=None)
    async def healthy() -> JSONResponse:
        problems = health.problems()
        if not problems:
            return JSONResponse({"status": "ok"})
        reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        error = errors.error_object(reason, errors.SERVER)
        return JSONResponse({"status": "error", "reason": reason} | error, 503)

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name) for name in server.models]}

    @app.get("/v1/models/{name}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        if name not in server.models:
            raise errors.NotFound(f"there is no model {name!r} here", "model")
        return _model_card(name)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(server.metrics.text(), media_type=_METRICS_TYPE)


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rgexport"}


def _affinity(prompt: Prompt) -> str:
    """A hash of how a conversation begins: up to its first user's message."""
    begin = ""
    for message in prompt.messages or ():
        begin += f"{message['role']}\n{message['content']}\n"
        if message["role"] == "user":
            break
    data = begin.encode("utf-8", "replace") if begin else repr(prompt.ids[:64]).encode()
    return hashlib.sha256(data).hexdigest()[:16]
