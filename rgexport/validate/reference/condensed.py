"""The reference's distribution at one position in a few kilobytes, and bounds of KL from it.

Kept are the most likely tokens with their logits and the log-sum-exp of all. Of the other tokens,
the *tail*, exact sums are kept and, unless `CODES` says 0 bits, a code for each token that bounds
its probability. Of KL(reference ‖ candidate) = Σ p log p - Σ p log q, only Σ p log q over the tail
is then unknown. It is linear in p, so its largest and smallest value under those bounds and the
tail's mass follow from a sort (a fractional knapsack).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEAST, MOST = 16, 4096
"""Tokens that are kept with their logits, at least and at most."""
RELATIVE_WIDTH = 1e-3
"""Wanted width of KL's interval, relative to KL, …"""
TYPICAL_DELTA = 0.1
"""… for Δlogits of this rms: KL = 0.1² / 2 = 0.005 nats, what 4 bits cost. Smaller Δlogits give
intervals that are narrower, but wider relative to KL."""

CODES: dict[int, np.dtype | None] = {0: None, 8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
"""Bits of a tail's codes → dtype."""
_NEGLIGIBLE = 16
"""Times 1 / codes², the share of the tail's mass whose tokens get the code 0: they then widen the
interval about as much as the codes do."""
_SLACK = 1e-11
"""Rounding error of the bounds' logarithms."""
_ROUNDING = 1e-12
"""Rounding error of sums over a vocabulary, in nats."""


@dataclass(frozen=True)
class Tail:
    """All tokens but the kept ones.

    The log p of a token with code c lies in (`floor` + (c - 1) `step`, `floor` + c `step`], that of
    a token with code 0 at `floor` or below. Without codes, all tokens have code 0.

    Attributes:
        mass: Σ p.
        offset: Σ p (log p - a), where a is the middle of the code's bounds, or `floor` for code 0.
        moved: Σ (p - p̂) (log p - a), where p̂ is the estimate of p by the middles alone.
        floor: natural logarithm of a probability.
        step: of the codes.
        codes: [vocab], meaningless for kept tokens; None: all are 0.
    """

    mass: float
    offset: float
    moved: float
    floor: float
    step: float
    codes: np.ndarray | None


@dataclass(frozen=True)
class Condensed:
    """One position: kept ids [k], most likely first, their logits [k] float32, and the tail."""

    ids: np.ndarray
    logits: np.ndarray
    log_sum_exp: float
    tail: Tail


def log_sum_exp(logits: np.ndarray) -> float:
    """Gives log Σ exp of float64 logits [vocab]."""
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))


def condense(logits: np.ndarray, bits: int, most: int = MOST) -> Condensed:
    """Keeps as many of the logits [vocab] float32 as `RELATIVE_WIDTH` needs, at most `most`.

    `bits`, a key of `CODES`, is the size of the tail's codes.
    """
    order = _most_likely(logits, most)
    delta = np.random.default_rng(0).normal(0, TYPICAL_DELTA, len(logits))
    typical = logits + delta
    best = _keep(logits, order, bits)
    if not _is_narrow(kl_bounds(best, typical)):
        return best
    count = LEAST
    while count < len(order):
        found = _keep(logits, order[:count], bits)
        if _is_narrow(kl_bounds(found, typical)):
            return found
        count *= 2
    return best


def _most_likely(logits: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(logits))
    ids = np.argpartition(logits, -count)[-count:]
    return ids[np.argsort(-logits[ids], kind="stable")]


def _is_narrow(kl: "KLBounds") -> bool:
    return kl.high - kl.low <= RELATIVE_WIDTH * kl.low


def _keep(logits: np.ndarray, ids: np.ndarray, bits: int) -> Condensed:
    wide = logits.astype(np.float64)
    total = log_sum_exp(wide)
    rest = np.delete(np.arange(len(wide)), ids)
    tail = _code(wide[rest] - total, rest, len(wide), bits)
    return Condensed(ids, logits[ids].astype(np.float32), total, tail)


def _code(log_p: np.ndarray, rest: np.ndarray, vocab: int, bits: int) -> Tail:
    """The tail of tokens `rest` with these log p, float64."""
    dtype = CODES[bits]
    if not len(rest):
        return Tail(0, 0, 0, 0, 0, None if dtype is None else np.zeros(vocab, dtype))
    p = np.exp(log_p)
    mass, top = float(p.sum()), float(log_p.max())
    if dtype is None:
        return Tail(mass, float(p @ (log_p - top)), 0, top, 0, None)
    last = np.iinfo(dtype).max
    ascending = np.sort(log_p)
    below = int(np.searchsorted(np.cumsum(np.exp(ascending)), _NEGLIGIBLE / last**2 * mass))
    floor = float(ascending[min(below, len(ascending) - 1)])
    step = (top - floor) / last
    found = np.ceil((log_p - floor) / step) if step else np.zeros(len(p))
    codes = np.zeros(vocab, dtype)
    codes[rest] = np.clip(found, 0, last)
    middles = _middles(floor, step, codes[rest])
    offset = float(p @ (log_p - middles))
    moved = float((p - _likely(mass, middles)) @ (log_p - middles))
    return Tail(mass, offset, moved, floor, step, codes)


def _middles(floor: float, step: float, codes: np.ndarray) -> np.ndarray:
    wide = codes.astype(np.float64)
    return floor + np.where(wide > 0, wide - 0.5, 0) * step


def _likely(mass: float, middles: np.ndarray) -> np.ndarray:
    """The estimate of p by the middles alone, of the tail's mass."""
    p = np.exp(middles)
    likely: np.ndarray = p * (mass / p.sum())
    return likely


def lead(position: Condensed, token: int) -> float:
    """Lower bound of the reference's logit of its first choice minus that of `token`."""
    kept = np.flatnonzero(position.ids == token)
    if len(kept):
        other = float(position.logits[kept[0]])
    else:
        tail = position.tail
        code = 0 if tail.codes is None else int(tail.codes[token])
        other = position.log_sum_exp + tail.floor + code * tail.step
    return max(float(position.logits[0]) - other, 0.0)


class KLBounds(NamedTuple):
    """KL(reference ‖ candidate) in nats: surely from `low` to `high`, most likely near `best`.

    `best` estimates the tail's probabilities by the middles of the codes' bounds; without codes, it
    takes them in the candidate's proportions.
    """

    low: float
    best: float
    high: float


def kl_bounds(position: Condensed, candidate: np.ndarray) -> KLBounds:
    """For the candidate's logits [vocab]; NaN where they are not finite."""
    wide = candidate.astype(np.float64)
    log_q = wide - log_sum_exp(wide)
    tail = position.tail
    log_p = position.logits.astype(np.float64) - position.log_sum_exp
    known = float(np.exp(log_p) @ (log_p - log_q[position.ids]))
    rest = np.ones(len(wide), bool)
    rest[position.ids] = False
    if not rest.any() or not tail.mass:
        exact = max(known, 0.0)
        return KLBounds(exact, exact, exact)
    log_q = log_q[rest]
    codes = None if tail.codes is None else tail.codes[rest]
    least, greatest = _extremes(tail, codes, log_q)
    # KL over the tail is smallest where the reference has the candidate's own proportions.
    nearest = tail.mass * (np.log(tail.mass) - log_sum_exp(log_q))
    low = max(known + max(tail.offset - greatest, nearest) - _ROUNDING, 0.0)
    high = max(known + tail.offset - least + _ROUNDING, low)
    likely = nearest if codes is None else tail.offset - _expected(tail, codes, log_q)
    return KLBounds(low, min(max(known + likely, low), high), high)


def _expected(tail: Tail, codes: np.ndarray, log_q: np.ndarray) -> float:
    """Estimates Σ p (log q - a); the error is Σ (p - p̂) (log q - log p)."""
    middles = _middles(tail.floor, tail.step, codes)
    return float(_likely(tail.mass, middles) @ (log_q - middles)) + tail.moved


def _extremes(tail: Tail, codes: np.ndarray | None, log_q: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest Σ p (log q - a) that the tail's bounds and mass allow."""
    if codes is None:
        gain = np.sort(log_q - tail.floor)
        low = np.zeros(len(gain))
        room = np.full(len(gain), np.exp(tail.floor + _SLACK))
    else:
        gain = log_q - _middles(tail.floor, tail.step, codes)
        order = np.argsort(gain)
        gain, codes = gain[order], codes[order]
        edge = tail.floor + codes.astype(np.float64) * tail.step
        low = np.where(codes > 0, np.exp(edge - tail.step - _SLACK), 0)
        room = np.exp(edge + _SLACK) - low
    spare = max(tail.mass - float(low.sum()), 0.0)
    base = float(low @ gain)
    return base + _fill(gain, room, spare), base + _fill(gain[::-1], room[::-1], spare)


def _fill(gain: np.ndarray, room: np.ndarray, amount: float) -> float:
    """Σ of gains for `amount` of mass, filled from the first on up to each one's room."""
    taken = np.diff(np.minimum(np.cumsum(room), amount), prepend=0.0)
    return float(taken @ gain)
