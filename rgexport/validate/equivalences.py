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
from rgexport.validate.metrics import (
    StateError,
    checkpoints,
    is_cache,
    recent,
    state_errors,
)
from rgexport.validate.reference_pass import Pass

STEPS = 8
"""The last tokens that are taken again; and a chunk more where its length is fixed."""
_RAGGED = (3, 1, 2)
"""Lengths of chunks, over and over."""
_MOST_CALL_TOKENS = 2048
"""Most tokens of a call."""
_SCORES_BYTES = 64 << 20
"""Most memory that a layer's attention scores take in one call, float32."""

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
"""Name of an equivalence → the statement that should hold."""


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


_Pair = tuple[ChunkResult, ChunkResult]
"""The expected result of a chunk, and the repeated one."""


@dataclass(frozen=True)
class Ending:
    """The last tokens [T] of a text, the state before them, and the chunk that they gave."""

    tokens: np.ndarray
    before: State
    chunk: ChunkResult


def repeated_tokens(info: SessionInfo) -> int:
    """Returns the number of last tokens that are taken again."""
    if info.whole_chunks:
        return STEPS + info.prefill_chunk
    return STEPS


def longest_call(config: GriffinConfig) -> int:
    """Most tokens of a call: 2,048, or so many that a layer's scores take 64 MiB in float32."""
    window = config.window
    scores_per_head = _SCORES_BYTES / 4 / config.num_heads
    # T tokens have T · (T + window) scores: solve T² + window · T = scores_per_head.
    tokens = int((math.sqrt(window**2 + 4 * scores_per_head) - window) / 2)
    return max(STEPS, min(_MOST_CALL_TOKENS, tokens))


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
    last_tokens, before = again
    equivalences = _compare_end(session, last_tokens, before, ending.chunk, most_logits)

    first_tokens = text[: len(head)]
    fresh = _prefill(session, None, first_tokens, len(first_tokens))
    recurrent = {name: a for name, a in fresh.state.items() if not is_cache(name)}
    used_state = ending.chunk.state
    no_position = used_state | zeros_of(used_state, (POSITION, ".conv1d"))
    started = _prefill(session, no_position, first_tokens, len(first_tokens))
    equivalences["reset"] = _compare([(ChunkResult(head, {}), fresh)], len(first_tokens))
    equivalences["start"] = _compare([(ChunkResult(head, recurrent), started)], len(first_tokens))

    # An engine with whole chunks has no longer calls, and takes the rows of a batch in turn.
    if not session.info.whole_chunks:
        at_once = _at_once(session, ending)
        equivalences["long"] = _compare([(ending.chunk, at_once)], len(ending.tokens))
        batch_pairs = _in_batch(session, text, used_state)
        equivalences["batch"] = _compare(batch_pairs, 2 * min(STEPS, len(text)))
    return equivalences


def compare_portable(
    session: Session, text: np.ndarray, reference: Pass, ending: Ending
) -> Equivalence:
    """Takes the beginning and the end of a text in a session without native kernels.

    The beginning is compared with the reference; the end, one long call, with the result of native
    kernels.
    """
    count = next(iter(checkpoints(len(text))), len(text))
    expected_state = reference.drift.get(count) or recent(reference.state)
    expected_first = ChunkResult(reference.logits(0, count), expected_state)

    zero_state = zeros_of(ending.before)
    (first,) = _in_pieces(session, text[None, :count], zero_state, _chunk_and_steps(count), count)
    first = replace(first, state=recent(first.state))

    pairs = [
        (expected_first, first),
        (ending.chunk, _at_once(session, ending)),
        *_in_batch(session, text, ending.chunk.state),
    ]
    return _compare(pairs, count + len(ending.tokens))


def _compare(pairs: Sequence[_Pair], tokens: int) -> Equivalence:
    """Compares pairs of expected and repeated chunks, by the last logits that both have."""
    rows = []
    states: list[StateError] = []
    for expected, repeated in pairs:
        count = min(len(expected.logits), len(repeated.logits))
        rows.append(metrics.compare_logits(expected.logits[-count:], repeated.logits[-count:]))
        states += state_errors(expected.state, repeated.state)
    logits = metrics.logit_error(np.concatenate(rows))
    return Equivalence(tokens=tokens, logits=logits, states=states)


def _compare_end(
    session: Session, tokens: np.ndarray, before: State, chunk: ChunkResult, most_logits: int
) -> dict[str, Equivalence]:
    """Takes the tokens [T] of `chunk` again from the state `before`, in three ways.

    Where chunks have a fixed length, the text may have been taken in steps: a whole chunk is then
    taken first, and a text that is too short for one is repeated.
    """
    info = session.info
    prefilled = _prefill(session, before, tokens, len(chunk.logits))
    restored = _compare([(chunk, prefilled)], len(tokens))

    if info.whole_chunks:
        tokens = np.resize(tokens, repeated_tokens(info))
        rows = 1
        if info.chunk_logits:
            rows = min(info.prefill_chunk, most_logits)
        first = _prefill(session, before, tokens[:-STEPS], rows)
        rest = session.prefill(tokens[None, -STEPS:], num_logits=STEPS)[0]
        chunk = ChunkResult(np.concatenate([first.logits, rest]), session.get_state())

    sizes_of_ways = {"steps": [1] * len(tokens), "ragged": list(_ragged(len(tokens), info))}
    equivalences = {}
    for name, sizes in sizes_of_ways.items():
        (repeated,) = _in_pieces(session, tokens[None], before, sizes, len(chunk.logits))
        equivalences[name] = _compare([(chunk, repeated)], len(tokens))
    equivalences["restored"] = restored
    return equivalences


def _prefill(session: Session, before: State | None, tokens: np.ndarray, rows: int) -> ChunkResult:
    """Takes tokens [T] in one chunk, from a reset session where `before` is None."""
    if before is None:
        session.reset()
    else:
        session.set_state(before)
    logits = session.prefill(tokens[None], num_logits=rows)[0]
    return ChunkResult(logits, session.get_state())


def _at_once(session: Session, ending: Ending) -> ChunkResult:
    """Takes the end of a text in one call, however long it is."""
    session.set_state(ending.before)
    rows = len(ending.chunk.logits)
    logits = session.prefill_at_once(ending.tokens[None], num_logits=rows)[0]
    return ChunkResult(logits, session.get_state())


def _in_batch(session: Session, text: np.ndarray, used: State) -> list[_Pair]:
    """Takes the last tokens of a text [T] from `used`, and its first ones, alone and in a batch."""
    count = min(STEPS, len(text))
    tokens = np.stack([text[-count:], text[:count]])
    states = [used, zeros_of(used)]
    sizes = _chunk_and_steps(count)

    alone = []
    for row, state in zip(tokens, states, strict=True):
        (result,) = _in_pieces(session, row[None], state, sizes, count)
        alone.append(result)

    before = {name: np.concatenate([state[name] for state in states]) for name in used}
    batched = _in_pieces(session, tokens, before, sizes, count)
    return list(zip(alone, batched, strict=True))


def _in_pieces(
    session: Session, tokens: np.ndarray, before: State, sizes: list[int], keep: int
) -> list[ChunkResult]:
    """Takes tokens [R, T] in chunks of these sizes; keeps each row's last logits, without gaps."""
    session.set_state(before)
    last_logits: deque[np.ndarray] = deque(maxlen=keep)
    start = 0
    for size in sizes:
        piece = tokens[:, start : start + size]
        count = 1
        if session.info.chunk_logits or size < session.info.prefill_chunk:
            count = min(size, keep)
        if count < size:
            last_logits.clear()
        if size == 1:
            last_logits.append(session.step(piece[:, 0]))
        else:
            last_logits.extend(session.prefill(piece, count).swapaxes(0, 1))
        start += size

    logits = np.stack(last_logits, 1)
    state = session.get_state()
    results = []
    for row in range(len(tokens)):
        row_state = {name: array[row : row + 1] for name, array in state.items()}
        results.append(ChunkResult(logits[row], row_state))
    return results


def _chunk_and_steps(count: int) -> list[int]:
    """Returns the sizes of a chunk and three single tokens, together `count`."""
    if count > 3:
        return [count - 3, 1, 1, 1]
    return [1] * count


def _ragged(count: int, info: SessionInfo) -> Iterator[int]:
    """Cuts `count` tokens into sizes; a fixed chunk does not begin where the text's do."""
    first: tuple[int, ...] = ()
    if info.whole_chunks:
        first = (_RAGGED[0], info.prefill_chunk)
    sizes = chain(first, cycle(_RAGGED))
    while count > 0:
        size = min(count, next(sizes))
        yield size
        count -= size


def zeros_of(state: State, ends: tuple[str, ...] = ("",)) -> State:
    """Returns zeros for the tensors whose names have one of these endings, by default for all."""
    return {name: np.zeros_like(array) for name, array in state.items() if name.endswith(ends)}
