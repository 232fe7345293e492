"""Runs an artifact and its references over one text, side by side, and measures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.session import Session
from rgexport.validate import metrics
from rgexport.validate.states import StateError, same_position, state_errors
from rgexport.validate.teacher import Pass

LOGITS_BYTES = 256 << 20
"""Logits of a block of positions, the artifact's and one reference's together."""
MAX_BLOCK = 512
STEPS = 8
"""The last tokens are taken once as a chunk and once more one by one."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact against one reference, over the whole text."""

    logits: metrics.LogitError
    kl: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[StateError]


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """The artifact against itself: its last tokens one by one against the same as one chunk."""

    tokens: int
    logits: metrics.LogitError
    states: list[StateError]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured by running; `original` is None where no original was given."""

    twin: Comparison
    original: Comparison | None
    steps: Equivalence
    same_position: bool


def measure(
    session: Session,
    tokens: np.ndarray,
    twin: Pass,
    original: Pass | None = None,
    text_bytes: int | None = None,
) -> Measurement:
    """Teacher-forces `session` with tokens [T] and compares it with the references' passes.

    The session takes the tokens in chunks and carries its state from one to the next, so what
    is compared is what a long conversation computes. Logits exist for one block at a time.
    """
    references = [twin] if original is None else [twin, original]
    rows: list[list[np.ndarray]] = [[] for _ in references]
    next_tokens = np.append(tokens[1:], -1)
    before: State = {}
    tail = np.empty((0, session.vocab_size), np.float32)

    session.reset()
    with task("Comparing", len(tokens), "tokens") as advance:
        for start, stop in _blocks(len(tokens), session.vocab_size):
            before = session.get_state()
            tail = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
            for reference, found in zip(references, rows, strict=True):
                expected = reference.logits(start, stop)
                found.append(metrics.compare_logits(expected, tail, next_tokens[start:stop]))
            advance(stop - start)
    state = session.get_state()
    comparisons = [
        _compare(np.concatenate(found), reference.state, state, text_bytes)
        for reference, found in zip(references, rows, strict=True)
    ]
    return Measurement(
        twin=comparisons[0],
        original=comparisons[1] if original is not None else None,
        steps=_compare_steps(session, tokens, before, tail, state),
        same_position=same_position(twin.state, state),
    )


def _blocks(length: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of positions that fit into the memory meant for logits; the last is for the steps."""
    size = min(MAX_BLOCK, max(STEPS, LOGITS_BYTES // (2 * 4 * vocab_size)))
    last = max(0, length - STEPS)
    for start in range(0, last, size):
        yield start, min(start + size, last)
    yield last, length


def _compare(rows: np.ndarray, expected: State, state: State, text_bytes: int | None) -> Comparison:
    return Comparison(
        logits=metrics.logit_error(rows),
        kl=metrics.kl_summary(rows),
        agreement=metrics.agreement(rows),
        likelihood=metrics.likelihood(rows, text_bytes),
        states=state_errors(expected, state),
    )


def _compare_steps(
    session: Session, tokens: np.ndarray, before: State, chunk: np.ndarray, state: State
) -> Equivalence:
    """Goes back to the state `before` and takes the tokens behind `chunk` [n, V] one by one."""
    session.set_state(before)
    count = len(chunk)
    stepped = np.stack([session.step(token[None])[0] for token in tokens[-count:]])
    rows = metrics.compare_logits(chunk, stepped, np.full(count, -1))
    return Equivalence(
        tokens=count,
        logits=metrics.logit_error(rows),
        states=state_errors(state, session.get_state()),
    )
