"""Functions that answer requests; the table `app.ENDPOINTS` has their paths."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport.chat.model import Model
from rgexport.chat.prompts import Message, PromptEncoder, PromptTokens
from rgexport.chat.reply import ModelReply, ReplyOptions
from rgexport.chat.sampling import Sampling
from rgexport.errors import RequestError
from rgexport.serve import bodies, errors
from rgexport.serve.answers import OpenAIAnswer
from rgexport.serve.clients import Client, slot_after, slot_from
from rgexport.serve.exchange import EventStream, Exchange, Limits, PlannedReply
from rgexport.serve.grammar import GrammarSource, json_source
from rgexport.serve.server import LONG, kind_of, server_of

AFFINITY = "X-Conversation"
"""Header for load balancers; its value is the same for all turns of a conversation."""
_ROLES = {"developer": "system"}
_MOST_PROMPTS = 64
_MOST_SCORED_TOKENS = 1 << 16
_COMPLETION_TOKENS = 16  # OpenAI's default
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def chat(request: Request, body: bodies.ChatRequest) -> Response:
    """Continues a conversation, as OpenAI's endpoint does."""
    name, model = server_of(request).model(body.model)
    answer = OpenAIAnswer(name, model.tokenizer, chat=True, logprobs=body.logprobs, n=body.n)
    return await _respond(request, body, answer, plan_chat)


async def complete(request: Request, body: bodies.CompletionRequest) -> Response:
    """Continues a prompt, or several, as OpenAI's endpoint does."""
    name, model = server_of(request).model(body.model)
    logprobs = body.logprobs is not None
    answer = OpenAIAnswer(name, model.tokenizer, chat=False, logprobs=logprobs, n=body.n)
    return await _respond(request, body, answer, plan_completion)


async def _respond(
    request: Request,
    body: bodies.GenerationBody,
    answer: OpenAIAnswer,
    plan: Callable[..., list[PlannedReply]],
) -> Response:
    server, name = server_of(request), answer.model
    client, model, limits = server.client(request), server.models[name], server.settings.limits
    kind, source = kind_of(len(await request.body())), _grammar_source(body)
    replies: list[PlannedReply] = await server.run(kind, request, plan, model, body, client, limits)
    if source is not None:
        make_mask = await server.grammar_thread.compile(server.grammars[name], source, request)
        replies = [replace(r, options=replace(r.options, mask=make_mask())) for r in replies]

    def finished(reply: ModelReply) -> None:
        slot = slot_after(replies[0].prompt, reply)
        server.slots.put((client.owner, name, body.id_slot), slot)

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


def messages_of(messages: Sequence[bodies.ChatMessage]) -> list[Message]:
    return [
        {"role": _ROLES.get(message.role, message.role), "content": _content(message)}
        for message in messages
    ]


def plan_chat(
    model: Model, body: bodies.ChatRequest, client: Client, limits: Limits
) -> list[PlannedReply]:
    model.require_chat()
    if body.tools and "tools" not in model.template.source:
        raise RequestError("tools: the chat template of this model has none; leave tools out")
    prompt = model.conversation_prompt(
        messages_of(body.messages), tools=body.tools or None, namespace=client.namespace
    )
    _require_few("the prompt", len(prompt.ids), limits.prompt_tokens)
    most = body.max_completion_tokens or body.max_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    options = _options(body, most, logprobs, client, limits)
    if body.prediction:
        draft = model.draft_of(_content(body.prediction))
        _require_few("prediction", len(draft), limits.prompt_tokens)
        options = replace(options, draft=draft)
    return _replies([prompt], body, options)


def plan_completion(
    model: Model, body: bodies.CompletionRequest, client: Client, limits: Limits
) -> list[PlannedReply]:
    if body.suffix:
        raise RequestError("suffix: this model cannot fill a gap; leave suffix out")
    if body.best_of not in (None, body.n):
        raise RequestError("best_of: there is none; leave it out, or set it to n")
    prompts = [PromptTokens(ids) for ids in _prompts(model, body.prompt)]
    longest = max(len(prompt.ids) for prompt in prompts)
    _require_few("the prompt", longest, limits.prompt_tokens)
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
    prompts: Sequence[PromptTokens], body: bodies.GenerationBody, options: ReplyOptions
) -> list[PlannedReply]:
    choices = [replace(options, sampling=_sampling(body, choice)) for choice in range(body.n)]
    return [PlannedReply(prompt, choice) for prompt in prompts for choice in choices]


def _options(
    body: bodies.GenerationBody,
    most: int | None,
    logprobs: int | None,
    client: Client,
    limits: Limits,
) -> ReplyOptions:
    return ReplyOptions(
        max_new_tokens=min(most or limits.new_tokens, limits.new_tokens),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        logprobs=logprobs,
        client=client.name,
        namespace=client.namespace,
    )


def _require_few(what: str, count: int, most: int | None) -> None:
    if most is not None and count > most:
        raise RequestError(f"{what} has {count} tokens; this server takes up to {most}")


def _sampling(body: bodies.GenerationBody, choice: int) -> Sampling:
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


def _grammar_source(body: bodies.GenerationBody) -> GrammarSource | None:
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


def _prompts(model: Model, prompt: Any) -> list[list[int]]:
    is_single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    prompts = [prompt] if is_single else prompt
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise RequestError(f"prompt: {len(prompts)} prompts; expected 1 to {_MOST_PROMPTS}")
    return [model.text_ids(p) if isinstance(p, str) else p for p in prompts]


def _content(message: bodies.ChatMessage | bodies.Prediction) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


async def healthy(request: Request) -> JSONResponse:
    """Reports whether every model still answers."""
    problems = server_of(request).health.problems()
    if not problems:
        return JSONResponse({"status": "ok"})
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    error = errors.error_object(reason, errors.SERVER)
    return JSONResponse({"status": "error", "reason": reason} | error, 503)


async def models(request: Request) -> dict[str, Any]:
    """Lists the models."""
    return {"object": "list", "data": [_model_card(name) for name in server_of(request).models]}


async def model(request: Request, name: str) -> dict[str, Any]:
    """Describes a model."""
    if name not in server_of(request).models:
        raise errors.NotFound(f"there is no model {name!r} here", "model")
    return _model_card(name)


def metrics(request: Request) -> PlainTextResponse:
    """Counts requests, tokens and seconds, in the format of Prometheus."""
    return PlainTextResponse(server_of(request).metrics.text(), media_type=_METRICS_TYPE)


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rgexport"}


async def tokenize(request: Request, body: bodies.TokenizeRequest) -> Response:
    """Returns the tokens of a text."""
    size = len(body.content)
    return await _answer(request, body.model, size, _tokens, body.content, body.add_special)


async def detokenize(request: Request, body: bodies.DetokenizeRequest) -> Response:
    """Returns the text of tokens."""
    return await _answer(request, body.model, len(body.tokens), _text, body.tokens)


async def apply_template(request: Request, body: bodies.TemplateRequest) -> Response:
    """Returns the prompt that a conversation becomes."""
    size, messages = len(await request.body()), messages_of(body.messages)
    return await _answer(request, body.model, size, _rendered, messages)


async def _answer(
    request: Request, name: str, size: int, function: Callable[..., bytes], *args: Any
) -> Response:
    server = server_of(request)
    _, model = server.model(name)
    if model.elsewhere and size > LONG:
        content = await server.run("long", request, model.elsewhere, function, *args)
    else:
        content = await server.run(kind_of(size), request, function, model, *args)
    return Response(content, media_type="application/json")


def _tokens(encoder: PromptEncoder, text: str, add_special: bool) -> bytes:
    ids = encoder.text_ids(text) if add_special else encoder.encode(text)
    _require_few("the text", len(ids), encoder.most_tokens)
    return _json({"tokens": ids})


def _text(encoder: PromptEncoder, ids: list[int]) -> bytes:
    _require_few("the text", len(ids), encoder.most_tokens)
    return _json({"content": encoder.tokenizer.decode(ids)})


def _rendered(encoder: PromptEncoder, messages: list[Message]) -> bytes:
    ids = encoder.conversation_prompt(messages).ids
    _require_few("the text", len(ids), encoder.most_tokens)
    special = {token: literal for literal, token in encoder.tokenizer.special.items()}
    pieces = [special.get(i) or encoder.tokenizer.surface(i) for i in ids]
    data = b"".join(p.encode() if isinstance(p, str) else p for p in pieces)
    return _json({"prompt": data.decode("utf-8", "replace"), "tokens": ids})


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def slots(request: Request) -> list[dict[str, Any]]:
    """Lists the slots of the client."""
    server = server_of(request)
    client = server.client(request)
    return [
        {"id": number, "model": name, "n_prompt_tokens": slot.count}
        for (owner, name, number), slot in server.slots.items()
        if owner == client.owner
    ]


async def act(
    request: Request,
    slot: int,
    action: Literal["save", "restore", "erase"],
    body: bodies.SlotRequest | None = None,
) -> dict[str, Any]:
    """Saves, restores or erases the state of a slot."""
    server, body = server_of(request), body or bodies.SlotRequest()
    client, name = server.client(request), body.filename
    model_name, model = server.model(body.model)
    key = client.owner, model_name, slot
    if action == "erase" and name is None:
        erased = server.slots.pop(key, None)
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
            server.slots.put(key, restored)
        return answer | {"n_restored": saved.position}
    await server.saved.require_space(client, name)
    if (seen := server.slots.get(key)) is None:
        raise RequestError(f"slot {slot} has seen nothing yet; nothing is saved")
    ids = await server.run("long", request, seen.ids, model)
    state = await model.astate(ids[:-1] or ids, client=client.name, namespace=client.namespace)
    saved = model.saved_state(ids, state, seen.messages)
    written = await server.saved.save(client, name, model, saved)
    return answer | {"n_saved": saved.position, "n_written": written}
