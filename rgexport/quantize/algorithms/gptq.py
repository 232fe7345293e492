"""GPTQ: each weight makes up for the errors of those before it.

GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304), on the scales of a clip
search. Then the scales are fitted to the levels, and each level to all others (coordinate descent).
All of it lowers tr(ΔW H ΔWᵀ); a row that rounding to nearest leaves with less starts from there.
"""

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize import affine, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import search
from rgexport.quantize.scheme import Affine, Palette
from rgexport.quantize.statistics import Hessian, Statistics

_ROUNDS = {True: 1, False: 2}
"""Whether rows are wide → how often levels are refined; the second time gains a few percent."""
_WIDE = 1024


def encode_affine(rows: np.ndarray, scheme: Affine, statistics: Statistics | None) -> Parts:
    """Quantizes rows [n, K]; see `algorithms.Encode`."""
    assert statistics is not None
    nearest, scales, zeros = search.choose(rows, scheme, statistics)
    levels = nearest.reshape(len(rows), nearest.shape[1] * nearest.shape[2])
    for part in statistics.hessians:
        _fill(rows, scheme, part, levels, scales, zeros)
    return affine.pack_parts(levels.reshape(nearest.shape), scales, zeros, scheme)


def _fill(
    rows: np.ndarray,
    scheme: Affine,
    part: Hessian,
    levels: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
) -> None:
    """Replaces the levels of one part of H, and the scales of its blocks."""
    own, size, columns = slice(part.start, part.stop), scheme.block or rows.shape[1], rows.shape[1]
    top = 2**scheme.bits - 1
    if part.start % size or (part.stop % size and part.stop != columns):
        # A block is in two parts: its scale stays, and each column has one of its own.
        places = np.arange(part.start, part.stop) // size
        scale, zero = (np.ascontiguousarray(x[:, places]) for x in (scales, zeros))
        grid = Grid(1, top, scale, -scale * zero)
        levels[:, own] = _chosen(rows[:, own], grid, part, levels[:, own])
        return
    blocks = slice(part.start // size, -(-part.stop // size))
    scale, zero = scales[:, blocks].copy(), zeros[:, blocks].copy()
    grid, half = Grid(size, top, scale, -scale * zero), scheme.scale == "float16"
    levels[:, own] = _chosen(rows[:, own], grid, part, levels[:, own], zero, half)
    scales[:, blocks] = scale


def encode_palette(rows: np.ndarray, scheme: Palette, statistics: Statistics | None) -> Parts:
    """Quantizes rows [n, K] in whole groups; see `algorithms.Encode`."""
    assert statistics is not None
    lut, levels = palette.choose(rows, scheme)
    table = np.repeat(lut.astype(np.float32), scheme.group, axis=0)
    for part in statistics.hessians:
        own = slice(part.start, part.stop)
        grid = Grid(1, 2**scheme.bits - 1, table=table)
        levels[:, own] = _chosen(rows[:, own], grid, part, levels[:, own])
    return palette.pack_parts(levels, lut, scheme)


def choose_levels(
    rows: np.ndarray, grid: Grid, hessians: tuple[Hessian, ...], nearest: np.ndarray
) -> np.ndarray:
    """Levels uint8 [n, K] of rows on a grid that stays as it is, with a scale for each column.

    Args:
        rows: any float dtype [n, K].
        grid: of all columns, with groups of 1.
        hessians: the diagonal blocks of H.
        nearest: uint8 [n, K], what rounding to nearest gives.
    """
    assert grid.group == 1 and grid.scale is not None and grid.offset is not None
    levels = nearest.copy()
    for part in hessians:
        own = slice(part.start, part.stop)
        scale, offset = (np.ascontiguousarray(x[:, own]) for x in (grid.scale, grid.offset))
        levels[:, own] = _chosen(
            rows[:, own], Grid(1, grid.top, scale, offset), part, nearest[:, own]
        )
    return levels


def _chosen(
    rows: np.ndarray,
    grid: Grid,
    part: Hessian,
    nearest: np.ndarray,
    zeros: np.ndarray | None = None,
    half: bool = False,
) -> np.ndarray:
    """Levels uint8 [n, k] for the columns of one part of H; scales of `grid` fit where `zeros`."""
    weights = np.ascontiguousarray(rows, np.float32)
    levels, lost = library.feedback(weights, grid, part.factors)
    nearest = np.ascontiguousarray(nearest)
    worse = lost > library.loss(weights, grid, part.factors, nearest)
    levels[worse] = nearest[worse]
    rounds = _ROUNDS[len(part.matrix) > _WIDE]
    library.refine(weights, grid, part.matrix, levels, rounds=rounds, zeros=zeros, half=half)
    return levels
