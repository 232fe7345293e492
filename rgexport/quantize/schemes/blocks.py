"""Blocks of rows: their sizes, the ranges of their weights, and scales as they are stored."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.schemes.base import FloatDtype, Uniform, nbytes_of

BLOCKS = (16, 32, 64, 128)
"""Block sizes that a user may ask for."""

SMALLEST_BLOCK = 8
"""Smaller blocks cost more in scales than they gain."""

_TINY = np.float32(np.finfo(np.float32).tiny)


def with_least_padding(scheme: Any, columns: int) -> Any:
    """Chooses the block size of a scheme: small blocks cost scales, large ones padding.

    Takes any scheme with a `block`, which is the largest size that is tried. Of sizes that cost the
    same, it takes the smallest.
    """

    def row_bytes(candidate: Uniform) -> int:
        return nbytes_of(candidate.part_shapes((1, columns)))

    candidates = [replace(scheme, block=block) for block in BLOCKS if block <= scheme.block]
    return min(candidates, key=row_bytes)


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` up to `limit`, at least 1."""
    size = min(number, limit)
    while number % size:
        size -= 1
    return size


@dataclass(frozen=True)
class BlockRanges:
    """The ranges of weights [rows, columns] in blocks.

    Attributes:
        block: weights of a block; the last block of a row may have fewer.
        columns: weights of a row.
        high: the largest weight of each block, [rows, blocks].
        low: the least weight of each block, [rows, blocks].
    """

    block: int
    columns: int
    high: np.ndarray
    low: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude in each block, [rows, blocks]."""
        return np.maximum(self.high, -self.low)

    @property
    def spans(self) -> np.ndarray:
        """The range of each block from its least to its largest weight, and to 0 at least."""
        return np.maximum(self.high, 0) - np.minimum(self.low, 0)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns the value of its block at each weight, [rows, columns]."""
        repeated = np.repeat(values, self.block, axis=1)
        return repeated[:, : self.columns]


def block_ranges(w: np.ndarray, block: int) -> BlockRanges:
    """Returns the ranges of weights [rows, columns] in blocks of so many columns."""
    columns = w.shape[1]
    starts = np.arange(0, columns, block)
    high = np.maximum.reduceat(w, starts, axis=1)
    low = np.minimum.reduceat(w, starts, axis=1)
    return BlockRanges(block, columns, high, low)


def storable(scales: np.ndarray, dtype: FloatDtype) -> np.ndarray:
    """Returns scales as `dtype` holds them, in float32; 1 for a block of zeros.

    float16 is rounded away from zero. Raises RequestError for a scale that it cannot hold.
    """
    if dtype == "float16":
        scales = _away_from_zero(scales)
    is_zero = np.abs(scales) < _TINY
    return np.where(is_zero, np.float32(1), scales)


def _away_from_zero(scales: np.ndarray) -> np.ndarray:
    """Returns scales rounded to float16 away from zero, as float32."""
    with np.errstate(over="ignore"):
        near = scales.astype(np.float16)
    away = np.nextafter(near, np.copysign(np.float16(np.inf), near))
    is_short = np.abs(near.astype(np.float32)) < np.abs(scales)
    rounded = np.where(is_short, away, near).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise RequestError(
            f"its weights need a scale of {np.abs(scales).max():.4g}, and float16 holds at "
            'most 65504; take a plan with "scale": "float32" for it, or another precision'
        )
    return rounded
