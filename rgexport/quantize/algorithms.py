"""The algorithms that choose scales, zero points and levels: their registry, GPTQ and k-means.

GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304): each weight makes up for the
errors of those before it, on the scales of a clip search. Then the scales are fitted to the levels,
and each level to all others (coordinate descent). All of it lowers tr(ΔW H ΔWᵀ); a row that
rounding to nearest leaves with less starts from there.

K-means of numbers: a clustering is a choice of cuts between sorted values. The best of some hundred
cuts are chosen exactly, by dynamic programming (as in Wang and Song, Ckmeans.1d.dp, 2011), then
refined by Lloyd's iterations.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.statistics import Hessian


@dataclass(frozen=True)
class Algorithm:
    """An algorithm's name for people, and whether it needs statistics of a matrix's inputs."""

    title: str
    needs_statistics: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "cast": Algorithm("rounding to the type"),
    "rtn": Algorithm("rounding to nearest"),
    "search": Algorithm("clip search"),
    "importance": Algorithm("clip search weighed by importance", needs_statistics=True),
    "kmeans": Algorithm("k-means"),
    "ggml": Algorithm("the rules of llama-quantize"),
    "gptq": Algorithm("GPTQ", needs_statistics=True),
}
"""`rtn` rounds to nearest on the scale of the extremes."""


_WIDE = 1024  # columns from which levels are refined once: a second time gains a few percent


def choose_levels(
    rows: np.ndarray, grid: Grid, hessians: tuple[Hessian, ...], nearest: np.ndarray
) -> np.ndarray:
    """Returns the levels, uint8 [n, K], of rows on a fixed grid; `nearest` are by rounding.

    The grid has a table for each row, or a scale and an offset for each column.
    """
    levels = nearest.copy()
    for hessian in hessians:
        columns = slice(hessian.start, hessian.stop)
        column_grid = grid
        if grid.scale is not None and grid.offset is not None:
            scale, offset = (np.ascontiguousarray(x[:, columns]) for x in (grid.scale, grid.offset))
            column_grid = Grid(1, grid.top, scale, offset)
        levels[:, columns] = refined(rows[:, columns], column_grid, hessian, nearest[:, columns])
    return levels


def refined(
    rows: np.ndarray,
    grid: Grid,
    hessian: Hessian,
    nearest: np.ndarray,
    zeros: np.ndarray | None = None,
    half: bool = False,
) -> np.ndarray:
    """Returns levels uint8 [n, k] for the columns of one Hessian; with `zeros`, fits scales too."""
    weights = np.ascontiguousarray(rows, np.float32)
    levels, losses = library.feedback(weights, grid, hessian.factors)
    nearest = np.ascontiguousarray(nearest)
    worse = losses > library.loss(weights, grid, hessian.factors, nearest)
    levels[worse] = nearest[worse]
    rounds = 1 if len(hessian.matrix) > _WIDE else 2
    library.refine(weights, grid, hessian.matrix, levels, rounds=rounds, zeros=zeros, half=half)
    return levels


_MOST_GAIN = 1.25


def output_gain(rows: np.ndarray, stored: np.ndarray, hessians: tuple[Hessian, ...]) -> np.ndarray:
    """Returns what each row's outputs should be multiplied by to have their size, float32 [n].

    Levels of least error make outputs w·x too small, by 10 % with 2 bits. Such errors of many
    matrices add up, as those of opposite signs do not.
    """
    exact, stored_size = np.zeros((2, len(rows)), np.float64)
    for hessian in hessians:
        columns = slice(hessian.start, hessian.stop)
        weights = np.ascontiguousarray(rows[:, columns], np.float32)
        products = weights @ hessian.matrix
        exact += np.einsum("nk,nk->n", products, weights, dtype=np.float64)
        stored_size += np.einsum("nk,nk->n", products, stored[:, columns], dtype=np.float64)
    gain = np.divide(exact, stored_size, out=np.ones_like(exact), where=stored_size > 0)
    return gain.clip(1, _MOST_GAIN).astype(np.float32)


_QUANTILES = 80  # cells of the grid between quantiles, which are denser towards both ends
_EVEN = 60
"""Cells of equal width. A multiple of 30, so that the cuts of 16 even levels from the least to the
largest value are among those tried, and no result is worse than such levels."""
_ENDS = 12  # cells of one value at each end: outliers may deserve a cluster of their own
_ROUNDS = 20


def centers(values: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` numbers, float64 ascending, with small squared distances from `values` [n].

    Up to `count` different values are returned as they are, the last one repeated.
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
    """Returns indices where a cut may be, with 0 and n; `changes` are where values change."""
    count = len(ordered)
    if len(changes) > _QUANTILES + _EVEN + 2 * _ENDS:
        shares = (1 - np.cos(np.linspace(0, np.pi, _QUANTILES + 1)[1:-1])) / 2
        quantiles = ordered[(count * shares).astype(np.intp)]
        even = np.linspace(ordered[0], ordered[-1], _EVEN + 1)[1:-1]
        inner = np.searchsorted(ordered, np.concatenate([quantiles, even]))
        changes = np.concatenate([changes[:_ENDS], inner, changes[-_ENDS:]])
    return np.unique(np.concatenate([[0], changes, [count]]))


def _best_cuts(
    ordered: np.ndarray, sums: np.ndarray, indices: np.ndarray, count: int
) -> np.ndarray:
    squares = np.add.reduceat(ordered * ordered, indices[:-1])
    squares = np.concatenate([[0.0], np.cumsum(squares)])
    n, first, second = (x[:, None] - x for x in (indices, sums[indices], squares))
    errors = second - first * first / np.maximum(n, 1)
    # At [j, i]: the squared error of values i to j around their mean; inf for j < i.
    errors = np.where(n < 0, np.inf, np.maximum(errors, 0))
    least, choices = errors[:, 0], []
    for _ in range(count - 1):
        totals = errors + least
        choices.append(totals.argmin(1))
        least = totals[np.arange(len(indices)), choices[-1]]
    chosen = [len(indices) - 1]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return indices[[0, *reversed(chosen)]]


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
    return np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), next_values)
