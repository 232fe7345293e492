"""Greedy continuations of texts, up to a stop."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.harness.prefixes import PrefixReader, TokenText
from rgexport.evaluate.losses import require_finite
from rgexport.griffin.control_tokens import END_OF_TURN, START_OF_TURN
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_MOST_TOKENS = 256
"""Most tokens of a reply, unless its settings say otherwise."""
_LIMITS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_LIMITS}
"""Known settings; those of sampling change nothing, as the most likely token is chosen."""


class GreedyReply:
    """The tokens that a model writes, up to the end of a turn, a stop, or the most tokens."""

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        """Takes the settings of lm_eval's `generate_until`.

        Raises:
            RequestError: a setting is unknown, or asks for random tokens.
        """
        if unknown := sorted({*settings} - _KNOWN):
            raise RequestError(
                f"the task sets {unknown[0]} for its answers; expected {', '.join(sorted(_KNOWN))}"
            )
        if settings.get("do_sample") is not False and float(settings.get("temperature") or 0) > 0:
            raise RequestError(
                "the task draws its answers at random (temperature "
                f"{settings['temperature']}); expected the likeliest tokens: choose another --task"
            )
        until = settings.get("until") or []
        self._stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        self._stop_bytes = [stop.encode() for stop in self._stops]
        limits = (settings[name] for name in _LIMITS if settings.get(name) is not None)
        self._most = int(next(limits, _MOST_TOKENS))
        self._tokenizer, self._ids, self._written = tokenizer, list[int](), b""
        self.done = self._most <= 0

    def add(self, token: int) -> None:
        """Takes the next token."""
        self._ids.append(token)
        new = self._literals.get(token) or self._tokenizer.surface(token)
        self._written += new
        tail = self._written[-len(new) - max(map(len, self._stop_bytes), default=0) :]
        self.done = (
            len(self._ids) >= self._most
            or token in self._tokenizer.stop_ids
            or any(stop in tail for stop in self._stop_bytes)
        )

    @property
    def text(self) -> str:
        """The text before the first stop, decoded as by lm_eval's HFLM: without special tokens."""
        special, unknown = self._tokenizer.special, self._tokenizer.unknown_id
        hidden = {unknown, special.get(START_OF_TURN), special.get(END_OF_TURN)}
        text = self._tokenizer.decode(token for token in self._ids if token not in hidden)
        for stop in self._stops:
            text = text.split(stop)[0]
        return text

    @property
    def last(self) -> int:
        """The last token."""
        return self._ids[-1]

    @cached_property
    def _literals(self) -> dict[int, bytes]:
        return {token: literal.encode() for literal, token in self._tokenizer.special.items()}


class Generations(PrefixReader):
    """Reads texts and writes a reply to each; several replies are written at once."""

    def __init__(
        self, session: Session, contexts: Sequence[tuple[int, ...]], replies: Sequence[GreedyReply]
    ):
        """Pairs each context with its reply; equal contexts are read once."""
        self._replies = defaultdict(list)
        for ids, reply in zip(contexts, replies, strict=True):
            self._replies[ids].append(reply)
        super().__init__(session, [TokenText(ids, 1) for ids in self._replies])
        self._last: dict[int, np.ndarray] = {}
        self._waiting: list[tuple[GreedyReply, np.ndarray, State]] = []

    def run(self) -> None:
        """Reads all texts and writes all replies.

        Raises:
            RequestError: the model gives NaN or infinite logits.
        """
        super().run()
        self._write(self._waiting)

    def on_logits(self, index: int, logits: np.ndarray) -> None:
        """Keeps the logits after the last token."""
        self._last[index] = logits[-1]

    def on_end(self, indices: Sequence[int]) -> None:
        """Collects replies until they fill a batch, then writes them."""
        for row, index in enumerate(indices):
            state, logits = self.session.get_rows(range(row, row + 1)), self._last.pop(index)
            for reply in self._replies[self.texts[index].ids]:
                if not reply.done:
                    self._waiting.append((reply, logits, state))
        while len(self._waiting) >= self.rows:
            batch, self._waiting = self._waiting[: self.rows], self._waiting[self.rows :]
            self._write(batch)

    def _write(self, batch: Sequence[tuple[GreedyReply, np.ndarray, State]]) -> None:
        """Writes the replies of a batch to their ends."""
        if not batch:
            return
        replies, rows, states = zip(*batch, strict=True)
        logits = np.stack(rows)
        self.session.set_state({n: np.concatenate([s[n] for s in states]) for n in states[0]})
        while True:
            require_finite(logits.max(-1))
            for reply, token in zip(replies, logits.argmax(-1).tolist(), strict=True):
                reply.add(token)
            unfinished = [row for row, reply in enumerate(replies) if not reply.done]
            if not unfinished:
                return
            if len(unfinished) < len(replies):
                replies = [replies[row] for row in unfinished]
                state = self.session.get_state()
                self.session.set_state({name: array[unfinished] for name, array in state.items()})
            logits = self.session.step(np.array([reply.last for reply in replies]))
