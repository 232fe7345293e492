"""`/v1/chat/completions` and `/v1/completions`: plan the replies of a request, and run them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from rgexport.chat.model import Model
from rgexport.chat.prompts import PromptTokens
from rgexport.chat.reply import ModelReply, ReplyOptions
from rgexport.chat.sampling import Sampling
from rgexport.chat.template import Message
from rgexport.errors import RequestError
from rgexport.serve.answers import OpenAIAnswer
from rgexport.serve.bodies import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationBody,
    Prediction,
)
from rgexport.serve.clients import Client, slot_after
from rgexport.serve.exchange import EventStream, Exchange, Limits, PlannedReply
from rgexport.serve.grammar import GrammarSource, json_source
from rgexport.serve.offload import kind_of
from rgexport.serve.server import server_of

AFFINITY = "X-Conversation"
"""Header for load balancers; its value is the same for all turns of a conversation."""
_ROLES = {"developer": "system"}
_MOST_PROMPTS = 64
_MOST_SCORED_TOKENS = 1 << 16
_COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion."""


async def chat(request: Request, body: ChatRequest) -> Response:
    name, model = server_of(request).model(body.model)
    answer = OpenAIAnswer(name, model.tokenizer, chat=True, logprobs=body.logprobs, n=body.n)
    return await _respond(request, body, answer, plan_chat)


async def complete(request: Request, body: CompletionRequest) -> Response:
    name, model = server_of(request).model(body.model)
    logprobs = body.logprobs is not None
    answer = OpenAIAnswer(name, model.tokenizer, chat=False, logprobs=logprobs, n=body.n)
    return await _respond(request, body, answer, plan_completion)


async def _respond(
    request: Request,
    body: GenerationBody,
    answer: OpenAIAnswer,
    plan: Callable[..., list[PlannedReply]],
) -> Response:
    server, name = server_of(request), answer.model
    client, model, limits = server.client(request), server.models[name], server.settings.limits
    kind = kind_of(len(await request.body()))
    replies: list[PlannedReply] = await server.offload.run(
        kind, request, plan, model, body, client, limits
    )
    replies = await server.with_grammar(name, replies, request)

    def finished(reply: ModelReply) -> None:
        slot = slot_after(replies[0].prompt, reply)
        server.slots.put(client.owner, name, body.id_slot, slot)

    exchange = Exchange(request, model, answer, replies, limits, finished)
    server.exchanges.add(exchange)
    await exchange.start()
    headers = {AFFINITY: _affinity(replies[0].prompt)}
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(exchange, headers, with_usage=with_usage)
    return JSONResponse(await exchange.whole(), headers=headers)


def _affinity(prompt: PromptTokens) -> str:
    """Returns a hash of the beginning of a conversation, up to the user's first message."""
    begin = ""
    for message in prompt.messages or ():
        begin += f"{message['role']}\n{message['content']}\n"
        if message["role"] == "user":
            break
    data = begin.encode("utf-8", "replace") if begin else repr(prompt.ids[:64]).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    return [
        {"role": _ROLES.get(message.role, message.role), "content": _content(message)}
        for message in messages
    ]


def plan_chat(
    model: Model, body: ChatRequest, client: Client, limits: Limits
) -> list[PlannedReply]:
    model.require_chat()
    if body.tools and "tools" not in model.template.source:
        raise RequestError("tools: the chat template of this model has none; leave tools out")
    prompt = model.conversation_prompt(
        messages_of(body.messages), tools=body.tools or None, namespace=client.namespace
    )
    _require_fitting([prompt], limits)
    most = body.max_completion_tokens or body.max_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    options = _options(body, most, logprobs, client, limits)
    if body.prediction:
        draft = model.draft_of(_content(body.prediction))
        if len(draft) > limits.prompt_tokens:
            raise RequestError(
                f"prediction has {len(draft)} tokens; this server takes up to "
                f"{limits.prompt_tokens}"
            )
        options = replace(options, draft=draft)
    return _replies([prompt], body, options)


def plan_completion(
    model: Model, body: CompletionRequest, client: Client, limits: Limits
) -> list[PlannedReply]:
    """Plans `n` replies to each prompt."""
    if body.suffix:
        raise RequestError("suffix: this model cannot fill a gap; leave suffix out")
    if body.best_of not in (None, body.n):
        raise RequestError("best_of: there is none; leave it out, or set it to n")
    prompts = [PromptTokens(ids) for ids in _prompts(model, body.prompt)]
    longest = _require_fitting(prompts, limits)
    most = body.max_tokens or _COMPLETION_TOKENS
    options = _options(body, most, body.logprobs, client, limits)
    if body.echo and body.logprobs is not None:
        if longest > _MOST_SCORED_TOKENS:
            raise RequestError(
                f"echo: the prompt has {longest} tokens; log probabilities are reported of up to "
                f"{_MOST_SCORED_TOKENS}; leave echo or logprobs out"
            )
        options = replace(options, prompt_logprobs=True)
    replies = _replies(prompts, body, options)
    if body.echo:
        return [replace(r, before=model.tokenizer.decode(r.prompt.ids)) for r in replies]
    return replies


def _replies(
    prompts: Sequence[PromptTokens], body: GenerationBody, options: ReplyOptions
) -> list[PlannedReply]:
    """Returns `n` replies to each prompt, each with its own seed."""
    grammar = _grammar_source(body)
    choices = [replace(options, sampling=_sampling(body, choice)) for choice in range(body.n)]
    return [PlannedReply(prompt, c, grammar=grammar) for prompt in prompts for c in choices]


def _options(
    body: GenerationBody, most: int | None, logprobs: int | None, client: Client, limits: Limits
) -> ReplyOptions:
    return ReplyOptions(
        max_new_tokens=min(most or limits.new_tokens, limits.new_tokens),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        logprobs=logprobs,
        client=client.name,
        namespace=client.namespace,
    )


def _require_fitting(prompts: Sequence[PromptTokens], limits: Limits) -> int:
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > limits.prompt_tokens:
        raise RequestError(
            f"the prompt has {longest} tokens; this server takes up to {limits.prompt_tokens}"
        )
    return longest


def _sampling(body: GenerationBody, choice: int) -> Sampling:
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise RequestError("logit_bias: its keys are not token ids") from None
    return Sampling(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repeat_penalty or body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        seed=None if body.seed is None else (body.seed + choice) % 2**63,
    )


def _grammar_source(body: GenerationBody) -> GrammarSource | None:
    """Returns the grammar of the only field that has one."""
    form = body.response_format
    if form is not None and form.type == "text":
        form = None
    sources = {"response_format": form, "grammar": body.grammar, "regex": body.regex}
    names = [name for name, source in sources.items() if source is not None]
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)}: give only one")
    if body.grammar is not None:
        return GrammarSource("grammar", body.grammar)
    if body.regex is not None:
        return GrammarSource("regex", body.regex)
    if form is None:
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise RequestError("response_format: its json_schema is missing")
    return json_source(form.json_schema.schema_ if form.json_schema else None)


def _prompts(
    model: Model, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    if isinstance(prompt, str):
        return [model.text_ids(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [_ids(prompt)]
    prompts = [model.text_ids(p) if isinstance(p, str) else _ids(p) for p in prompt]
    if not prompts or len(prompts) > _MOST_PROMPTS:
        raise RequestError(f"prompt: {len(prompts)} prompts; expected 1 to {_MOST_PROMPTS}")
    return prompts


def _ids(prompt: Any) -> list[int]:
    return [int(token) for token in prompt]


def _content(message: ChatMessage | Prediction) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)
