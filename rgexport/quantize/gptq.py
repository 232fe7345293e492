"""GPTQ: each weight makes up for the errors of those before it.

GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304), on the scales of a clip
search. Then the scales are fitted to the levels, and each level to all others (coordinate descent).
All of it lowers tr(ΔW H ΔWᵀ); a row that rounding to nearest leaves with less starts from there.
"""

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.statistics import Hessian

_ROUNDS = {True: 1, False: 2}
"""Whether rows are wide → how often levels are refined; the second time gains a few percent."""
_WIDE = 1024


def refill_blocks(
    rows: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    hessian: Hessian,
    block: int,
    top: int,
    half: bool,
) -> None:
    """Replaces the levels uint8 [n, at least K] of one diagonal block of H, and their scales.

    `rows` are [n, K], `scales` and `zeros` float32 [n, blocks], `half` is for float16 scales.
    """
    columns = slice(hessian.start, hessian.stop)
    weights, nearest = rows[:, columns], levels[:, columns]
    if hessian.start % block or (hessian.stop % block and hessian.stop != rows.shape[1]):
        # A quantization block is in two Hessians: its scale stays, and counts for each column.
        blocks = np.arange(hessian.start, hessian.stop) // block
        scale, zero = (np.ascontiguousarray(x[:, blocks]) for x in (scales, zeros))
        levels[:, columns] = _chosen(weights, Grid(1, top, scale, -scale * zero), hessian, nearest)
        return
    spanned = slice(hessian.start // block, -(-hessian.stop // block))
    scale, zero = scales[:, spanned].copy(), zeros[:, spanned].copy()
    grid = Grid(block, top, scale, -scale * zero)
    levels[:, columns] = _chosen(weights, grid, hessian, nearest, zero, half)
    scales[:, spanned] = scale


def choose_levels(
    rows: np.ndarray, grid: Grid, hessians: tuple[Hessian, ...], nearest: np.ndarray
) -> np.ndarray:
    """Returns levels uint8 [n, K] of rows on a fixed grid, from those `nearest` to them.

    The grid is a table for each row, or a scale and an offset for each column.
    """
    levels = nearest.copy()
    for hessian in hessians:
        columns = slice(hessian.start, hessian.stop)
        column_grid = grid
        if grid.scale is not None and grid.offset is not None:
            scale, offset = (np.ascontiguousarray(x[:, columns]) for x in (grid.scale, grid.offset))
            column_grid = Grid(1, grid.top, scale, offset)
        levels[:, columns] = _chosen(rows[:, columns], column_grid, hessian, nearest[:, columns])
    return levels


def _chosen(
    rows: np.ndarray,
    grid: Grid,
    hessian: Hessian,
    nearest: np.ndarray,
    zeros: np.ndarray | None = None,
    half: bool = False,
) -> np.ndarray:
    """Levels uint8 [n, k] of the columns of one Hessian; with `zeros`, scales are fitted."""
    weights = np.ascontiguousarray(rows, np.float32)
    levels, lost = library.feedback(weights, grid, hessian.factors)
    nearest = np.ascontiguousarray(nearest)
    worse = lost > library.loss(weights, grid, hessian.factors, nearest)
    levels[worse] = nearest[worse]
    rounds = _ROUNDS[len(hessian.matrix) > _WIDE]
    library.refine(weights, grid, hessian.matrix, levels, rounds=rounds, zeros=zeros, half=half)
    return levels
