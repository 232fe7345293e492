"""The state of a server, and computations beside its event loop: in threads, or in a process."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request

from rgexport.chat.model import Model
from rgexport.chat.reading import ReadingLog
from rgexport.progress import note
from rgexport.serve.bodies import parse
from rgexport.serve.clients import Client, ClientSlots, NamedStates, network_of
from rgexport.serve.disconnects import until_done
from rgexport.serve.errors import NotFound
from rgexport.serve.exchange import Exchange, Limits
from rgexport.serve.grammar import Grammars, GrammarThread
from rgexport.serve.guards import Connections
from rgexport.serve.monitoring import STALL_SECONDS, Health, Metrics
from rgexport.serve.text_process import TextProcess, with_encoder

LONG = 1 << 16
"""Smallest body, in bytes, that the process for long texts parses."""
_SHORT = 1 << 14
"""Largest body with a short computation: it has no text that `chat.prompts` counts as long."""
Kind = Literal["short", "long"]
_THREADS: dict[Kind, int] = {"short": 3, "long": 2}
"""Threads of each kind, so that long computations do not delay short ones. They are few, since they
compete with the scheduler for the interpreter's lock."""


def kind_of(size: int) -> Kind:
    return "long" if size > _SHORT else "short"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server, as the options of `rgexport serve` describe them.

    `*` stands for all origins or hosts. `saved` is the folder of states that clients name: at most
    `most_saved` states of a client, `saved_bytes` of all. With `share_prefixes`, all clients use
    the same states. `trusted_proxies` are addresses, believed about X-Forwarded-For.
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
    host: str = "127.0.0.1"
    port: int = 8080
    connections: Connections = field(default_factory=Connections)
    grace_seconds: int = 30
    stall_seconds: float = STALL_SECONDS


class Server:
    """The models, and all else that endpoints share; they get it by `server_of`."""

    def __init__(
        self,
        models: Mapping[str, Model],
        settings: ServerSettings,
        text_process: TextProcess | None = None,
    ) -> None:
        self.models, self.settings = dict(models), settings
        self.metrics = Metrics(self.models)
        self.health = Health(models, stall_seconds=settings.stall_seconds)
        self.slots, self.exchanges = ClientSlots(), WeakSet[Exchange]()
        self.saved = NamedStates(settings.saved, settings.most_saved, settings.saved_bytes)
        self.grammar_thread, self._text_process = GrammarThread(), text_process
        self.grammars = {
            name: Grammars(model.tokenizer, model.vocab_size) for name, model in models.items()
        }
        for name, model in models.items():
            model.most_tokens = settings.limits.prompt_tokens
            if settings.log:
                model.scheduler.on_reading = ReadingLog()
            if text_process:
                model.elsewhere = partial(text_process.call, with_encoder, name)

    def model(self, name: str) -> tuple[str, Model]:
        if len(self.models) == 1:
            (only,) = self.models
            if name not in ("", only) and self.settings.log:
                _log_other_name(name[:80], only)
            return only, self.models[only]
        if name not in self.models:
            expected = ", ".join(self.models)
            raise NotFound(f"there is no model {name!r} here; expected one of {expected}", "model")
        return name, self.models[name]

    def client(self, request: Request) -> Client:
        key, address = self.settings.api_key, request.client.host if request.client else ""
        identity = f"address\n{address}" if key is None else f"key\n{key}"
        owner = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return Client(network_of(address), owner, self.settings.share_prefixes)

    async def parse(self, request: Request, kind: Any, data: bytes) -> Any:
        if self._text_process and len(data) > LONG:
            return await self.run("long", request, self._text_process.call, parse, kind, data)
        return await self.run(kind_of(len(data)), request, parse, kind, data)

    async def run(
        self, kind: Kind, request: Request, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Returns `function(*args)`, computed in a thread; raises Gone if the client left."""
        limiter, call = self._limiters[kind], partial(function, *args)
        job = asyncio.ensure_future(run_sync(call, limiter=limiter, abandon_on_cancel=True))
        try:
            await until_done(job, request)
            return job.result()
        finally:
            job.cancel()

    @cached_property
    def _limiters(self) -> dict[Kind, CapacityLimiter]:
        """Limiters, which are made in the event loop."""
        return {kind: CapacityLimiter(threads) for kind, threads in _THREADS.items()}


@lru_cache  # each name once
def _log_other_name(name: str, only: str) -> None:
    note(f"requests for the model {name!r} are answered by {only}, the only one")


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server
