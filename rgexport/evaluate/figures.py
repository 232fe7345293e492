"""How sure a figure is: intervals of shares and of means, and differences of pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)
"""Half of a 95 % interval, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval, None if unknown, and how many observations it is of."""

    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second minus first over the same observations, its 95 % interval, and the p value of 0.

    Interval and p are None if unknown.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None


def share(right: int, count: int) -> Estimate:
    """A share with Wilson's interval (JASA 22, 1927), which stays in [0, 1]."""
    middle = (right + Z**2 / 2) / (count + Z**2)
    spread = Z / (count + Z**2) * math.sqrt(right * (count - right) / count + Z**2 / 4)
    return Estimate(
        value=right / count,
        low=max(0.0, middle - spread) if right else 0.0,
        high=min(1.0, middle + spread) if right < count else 1.0,
        count=count,
    )


def mean(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """A mean per item, from sums over clusters of items whose errors are not independent.

    The interval is that of the ratio of two sums, from the spread of the clusters (Cochran,
    Sampling Techniques, chapter 6). With one cluster it is unknown.
    """
    total, items = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    value, spread = _ratio(total, items)
    low, high = _around(value, spread)
    return Estimate(value=value, low=low, high=high, count=int(items.sum()))


def mean_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[float]
) -> Difference:
    """As `mean`, of what the second's sums are above the first's, cluster by cluster."""
    gaps = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    value, spread = _ratio(gaps, np.asarray(counts, np.float64))
    low, high = _around(value, spread)
    return Difference(value=value, low=low, high=high, p=_p(value, spread))


def _p(value: float, spread: float | None) -> float | None:
    if not spread:
        return None if spread is None else float(value == 0)
    return 2 * (1 - _NORMAL.cdf(abs(value) / spread * Z))


def _around(value: float, spread: float | None) -> tuple[float | None, float | None]:
    return (None, None) if spread is None else (value - spread, value + spread)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """The sums' total per item, and half of its 95 % interval."""
    clusters, value = len(sums), float(sums.sum() / counts.sum())
    if clusters < 2:
        return value, None
    rest = sums - value * counts
    variance = (rest @ rest) * clusters / (clusters - 1)
    return value, Z * math.sqrt(variance) / float(counts.sum())
