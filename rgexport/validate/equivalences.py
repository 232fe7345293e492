"""An artifact against itself: the same tokens taken in another way give the same."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import State
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate import metrics
from rgexport.validate.states import StateError, state_errors

STEPS = 8
"""The last tokens are taken again in other ways; so many, and a chunk more where it has a fixed
length."""
_RAGGED = 3, 1, 2


SAME = {
    "steps": "one by one as in a chunk",
    "ragged": "in chunks of any lengths as in one",
    "restored": "a saved state continues as the conversation did",
    "reset": "a reset leaves nothing behind",
}
"""An equivalence → what it says."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """So many tokens taken in two ways: their logits, and the states behind them if known."""

    tokens: int
    logits: metrics.LogitError
    states: list[StateError]


@dataclass(frozen=True)
class Chunk:
    """The logits of the last tokens of a chunk, [n, vocab], and the state behind it."""

    logits: np.ndarray
    state: State


def taken_again(info: SessionInfo) -> int:
    """How many of the last tokens are taken again."""
    return STEPS + (info.prefill_chunk if info.whole_chunks else 0)


def equivalences(
    session: Session, tokens: np.ndarray, before: State, chunk: Chunk, most_logits: int
) -> dict[str, Equivalence]:
    """Goes back to the state `before` and takes the tokens [T] of `chunk` again, in three ways.

    steps: one by one; ragged: in chunks of unequal lengths; restored: as before, from the state
    that was saved.

    Where only whole chunks are chunks, the first one may not have been one: it is then taken
    again, and a text that is too short for one is repeated.

    Args:
        session: the artifact's, anywhere.
        tokens: the last ones of the text, `taken_again` of them or the whole text.
        before: the state before them.
        chunk: what they gave as one chunk, or as several where that is too long for one.
        most_logits: rows of logits that there may be at once.
    """
    restored = _against(chunk, _again(session, tokens, before, len(chunk.logits)), len(tokens))
    if session.info.whole_chunks:
        tokens = np.resize(tokens, taken_again(session.info))
        session.set_state(before)
        chunk = _whole_chunk(session, tokens, most_logits)
    found = {}
    for name, sizes in (
        ("steps", [1] * len(tokens)),
        ("ragged", list(_ragged(len(tokens), session.info))),
    ):
        session.set_state(before)
        other = _pieces(session, tokens, sizes, len(chunk.logits))
        found[name] = _against(chunk, other, len(tokens))
    return found | {"restored": restored}


def after_reset(session: Session, tokens: np.ndarray, logits: np.ndarray) -> Equivalence:
    """Forgets everything and takes the first tokens [n] of the text, whose logits [n, V] were so.

    A session that forgets not all would go on from where it was.
    """
    session.reset()
    again = session.prefill(tokens[None], num_logits=len(tokens))[0]
    rows = metrics.compare_logits(logits, again, np.full(len(logits), -1))
    return Equivalence(tokens=len(tokens), logits=metrics.logit_error(rows), states=[])


def _against(chunk: Chunk, other: Chunk, tokens: int) -> Equivalence:
    count = min(len(chunk.logits), len(other.logits))
    rows = metrics.compare_logits(chunk.logits[-count:], other.logits[-count:], np.full(count, -1))
    return Equivalence(
        tokens=tokens,
        logits=metrics.logit_error(rows),
        states=state_errors(chunk.state, other.state),
    )


def _again(session: Session, tokens: np.ndarray, before: State, num_logits: int) -> Chunk:
    session.set_state(before)
    logits = session.prefill(tokens[None], num_logits=num_logits)[0]
    return Chunk(logits, session.get_state())


def _pieces(session: Session, tokens: np.ndarray, sizes: list[int], keep: int) -> Chunk:
    """Takes the tokens in chunks of these sizes; of their logits, the last that are unbroken."""
    last: deque[np.ndarray] = deque(maxlen=keep)
    start = 0
    for size in sizes:
        part = tokens[None, start : start + size]
        wanted = size if session.info.chunk_logits or size < session.info.prefill_chunk else 1
        if wanted < size:
            last.clear()
        last.extend(session.step(part[:, 0]) if size == 1 else session.prefill(part, wanted)[0])
        start += size
    return Chunk(np.stack(last), session.get_state())


def _ragged(count: int, info: SessionInfo) -> Iterator[int]:
    """Sizes whose sum is `count`; of whole chunks one that does not begin at a chunk's place."""
    left = count
    if info.whole_chunks:
        yield from (_RAGGED[0], info.prefill_chunk)
        left -= _RAGGED[0] + info.prefill_chunk
    turn = 0
    while left > 0:
        size = min(left, _RAGGED[turn % len(_RAGGED)])
        yield size
        left -= size
        turn += 1


def _whole_chunk(session: Session, tokens: np.ndarray, most_logits: int) -> Chunk:
    """Takes a chunk with as many logits as it gives, and the tokens behind it."""
    known = min(session.info.prefill_chunk, most_logits)
    count = known if session.info.chunk_logits else 1
    logits = [
        session.prefill(part[None], num_logits=wanted)[0]
        for part, wanted in ((tokens[:-STEPS], count), (tokens[-STEPS:], STEPS))
    ]
    return Chunk(np.concatenate(logits), session.get_state())
