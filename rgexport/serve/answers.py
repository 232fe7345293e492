"""Replies of a model as the JSON objects of OpenAI's answers."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rgexport.chat.reply import ModelReply, ScoredToken, TextPiece
from rgexport.chat.tokenizer import Tokenizer

_FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}
"""Why a reply ended → OpenAI's `finish_reason`."""


def _random_id() -> str:
    return uuid.uuid4().hex


def _now() -> int:
    """Returns the Unix time in seconds."""
    return int(time.time())


@dataclass
class OpenAIAnswer:
    """The answer to one request, as a whole or as events.

    Attributes:
        model: name of the model.
        chat: whether the request was one for a chat, not for a completion.
        logprobs: whether log probabilities of the tokens are reported.
        n: number of replies to each prompt.
        created: Unix time in seconds.
    """

    model: str
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool
    n: int = 1
    id: str = field(default_factory=_random_id)
    created: int = field(default_factory=_now)

    def whole(
        self, replies: Sequence[ModelReply], tokens: Sequence[Sequence[ScoredToken]]
    ) -> dict[str, Any]:
        """Returns the answer with all replies; `tokens` has those of each reply."""
        choices = []
        for index, (reply, reply_tokens) in enumerate(zip(replies, tokens, strict=True)):
            choices.append(self._choice(index, reply, reply_tokens))
        answer = self._header("chat.completion")
        answer["choices"] = choices
        answer["usage"] = usage(replies, self.n)
        answer["timings"] = timings(replies[0])
        return answer

    def opening(self, index: int, before: str = "") -> dict[str, Any] | None:
        """Returns the first event of a reply; None if it would say nothing.

        `before` is the text of the prompt that a completion repeats.
        """
        if self.chat:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        if before:
            return self._chunk(index, {"text": before})
        return None

    def piece(self, index: int, piece: TextPiece) -> dict[str, Any]:
        """Returns the event of a piece of a reply."""
        logprobs = self._logprobs(piece.tokens)
        if self.chat:
            return self._chunk(index, {"delta": {"content": piece.text}, "logprobs": logprobs})
        return self._chunk(index, {"text": piece.text, "logprobs": logprobs})

    def closing(self, index: int, reply: ModelReply) -> dict[str, Any]:
        """Returns the last event of a reply."""
        no_text: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        event = self._chunk(index, no_text, _FINISH_REASONS[reply.reason])
        event["timings"] = timings(reply)
        return event

    def costs(self, replies: Sequence[ModelReply]) -> dict[str, Any]:
        """Returns the event with the usage of all replies."""
        event = self._header("chat.completion.chunk")
        event["choices"] = []
        event["usage"] = usage(replies, self.n)
        return event

    def _choice(
        self, index: int, reply: ModelReply, tokens: Sequence[ScoredToken]
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": reply.text}
        else:
            choice["text"] = reply.text
        choice["logprobs"] = self._logprobs(tokens)
        choice["finish_reason"] = _FINISH_REASONS[reply.reason]
        return choice

    def _chunk(
        self, index: int, content: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        """Returns an event with the fields `content`, which may replace `logprobs`."""
        choice = {"index": index, "logprobs": None, **content, "finish_reason": reason}
        event = self._header("chat.completion.chunk")
        event["choices"] = [choice]
        return event

    def _header(self, chat_object: str) -> dict[str, Any]:
        """Returns the fields that every object begins with."""
        if self.chat:
            prefix = "chatcmpl"
            object_name = chat_object
        else:
            prefix = "cmpl"
            object_name = "text_completion"
        return {
            "id": f"{prefix}-{self.id}",
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return self._chat_logprobs(tokens)
        return self._completion_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Returns an object for each token."""
        content = []
        for token in tokens:
            entry = self._chat_logprob(token.id, token.logprob)
            entry["top_logprobs"] = [
                self._chat_logprob(token_id, logprob) for token_id, logprob in token.top
            ]
            content.append(entry)
        return {"content": content}

    def _chat_logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "id": token_id,
            "token": self._text(token_id),
            "logprob": logprob,
            "bytes": list(self.tokenizer.surface(token_id)),
        }

    def _completion_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Returns a list for each field."""
        top_logprobs: list[dict[str, float] | None] = []
        for token in tokens:
            if token.logprob is None:
                # Nothing predicts a prompt's first token; OpenAI answers null for it.
                top_logprobs.append(None)
            else:
                top = {self._text(token_id): logprob for token_id, logprob in token.top}
                top_logprobs.append(top)
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top_logprobs,
        }

    def _text(self, token_id: int) -> str:
        return self.tokenizer.surface(token_id).decode("utf-8", "replace")


def usage(replies: Sequence[ModelReply], n: int = 1) -> dict[str, Any]:
    """Returns OpenAI's usage of `n` replies to each prompt, which counts once, not `n` times."""
    prompt_tokens = 0
    cached_tokens = 0
    for start in range(0, len(replies), n):
        same_prompt = replies[start : start + n]
        prompt_tokens += same_prompt[0].prompt_tokens
        # The reply that read the prompt has the fewest; the others found the prompt's state.
        cached_tokens += min(reply.cached_tokens for reply in same_prompt)
    new_tokens = sum(reply.new_tokens for reply in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def timings(reply: ModelReply) -> dict[str, Any]:
    """Returns llama-server's timings of a reply, in milliseconds and tokens per second."""
    return {
        "cache_n": reply.cached_tokens,
        "prompt_n": reply.prompt_tokens - reply.cached_tokens,
        "prompt_ms": 1e3 * reply.read_seconds,
        "prompt_per_second": reply.read_rate,
        "predicted_n": reply.new_tokens,
        "predicted_ms": 1e3 * reply.write_seconds,
        "predicted_per_second": reply.write_rate,
    }
