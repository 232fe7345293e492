"""Computations beside the event loop: in threads, or in a process."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, Literal

import anyio
import anyio.to_thread
from starlette.requests import Request

from rgexport.chat.model import Model
from rgexport.serve.bodies import parse
from rgexport.serve.errors import Gone
from rgexport.serve.exchange import until_gone
from rgexport.serve.text_process import TextProcess, with_encoder

LONG = 1 << 16
"""Smallest body, in bytes, that the process for long texts parses."""
_SHORT = 1 << 14
"""Largest body with a short computation: it has no text that `chat.prompts` counts as long."""
Kind = Literal["short", "long"]
_THREADS: dict[Kind, int] = {"short": 3, "long": 2}
"""Threads of each kind, so that long computations do not delay short ones. They are few, since they
compete with the scheduler for the interpreter's lock."""


class Offload:
    """Runs functions in threads or the process, unless the client leaves before they begin."""

    def __init__(self, text_process: TextProcess | None) -> None:
        self._text_process = text_process

    async def parse(self, request: Request, kind: Any, data: bytes) -> Any:
        if self._text_process and len(data) > LONG:
            return await self.run("long", request, self._text_process.call, parse, kind, data)
        return await self.run(kind_of(len(data)), request, parse, kind, data)

    async def with_encoder(
        self,
        request: Request,
        name: str,
        model: Model,
        size: int,
        function: Callable[..., bytes],
        *args: Any,
    ) -> Any:
        """Returns `function(encoder of the model, *args)`; `size` is the length of its input."""
        if self._text_process and size > LONG:
            call = self._text_process.call
            return await self.run("long", request, call, with_encoder, name, function, *args)
        return await self.run(kind_of(size), request, function, model, *args)

    async def run(
        self, kind: Kind, request: Request, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Returns `function(*args)`, computed in a thread; raises Gone if the client left."""
        call = anyio.to_thread.run_sync(
            functools.partial(function, *args), limiter=self._limiters[kind], abandon_on_cancel=True
        )
        job = asyncio.ensure_future(call)
        leaving = asyncio.ensure_future(until_gone(request))
        try:
            await asyncio.wait((job, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise Gone
            return job.result()
        finally:
            leaving.cancel()
            job.cancel()

    @functools.cached_property
    def _limiters(self) -> dict[Kind, anyio.CapacityLimiter]:
        return {kind: anyio.CapacityLimiter(threads) for kind, threads in _THREADS.items()}


def kind_of(size: int) -> Kind:
    return "long" if size > _SHORT else "short"
