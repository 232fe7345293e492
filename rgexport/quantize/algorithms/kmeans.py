"""K-means of numbers, the algorithm of palettes.

A clustering of numbers is a choice of cuts between sorted values. The best of some hundred cuts are
chosen exactly, by dynamic programming (Wang and Song, Ckmeans.1d.dp, The R Journal 2011), then
refined by Lloyd's iterations.
"""

import numpy as np

_QUANTILES = 80
"""Cells of the grid between quantiles, which are denser towards both ends."""
_EVEN = 60
"""Cells of equal width.

A multiple of 30, so that the cuts of 16 even levels from the least to the largest value are among
those tried, and no result is worse than such levels.
"""
_ENDS = 12
"""Cells of one value at each end: outliers may deserve a cluster of their own."""
_ROUNDS = 20
"""Lloyd's iterations at most; most inputs need fewer."""


def centers(values: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` numbers, float64 ascending, with small squared distances from `values` [n].

    Up to `count` different values are returned as they are, the last one repeated.
    """
    ordered = np.sort(values).astype(np.float64)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(changes) < count:
        distinct = ordered[[0, *changes]]
        return np.pad(distinct, (0, count - len(distinct)), mode="edge")

    middle = ordered[len(ordered) // 2]
    ordered -= middle  # squares of small numbers: their sums lose fewer digits
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    candidates = _candidate_cuts(ordered, changes)
    cuts = _best_cuts(ordered, sums, candidates, count)
    return _lloyd(ordered, sums, cuts) + middle


def _candidate_cuts(ordered: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Returns indices where a cut may be, with 0 and n; `changes` are where values change."""
    count = len(ordered)
    if len(changes) > _QUANTILES + _EVEN + 2 * _ENDS:
        angles = np.linspace(0, np.pi, _QUANTILES + 1)[1:-1]
        shares = (1 - np.cos(angles)) / 2
        quantiles = ordered[(count * shares).astype(np.intp)]
        even = np.linspace(ordered[0], ordered[-1], _EVEN + 1)[1:-1]
        inner = np.searchsorted(ordered, np.concatenate([quantiles, even]))
        changes = np.concatenate([changes[:_ENDS], inner, changes[-_ENDS:]])
    return np.unique(np.concatenate([[0], changes, [count]]))


def _best_cuts(
    ordered: np.ndarray, sums: np.ndarray, candidates: np.ndarray, count: int
) -> np.ndarray:
    """Returns the `count` + 1 candidates that cut the values into the best `count` clusters.

    `sums` are the prefix sums of the values. The result begins with 0 and ends with n.
    """
    errors = _cluster_errors(ordered, sums, candidates)
    least = errors[:, 0]
    choices = []
    for _ in range(count - 1):
        totals = errors + least
        choice = totals.argmin(1)
        choices.append(choice)
        least = totals[np.arange(len(candidates)), choice]

    path = [len(candidates) - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    path.append(0)
    return candidates[path[::-1]]


def _cluster_errors(ordered: np.ndarray, sums: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Returns errors [j, i]: the squared error of values i to j around their mean, inf for j < i.

    The error is Σ x² - (Σ x)² / n, from differences of prefix sums.
    """
    squares = np.add.reduceat(ordered * ordered, candidates[:-1])
    square_sums = np.concatenate([[0.0], np.cumsum(squares)])

    n = _differences(candidates)
    first = _differences(sums[candidates])
    second = _differences(square_sums)
    errors = second - first * first / np.maximum(n, 1)
    return np.where(n < 0, np.inf, np.maximum(errors, 0))


def _differences(prefix: np.ndarray) -> np.ndarray:
    """Returns prefix[j] - prefix[i] at [j, i]."""
    return prefix[:, None] - prefix


def _lloyd(ordered: np.ndarray, sums: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Returns the means between cuts, after some rounds that move cuts midway between means."""
    means = _means(ordered, sums, cuts)
    for _ in range(_ROUNDS):
        inner = np.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        if np.array_equal(inner, cuts[1:-1]):
            break
        cuts = np.concatenate([[0], inner, [len(ordered)]])
        means = _means(ordered, sums, cuts)
    return means


def _means(ordered: np.ndarray, sums: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Returns the mean between each two cuts; for an empty interval, the value that follows."""
    counts = np.diff(cuts)
    next_values = ordered[np.minimum(cuts[:-1], len(ordered) - 1)]
    means = np.diff(sums[cuts]) / np.maximum(counts, 1)
    return np.where(counts > 0, means, next_values)
