"""How a model goes on after texts: greedily, up to a stop."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.harness.prefixes import Reader, Text
from rgexport.griffin.control_tokens import END_OF_TURN, START_OF_TURN
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_MOST_TOKENS = 256
"""Of a reply, unless the settings say how many."""
_LIMITS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_LIMITS}
"""Settings that are understood; some of them change nothing where the likeliest token is taken."""


class Reply:
    """What a model writes, up to the end of a turn, a stop, or the most tokens."""

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        """`settings` are those of `generate_until`.

        Raises:
            RequestError: they ask for anything but the likeliest tokens.
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
        given = (settings[name] for name in _LIMITS if settings.get(name) is not None)
        self._most = int(next(given, _MOST_TOKENS))
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
        """What was written before the first stop, as HFLM decodes it: without special tokens."""
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

    @cached_property
    def _stop_bytes(self) -> list[bytes]:
        return [stop.encode() for stop in self._stops]


class Generations(Reader):
    """Reads texts, and writes the reply to each; several replies are written at once."""

    def __init__(
        self, session: Session, contexts: Sequence[tuple[int, ...]], replies: Sequence[Reply]
    ):
        """There is a reply for each context; contexts may be there several times."""
        self._replies = defaultdict(list)
        for ids, reply in zip(contexts, replies, strict=True):
            self._replies[ids].append(reply)
        super().__init__(session, [Text(ids, 1) for ids in self._replies])
        self._last: dict[int, np.ndarray] = {}
        self._waiting: list[tuple[Reply, np.ndarray, State]] = []

    def run(self) -> None:
        """Reads all texts and writes all replies.

        Raises:
            RequestError: the model gives NaN or infinite logits.
        """
        super().run()
        self._write(self._waiting)

    def heard(self, place: int, logits: np.ndarray) -> None:
        """Keeps the logits after the last token."""
        self._last[place] = logits[-1]

    def ended(self, places: Sequence[int]) -> None:
        """Lets the replies to texts wait until there are enough for a batch."""
        for row, place in enumerate(places):
            state, logits = self.session.get_rows(range(row, row + 1)), self._last.pop(place)
            for reply in self._replies[self.texts[place].ids]:
                if not reply.done:
                    self._waiting.append((reply, logits, state))
        while len(self._waiting) >= self.rows:
            batch, self._waiting = self._waiting[: self.rows], self._waiting[self.rows :]
            self._write(batch)

    def _write(self, batch: Sequence[tuple[Reply, np.ndarray, State]]) -> None:
        """Writes some replies to their ends."""
        if not batch:
            return
        replies, rows, states = zip(*batch, strict=True)
        logits = np.stack(rows)
        self.session.set_state({n: _stacked([s[n] for s in states]) for n in states[0]})
        while True:
            for reply, token in zip(replies, _likeliest(logits), strict=True):
                reply.add(token)
            going = [row for row, reply in enumerate(replies) if not reply.done]
            if not going:
                return
            if len(going) < len(replies):
                replies = [replies[row] for row in going]
                state = self.session.get_state()
                self.session.set_state({name: array[going] for name, array in state.items()})
            logits = self.session.step(np.array([reply.last for reply in replies]))


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [1, …] as one; llama.cpp's own states differ in length, and zeros follow them."""
    longest = max(row.shape[1:] for row in rows)
    padded = [
        row if row.shape[1:] == longest else np.pad(row, ((0, 0), (0, longest[0] - row.shape[1])))
        for row in rows
    ]
    return np.concatenate(padded)


def _likeliest(logits: np.ndarray) -> list[int]:
    """The likeliest token of each row [R, vocab]."""
    if not np.isfinite(logits.max(-1)).all():
        raise RequestError(
            "the model's logits are NaN or infinite; check the artifact with `rgexport validate`"
        )
    found: list[int] = logits.argmax(-1).tolist()
    return found
