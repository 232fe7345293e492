"""A running request: its replies, sent whole or as server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rgexport.chat.jobs import GenerationJob
from rgexport.chat.model import Model
from rgexport.chat.prompts import PromptTokens
from rgexport.chat.reply import Item, ModelReply, ReplyOptions, ScoredToken, TextPiece
from rgexport.errors import RequestError
from rgexport.serve.answers import OpenAIAnswer
from rgexport.serve.disconnects import until_gone
from rgexport.serve.errors import Gone, ServerEnds, TooLong, as_error

_STARTED_AT_ONCE = 8
"""Replies that start before the event loop runs again: each takes about 0.05 ms."""

_PING = b": reading\n\n"
"""A comment, which clients ignore: a proxy may close a connection that is silent for long."""

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Limits:
    """Limits of a request; `ping_seconds` is the longest silence of a stream."""

    new_tokens: int = 4096
    prompt_tokens: int = 1 << 20
    seconds: float = 3600.0
    ping_seconds: float = 15.0


@dataclass(frozen=True)
class PlannedReply:
    """A reply that has not begun; `before` is the text that the answer puts in front of it."""

    prompt: PromptTokens
    options: ReplyOptions
    before: str = ""


class Exchange:
    """The replies to one request.

    The event loop's thread calls all methods. The model's threads deliver what it receives.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        answer: OpenAIAnswer,
        planned: Sequence[PlannedReply],
        limits: Limits,
        finished: Callable[[ModelReply], None],
    ) -> None:
        """Takes `finished`, which is called with the first reply when it is complete."""
        self._request = request
        self._model = model
        self._answer = answer
        self._planned = planned
        self._limits = limits
        self._finished = finished
        self._received: asyncio.Queue[tuple[int, Item | Gone]] = asyncio.Queue()
        """The index of a reply, and a piece, its end or an error."""
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + limits.seconds
        self._replies: dict[int, ModelReply] = {}
        self._jobs: list[GenerationJob] = []
        self._is_over = False

    async def start(self) -> None:
        """Starts all replies, or none.

        Raises:
            RequestError: the model never runs as many requests at once, or refuses one.
            Busy: too many requests wait.
        """
        limit = self._model.scheduler.most_requests
        if len(self._planned) > limit:
            raise RequestError(
                f"n: the request asks for {len(self._planned)} replies; this server takes up to "
                f"{limit} at once; send several requests"
            )
        try:
            for index, planned in enumerate(self._planned):
                deliver = partial(self._deliver, index)
                job = self._model.start(planned.prompt, planned.options, deliver)
                self._jobs.append(job)
                if len(self._jobs) % _STARTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends all replies; what they still deliver is ignored."""
        self._is_over = True
        for job in self._jobs:
            job.cancel()

    def stop(self) -> None:
        """Lets the answer end with the error that the server ends."""
        self._received.put_nowait((0, ServerEnds()))

    async def whole(self) -> dict[str, Any]:
        """Returns the answer when all replies are complete.

        Raises:
            Gone: the client left.
            RequestError: a reply failed or the answer took too long; or the server ends.
        """
        tokens: list[list[ScoredToken]] = [[] for _ in self._planned]
        async with contextlib.aclosing(self._items(None)) as items:
            async for index, item in items:
                if isinstance(item, TextPiece):
                    tokens[index] += item.tokens

        replies = []
        for planned, reply in zip(self._planned, self._ordered_replies(), strict=True):
            text = planned.before + reply.text
            replies.append(replace(reply, text=text))
        return self._answer.whole(replies, tokens)

    async def events(self, *, with_usage: bool) -> AsyncIterator[bytes]:
        """Yields the answer as server-sent events; an error is the last of them."""
        try:
            async with contextlib.aclosing(self._reply_events()) as reply_events:
                async for event in reply_events:
                    yield event
            if with_usage:
                yield _event(self._answer.costs(self._ordered_replies()))
            yield _DONE
        except RequestError as error:
            _, body = as_error(error)
            yield _event(body)
        except Gone:
            return

    async def _reply_events(self) -> AsyncGenerator[bytes, None]:
        """Yields the events of all replies as they come, and pings while nothing comes."""
        opened: set[int] = set()
        async with contextlib.aclosing(self._items(self._limits.ping_seconds)) as items:
            async for index, item in items:
                if item is None:
                    yield _PING
                    continue
                if index not in opened:
                    opened.add(index)
                    opening = self._answer.opening(index, self._planned[index].before)
                    if opening:
                        yield _event(opening)
                if isinstance(item, TextPiece):
                    yield _event(self._answer.piece(index, item))
                else:
                    yield _event(self._answer.closing(index, item))

    def _ordered_replies(self) -> list[ModelReply]:
        return [self._replies[index] for index in sorted(self._replies)]

    def _deliver(self, index: int, item: Item) -> None:
        """Hands an item to the event loop; the model's threads call it."""
        if self._is_over:
            return
        with contextlib.suppress(RuntimeError):  # the loop may be closed meanwhile
            self._loop.call_soon_threadsafe(self._received.put_nowait, (index, item))

    async def _items(
        self, silence: float | None
    ) -> AsyncGenerator[tuple[int, TextPiece | ModelReply | None], None]:
        """Yields indices of replies with their pieces and ends, until all have ended.

        Yields None for an item after each `silence`, in seconds. Its end cancels the replies that
        run. Raises as `whole` does.
        """
        leaving = asyncio.create_task(until_gone(self._request))
        leaving.add_done_callback(self._on_gone)
        try:
            while len(self._replies) < len(self._planned):
                try:
                    index, item = await self._next_item(silence)
                except TimeoutError:
                    yield 0, None
                    continue
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, ModelReply):
                    self._replies[index] = item
                    if index == 0:
                        self._finished(item)
                yield index, item
        finally:
            leaving.cancel()
            self.cancel()

    async def _next_item(self, silence: float | None) -> tuple[int, Item | Gone]:
        """Returns the next item; raises TimeoutError after `silence` or at the deadline.

        Raises TooLong once the deadline has passed.
        """
        remaining = self._deadline - self._loop.time()
        if remaining <= 0:
            seconds = self._limits.seconds
            raise TooLong(f"the answer takes longer than {seconds:g} s; ask for fewer tokens")
        timeout = min(silence or remaining, remaining)
        return await asyncio.wait_for(self._received.get(), timeout)

    def _on_gone(self, _: asyncio.Task[None]) -> None:
        self._received.put_nowait((0, Gone()))


class EventStream(StreamingResponse):
    """An answer as server-sent events; its end cancels the replies, however it ends."""

    def __init__(self, exchange: Exchange, headers: dict[str, str], *, with_usage: bool) -> None:
        # nginx would collect events before it passes them on.
        stream_headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(
            exchange.events(with_usage=with_usage),
            media_type="text/event-stream",
            headers=headers | stream_headers,
        )
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


def _event(body: dict[str, Any]) -> bytes:
    """Returns a server-sent event; lone surrogates become question marks."""
    text = json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")
