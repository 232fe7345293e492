"""GPTQ, and the gain that keeps the size of a matrix's outputs.

GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304): each weight makes up for the
errors of those before it, on the scales of a clip search. Then the scales are fitted to the levels,
and each level to all others (coordinate descent). All of it lowers tr(ΔW H ΔWᵀ); a row that
rounding to nearest leaves with less starts from there.
"""

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.algorithms.statistics import Hessian

_WIDE = 1024
"""Columns from which levels are refined once: a second time gains a few percent."""
_MAX_GAIN = 1.25
"""Largest factor of `output_gain`."""


def choose_levels(
    rows: np.ndarray, grid: Grid, hessians: tuple[Hessian, ...], nearest: np.ndarray
) -> np.ndarray:
    """Returns the levels, uint8 [n, K], of rows on a fixed grid; `nearest` are by rounding.

    The grid has a table for each row, or a scale and an offset for each column.
    """
    levels = nearest.copy()
    for hessian in hessians:
        columns = slice(hessian.start, hessian.stop)
        block_grid = _grid_of_columns(grid, columns)
        levels[:, columns] = refined(rows[:, columns], block_grid, hessian, nearest[:, columns])
    return levels


def _grid_of_columns(grid: Grid, columns: slice) -> Grid:
    """Returns the part of a grid for some columns; a grid of tables, which has none, as it is."""
    if grid.scale is None or grid.offset is None:
        return grid
    scale = np.ascontiguousarray(grid.scale[:, columns])
    offset = np.ascontiguousarray(grid.offset[:, columns])
    return Grid(1, grid.top, scale, offset)


def refined(
    rows: np.ndarray,
    grid: Grid,
    hessian: Hessian,
    nearest: np.ndarray,
    zeros: np.ndarray | None = None,
    half: bool = False,
) -> np.ndarray:
    """Returns levels uint8 [n, k] for the columns of one Hessian, of rows [n, k].

    `nearest`, uint8 [n, k], are the levels by rounding. With `zeros`, the zero points [n, blocks],
    the scales of the grid are fitted, too, in place; `half` rounds them to float16.
    """
    weights = np.ascontiguousarray(rows, np.float32)
    nearest = np.ascontiguousarray(nearest)

    levels, losses = library.feedback(weights, grid, hessian.factors)
    is_worse = losses > library.loss(weights, grid, hessian.factors, nearest)
    levels[is_worse] = nearest[is_worse]

    rounds = 1 if len(hessian.matrix) > _WIDE else 2
    library.refine(weights, grid, hessian.matrix, levels, rounds=rounds, zeros=zeros, half=half)
    return levels


def output_gain(rows: np.ndarray, stored: np.ndarray, hessians: tuple[Hessian, ...]) -> np.ndarray:
    """Returns the factor of each row that gives its outputs their original size, float32 [n].

    It is w H wᵀ / w H ŵᵀ of the weights w and the stored ŵ, from 1 to 1.25. Levels of least error
    make outputs w·x too small, by 10 % with 2 bits. Such errors of many matrices add up, but errors
    of opposite signs do not.
    """
    exact_products = np.zeros(len(rows), np.float64)
    stored_products = np.zeros(len(rows), np.float64)
    for hessian in hessians:
        columns = slice(hessian.start, hessian.stop)
        weights = np.ascontiguousarray(rows[:, columns], np.float32)
        weighted = weights @ hessian.matrix
        exact_products += _row_products(weighted, weights)
        stored_products += _row_products(weighted, stored[:, columns])

    gain = np.ones_like(exact_products)
    np.divide(exact_products, stored_products, out=gain, where=stored_products > 0)
    return gain.clip(1, _MAX_GAIN).astype(np.float32)


def _row_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the dot product of each pair of rows, float64 [n]."""
    return np.einsum("nk,nk->n", a, b, dtype=np.float64)
