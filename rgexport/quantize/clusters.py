"""K-means in one dimension.

Clusters of a line are intervals, so a clustering is a choice of cuts between sorted values. The
best of some hundred cuts are chosen exactly, by dynamic programming (as in Wang and Song,
Ckmeans.1d.dp, 2011), then refined by Lloyd's iterations. With few different values all cuts are
tried, so the result is optimal; with many, the optimum of a grid avoids poor local optima.
"""

import numpy as np

_QUANTILES = 80
"""Cells of the grid between quantiles, which are denser towards both ends."""
_EVEN = 60
"""Cells of equal width. A multiple of 30, so that the cuts of 16 even levels from the least to the
largest value are among those tried, and no result is worse than such levels."""
_ENDS = 12
"""Cells of one value at each end: outliers may deserve a cluster of their own."""
_ROUNDS = 20


def centers(values: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` numbers, float64 ascending, near to `values` [n] by squared distances.

    Up to `count` different values are returned as they are; fewer are padded with the largest.
    """
    ordered = np.sort(values).astype(np.float64)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(changes) < count:
        return np.pad(ordered[[0, *changes]], (0, count - 1 - len(changes)), mode="edge")
    middle = ordered[len(ordered) // 2]
    ordered -= middle  # squares of small numbers: their sums lose fewer digits
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    cuts = _best_cuts(ordered, sums, _possible_cuts(ordered, changes), count)
    return _lloyd(ordered, sums, cuts) + middle


def _possible_cuts(ordered: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Indices where a cut may be, ascending, with 0 and n; `changes` is where values change."""
    last = len(ordered)
    if len(changes) > _QUANTILES + _EVEN + 2 * _ENDS:
        shares = (1 - np.cos(np.linspace(0, np.pi, _QUANTILES + 1)[1:-1])) / 2
        quantiles = ordered[(last * shares).astype(np.intp)]
        even = np.linspace(ordered[0], ordered[-1], _EVEN + 1)[1:-1]
        inner = np.searchsorted(ordered, np.concatenate([quantiles, even]))
        changes = np.concatenate([changes[:_ENDS], inner, changes[-_ENDS:]])
    return np.unique(np.concatenate([[0], changes, [last]]))


def _best_cuts(
    ordered: np.ndarray, sums: np.ndarray, indices: np.ndarray, count: int
) -> np.ndarray:
    """`count + 1` of the indices, with 0 and n, for the least squared error."""
    errors = _interval_errors(ordered, sums, indices)
    least, choices = errors[:, 0], []
    for _ in range(count - 1):
        totals = errors + least
        choices.append(totals.argmin(1))
        least = totals[np.arange(len(indices)), choices[-1]]
    chosen = [len(indices) - 1]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return indices[[0, *reversed(chosen)]]


def _interval_errors(ordered: np.ndarray, sums: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """At [j, i], the squared error of values i to j around their mean; infinite for j < i."""
    squares = np.add.reduceat(ordered * ordered, indices[:-1])
    squares = np.concatenate([[0.0], np.cumsum(squares)])
    n, first, second = (x[:, None] - x for x in (indices, sums[indices], squares))
    errors = second - first * first / np.maximum(n, 1)
    return np.where(n < 0, np.inf, np.maximum(errors, 0))


def _lloyd(ordered: np.ndarray, sums: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Means between cuts, after rounds of moving each cut midway between its two means."""
    means = _means(ordered, sums, cuts)
    for _ in range(_ROUNDS):
        inner = np.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        if np.array_equal(inner, cuts[1:-1]):
            break
        cuts = np.concatenate([[0], inner, [len(ordered)]])
        means = _means(ordered, sums, cuts)
    return means


def _means(ordered: np.ndarray, sums: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The mean between each two cuts; for an empty interval, the value that follows."""
    counts = np.diff(cuts)
    next_values = ordered[np.minimum(cuts[:-1], len(ordered) - 1)]
    return np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), next_values)
