"""An artifact against itself: the same tokens taken in another way give the same.

Other runtimes take a prompt in one call, and run the bodies of the functions that our kernels
replace, so both are compared, too.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate import metrics
from rgexport.validate.metrics import StateError, checkpoints, recent, state_errors
from rgexport.validate.reference_pass import Pass

STEPS = 8
"""The last tokens that are taken again; and a chunk more where its length is fixed."""
_RAGGED = 3, 1, 2  # lengths of chunks, over and over

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
    """Errors between two ways of taking tokens; `states` are after each text, if known."""

    tokens: int
    logits: metrics.LogitError
    states: list[StateError]


@dataclass(frozen=True)
class ChunkResult:
    """The logits of the last tokens of a chunk, [n, vocab], and the state after it."""

    logits: np.ndarray
    state: State


@dataclass(frozen=True)
class Ending:
    """The last tokens [T] of a text, the state before them, and the chunk that they gave."""

    tokens: np.ndarray
    before: State
    chunk: ChunkResult


def repeated_tokens(info: SessionInfo) -> int:
    return STEPS + (info.prefill_chunk if info.whole_chunks else 0)


def longest_call(config: GriffinConfig) -> int:
    """Most tokens of a call: 2,048, or so many that a layer's scores take 64 MiB in float32."""
    window, scores = config.window, (64 << 20) / 4 / config.num_heads
    tokens = int((math.sqrt(window**2 + 4 * scores) - window) / 2)
    return max(STEPS, min(2048, tokens))


def compare_with_itself(
    session: Session,
    text: np.ndarray,
    head: np.ndarray,
    again: tuple[np.ndarray, State],
    ending: Ending,
    most_logits: int,
) -> dict[str, Equivalence]:
    """Takes the beginning and the end of a text [T] again in all ways that the engine has.

    `head` are logits [n, vocab] of the first tokens, `again` the last `repeated_tokens` or all,
    with the state before them. At most `most_logits` rows of logits exist at once. The convolution
    has no positions: at position 0, its state must be zeros.
    """
    result = _compare_end(session, *again, ending.chunk, most_logits)
    first, used = text[: len(head)], ending.chunk.state
    fresh = _prefill(session, None, first, len(first))
    recurrent = {n: a for n, a in fresh.state.items() if not n.endswith((".key", ".value"))}
    no_position = used | zeros_of(used, (POSITION, ".conv1d"))
    started = _prefill(session, no_position, first, len(first))
    result["reset"] = _compare([(ChunkResult(head, {}), fresh)], len(first))
    result["start"] = _compare([(ChunkResult(head, recurrent), started)], len(first))
    if not session.info.whole_chunks:  # such an engine has no longer calls, and takes rows in turn
        result["long"] = _compare([(ending.chunk, _at_once(session, ending))], len(ending.tokens))
        result["batch"] = _compare(_in_batch(session, text, used), 2 * min(STEPS, len(text)))
    return result


def compare_portable(
    session: Session, text: np.ndarray, reference: Pass, ending: Ending
) -> Equivalence:
    """Takes the beginning and the end of a text in a session without native kernels.

    The beginning is compared with the reference; the end, one long call, with what native kernels
    gave.
    """
    count = next(iter(checkpoints(len(text))), len(text))
    state = reference.drift.get(count) or recent(reference.state)
    start, sizes = zeros_of(ending.before), _chunk_and_steps(count)
    (first,) = _in_pieces(session, text[None, :count], start, sizes, count)
    pairs = [
        (ChunkResult(reference.logits(0, count), state), replace(first, state=recent(first.state))),
        (ending.chunk, _at_once(session, ending)),
        *_in_batch(session, text, ending.chunk.state),
    ]
    return _compare(pairs, count + len(ending.tokens))


def _compare(pairs: Sequence[tuple[ChunkResult, ChunkResult]], tokens: int) -> Equivalence:
    """Compares pairs of expected and repeated chunks, by the last logits that both have."""
    rows = []
    for expected, repeated in pairs:
        count = min(len(expected.logits), len(repeated.logits))
        ours, theirs = (chunk.logits[-count:] for chunk in (expected, repeated))
        rows.append(metrics.compare_logits(ours, theirs))
    return Equivalence(
        tokens=tokens,
        logits=metrics.logit_error(np.concatenate(rows)),
        states=[e for one, two in pairs for e in state_errors(one.state, two.state)],
    )


def _compare_end(
    session: Session, tokens: np.ndarray, before: State, chunk: ChunkResult, most_logits: int
) -> dict[str, Equivalence]:
    """Takes the tokens [T] of `chunk` again from the state `before`, in three ways.

    Where chunks have a fixed length, the text may have been taken in steps: a whole chunk is then
    taken first, and a text that is too short for one is repeated.
    """
    again, info = _prefill(session, before, tokens, len(chunk.logits)), session.info
    restored = _compare([(chunk, again)], len(tokens))
    if info.whole_chunks:
        tokens = np.resize(tokens, repeated_tokens(info))
        rows = min(info.prefill_chunk, most_logits) if info.chunk_logits else 1
        first = _prefill(session, before, tokens[:-STEPS], rows)
        rest = session.prefill(tokens[None, -STEPS:], num_logits=STEPS)[0]
        chunk = ChunkResult(np.concatenate([first.logits, rest]), session.get_state())
    result = {}
    for name, sizes in (("steps", [1] * len(tokens)), ("ragged", list(_ragged(len(tokens), info)))):
        (repeated,) = _in_pieces(session, tokens[None], before, sizes, len(chunk.logits))
        result[name] = _compare([(chunk, repeated)], len(tokens))
    return result | {"restored": restored}


def _prefill(session: Session, before: State | None, tokens: np.ndarray, rows: int) -> ChunkResult:
    if before is None:
        session.reset()
    else:
        session.set_state(before)
    return ChunkResult(session.prefill(tokens[None], num_logits=rows)[0], session.get_state())


def _at_once(session: Session, ending: Ending) -> ChunkResult:
    session.set_state(ending.before)
    logits = session.prefill_at_once(ending.tokens[None], num_logits=len(ending.chunk.logits))[0]
    return ChunkResult(logits, session.get_state())


def _in_batch(
    session: Session, text: np.ndarray, used: State
) -> list[tuple[ChunkResult, ChunkResult]]:
    """Takes the last tokens of a text [T] from `used`, and its first ones, alone and in a batch."""
    count = min(STEPS, len(text))
    tokens, states = np.stack([text[-count:], text[:count]]), [used, zeros_of(used)]
    sizes = _chunk_and_steps(count)
    alone = [
        _in_pieces(session, row[None], state, sizes, count)[0]
        for row, state in zip(tokens, states, strict=True)
    ]
    before = {name: np.concatenate([state[name] for state in states]) for name in used}
    return list(zip(alone, _in_pieces(session, tokens, before, sizes, count), strict=True))


def _in_pieces(
    session: Session, tokens: np.ndarray, before: State, sizes: list[int], keep: int
) -> list[ChunkResult]:
    """Takes tokens [R, T] in chunks of these sizes; keeps each row's last logits, without gaps."""
    session.set_state(before)
    last: deque[np.ndarray] = deque(maxlen=keep)
    start = 0
    for size in sizes:
        part = tokens[:, start : start + size]
        every = session.info.chunk_logits or size < session.info.prefill_chunk
        count = min(size, keep) if every else 1
        if count < size:
            last.clear()
        if size == 1:
            last.append(session.step(part[:, 0]))
        else:
            last.extend(session.prefill(part, count).swapaxes(0, 1))
        start += size
    logits, state = np.stack(last, 1), session.get_state()
    return [
        ChunkResult(logits[row], {name: array[row : row + 1] for name, array in state.items()})
        for row in range(len(tokens))
    ]


def _chunk_and_steps(count: int) -> list[int]:
    return [*([count - 3] if count > 3 else []), *[1] * min(count, 3)]


def _ragged(count: int, info: SessionInfo) -> Iterator[int]:
    """Cuts `count` tokens into sizes; a fixed chunk does not begin where the text's do."""
    first = (_RAGGED[0], info.prefill_chunk) if info.whole_chunks else ()
    sizes = chain(first, cycle(_RAGGED))
    while count > 0:
        size = min(count, next(sizes))
        yield size
        count -= size


def zeros_of(state: State, ends: tuple[str, ...] = ("",)) -> State:
    """Zeros for the tensors with one of these endings, by default for all."""
    return {name: np.zeros_like(array) for name, array in state.items() if name.endswith(ends)}
