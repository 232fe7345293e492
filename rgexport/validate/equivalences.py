"""An artifact against itself: the same tokens taken in another way give the same."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np

from rgexport.griffin.state import State
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate import metrics
from rgexport.validate.states import StateError, state_errors

STEPS = 8
"""The last tokens that are taken again; and a chunk more where its length is fixed."""
_RAGGED = 3, 1, 2
"""Lengths of chunks, over and over."""

SAME = {
    "steps": "single tokens give what a chunk gives",
    "ragged": "chunks of any lengths give what one chunk gives",
    "restored": "a saved state continues as the original one",
    "reset": "a reset forgets everything",
}
"""Name of an equivalence → what should hold."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Tokens taken in two ways: the errors of their logits and, if known, of the states after."""

    tokens: int
    logits: metrics.LogitError
    states: list[StateError]


@dataclass(frozen=True)
class Chunk:
    """The logits of the last tokens of a chunk, [n, vocab], and the state after it."""

    logits: np.ndarray
    state: State


def taken_again(info: SessionInfo) -> int:
    """How many of the last tokens are taken again."""
    return STEPS + (info.prefill_chunk if info.whole_chunks else 0)


def equivalences(
    session: Session, tokens: np.ndarray, before: State, chunk: Chunk, most_logits: int
) -> dict[str, Equivalence]:
    """Goes back to the state `before` and takes the tokens [T] of `chunk` again, in three ways.

    steps: one by one; ragged: in chunks of unequal lengths; restored: as before, from the saved
    state.

    Where chunks have a fixed length, the text may have been taken in steps: a whole chunk is then
    taken first, and a text that is too short for one is repeated.

    Args:
        session: the artifact's, in any state.
        tokens: the last ones of the text, `taken_again` of them or the whole text.
        before: the state before them.
        chunk: what they gave as one chunk, or as several where that is too long for one.
        most_logits: rows of logits that may exist at once.
    """
    session.set_state(before)
    logits = session.prefill(tokens[None], num_logits=len(chunk.logits))[0]
    restored = _against(chunk, Chunk(logits, session.get_state()), len(tokens))
    if session.info.whole_chunks:
        tokens = np.resize(tokens, taken_again(session.info))
        session.set_state(before)
        chunk = _whole_chunk(session, tokens, most_logits)
    found = {}
    for name, sizes in (
        ("steps", [1] * len(tokens)),
        ("ragged", list(_ragged(len(tokens), session.info))),
    ):
        other = _pieces(session, tokens, before, sizes, len(chunk.logits))
        found[name] = _against(chunk, other, len(tokens))
    return found | {"restored": restored}


def after_reset(session: Session, tokens: np.ndarray, logits: np.ndarray) -> Equivalence:
    """Resets and takes the first tokens [n] of the text again, which gave `logits` [n, V]."""
    session.reset()
    again = session.prefill(tokens[None], num_logits=len(tokens))[0]
    return _against(Chunk(logits, {}), Chunk(again, {}), len(tokens))


def _against(chunk: Chunk, other: Chunk, tokens: int) -> Equivalence:
    count = min(len(chunk.logits), len(other.logits))
    rows = metrics.compare_logits(chunk.logits[-count:], other.logits[-count:], np.full(count, -1))
    return Equivalence(
        tokens=tokens,
        logits=metrics.logit_error(rows),
        states=state_errors(chunk.state, other.state),
    )


def _pieces(
    session: Session, tokens: np.ndarray, before: State, sizes: list[int], keep: int
) -> Chunk:
    """Takes the tokens in chunks of these sizes; keeps the last logits, without gaps."""
    session.set_state(before)
    last: deque[np.ndarray] = deque(maxlen=keep)
    start = 0
    for size in sizes:
        part = tokens[None, start : start + size]
        every = session.info.chunk_logits or size < session.info.prefill_chunk
        wanted = min(size, keep) if every else 1
        if wanted < size:
            last.clear()
        last.extend(session.step(part[:, 0]) if size == 1 else session.prefill(part, wanted)[0])
        start += size
    return Chunk(np.stack(last), session.get_state())


def _ragged(count: int, info: SessionInfo) -> Iterator[int]:
    """Sizes whose sum is `count`; of fixed chunks one, which does not begin where the text's do."""
    first = (_RAGGED[0], info.prefill_chunk) if info.whole_chunks else ()
    sizes = chain(first, cycle(_RAGGED))
    while count > 0:
        size = min(count, next(sizes))
        yield size
        count -= size


def _whole_chunk(session: Session, tokens: np.ndarray, most_logits: int) -> Chunk:
    """Takes a chunk with as many logits as it gives, and the tokens after it with all of theirs."""
    known = min(session.info.prefill_chunk, most_logits)
    count = known if session.info.chunk_logits else 1
    logits = [
        session.prefill(part[None], num_logits=wanted)[0]
        for part, wanted in ((tokens[:-STEPS], count), (tokens[-STEPS:], STEPS))
    ]
    return Chunk(np.concatenate(logits), session.get_state())
