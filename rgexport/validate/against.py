"""An artifact against a reference file: the cost of compression, measured without torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest import Manifest
from rgexport.griffin.tensor import slab_bounds
from rgexport.progress import task
from rgexport.runtimes.session import Session
from rgexport.validate import metrics, thresholds
from rgexport.validate.condensed import KLBounds, kl_bounds, log_sum_exp
from rgexport.validate.measure import LOGITS_BYTES
from rgexport.validate.reference_file import PromptRecord, ReferenceFile
from rgexport.validate.source import config_differences
from rgexport.validate.states import StateError, state_errors, worst
from rgexport.validate.thresholds import Check

SHAPES = (
    "vocab_size",
    "width",
    "mlp_width",
    "lru_width",
    "lru_heads",
    "num_heads",
    "head_dim",
    "block_types",
    "conv_width",
)
"""Fields of a configuration that an artifact must share with a reference."""


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt; the mean KL is about `kl`, and surely between the other two.

    `greedy_common` of the reference's `greedy_tokens` are the artifact's own first choices, up to
    the first one that is not.
    """

    name: str
    tokens: int
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    worst_state: float
    greedy_tokens: int
    greedy_common: int


@dataclass(frozen=True, kw_only=True)
class AgainstFile:
    """The artifact against a reference file, over all its prompts.

    KL at each position is about `kl` and surely between `kl_low` and `kl_high`, all the same where
    the file has all logits (see `condensed.KLBounds`); `kl_width` is the width of the mean's
    interval against the mean. `logits` is of those `full_positions` alone, all else of all
    positions. Where the artifact's first choice is not among the tokens whose logits the file
    has, `largest_flip_margin` counts the last of them.
    """

    path: str
    model: str
    computed: dict[str, str]
    same_files: bool
    config_differences: tuple[str, ...]
    positions: int
    full_positions: int
    non_finite_positions: int
    logits: metrics.LogitError
    kl: metrics.KL
    kl_low: metrics.KL
    kl_high: metrics.KL
    kl_width: float
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[StateError]
    prompts: list[PromptResult]

    @property
    def greedy(self) -> tuple[int, int]:
        """Tokens of the reference's continuations, and those that the artifact shares."""
        return (
            sum(prompt.greedy_tokens for prompt in self.prompts),
            sum(prompt.greedy_common for prompt in self.prompts),
        )


@dataclass(frozen=True)
class _Measured:
    """What was measured on one prompt: rows of `metrics.ROWS`, and bounds of KL [T, 3]."""

    rows: np.ndarray
    bounds: np.ndarray
    finite: np.ndarray
    states: list[StateError]
    greedy_common: int


def check_fits(reference: ReferenceFile, manifest: Manifest) -> None:
    """Makes sure that the two have the same shapes.

    Raises:
        RequestError: they have not.
    """
    ours, theirs = manifest.config, reference.header.config
    for name in SHAPES:
        if getattr(ours, name) != getattr(theirs, name):
            raise RequestError(
                f"{reference.path} is of a model of another shape: its {name} is "
                f"{getattr(theirs, name)}, the artifact's {getattr(ours, name)}; give a reference "
                "of the model that the artifact was made from"
            )


def compare_with_file(
    session: Session, manifest: Manifest, reference: ReferenceFile
) -> AgainstFile:
    """Teacher-forces a session with all prompts; logits exist for one block of positions.

    Raises:
        RequestError: see `check_fits`.
    """
    check_fits(reference, manifest)
    header = reference.header
    measured = []
    with task("Comparing with the reference file", header.positions, "tokens") as advance:
        for index, prompt, span in reference.spans():
            measured.append(_measure(session, reference, index, prompt, span))
            advance(prompt.tokens)
    rows = np.concatenate([found.rows for found in measured])
    low, best, high = map(_kl_summary, np.concatenate([found.bounds for found in measured]).T)
    ours = {record.sha256 for record in manifest.source.files.values()}
    return AgainstFile(
        path=str(reference.path),
        model=header.model,
        computed=header.computed,
        same_files=ours == {record.sha256 for record in header.files.values()},
        config_differences=config_differences(manifest.config, header.config),
        positions=len(rows),
        full_positions=len(reference.full_positions),
        non_finite_positions=int(sum((~found.finite).sum() for found in measured)),
        logits=metrics.logit_error(rows[reference.full_positions]),
        kl=best,
        kl_low=low,
        kl_high=high,
        kl_width=(high.mean - low.mean) / best.mean if best.mean else 0.0,
        agreement=metrics.agreement(rows),
        likelihood=metrics.likelihood(rows, _bytes(header.prompts)),
        states=_worst_states([found.states for found in measured]),
        prompts=[
            _prompt_result(prompt, found)
            for prompt, found in zip(header.prompts, measured, strict=True)
        ],
    )


def _kl_summary(kl: np.ndarray) -> metrics.KL:
    rows = np.zeros(len(kl), metrics.ROWS)
    rows["kl"] = kl
    return metrics.kl_summary(rows)


def file_checks(found: AgainstFile, manifest: Manifest) -> Iterator[Check]:
    """What is demanded of an artifact that was compared with a reference file."""
    storage = thresholds.coarsest(manifest)
    yield Check(
        name="reference.rms",
        value=found.logits.relative_rms,
        limit=thresholds.ORIGINAL_RMS[storage],
        reason=f"more than {storage} weights cost, unless the export is broken",
    )
    yield Check(
        name="reference.finite",
        value=float(found.non_finite_positions),
        limit=0,
        reason="positions whose logits are not finite",
    )


def _measure(
    session: Session, reference: ReferenceFile, index: int, prompt: PromptRecord, span: slice
) -> _Measured:
    """One prompt, from the beginning."""
    tokens = reference.tokens[span]
    rows = np.zeros(len(tokens), metrics.ROWS)
    bounds, finite = np.zeros((len(tokens), 3)), np.zeros(len(tokens), bool)
    session.reset()
    row_bytes = 2 * 4 * session.vocab_size
    logits = np.empty((1, 0))
    for start, stop in slab_bounds(len(tokens), row_bytes, LOGITS_BYTES):
        logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
        for place, candidate in enumerate(logits, start):
            following = int(tokens[place + 1]) if place + 1 < len(tokens) else -1
            finite[place] = np.isfinite(candidate).all()
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                found = _compare(reference, span.start + place, candidate, following)
            rows[place], bounds[place] = found
    states = state_errors(reference.state(index), session.get_state())
    common = _common(session, logits[-1], reference.greedy(index))
    return _Measured(rows, bounds, finite, states, common)


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
    first = int(candidate.argmax())
    ours, theirs = found.ids[:5], np.argpartition(candidate, -5)[-5:]
    row["top1"] = first == int(found.ids[0])
    row["top5"] = float(np.isin(ours, theirs).mean())
    place = np.flatnonzero(found.ids == first)
    chosen = found.logits[place[0] if len(place) else -1]
    row["flip_margin"] = float(found.logits[0]) - float(chosen)
    if following >= 0:
        wide = candidate.astype(np.float64)
        row["has_next"] = True
        row["nll"] = reference.sums[position, 1]
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


def _bytes(prompts: tuple[PromptRecord, ...]) -> int | None:
    """Of all texts together, where all are known."""
    known = [prompt.bytes for prompt in prompts if prompt.bytes is not None]
    return sum(known) if len(known) == len(prompts) else None


def _worst_states(prompts: list[list[StateError]]) -> list[StateError]:
    """Of each state, the prompt where it is worst."""
    found: dict[str, StateError] = {}
    for error in (error for errors in prompts for error in errors):
        best = found.get(error.name)
        if best is None or not error.relative_max <= best.relative_max:
            found[error.name] = error
    return list(found.values())


def _prompt_result(prompt: PromptRecord, found: _Measured) -> PromptResult:
    low, best, high = found.bounds.mean(0).tolist()
    return PromptResult(
        name=prompt.name,
        tokens=prompt.tokens,
        kl=best,
        kl_low=low,
        kl_high=high,
        top1=float(found.rows["top1"].mean()),
        worst_state=worst(found.states),
        greedy_tokens=prompt.greedy_tokens,
        greedy_common=found.greedy_common,
    )
