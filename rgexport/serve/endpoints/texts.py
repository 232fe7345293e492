"""`/tokenize`, `/detokenize` and `/apply-template`."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response

from rgexport.chat.prompts import PromptEncoder
from rgexport.chat.template import Message
from rgexport.errors import RequestError
from rgexport.serve.endpoints.completions import messages_of
from rgexport.serve.requests import DetokenizeRequest, TemplateRequest, TokenizeRequest
from rgexport.serve.server import server_of


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
