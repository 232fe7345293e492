"""How far one model's logits and states are from another's.

Every position is reduced to one row of numbers as soon as its logits exist, so nothing of size
positions × vocabulary is kept. The reductions are float64. Means, quantiles and standard errors
are taken over the rows at the end, so they do not depend on the size of blocks.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import POSITION, State
from rgexport.numerics import log_sum_exp

ROWS = np.dtype(
    [
        ("max_delta", np.float64),  # max |Δlogit|
        ("mean_delta", np.float64),  # mean |Δlogit|
        ("square_delta", np.float64),  # mean Δlogit²
        ("max_logit", np.float64),  # max |logit| of the reference
        ("variance", np.float64),  # of the reference's logits
        ("cosine", np.float64),  # similarity of both rows of logits
        ("kl", np.float64),  # KL(reference ‖ candidate), nats
        ("top1", np.bool_),  # the same most likely token
        ("top5", np.float64),  # share of the reference's five likeliest among the candidate's
        ("flip_margin", np.float64),  # reference: logit of its top-1 minus that of the candidate's
        ("has_next", np.bool_),  # the text goes on after this position
        ("nll", np.float64),  # of the next token under the reference, nats; 0 without one
        ("nll_candidate", np.float64),
    ]
)
"""One row per position."""

_BLOCK_VALUES = 1 << 16
"""Logits of a float64 block; its temporaries stay in cache."""


def compare_logits(
    reference: np.ndarray, candidate: np.ndarray, next_tokens: np.ndarray | None = None
) -> np.ndarray:
    """Returns `ROWS` [n] of logits [n, vocab], any floats; `next_tokens` [n] are -1 at the end."""
    rows = np.empty(len(reference), ROWS)
    if next_tokens is None:
        next_tokens = np.full(len(rows), -1)
    step = max(1, _BLOCK_VALUES // max(1, reference.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(reference), step):
            block = slice(start, start + step)
            _compare_block(reference[block], candidate[block], next_tokens[block], rows[block])
    return rows


def _compare_block(
    reference: np.ndarray, candidate: np.ndarray, next_tokens: np.ndarray, out: np.ndarray
) -> None:
    ref = reference.astype(np.float64)
    cand = candidate.astype(np.float64)
    out["max_logit"] = np.abs(ref).max(1)
    out["variance"] = ref.var(1)
    out["cosine"] = _row_cosine(ref, cand)
    out["top5"] = _shared_top5(ref, cand)

    positions = np.arange(len(ref))
    first_ref = ref.argmax(1)
    first_cand = cand.argmax(1)
    out["top1"] = first_ref == first_cand
    out["flip_margin"] = ref[positions, first_ref] - ref[positions, first_cand]

    log_p = log_sum_exp(ref)
    log_q = log_sum_exp(cand)
    known = next_tokens >= 0
    token = np.where(known, next_tokens, 0)
    out["has_next"] = known
    out["nll"] = np.where(known, log_p - ref[positions, token], 0)
    out["nll_candidate"] = np.where(known, log_q - cand[positions, token], 0)

    # Σ p (log p - log q) with p = exp(ref - log_p); rounding may leave -1e-15 where it is 0.
    delta = ref - cand
    kl = np.einsum("nv,nv->n", np.exp(ref - log_p[:, None]), delta) - log_p + log_q
    out["kl"] = np.maximum(kl, 0)

    absolute = np.abs(delta, out=delta)
    out["max_delta"] = absolute.max(1)
    out["mean_delta"] = absolute.mean(1)
    out["square_delta"] = np.einsum("nv,nv->n", absolute, absolute) / ref.shape[1]


def _row_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of each pair of rows; 1 where both rows are zero."""
    dot = np.einsum("nv,nv->n", a, b)
    square_a = np.einsum("nv,nv->n", a, a)
    square_b = np.einsum("nv,nv->n", b, b)
    norms = np.sqrt(square_a * square_b)
    cosine = dot / np.where(norms == 0, 1, norms)
    return np.where(norms == 0, square_a == square_b, cosine)


def _shared_top5(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Returns the share of the reference's five likeliest tokens among the candidate's, [n]."""
    most = min(5, reference.shape[1])
    reference_top = np.argpartition(reference, -most, axis=1)[:, -most:]
    candidate_top = np.argpartition(candidate, -most, axis=1)[:, -most:]
    equal = reference_top[:, :, None] == candidate_top[:, None, :]
    return np.asarray(equal.any(2).mean(1))


@dataclass(frozen=True, kw_only=True)
class LogitError:
    """|Δlogit| over all positions and tokens.

    `relative_max` is relative to the largest |logit|; `relative_rms` is the rms relative to the
    standard deviation of the reference's logits at each position: 1 for constant logits.
    """

    max: float
    mean: float
    relative_max: float
    relative_rms: float
    rms_standard_error: float
    largest_logit: float
    cosine: float
    lowest_cosine: float
    worst_position: int
    non_finite_positions: int


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL(reference ‖ candidate) per position, in nats; positions are taken as independent."""

    mean: float
    standard_error: float
    median: float
    p95: float
    p99: float
    max: float
    worst_position: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares in [0, 1], and the positions where the two models' most likely tokens differ.

    `near_ties` of these flips are no more than the tolerated noise explains. `largest_flip_margin`
    is the largest lead, in logits, of the reference's choice over the candidate's.
    """

    top1: float
    top5: float
    largest_flip_margin: float
    flips: int
    near_ties: int


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Mean negative log-likelihood of a text's tokens under both models, in nats.

    `delta` is the candidate's minus the reference's, with the error of the paired differences.
    """

    tokens: int
    nll: float
    nll_candidate: float
    delta: float
    delta_standard_error: float
    perplexity: float
    perplexity_candidate: float
    bits_per_byte: float | None
    bits_per_byte_candidate: float | None


def logit_error(rows: np.ndarray) -> LogitError:
    """Summarizes the errors of logits over all positions, `ROWS` [n]."""
    largest_logit = float(rows["max_logit"].max())
    largest_error = float(rows["max_delta"].max())
    square_error = float(rows["square_delta"].mean())
    variance = float(rows["variance"].mean()) or 1
    rms = (square_error / variance) ** 0.5
    rms_standard_error = 0.0
    if rms:
        # The error of a square is twice that of its root, relatively.
        rms_standard_error = _standard_error(rows["square_delta"]) / variance / (2 * rms)
    return LogitError(
        max=largest_error,
        mean=float(rows["mean_delta"].mean()),
        relative_max=largest_error / (largest_logit or 1),
        relative_rms=rms,
        rms_standard_error=rms_standard_error,
        largest_logit=largest_logit,
        cosine=float(rows["cosine"].mean()),
        lowest_cosine=float(rows["cosine"].min()),
        worst_position=int(rows["max_delta"].argmax()),
        non_finite_positions=int((~np.isfinite(rows["mean_delta"])).sum()),
    )


def kl_summary(rows: np.ndarray) -> KL:
    """Summarizes `kl` over all positions, `ROWS` [n]."""
    kl = rows["kl"]
    median, p95, p99 = np.quantile(kl, (0.5, 0.95, 0.99)).tolist()
    return KL(
        mean=float(kl.mean()),
        standard_error=_standard_error(kl),
        median=median,
        p95=p95,
        p99=p99,
        max=float(kl.max()),
        worst_position=int(kl.argmax()),
    )


def agreement(rows: np.ndarray, noise: float = 0.0) -> Agreement:
    """Summarizes `top1`, `top5` and `flip_margin`.

    `noise` is the tolerated rms error of a logit, relative to the reference's deviation: a flip of
    no larger margin than √2 times that is a near tie.
    """
    flipped = rows[~rows["top1"]]
    margins = np.sqrt(2 * flipped["variance"]) * noise
    return Agreement(
        top1=float(rows["top1"].mean()),
        top5=float(rows["top5"].mean()),
        largest_flip_margin=float(rows["flip_margin"].max()),
        flips=len(flipped),
        near_ties=int((flipped["flip_margin"] <= margins).sum()),
    )


def likelihood(rows: np.ndarray, text_bytes: int | None) -> Likelihood | None:
    """Summarizes `nll`; None where no position has a next token."""
    known = rows[rows["has_next"]]
    if not len(known):
        return None
    deltas = known["nll_candidate"] - known["nll"]
    nll = float(known["nll"].mean())
    nll_candidate = float(known["nll_candidate"].mean())
    bits_per_byte = None
    bits_per_byte_candidate = None
    if text_bytes:
        bits_per_nat = len(known) / (np.log(2) * text_bytes)  # bits per byte for a nat per token
        bits_per_byte = float(nll * bits_per_nat)
        bits_per_byte_candidate = float(nll_candidate * bits_per_nat)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(nll))
        perplexity_candidate = float(np.exp(nll_candidate))
    return Likelihood(
        tokens=len(known),
        nll=nll,
        nll_candidate=nll_candidate,
        delta=float(deltas.mean()),
        delta_standard_error=_standard_error(deltas),
        perplexity=perplexity,
        perplexity_candidate=perplexity_candidate,
        bits_per_byte=bits_per_byte,
        bits_per_byte_candidate=bits_per_byte_candidate,
    )


def _standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean; 0 for a single value."""
    if len(values) <= 1:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        return float(values.std(ddof=1) / np.sqrt(len(values)))


FIRST_CHECKPOINT = 64
"""The first position where states are compared."""
RECENT = 64
"""Tokens per checkpoint with compared keys and values."""


@dataclass(frozen=True, kw_only=True)
class StateError:
    """One state: max |Δ| / max |reference| and ‖Δ‖ / ‖reference‖; not divided by zero."""

    name: str
    relative_max: float
    relative_norm: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The states after `position` tokens of a text; of caches only what `recent` keeps."""

    position: int
    states: list[StateError]


def state_errors(reference: State, candidate: State) -> list[StateError]:
    """Compares all tensors except the position; tensors of another shape are left out."""
    errors = []
    for name, array in reference.items():
        if name == POSITION or array.shape != candidate[name].shape:
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            expected = array.astype(np.float64)
            delta = np.abs(candidate[name].astype(np.float64) - expected)
            relative_max = float(delta.max() / (np.abs(expected).max() or 1))
            relative_norm = float(np.linalg.norm(delta) / (np.linalg.norm(expected) or 1))
        error = StateError(name=name, relative_max=relative_max, relative_norm=relative_norm)
        errors.append(error)
    return errors


def is_cache(name: str) -> bool:
    """Whether a canonical state has attention's keys or values."""
    return name.endswith((".key", ".value"))


def recent(state: State) -> State:
    """Copies a state, with the last `RECENT` keys and values alone: a 2B has 33 MB of them."""
    copied = {}
    for name, array in state.items():
        if is_cache(name):
            array = array[:, -RECENT:]
        copied[name] = array.copy()
    return copied


def checkpoints(length: int) -> list[int]:
    """Returns positions inside a text where states are compared: 64, 128, 256, …"""
    positions = []
    position = FIRST_CHECKPOINT
    while position < length:
        positions.append(position)
        position *= 2
    return positions


def worst(errors: list[StateError]) -> float:
    """Returns the largest `relative_max`; NaN if there is one; 0 for a model without states."""
    return float(np.max([error.relative_max for error in errors], initial=0))
