"""Functions that answer all other requests; the table `app.ENDPOINTS` has their paths."""

import json
from collections.abc import Callable
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from rgexport.chat.prompts import PromptEncoder
from rgexport.chat.template import Message
from rgexport.errors import RequestError
from rgexport.serve import errors
from rgexport.serve.bodies import DetokenizeRequest, SlotRequest, TemplateRequest, TokenizeRequest
from rgexport.serve.clients import slot_from
from rgexport.serve.completions import messages_of
from rgexport.serve.server import server_of

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def healthy(request: Request) -> JSONResponse:
    problems = server_of(request).health.problems()
    if not problems:
        return JSONResponse({"status": "ok"})
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    error = errors.error_object(reason, errors.SERVER)
    return JSONResponse({"status": "error", "reason": reason} | error, 503)


async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model_card(name) for name in server_of(request).models]}


async def model(request: Request, name: str) -> dict[str, Any]:
    if name not in server_of(request).models:
        raise errors.NotFound(f"there is no model {name!r} here", "model")
    return _model_card(name)


def metrics(request: Request) -> PlainTextResponse:
    return PlainTextResponse(server_of(request).metrics.text(), media_type=_METRICS_TYPE)


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rgexport"}


async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    size = len(body.content)
    return await _answer(request, body.model, size, _tokens, body.content, body.add_special)


async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    return await _answer(request, body.model, len(body.tokens), _text, body.tokens)


async def apply_template(request: Request, body: TemplateRequest) -> Response:
    """Answers with the prompt of a chat, as a text and as tokens."""
    size, messages = len(await request.body()), messages_of(body.messages)
    return await _answer(request, body.model, size, _rendered, messages)


async def _answer(
    request: Request, name: str, size: int, function: Callable[..., bytes], *args: Any
) -> Response:
    """Runs a function of an encoder beside the event loop; `size` is the length of the input."""
    server = server_of(request)
    name, model = server.model(name)
    content = await server.offload.with_encoder(request, name, model, size, function, *args)
    return Response(content, media_type="application/json")


def _tokens(encoder: PromptEncoder, text: str, add_special: bool) -> bytes:
    ids = encoder.text_ids(text) if add_special else encoder.encode(text)
    _require_few(encoder, ids)
    return _json({"tokens": ids})


def _text(encoder: PromptEncoder, ids: list[int]) -> bytes:
    _require_few(encoder, ids)
    return _json({"content": encoder.tokenizer.decode(ids)})


def _rendered(encoder: PromptEncoder, messages: list[Message]) -> bytes:
    ids = encoder.conversation_prompt(messages).ids
    _require_few(encoder, ids)
    special = {token: literal for literal, token in encoder.tokenizer.special.items()}
    pieces = [special.get(i) or encoder.tokenizer.surface(i) for i in ids]
    data = b"".join(p.encode() if isinstance(p, str) else p for p in pieces)
    return _json({"prompt": data.decode("utf-8", "replace"), "tokens": ids})


def _require_few(encoder: PromptEncoder, ids: list[int]) -> None:
    most = encoder.most_tokens
    if most is not None and len(ids) > most:
        raise RequestError(f"there are {len(ids)} tokens; this server takes up to {most}")


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def slots(request: Request) -> list[dict[str, Any]]:
    server = server_of(request)
    return [
        {"id": number, "model": name, "n_prompt_tokens": slot.count}
        for name, number, slot in server.slots.of(server.client(request).owner)
    ]


async def act(
    request: Request,
    slot: int,
    action: Literal["save", "restore", "erase"],
    body: SlotRequest | None = None,
) -> dict[str, Any]:
    server, body = server_of(request), body or SlotRequest()
    client, name = server.client(request), body.filename
    model_name, model = server.model(body.model)
    key = client.owner, model_name, slot
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
    await server.saved.require_space(client, name)
    if (seen := server.slots.get(*key)) is None:
        raise RequestError(f"slot {slot} has seen nothing yet; nothing is saved")
    ids = await server.offload.run("long", request, seen.ids, model)
    state = await model.astate(ids[:-1] or ids, client=client.name, namespace=client.namespace)
    saved = model.saved_state(ids, state, seen.messages)
    written = await server.saved.save(client, name, model, saved)
    return answer | {"n_saved": saved.position, "n_written": written}
