"""ggml's types: as llama-quantize fills them, or with levels by GPTQ.

Scales and minimums are always those of ggml's own search, with importances where there are some.
GPTQ then chooses other levels on them, and any llama.cpp reads the rows as before.
"""

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import gptq
from rgexport.quantize.ggml_grid import GRID_TYPES, grid_of, with_levels
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.scheme import Ggml
from rgexport.quantize.statistics import Statistics


def encode(rows: np.ndarray, scheme: Ggml, statistics: Statistics | None) -> Parts:
    """Quantizes rows [n, K] as llama-quantize does; see `algorithms.Encode`."""
    importance = None if statistics is None else statistics.importance
    return {"data": quantize_rows(rows, scheme.type, importance)}


def encode_gptq(rows: np.ndarray, scheme: Ggml, statistics: Statistics | None) -> Parts:
    """The same with levels by GPTQ; types of floats have none."""
    assert statistics is not None
    kind, parts = scheme.type, encode(rows, scheme, statistics)
    if kind not in GRID_TYPES:
        return parts
    grid = grid_of(parts["data"], kind)
    columns = (np.repeat(part, grid.group, axis=1) for part in (grid.scale, grid.offset))
    levels = gptq.choose_levels(
        rows, library.Grid(1, grid.top, *columns), statistics.hessians, grid.levels
    )
    return {"data": with_levels(parts["data"], kind, levels)}
