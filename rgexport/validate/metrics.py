"""How far one model's logits and states are from another's.

Every position is reduced to one row of numbers as soon as its logits exist, so nothing of size
positions × vocabulary is kept. The reductions are float64. Means, quantiles and standard errors
are taken over the rows at the end, so they do not depend on the size of blocks.
"""

from dataclasses import dataclass
from itertools import count, takewhile

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

_BLOCK_VALUES = 1 << 16  # logits per float64 block, whose temporaries stay in cache


def compare_logits(
    reference: np.ndarray, candidate: np.ndarray, next_tokens: np.ndarray | None = None
) -> np.ndarray:
    """Returns `ROWS` [n] of logits [n, vocab], any floats; `next_tokens` [n] are -1 at the end."""
    rows = np.empty(len(reference), ROWS)
    next_tokens = np.full(len(rows), -1) if next_tokens is None else next_tokens
    step = max(1, _BLOCK_VALUES // max(1, reference.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(reference), step):
            block = slice(start, start + step)
            _compare_block(reference[block], candidate[block], next_tokens[block], rows[block])
    return rows


def _compare_block(
    reference: np.ndarray, candidate: np.ndarray, next_tokens: np.ndarray, out: np.ndarray
) -> None:
    ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
    at = np.arange(len(ref))
    delta = ref - cand
    log_p = log_sum_exp(ref)
    log_q = log_sum_exp(cand)
    # Σ p (log p - log q) with p = exp(ref - log_p); rounding may leave -1e-15 where it is 0.
    kl = np.einsum("nv,nv->n", np.exp(ref - log_p[:, None]), delta) - log_p + log_q
    first, first_candidate = ref.argmax(1), cand.argmax(1)
    absolute = np.abs(delta, out=delta)
    known = next_tokens >= 0
    token = np.where(known, next_tokens, 0)

    out["max_delta"] = absolute.max(1)
    out["mean_delta"] = absolute.mean(1)
    out["square_delta"] = np.einsum("nv,nv->n", absolute, absolute) / ref.shape[1]
    out["max_logit"] = np.abs(ref).max(1)
    out["variance"] = ref.var(1)
    ab, aa, bb = (np.einsum("nv,nv->n", x, y) for x, y in ((ref, cand), (ref, ref), (cand, cand)))
    norms = np.sqrt(aa * bb)
    out["cosine"] = np.where(norms == 0, aa == bb, ab / np.where(norms == 0, 1, norms))
    out["kl"] = np.maximum(kl, 0)
    out["top1"] = first == first_candidate
    most = min(5, ref.shape[1])
    ours, theirs = (np.argpartition(x, -most, axis=1)[:, -most:] for x in (ref, cand))
    out["top5"] = (ours[:, :, None] == theirs[:, None, :]).any(2).mean(1)
    out["flip_margin"] = ref[at, first] - ref[at, first_candidate]
    out["has_next"] = known
    out["nll"] = np.where(known, log_p - ref[at, token], 0)
    out["nll_candidate"] = np.where(known, log_q - cand[at, token], 0)


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
    largest, worst = float(rows["max_logit"].max()), float(rows["max_delta"].max())
    square, variance = float(rows["square_delta"].mean()), float(rows["variance"].mean()) or 1
    rms = (square / variance) ** 0.5
    error = _standard_error(rows["square_delta"]) / variance
    return LogitError(
        max=worst,
        mean=float(rows["mean_delta"].mean()),
        relative_max=worst / (largest or 1),
        relative_rms=rms,
        rms_standard_error=error / (2 * rms) if rms else 0.0,
        largest_logit=largest,
        cosine=float(rows["cosine"].mean()),
        lowest_cosine=float(rows["cosine"].min()),
        worst_position=int(rows["max_delta"].argmax()),
        non_finite_positions=int((~np.isfinite(rows["mean_delta"])).sum()),
    )


def kl_summary(rows: np.ndarray) -> KL:
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
    ours, theirs = float(known["nll"].mean()), float(known["nll_candidate"].mean())
    bits = len(known) / (np.log(2) * text_bytes) if text_bytes else None
    with np.errstate(over="ignore"):
        return Likelihood(
            tokens=len(known),
            nll=ours,
            nll_candidate=theirs,
            delta=float(deltas.mean()),
            delta_standard_error=_standard_error(deltas),
            perplexity=float(np.exp(ours)),
            perplexity_candidate=float(np.exp(theirs)),
            bits_per_byte=float(ours * bits) if bits else None,
            bits_per_byte_candidate=float(theirs * bits) if bits else None,
        )


def _standard_error(values: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


FIRST_CHECKPOINT = 64
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
            most = float(delta.max() / (np.abs(expected).max() or 1))
            norm = float(np.linalg.norm(delta) / (np.linalg.norm(expected) or 1))
        errors.append(StateError(name=name, relative_max=most, relative_norm=norm))
    return errors


def recent(state: State) -> State:
    """A copy with the keys and values of the last `RECENT` tokens: a 2B's windows take 33 MB."""
    return {
        name: (array[:, -RECENT:] if name.endswith((".key", ".value")) else array).copy()
        for name, array in state.items()
    }


def checkpoints(length: int) -> list[int]:
    """Positions inside a text of so many tokens where states are compared: 64, 128, 256, …"""
    doubled = (FIRST_CHECKPOINT << n for n in count())
    return list(takewhile(lambda position: position < length, doubled))


def worst(errors: list[StateError]) -> float:
    """The largest `relative_max`; NaN if there is one; 0 for a model without states."""
    return float(np.max([error.relative_max for error in errors], initial=0))
