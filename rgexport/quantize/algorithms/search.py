"""Clip search: the scale of each block that gives the least squared error.

The largest weights of a block may be clipped, so that all others are nearer to a level. Fractions
of the scale of the extremes are tried, with both signs where levels are symmetric (they are not
quite: int4 has -8, but not 8), and with three zero points where they are not; then the scale is
fitted to the levels. The scale of the extremes itself is among them, so no block is worse than by
rounding to nearest.
"""

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.quantize import affine
from rgexport.quantize.affine import Parts
from rgexport.quantize.scheme import Affine
from rgexport.quantize.statistics import Statistics

_LANES = 16
"""The kernel's blocks are multiples of this."""


def encode(rows: np.ndarray, scheme: Affine, statistics: Statistics | None) -> Parts:
    """Quantizes rows [n, K] of any float dtype; see `algorithms.Encode`."""
    levels, scales, zeros = choose(rows, scheme, statistics)
    return affine.pack_parts(levels, scales, zeros, scheme)


def choose(
    rows: np.ndarray, scheme: Affine, statistics: Statistics | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels uint8 [n, blocks, block], and scales and zero points float32 [n, blocks].

    Where there are statistics, errors are weighed by their importance.

    Raises:
        RequestError: a weight is too large for float16 scales.
    """
    weights = affine.in_blocks(rows, scheme)
    scales, zeros = affine.extreme_scales(weights, scheme)
    importance = None
    if statistics is not None:
        weighs = statistics.importance / statistics.importance.max(initial=np.float32(1e-30))
        importance = _in_lanes(affine.in_blocks(weighs[None], scheme))[0]
    levels = library.search(
        _in_lanes(weights),
        importance,
        scheme.bits,
        scheme.symmetric,
        scheme.scale == "float16",
        scales,
        zeros,
    )
    return levels[..., : weights.shape[2]], scales, zeros


def _in_lanes(weights: np.ndarray) -> np.ndarray:
    """Blocks with zeros behind them, which are without error in any scale."""
    more = -weights.shape[2] % _LANES
    return np.pad(weights, ((0, 0), (0, 0), (0, more))) if more else weights
