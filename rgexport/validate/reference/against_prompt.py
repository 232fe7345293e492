"""An artifact on one prompt of a reference file: logits, states, and the greedy continuation."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import State
from rgexport.runtimes.session import Session
from rgexport.validate import metrics
from rgexport.validate.measure import blocks, whole_chunks
from rgexport.validate.reference.condensed import KLBounds, kl_bounds, lead, log_sum_exp
from rgexport.validate.reference.reference_file import PromptRecord, ReferenceFile
from rgexport.validate.states import Drift, StateError, state_errors


@dataclass(frozen=True)
class PromptMeasured:
    """What was measured on one prompt of T tokens.

    rows: [T] of `metrics.ROWS`; bounds: of KL, [T, 3]; finite: [T], whether all logits are;
    states: behind its end; drift: those at its checkpoints; before: the artifact's own canonical
    states behind so many tokens, where they were asked for.
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
    prompt: PromptRecord,
    span: slice,
    keep: Collection[int] = (),
) -> PromptMeasured:
    """Teacher-forces a session with one prompt, from the beginning.

    Args:
        session: the artifact's.
        reference: the file.
        index: the prompt's.
        prompt: its record.
        span: its place among the positions.
        keep: counts of tokens behind which the artifact's own state is wanted.
    """
    tokens, inside = reference.tokens[span], reference.checkpoints(index)
    positions = _Positions(reference, tokens, span.start)
    drift: list[Drift] = []
    before: dict[int, State] = {}
    logits = np.empty((1, 0))
    session.reset()
    if 0 in keep:
        before[0] = session.get_state()
    for start, stop in blocks(session, {len(tokens), *keep} | whole_chunks(session, inside)):
        logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
        positions.see(start, logits)
        if stop in keep:
            before[stop] = session.get_state()
        if stop in inside:
            errors = state_errors(inside[stop], session.get_state())
            drift.append(Drift(position=stop, states=errors))
    return PromptMeasured(
        rows=positions.rows,
        bounds=positions.bounds,
        finite=positions.finite,
        states=state_errors(reference.state(index), session.get_state()),
        drift=drift,
        greedy_common=_common(session, logits[-1], reference.greedy(index)),
        before=before,
    )


class _Positions:
    """What is measured at each position; see `PromptMeasured`."""

    def __init__(self, reference: ReferenceFile, tokens: np.ndarray, first: int):
        self._reference, self._first = reference, first
        self._following = [*tokens[1:].tolist(), -1]
        self.rows = np.zeros(len(tokens), metrics.ROWS)
        self.bounds = np.zeros((len(tokens), 3))
        self.finite = np.zeros(len(tokens), bool)

    def see(self, start: int, logits: np.ndarray) -> None:
        """The artifact's logits [n, vocab] of the prompt's positions from `start` on."""
        for place, candidate in enumerate(logits, start):
            self.finite[place] = np.isfinite(candidate).all()
            position, following = self._first + place, self._following[place]
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                found = _compare(self._reference, position, candidate, following)
            self.rows[place], self.bounds[place] = found


def _compare(
    reference: ReferenceFile, position: int, candidate: np.ndarray, following: int
) -> tuple[np.void, KLBounds]:
    """One position's row and the bounds of its KL."""
    if reference.is_full(position):
        full = reference.full_logits(position)[None]
        row = metrics.compare_logits(full, candidate[None], np.array([following]))[0]
        return row, KLBounds(row["kl"], row["kl"], row["kl"])
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
    """How many of the expected tokens [n] the session chooses, one after another."""
    for count, token in enumerate(expected.tolist()):
        if int(logits.argmax()) != token:
            return count
        if count + 1 < len(expected):
            logits = session.step(np.array([token], np.int64))[0]
    return len(expected)
