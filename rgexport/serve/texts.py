"""Answers of `/tokenize`, `/detokenize` and `/apply-template`."""

import json
from typing import Any

from rgexport.chat.prompts import Prompts
from rgexport.chat.template import Message
from rgexport.errors import RequestError


def tokens(prompts: Prompts, text: str, add_special: bool) -> bytes:
    """Returns the tokens of a text; with `add_special`, as a completion reads it.

    Raises:
        RequestError: there are more than the server takes.
    """
    ids = prompts.text_ids(text) if add_special else prompts.encode(text)
    _require_few(prompts, ids)
    return _json({"tokens": ids})


def text(prompts: Prompts, ids: list[int]) -> bytes:
    """Returns the text of tokens.

    Raises:
        RequestError: there are more than the server takes.
    """
    _require_few(prompts, ids)
    return _json({"content": prompts.tokenizer.decode(ids)})


def template(prompts: Prompts, messages: list[Message]) -> bytes:
    """Returns what a chat with these messages reads, as a text and as tokens.

    Raises:
        RequestError: there are more tokens than the server takes, or the template refuses them.
    """
    ids = prompts.conversation_prompt(messages).ids
    _require_few(prompts, ids)
    special = {token: literal for literal, token in prompts.tokenizer.special.items()}
    pieces = [special.get(i) or prompts.tokenizer.surface(i) for i in ids]
    data = b"".join(p.encode() if isinstance(p, str) else p for p in pieces)
    return _json({"prompt": data.decode("utf-8", "replace"), "tokens": ids})


def _require_few(prompts: Prompts, ids: list[int]) -> None:
    most = prompts.most_tokens
    if most is not None and len(ids) > most:
        raise RequestError(f"there are {len(ids)} tokens; this server takes up to {most}")


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
