"""A running request: its replies as OpenAI's answers, whole or as server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rgexport.chat.jobs import GenerationJob
from rgexport.chat.model import Model
from rgexport.chat.prompts import PromptTokens
from rgexport.chat.reply import Item, ModelReply, ReplyOptions, ScoredToken, TextPiece
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.serve.errors import Gone, ServerEnds, TooLong, as_error

_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}
_STARTED_AT_ONCE = 8
"""Replies that start before the event loop runs again: each takes about 0.05 ms."""
_DONE = b"data: [DONE]\n\n"


@dataclass
class OpenAIAnswer:
    model: str
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool
    n: int = 1
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, replies: Sequence[ModelReply], tokens: Sequence[Sequence[ScoredToken]]
    ) -> dict[str, Any]:
        choices = []
        for index, (reply, scored) in enumerate(zip(replies, tokens, strict=True)):
            message = {"message": {"role": "assistant", "content": reply.text}}
            choices.append(
                {
                    "index": index,
                    **(message if self.chat else {"text": reply.text}),
                    "logprobs": self._logprobs(scored),
                    "finish_reason": _REASONS[reply.reason],
                }
            )
        return self._object("chat.completion") | {
            "choices": choices,
            "usage": usage(replies, self.n),
            "timings": timings(replies[0]),
        }

    def opening(self, index: int, before: str = "") -> dict[str, Any] | None:
        if self.chat:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        return self._chunk(index, {"text": before}) if before else None

    def piece(self, index: int, piece: TextPiece) -> dict[str, Any]:
        text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._chunk(index, text | {"logprobs": self._logprobs(piece.tokens)})

    def closing(self, index: int, reply: ModelReply) -> dict[str, Any]:
        empty: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk(index, empty, _REASONS[reply.reason]) | {"timings": timings(reply)}

    def costs(self, replies: Sequence[ModelReply]) -> dict[str, Any]:
        costs = {"choices": [], "usage": usage(replies, self.n)}
        return self._object("chat.completion.chunk") | costs

    def _chunk(self, index: int, text: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **text, "finish_reason": reason}
        return self._object("chat.completion.chunk") | {"choices": [choice]}

    def _object(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            tops = [[self._named(*pair) for pair in token.top] for token in tokens]
            pairs = zip(tokens, tops, strict=True)
            content = [self._named(t.id, t.logprob) | {"top_logprobs": top} for t, top in pairs]
            return {"content": content}
        # Nothing predicts a prompt's first token; OpenAI answers null for it.
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else {self._text(i): p for i, p in token.top}
                for token in tokens
            ],
        }

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "id": token,
            "token": self._text(token),
            "logprob": logprob,
            "bytes": list(self.tokenizer.surface(token)),
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.surface(token).decode("utf-8", "replace")


def usage(replies: Sequence[ModelReply], n: int = 1) -> dict[str, Any]:
    """Returns OpenAI's usage of `n` replies to each prompt, which counts once, not `n` times."""
    by_prompt = [replies[start : start + n] for start in range(0, len(replies), n)]
    prompt = sum(group[0].prompt_tokens for group in by_prompt)
    cached = sum(min(reply.cached_tokens for reply in group) for group in by_prompt)
    new = sum(reply.new_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(reply: ModelReply) -> dict[str, Any]:
    return {
        "cache_n": reply.cached_tokens,
        "prompt_n": reply.prompt_tokens - reply.cached_tokens,
        "prompt_ms": 1e3 * reply.read_seconds,
        "prompt_per_second": reply.read_rate,
        "predicted_n": reply.new_tokens,
        "predicted_ms": 1e3 * reply.write_seconds,
        "predicted_per_second": reply.write_rate,
    }


@dataclass(frozen=True)
class Limits:
    """Limits of a request; `ping_seconds` is the longest silence of a stream."""

    new_tokens: int = 4096
    prompt_tokens: int = 1 << 20
    seconds: float = 3600.0
    ping_seconds: float = 15.0


@dataclass(frozen=True)
class PlannedReply:
    prompt: PromptTokens
    options: ReplyOptions
    before: str = ""


class Exchange:
    """The replies to one request; `finished` gets the first one. Its end cancels those that run."""

    def __init__(
        self,
        request: Request,
        model: Model,
        answer: OpenAIAnswer,
        planned: Sequence[PlannedReply],
        limits: Limits,
        finished: Callable[[ModelReply], None],
    ) -> None:
        self._request, self._model = request, model
        self._answer, self._planned = answer, planned
        self._limits, self._finished = limits, finished
        self._arrived: asyncio.Queue[tuple[int, Item | Gone]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + limits.seconds
        self._replies: dict[int, ModelReply] = {}
        self._jobs: list[GenerationJob] = []
        self._is_over = False

    async def start(self) -> None:
        if len(self._planned) > (most := self._model.scheduler.most_requests):
            raise RequestError(
                f"n: the request asks for {len(self._planned)} replies; this server takes up to "
                f"{most} at once; send several requests"
            )
        try:
            for index, planned in enumerate(self._planned, 1):
                take = partial(self._take, index - 1)
                self._jobs.append(self._model.start(planned.prompt, planned.options, take))
                if index % _STARTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        self._is_over = True
        for job in self._jobs:
            job.cancel()

    def stop(self) -> None:
        self._arrived.put_nowait((0, ServerEnds()))

    async def whole(self) -> dict[str, Any]:
        tokens: list[list[ScoredToken]] = [[] for _ in self._planned]
        async with contextlib.aclosing(self._items(None)) as items:
            async for index, item in items:
                if isinstance(item, TextPiece):
                    tokens[index] += item.tokens
        pairs = zip(self._planned, self._ordered, strict=True)
        replies = [replace(reply, text=planned.before + reply.text) for planned, reply in pairs]
        return self._answer.whole(replies, tokens)

    async def events(self, *, with_usage: bool) -> AsyncIterator[bytes]:
        opened: set[int] = set()
        try:
            async with contextlib.aclosing(self._items(self._limits.ping_seconds)) as items:
                async for index, item in items:
                    if item is None:
                        yield b": reading\n\n"
                        continue
                    if index not in opened:
                        opened.add(index)
                        if first := self._answer.opening(index, self._planned[index].before):
                            yield _event(first)
                    if isinstance(item, TextPiece):
                        yield _event(self._answer.piece(index, item))
                    else:
                        yield _event(self._answer.closing(index, item))
            if with_usage:
                yield _event(self._answer.costs(self._ordered))
            yield _DONE
        except RequestError as error:
            yield _event(as_error(error)[1])
        except Gone:
            return

    @property
    def _ordered(self) -> list[ModelReply]:
        return [self._replies[index] for index in sorted(self._replies)]

    def _take(self, index: int, item: Item) -> None:
        if self._is_over:
            return
        with contextlib.suppress(RuntimeError):  # the loop may be closed meanwhile
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, item))

    async def _items(
        self, silence: float | None
    ) -> AsyncGenerator[tuple[int, TextPiece | ModelReply | None], None]:
        leaving = asyncio.create_task(until_gone(self._request))
        leaving.add_done_callback(lambda _: self._arrived.put_nowait((0, Gone())))
        try:
            while len(self._replies) < len(self._planned):
                rest = self._end - self._loop.time()
                if rest <= 0:
                    most = self._limits.seconds
                    raise TooLong(f"the answer takes longer than {most:g} s; ask for fewer tokens")
                try:
                    wait = min(silence or rest, rest)
                    index, item = await asyncio.wait_for(self._arrived.get(), wait)
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


class EventStream(StreamingResponse):
    def __init__(self, exchange: Exchange, headers: dict[str, str], *, with_usage: bool) -> None:
        headers = headers | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        events = exchange.events(with_usage=with_usage)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def until_done(
    future: asyncio.Future[Any], request: Request, seconds: float | None = None
) -> None:
    """Waits for a future, at most for `seconds`; raises Gone if the client leaves before."""
    leaving = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((future, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not future.done():
            raise Gone
    finally:
        leaving.cancel()


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
