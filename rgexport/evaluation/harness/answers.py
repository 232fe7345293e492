"""Answers the three kinds of requests of lm_eval with a session.

The tokens that are read and scored are those of lm_eval's own `HFLM`, except that no text is cut:
the state has the same size after any number of tokens.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.evaluation.harness.prefixes import Ids, PrefixReader, ScoredText, score
from rgexport.evaluation.losses import require_finite
from rgexport.evaluation.pieces import Result
from rgexport.griffin.control_tokens import END_OF_TURN, START_OF_TURN
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_ROLLING, _GENERATION = "loglikelihood_rolling", "generate_until"
_MOST_TOKENS = 256  # most tokens of a reply, unless its settings say otherwise
_LIMITS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_LIMITS}
"""Known settings; those of sampling change nothing, as the most likely token is chosen."""


@dataclass(frozen=True)
class LmRequest:
    """A request of lm_eval: its kind, and its arguments as JSON.

    `loglikelihood` of a context and a continuation is answered by it and whether the latter is the
    likeliest, `loglikelihood_rolling` of a text by it, `generate_until` of a context and settings
    by a text.
    """

    kind: str
    arguments: str

    @classmethod
    def of(cls, kind: str, *arguments: Any) -> "LmRequest":
        return cls(kind, json.dumps(arguments))

    @cached_property
    def values(self) -> list[Any]:
        values: list[Any] = json.loads(self.arguments)
        return values


def sha256_of(requests: Sequence[LmRequest]) -> str:
    text = json.dumps([[request.kind, request.arguments] for request in requests])
    return hashlib.sha256(text.encode()).hexdigest()


def answer(tokenizer: Tokenizer, session: Session, requests: Sequence[LmRequest]) -> Result:
    """Returns the answers in the order of requests, and the tokens: read ones, and all."""
    generated = [request for request in requests if request.kind == _GENERATION]
    judged = [request for request in requests if request.kind != _GENERATION]
    scored = [_scored_text(tokenizer, request) for request in judged]
    contexts = [
        tuple(_encoded(tokenizer, request.values[0]) or [_first(tokenizer)])
        for request in generated
    ]
    replies = [GreedyReply(tokenizer, request.values[1]) for request in generated]
    nats, likeliest, read = score(session, scored)
    read += write_replies(session, contexts, replies)
    answers: dict[LmRequest, Any] = {
        request: reply.text for request, reply in zip(generated, replies, strict=True)
    }
    for request, loss, is_likeliest in zip(judged, nats.tolist(), likeliest.tolist(), strict=True):
        answers[request] = -loss if request.kind == _ROLLING else [-loss, is_likeliest]
    return {
        "answers": [answers[request] for request in requests],
        "read": read,
        "asked": sum(len(text.ids) for text in scored) + sum(map(len, contexts)),
    }


def _scored_text(tokenizer: Tokenizer, request: LmRequest) -> ScoredText:
    if request.kind == _ROLLING:
        # Like HFLM, the text's own bos is a target, too.
        before, after = [_first(tokenizer)], _encoded(tokenizer, request.values[0])
    else:
        before, after = _pair(tokenizer, *request.values)
    if not after:
        raise RequestError(
            f"a task asks how likely an empty text is, after {request.values[0][-40:]!r}; correct "
            "its documents, or choose another --task"
        )
    return ScoredText((*before, *after[:-1]), tuple(after))


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes both; spaces at the end of the context become part of the continuation."""
    text, context = context + continuation, context.rstrip()
    if context:
        before = _encoded(tokenizer, context)
        return before, _encoded(tokenizer, text)[len(before) :]
    first, after = _first(tokenizer), _plain(tokenizer, text)
    return ([first], after) if after[:1] != [first] else (after[:1], after[1:])


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns one bos and the ids of a text; literals of special tokens become their ids."""
    bos, ids = tokenizer.bos_id, _plain(tokenizer, text)
    literal = tokenizer.literal(bos)
    return ids if bos is None or (literal and text.startswith(literal)) else [bos, *ids]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_markup(text.encode(errors="replace").decode())


def _first(tokenizer: Tokenizer) -> int:
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return token
    raise RequestError("the tokenizer has neither a bos nor an eos, which the suite tasks needs")


class GreedyReply:
    """The ids that a model writes, up to the end of a turn, a stop, or the most tokens."""

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        """Takes the settings of lm_eval's `generate_until`; refuses unknown and random ones."""
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
        self._literals = {token: text.encode() for text, token in tokenizer.special.items()}
        self._tokenizer, self.ids, self._written = tokenizer, list[int](), b""
        self.done = self._most <= 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        new = self._literals.get(token) or self._tokenizer.surface(token)
        self._written += new
        tail = self._written[-len(new) - max(map(len, self._stop_bytes), default=0) :]
        self.done = (
            len(self.ids) >= self._most
            or token in self._tokenizer.stop_ids
            or any(stop in tail for stop in self._stop_bytes)
        )

    @property
    def text(self) -> str:
        """The text before the first stop, decoded as by lm_eval's HFLM: without special tokens."""
        special, unknown = self._tokenizer.special, self._tokenizer.unknown_id
        hidden = {unknown, special.get(START_OF_TURN), special.get(END_OF_TURN)}
        text = self._tokenizer.decode(token for token in self.ids if token not in hidden)
        for stop in self._stops:
            text = text.split(stop)[0]
        return text


_Waiting = tuple[GreedyReply, np.ndarray, State]
"""A reply to write, the logits [vocab] of its first token, and the state before it."""


def write_replies(session: Session, contexts: Sequence[Ids], replies: Sequence[GreedyReply]) -> int:
    """Reads texts, equal ones once, and writes a reply to each; writes a batch of them at once.

    Returns the number of tokens that were read.
    """
    by_ids = defaultdict(list)
    for ids, reply in zip(contexts, replies, strict=True):
        by_ids[ids].append(reply)
    reader = PrefixReader(session, dict.fromkeys(by_ids, 1))
    waiting: list[_Waiting] = []
    for part in reader.parts():
        state = session.get_rows(range(part.row, part.row + 1))
        waiting += [(reply, part.logits[-1], state) for reply in by_ids[part.ids] if not reply.done]
        while len(waiting) >= reader.rows:
            batch, waiting = waiting[: reader.rows], waiting[reader.rows :]
            reading = session.get_state()
            _write(session, batch)
            session.set_state(reading)
    if waiting:
        _write(session, waiting)
    return reader.read


def _write(session: Session, batch: Sequence[_Waiting]) -> None:
    replies, rows, states = map(list, zip(*batch, strict=True))
    logits = np.stack(rows)
    session.set_state({n: np.concatenate([s[n] for s in states]) for n in states[0]})
    while True:
        require_finite(logits.max(-1))
        for reply, token in zip(replies, logits.argmax(-1).tolist(), strict=True):
            reply.add(token)
        unfinished = [row for row, reply in enumerate(replies) if not reply.done]
        if not unfinished:
            return
        if len(unfinished) < len(replies):
            replies = [replies[row] for row in unfinished]
            state = session.get_state()
            session.set_state({name: array[unfinished] for name, array in state.items()})
        logits = session.step(np.array([reply.ids[-1] for reply in replies]))
