"""An artifact on one prompt of a reference file: logits, states, and the greedy continuation."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import State
from rgexport.runtimes.session import Session
from rgexport.validate import metrics
from rgexport.validate.measure import blocks, whole_chunks
from rgexport.validate.reference.condensed import KLBounds, kl_bounds, lead, log_sum_exp
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.states import Drift, StateError, state_errors


@dataclass(frozen=True)
class PromptMeasured:
    """What was measured on a prompt of T tokens.

    Attributes:
        rows: [T] of `metrics.ROWS`.
        bounds: of KL, [T, 3]; see `condensed.KLBounds`.
        finite: [T], whether all logits are finite.
        states: errors after the prompt.
        drift: errors at its checkpoints.
        greedy_common: tokens of the reference's continuation that the artifact chooses too.
        before: count of tokens → the artifact's canonical state after them, where it was asked for.
    """

    rows: np.ndarray
    bounds: np.ndarray
    finite: np.ndarray
    states: list[StateError]
    drift: list[Drift]
    greedy_common: int
    before: dict[int, State]


def measure_prompt(
    session: Session,
    reference: ReferenceFile,
    index: int,
    span: slice,
    keep: Collection[int] = (),
) -> PromptMeasured:
    """Teacher-forces a session with one prompt, from the beginning.

    Args:
        session: the artifact's.
        reference: the file.
        index: the prompt's.
        span: its positions.
        keep: counts of tokens after which the artifact's state is wanted.
    """
    tokens, inside = reference.tokens[span], reference.checkpoints(index)
    following = [*tokens[1:].tolist(), -1]
    rows, bounds = np.zeros(len(tokens), metrics.ROWS), np.zeros((len(tokens), 3))
    finite = np.zeros(len(tokens), bool)
    drift: list[Drift] = []
    before: dict[int, State] = {}
    logits = np.empty((1, 0))
    session.reset()
    if 0 in keep:
        before[0] = session.get_state()
    for start, stop in blocks(session, {len(tokens), *keep} | whole_chunks(session, inside)):
        logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
        finite[start:stop] = np.isfinite(logits).all(1)
        for i, candidate in enumerate(logits, start):
            rows[i], bounds[i] = _compare(reference, span.start + i, candidate, following[i])
        if stop in keep:
            before[stop] = session.get_state()
        if stop in inside:
            errors = state_errors(inside[stop], session.get_state())
            drift.append(Drift(position=stop, states=errors))
    return PromptMeasured(
        rows=rows,
        bounds=bounds,
        finite=finite,
        states=state_errors(reference.state(index), session.get_state()),
        drift=drift,
        greedy_common=_common(session, logits[-1], reference.greedy(index)),
        before=before,
    )


def _compare(
    reference: ReferenceFile, position: int, candidate: np.ndarray, following: int
) -> tuple[np.void, KLBounds]:
    """One position's row and the bounds of its KL; `following` is the next token or -1."""
    if reference.is_full(position):
        full = reference.full_logits(position)[None]
        row = metrics.compare_logits(full, candidate[None], np.array([following]))[0]
        return row, KLBounds(row["kl"], row["kl"], row["kl"])
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return _compare_condensed(reference, position, candidate, following)


def _compare_condensed(
    reference: ReferenceFile, position: int, candidate: np.ndarray, following: int
) -> tuple[np.void, KLBounds]:
    found = reference.condensed(position)
    row = np.zeros(1, metrics.ROWS)[0]
    bounds = kl_bounds(found, candidate)
    row["kl"] = bounds.best
    row["variance"] = reference.variance(position)
    first = int(candidate.argmax())
    theirs = np.argpartition(candidate, -5)[-5:]
    row["top1"] = first == int(found.ids[0])
    row["top5"] = float(np.isin(found.ids[:5], theirs).mean())
    row["flip_margin"] = lead(found, first)
    if following >= 0:
        wide = candidate.astype(np.float64)
        row["has_next"] = True
        row["nll"] = reference.next_nll(position)
        row["nll_candidate"] = log_sum_exp(wide) - wide[following]
    return row, bounds


def _common(session: Session, logits: np.ndarray, expected: np.ndarray) -> int:
    """How many of the expected tokens [n] the session chooses, up to the first that it does not."""
    for count, token in enumerate(expected.tolist()):
        if int(logits.argmax()) != token:
            return count
        if count + 1 < len(expected):
            logits = session.step(np.array([token], np.int64))[0]
    return len(expected)
