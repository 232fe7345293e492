"""The HTTP interface: OpenAI's, with llama-server's additions."""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport import __version__
from rgexport.chat.model import Model
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Reply
from rgexport.errors import RequestError
from rgexport.serve import errors
from rgexport.serve.answers import Answer
from rgexport.serve.clients import Client, client_of
from rgexport.serve.compiling import Compiler
from rgexport.serve.exchange import (
    EventStream,
    Exchange,
    Gone,
    Limits,
    Work,
    until_gone,
    while_there,
)
from rgexport.serve.grammar import Grammars
from rgexport.serve.metrics import Metrics
from rgexport.serve.middleware import Guard
from rgexport.serve.named_states import NamedStates
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
from rgexport.serve.works import chat_works, completion_works, messages_of

AFFINITY = "X-Conversation"
"""Header whose value is the same for all turns of a conversation, for a load balancer."""
_CLIENT_CLOSED = 499
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        api_key: what clients must present; None lets all in.
        cors_origins: web pages that may use it.
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


def create_app(models: Mapping[str, Model], settings: Settings) -> FastAPI:
    """The app that serves these models."""
    server = Server(models, settings)

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
    errors.install(app)
    _generation_routes(app, server)
    _text_routes(app, server)
    _state_routes(app, server)
    _status_routes(app, server)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[AFFINITY],
        )
    app.add_middleware(
        Guard,
        api_key=settings.api_key,
        body_bytes=settings.body_bytes,
        metrics=server.metrics,
        log=settings.log,
    )
    if settings.trusted_proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=[*settings.trusted_proxies])
    return app


def _generation_routes(app: FastAPI, server: Server) -> None:
    limits = server.settings.limits

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        name, model = server.model(body.model)
        asked = model, body, server.client(request), limits
        answer = Answer(name, model.tokenizer, chat=True, logprobs=body.logprobs, n=body.n)
        return await _respond(request, body, answer, partial(chat_works, *asked))

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        name, model = server.model(body.model)
        asked = model, body, server.client(request), limits
        logprobs = body.logprobs is not None
        answer = Answer(name, model.tokenizer, chat=False, logprobs=logprobs, n=body.n)
        return await _respond(request, body, answer, partial(completion_works, *asked))

    async def _respond(
        request: Request, body: Generation, answer: Answer, make_works: Callable[[], list[Work]]
    ) -> Response:
        owner, model = server.client(request).owner, server.models[answer.model]

        def finished(reply: Reply) -> None:
            slot = slot_after(works[0].prompt, reply)
            server.slots.put(owner, answer.model, body.id_slot, slot)

        try:
            works = await while_there(request, make_works)
            works = await server.with_grammar(answer.model, works, request)
            exchange = Exchange(request, model, answer, works, limits, finished)
            headers = {AFFINITY: _affinity(works[0].prompt)}
            if body.stream:
                with_usage = bool(body.stream_options and body.stream_options.include_usage)
                return EventStream(exchange, headers, with_usage=with_usage)
            return JSONResponse(await exchange.whole(), headers=headers)
        except Gone:
            return Response(status_code=_CLIENT_CLOSED)


def _text_routes(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", response_model=None)
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _, model = server.model(body.model)
        encode = model.text_ids if body.add_special else model.tokenizer.encode_text
        return {"tokens": encode(body.content)}

    @app.post("/detokenize", response_model=None)
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _, model = server.model(body.model)
        return {"content": model.tokenizer.decode(body.tokens)}

    @app.post("/apply-template", response_model=None)
    def apply_template(body: TemplateRequest) -> dict[str, Any]:
        _, model = server.model(body.model)
        ids = model.conversation_prompt(messages_of(body.messages)).ids
        special = {token: text for text, token in model.tokenizer.special.items()}
        pieces = [special.get(i) or model.tokenizer.surface(i) for i in ids]
        data = b"".join(p.encode() if isinstance(p, str) else p for p in pieces)
        return {"prompt": data.decode("utf-8", "replace"), "tokens": ids}


def _state_routes(app: FastAPI, server: Server) -> None:
    @app.get("/slots", response_model=None)
    def slots(request: Request) -> list[dict[str, Any]]:
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
        ids = await run_in_threadpool(seen.ids, model)
        state = await model.astate(ids[:-1] or ids, client=client.name, namespace=client.namespace)
        saved = model.saved_state(ids, state, seen.messages)
        written = await server.saved.save(client, name, model, saved)
        return answer | {"n_saved": saved.position, "n_written": written}


def _status_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health", response_model=None)
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", response_model=None)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name) for name in server.models]}

    @app.get("/v1/models/{name}", response_model=None)
    def model(name: str) -> dict[str, Any]:
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
