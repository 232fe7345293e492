"""Confidence intervals of shares, means and paired differences.

An estimate has its `value`, the `low` and the `high` end of its 95 % interval (None if unknown),
and the `count` of observations; a difference has its `p` instead.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

_SHARE = 0.95
Z = NormalDist().inv_cdf((1 + _SHARE) / 2)
"""Half of a 95 % interval, in standard errors."""
_FLIPS = 9999
"""Random sign vectors of a sign-flip test."""
_FLIPPED_AT_ONCE = 1 << 22
"""Most signs that are drawn in one call, to bound the memory."""

Figure = dict[str, Any]
"""An estimate as JSON."""


def ends(figure: Figure) -> list[float | None]:
    """Returns a value and the two ends of its interval."""
    return [figure["value"], figure["low"], figure["high"]]


def share(right: float, count: int) -> Figure:
    """Returns a share with Wilson's interval (JASA 22, 1927); `right` may be a sum of shares."""
    middle = (right + Z**2 / 2) / (count + Z**2)
    spread = Z / (count + Z**2) * math.sqrt(right * (count - right) / count + Z**2 / 4)

    # The ends of extreme shares are exactly 0 and 1; rounding would miss them.
    low = 0.0
    if right:
        low = max(0.0, middle - spread)
    high = 1.0
    if right < count:
        high = min(1.0, middle + spread)

    return {"value": right / count, "low": low, "high": high, "count": count}


def mean(sums: Sequence[float], counts: Sequence[float]) -> Figure:
    """Returns the mean per item, from sums over clusters of items that are not independent.

    The interval is that of a ratio of two sums (Cochran, Sampling Techniques, chapter 6); it is
    unknown for one cluster.
    """
    estimate = _ratio(np.asarray(sums, np.float64), counts)
    estimate["count"] = int(sum(counts))
    return estimate


def mean_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[float]
) -> Figure:
    """Returns the `mean` of the second's sums minus the first's, cluster by cluster.

    p is that of a sign-flip test (Fisher's randomization test): the share of random signs of the
    differences for which their sum is as far from 0; at least 1 in 10,000.
    """
    gaps = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    estimate = _ratio(gaps, counts)
    estimate["p"] = None
    if estimate["low"] is not None:
        estimate["p"] = _sign_flip_p(gaps)
    return estimate


def _sign_flip_p(gaps: np.ndarray) -> float:
    """Returns the p of a sign-flip test of differences [n]."""
    gaps = gaps[gaps != 0]
    # A sum that differs by rounding alone counts as equally far from 0.
    bound = abs(gaps.sum()) * (1 - 1e-12)
    random = np.random.default_rng(0)
    at_once = max(1, _FLIPPED_AT_ONCE // max(1, len(gaps)))

    reached = 0
    for start in range(0, _FLIPS, at_once):
        rows = min(at_once, _FLIPS - start)
        bits = random.integers(0, 2, (rows, len(gaps)), np.int8)
        signs = bits * np.int8(2) - np.int8(1)
        reached += int((abs(signs @ gaps) >= bound).sum())
    return (reached + 1) / (_FLIPS + 1)


def _ratio(sums: np.ndarray, items: Sequence[float]) -> Figure:
    """Returns the mean per item, and the ends of its 95 % interval."""
    counts = np.asarray(items, np.float64)
    clusters = len(sums)
    value = float(sums.sum() / counts.sum())
    if clusters < 2:
        return {"value": value, "low": None, "high": None}

    residuals = sums - value * counts
    variance = (residuals @ residuals) * clusters / (clusters - 1)
    spread = _student_t(clusters - 1) * math.sqrt(variance) / float(counts.sum())
    return {"value": value, "low": value - spread, "high": value + spread}


def _student_t(freedom: int) -> float:
    """Returns Student's t for `Z`; from 3 on within 1 % (Abramowitz and Stegun, 26.7.5)."""
    if freedom == 1:
        return math.tan(math.pi * _SHARE / 2)
    if freedom == 2:
        return math.sqrt(2 / (1 - _SHARE**2) - 2)
    z = Z
    step = 1 / freedom
    return (
        z
        + (z**3 + z) / 4 * step
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 * step**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 * step**3
    )
