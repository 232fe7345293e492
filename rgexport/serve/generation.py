"""Running a request: from its fields to replies, whole or as server-sent events."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from rgexport.chat.model import Model, Prompt
from rgexport.chat.reply import Chosen, Piece, Reply, ReplyOptions
from rgexport.chat.sampling import Sampling
from rgexport.chat.template import Message
from rgexport.errors import RequestError
from rgexport.serve.answers import Answer
from rgexport.serve.errors import TooLong, as_error
from rgexport.serve.grammar import Grammar, Grammars
from rgexport.serve.requests import ChatMessage, ChatRequest, CompletionRequest, Generation

_DONE = b"data: [DONE]\n\n"
_ROLES = {"developer": "system"}


class Gone(Exception):  # noqa: N818
    """The client has left."""


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        new_tokens: most tokens of a reply, and how many there are if a client does not say.
        prompt_tokens: most tokens of a prompt.
        seconds: longest time of an answer.
        ping_seconds: longest silence of a stream.
    """

    new_tokens: int = 4096
    prompt_tokens: int = 1 << 20
    seconds: float = 3600.0
    ping_seconds: float = 15.0


@dataclass(frozen=True)
class Work:
    """One reply to make."""

    prompt: Prompt
    options: ReplyOptions


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Turns as a template takes them."""
    return [
        {"role": _ROLES.get(message.role, message.role), "content": _text(message)}
        for message in messages
    ]


def chat_works(
    model: Model, grammars: Grammars, body: ChatRequest, client: str, limits: Limits
) -> list[Work]:
    """The replies that a chat asks for.

    Raises:
        RequestError: the template refuses the messages, or a field asks for what there is not.
    """
    if body.tools and "tools" not in model.template.source:
        raise RequestError("tools: the chat template of this model has none; leave tools out")
    prompt = model.conversation_prompt(messages_of(body.messages), tools=body.tools or None)
    logprobs = body.top_logprobs if body.logprobs else None
    most = body.max_completion_tokens or body.max_tokens
    return _works(model, grammars, [prompt], body, (most, logprobs, client), limits)


def completion_works(
    model: Model, grammars: Grammars, body: CompletionRequest, client: str, limits: Limits
) -> list[Work]:
    """The replies that a completion asks for: `n` of each prompt.

    Raises:
        RequestError: a prompt is empty, or a field asks for what there is not.
    """
    if body.suffix:
        raise RequestError("suffix: this model cannot fill a gap; leave suffix out")
    if body.best_of not in (None, body.n):
        raise RequestError("best_of: there is none; leave it out, or set it to n")
    prompts = [Prompt(ids) for ids in _prompts(model, body.prompt)]
    return _works(model, grammars, prompts, body, (body.max_tokens, body.logprobs, client), limits)


async def answer_whole(
    request: Request,
    model: Model,
    answer: Answer,
    works: Sequence[Work],
    before: Sequence[str],
    *,
    limits: Limits,
) -> dict[str, Any]:
    """All replies, and then the answer.

    Raises:
        Gone: the client has left.
        RequestError: a reply failed.
    """
    merged = _merged(request, model, works, None, limits.seconds)
    async with contextlib.aclosing(merged) as items:
        replies: dict[int, Reply] = {}
        tokens: dict[int, list[Chosen]] = {index: [] for index in range(len(works))}
        async for index, item in items:
            if isinstance(item, Reply):
                replies[index] = item
            elif isinstance(item, Piece):
                tokens[index] += item.tokens
    said = [dataclasses.replace(r, text=before[i] + r.text) for i, r in sorted(replies.items())]
    return answer.whole(said, [tokens[index] for index in sorted(tokens)])


async def stream(
    request: Request,
    model: Model,
    answer: Answer,
    works: Sequence[Work],
    before: Sequence[str],
    *,
    with_usage: bool,
    limits: Limits,
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a comment while nothing is said."""
    opened: set[int] = set()
    replies: dict[int, Reply] = {}
    try:
        merged = _merged(request, model, works, limits.ping_seconds, limits.seconds)
        async with contextlib.aclosing(merged) as items:
            async for index, item in items:
                if item is None:
                    yield b": reading\n\n"
                    continue
                if index not in opened:
                    opened.add(index)
                    if first := answer.opening(index, before[index]):
                        yield _event(first)
                if isinstance(item, Piece):
                    yield _event(answer.piece(index, item))
                else:
                    replies[index] = item
                    yield _event(answer.closing(index, item))
        if with_usage:
            yield _event(answer.costs([replies[index] for index in sorted(replies)]))
        yield _DONE
    except RequestError as error:
        yield _event(as_error(error)[1])
    except Gone:
        return


async def _merged(
    request: Request, model: Model, works: Sequence[Work], silence: float | None, most: float
) -> AsyncGenerator[tuple[int, Piece | Reply | None], None]:
    """What all replies say, as it comes, until all have ended; None after a silence.

    Raises:
        Gone: the client has left.
        TooLong: it took longer than `most` seconds.
        RequestError: a reply failed.
    """
    arrived: asyncio.Queue[tuple[int, Piece | Reply | Exception]] = asyncio.Queue()

    async def listen(index: int, work: Work) -> None:
        try:
            async with contextlib.aclosing(model.deliver(work.prompt, work.options)) as items:
                async for item in items:
                    arrived.put_nowait((index, item))
        except RequestError as error:
            arrived.put_nowait((index, error))

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        arrived.put_nowait((0, Gone()))

    loop = asyncio.get_running_loop()
    end = loop.time() + most
    tasks = [asyncio.create_task(listen(index, work)) for index, work in enumerate(works)]
    tasks.append(asyncio.create_task(leave()))
    left = len(works)
    try:
        while left:
            rest = end - loop.time()
            if rest <= 0:
                raise TooLong(f"the answer takes longer than {most:g} s; ask for fewer tokens")
            try:
                index, item = await asyncio.wait_for(arrived.get(), min(silence or rest, rest))
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(item, Exception):
                raise item
            left -= isinstance(item, Reply)
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _works(
    model: Model,
    grammars: Grammars,
    prompts: Sequence[Prompt],
    body: Generation,
    rest: tuple[int | None, int | None, str],
    limits: Limits,
) -> list[Work]:
    most, logprobs, client = rest
    for prompt in prompts:
        if len(prompt.ids) > limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens; this server takes up to "
                f"{limits.prompt_tokens}"
            )
    found = []
    for prompt in prompts:
        for choice in range(body.n):
            options = ReplyOptions(
                sampling=_sampling(body, choice),
                max_new_tokens=min(most or limits.new_tokens, limits.new_tokens),
                stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
                logprobs=logprobs,
                mask=_mask(grammars, body),
                client=body.user or client,
            )
            found.append(Work(prompt, options))
    return found


def _sampling(body: Generation, choice: int) -> Sampling:
    """How tokens are chosen; each choice has another seed."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise RequestError("logit_bias: its keys are not token ids") from None
    seed = None if body.seed is None else (body.seed + choice) % 2**63
    return Sampling(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repeat_penalty or body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        seed=seed,
    )


def _mask(grammars: Grammars, body: Generation) -> Grammar | None:
    """What may be written, by the one field that says so."""
    form = body.response_format
    wanted = {
        "response_format": form is not None and form.type != "text",
        "grammar": body.grammar is not None,
        "regex": body.regex is not None,
    }
    if sum(wanted.values()) > 1:
        raise RequestError(f"{' and '.join(n for n, w in wanted.items() if w)}: give only one")
    if body.grammar is not None:
        return grammars.grammar(body.grammar)
    if body.regex is not None:
        return grammars.regex(body.regex)
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise RequestError("response_format: its json_schema is missing")
    return grammars.json(form.json_schema.schema_ if form.json_schema else None)


def _prompts(
    model: Model, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    if isinstance(prompt, str):
        return [model.text_ids(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    found = [model.text_ids(each) if isinstance(each, str) else _ids(each) for each in prompt]
    if not found or len(found) > _MOST_PROMPTS:
        raise RequestError(f"prompt: {len(found)} prompts; expected 1 to {_MOST_PROMPTS}")
    return found


_MOST_PROMPTS = 64


def _ids(prompt: Any) -> list[int]:
    return [int(token) for token in prompt]


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
