"""Functions of arrays that choose the levels of quantized weights, in the native library.

Rows are independent, and every sum has a fixed order: results depend neither on the processor nor
on threads, nor on the rows of one call. Calls do not hold the interpreter's lock.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.kernels.build import Signature, library_path, load_library

LIBRARY = library_path(Path(__file__).parent)


@dataclass(frozen=True)
class Grid:
    """The levels of rows [n, K]: level q has the value `scale · q + offset`, or is in a table.

    Attributes:
        group: columns that share a scale.
        top: the largest level; the least is 0.
        scale: float32 [n, ceil(K / group)], like `offset`.
        table: float32 [n, top + 1], ascending, instead of these.
    """

    group: int
    top: int
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    table: np.ndarray | None = None


@dataclass(frozen=True)
class Factors:
    """H = (I + M) D (I + M)ᵀ for a symmetric H: m [k, k], strictly upper, and d [k], float32."""

    m: np.ndarray
    d: np.ndarray


def unusable() -> str:
    """Returns why the library cannot be used, or "" if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


def search(
    weights: np.ndarray,
    importance: np.ndarray | None,
    bits: int,
    symmetric: bool,
    half: bool,
    scales: np.ndarray,
    zeros: np.ndarray,
) -> np.ndarray:
    """Tries fractions of scales; the one with the least squared error replaces the scale.

    Returns the levels, uint8, of weights, float32 [n, blocks, block]; `block` is a multiple of 16.
    Squared errors are multiplied by the importance, float32 [blocks, block]. Scales of the
    extremes and their zero points, float32 [n, blocks], are changed; if `symmetric`, zero points
    stay, and scales may change their sign. If `half`, scales and `scale · level` are float16.
    """
    count, blocks, block = weights.shape
    levels = np.empty(weights.shape, np.uint8)
    _library().rgexport_search(
        *map(_of, (weights, importance)),
        *(count, blocks, block, bits, symmetric, half),
        *map(_of, (scales, zeros, levels)),
    )
    return levels


def factor(matrix: np.ndarray) -> Factors | None:
    """Factors a symmetric matrix, float64 [k, k], and overwrites it; None if it is not positive."""
    k = len(matrix)
    factors = Factors(np.empty((k, k), np.float32), np.empty(k, np.float32))
    failed = _library().rgexport_factor(_of(matrix), k, _of(factors.m), _of(factors.d))
    return None if failed else factors


def feedback(weights: np.ndarray, grid: Grid, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the levels, uint8 [n, K], column by column; each corrects the errors before it.

    This is LDLQ (arXiv 2307.13304), with the same levels as GPTQ (arXiv 2210.17323). Returns (w −
    v) H (w − v)ᵀ of each row, too, float64 [n].
    """
    levels, lost = np.empty(weights.shape, np.uint8), np.empty(len(weights))
    arrays = map(_of, (factors.m, factors.d, levels, lost))
    _library().rgexport_feedback(*_rows(weights, grid), *arrays)
    return levels, lost


def loss(weights: np.ndarray, grid: Grid, factors: Factors, levels: np.ndarray) -> np.ndarray:
    """Returns (w − v) H (w − v)ᵀ of each row for its levels, float64 [n]."""
    lost = np.empty(len(weights))
    arrays = map(_of, (factors.m, factors.d, levels, lost))
    _library().rgexport_loss(*_rows(weights, grid), *arrays)
    return lost


def refine(
    weights: np.ndarray,
    grid: Grid,
    matrix: np.ndarray,
    levels: np.ndarray,
    *,
    rounds: int,
    zeros: np.ndarray | None = None,
    half: bool = False,
) -> None:
    """Lowers (w − v) H (w − v)ᵀ of rows [n, K] in `rounds`: by new scales, then level by level.

    Changes the levels, uint8 [n, K], and the grid's scales, stored as float16 if `half`, and
    offsets where there are zero points, whole numbers in float32 [n, groups].
    """
    arguments = *_rows(weights, grid), _of(zeros), half, _of(matrix), rounds, _of(levels)
    _library().rgexport_refine(*arguments)


def choose_codes(
    weights: np.ndarray,
    packed: np.ndarray,
    type_number: int,
    codebook: np.ndarray,
    first: int,
    matrix: np.ndarray,
    factors: Factors,
) -> None:
    """Chooses other codes for rows of a ggml i-quant, uint8 [n, row_bytes]; their scales stay.

    No row's (w − v) H (w − v)ᵀ grows. `weights` float32 [n, K]; `codebook` float32 [weights of an
    entry, entries]; H, float32 [k, k], for columns from `first` on, both multiples of 8.
    """
    assert first % 8 == len(matrix) % 8 == 0  # weights that share signs
    codes = type_number, _of(codebook), codebook.shape[1], _of(weights), *weights.shape
    arrays = map(_of, (factors.m, factors.d, matrix))
    _library().rgexport_codebook(*codes, first, len(matrix), *arrays, _of(packed))


def _rows(weights: np.ndarray, grid: Grid) -> tuple[object, ...]:
    sizes = *weights.shape, grid.group, ctypes.c_float(grid.top)
    return _of(weights), *sizes, *map(_of, (grid.scale, grid.offset, grid.table))


def _of(array: np.ndarray | None) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p()
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RequestError(
            f"this needs the library that chooses levels, but {loaded}; or take --quality fast"
        )
    return loaded


_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ROWS = _P, _N, _N, _N, _F, _P, _P, _P
_SIGNATURES: dict[str, Signature] = {
    "search": (None, (_P, _P, _N, _N, _N, _I, _I, _I, _P, _P, _P)),
    "factor": (_I, (_P, _N, _P, _P)),
    "feedback": (None, (*_ROWS, _P, _P, _P, _P)),
    "loss": (None, (*_ROWS, _P, _P, _P, _P)),
    "codebook": (None, (_I, _P, _I, _P, _N, _N, _N, _N, _P, _P, _P, _P)),
    "refine": (None, (*_ROWS, _P, _I, _P, _I, _P)),
}


@cache
def _load() -> ctypes.CDLL | str:
    return load_library(LIBRARY, _SIGNATURES)
