"""OpenAI's answers, whole or in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgexport.chat.reply import ModelReply, ScoredToken, TextPiece
from rgexport.chat.tokenizer import Tokenizer

_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


@dataclass
class OpenAIAnswer:
    """An answer of `/v1/chat/completions` or `/v1/completions`, with `n` replies to each prompt."""

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
        last = self._chunk(index, empty, _REASONS[reply.reason])
        return last | {"timings": timings(reply)}

    def costs(self, replies: Sequence[ModelReply]) -> dict[str, Any]:
        return self._object("chat.completion.chunk") | {
            "choices": [],
            "usage": usage(replies, self.n),
        }

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
        return self._chat_logprobs(tokens) if self.chat else self._completion_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._named(token.id, token.logprob)
            | {"top_logprobs": [self._named(i, logprob) for i, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content}

    def _completion_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        # Nothing predicts a prompt's first token; OpenAI answers null for it.
        tops = [
            None if token.logprob is None else {self._text(i): logprob for i, logprob in token.top}
            for token in tokens
        ]
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
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
    """Returns OpenAI's usage of `n` replies to each prompt: a prompt counts once, not `n` times."""
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
