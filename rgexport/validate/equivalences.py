"""An artifact against itself: the same tokens taken in another way give the same."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np

from rgexport.griffin.state import POSITION, State
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
    "start": "position 0 ignores states of earlier tokens",
    "long": "one long call gives what shorter ones give",
    "batch": "two texts in one batch give what each gives alone",
    "portable": "without native kernels, the same graph gives the same",
}
"""Name of an equivalence → what should hold."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Tokens taken in two ways: the errors of their logits and, if known, of the states after.

    Where several texts were taken, `states` has those of each.
    """

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
    restored = compared([(chunk, Chunk(logits, session.get_state()))], len(tokens))
    if session.info.whole_chunks:
        tokens = np.resize(tokens, taken_again(session.info))
        session.set_state(before)
        chunk = _whole_chunk(session, tokens, most_logits)
    found = {}
    for name, sizes in (
        ("steps", [1] * len(tokens)),
        ("ragged", list(_ragged(len(tokens), session.info))),
    ):
        (other,) = in_pieces(session, tokens[None], before, sizes, len(chunk.logits))
        found[name] = compared([(chunk, other)], len(tokens))
    return found | {"restored": restored}


def from_start(
    session: Session, tokens: np.ndarray, logits: np.ndarray, used: State
) -> dict[str, Equivalence]:
    """Takes the first tokens [n] of the text again, which gave `logits` [n, V], in two ways.

    reset: after a reset; start: at position 0, from the states `used` of a longer text. The
    convolution has no positions: its state must be zeros.
    """
    session.reset()
    fresh = _recurrent(session, tokens)
    session.set_state(used | zeros_of(used, (POSITION, ".conv1d")))
    started = _recurrent(session, tokens)
    return {
        "reset": compared([(Chunk(logits, {}), fresh)], len(tokens)),
        "start": compared([(Chunk(logits, fresh.state), started)], len(tokens)),
    }


def _recurrent(session: Session, tokens: np.ndarray) -> Chunk:
    """Takes tokens [n]; keeps the states that have no place for earlier tokens."""
    logits = session.prefill(tokens[None], num_logits=len(tokens))[0]
    state = session.get_state().items()
    return Chunk(logits, {n: a for n, a in state if not n.endswith((".key", ".value"))})


def in_batch(session: Session, text: np.ndarray, used: State) -> list[tuple[Chunk, Chunk]]:
    """Takes the last tokens of a text [T] and its first ones, alone and in one batch.

    The last ones start from the state `used`, so that the rows have different positions.

    Returns:
        For each row, what it gave alone and in the batch.
    """
    count = min(STEPS, len(text))
    tokens, states = np.stack([text[-count:], text[:count]]), [used, zeros_of(used)]
    sizes = chunk_and_steps(count)
    alone = [
        in_pieces(session, row[None], state, sizes, count)[0]
        for row, state in zip(tokens, states, strict=True)
    ]
    before = {name: np.concatenate([state[name] for state in states]) for name in used}
    return list(zip(alone, in_pieces(session, tokens, before, sizes, count), strict=True))


def chunk_and_steps(count: int) -> list[int]:
    """Sizes whose sum is `count`: one chunk, and three single tokens."""
    return [*([count - 3] if count > 3 else []), *[1] * min(count, 3)]


def zeros_of(state: State, ends: tuple[str, ...] = ("",)) -> State:
    """Zeros in place of the tensors whose names have one of these ends, by default of all."""
    return {name: np.zeros_like(array) for name, array in state.items() if name.endswith(ends)}


def compared(pairs: Sequence[tuple[Chunk, Chunk]], tokens: int) -> Equivalence:
    """Compares what tokens gave in one way with what they gave in another.

    Of each pair, the last logits that both have count, and the first one's states.
    """
    rows = []
    for expected, other in pairs:
        count = min(len(expected.logits), len(other.logits))
        ours, theirs = (chunk.logits[-count:] for chunk in (expected, other))
        rows.append(metrics.compare_logits(ours, theirs, np.full(count, -1)))
    return Equivalence(
        tokens=tokens,
        logits=metrics.logit_error(np.concatenate(rows)),
        states=[e for one, other in pairs for e in state_errors(one.state, other.state)],
    )


def in_pieces(
    session: Session, tokens: np.ndarray, before: State, sizes: list[int], keep: int
) -> list[Chunk]:
    """Takes tokens [R, T] in chunks of these sizes; keeps each row's last logits, without gaps."""
    session.set_state(before)
    last: deque[np.ndarray] = deque(maxlen=keep)
    start = 0
    for size in sizes:
        part = tokens[:, start : start + size]
        every = session.info.chunk_logits or size < session.info.prefill_chunk
        wanted = min(size, keep) if every else 1
        if wanted < size:
            last.clear()
        if size == 1:
            last.append(session.step(part[:, 0]))
        else:
            last.extend(session.prefill(part, wanted).swapaxes(0, 1))
        start += size
    logits, state = np.stack(last, 1), session.get_state()
    return [
        Chunk(logits[row], {name: array[row : row + 1] for name, array in state.items()})
        for row in range(len(tokens))
    ]


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
