"""The layout of block-wise affine quantization; rounding to nearest, and the inverse.

A row of K weights is cut into ceil(K / block) blocks; the last one is padded with zeros. What is
stored is ONNX Runtime's `MatMulNBits` layout (its ContribOperators.md), one row after another:

| part | per row | |
|---|---|---|
| `data` | ceil(blocks · block · bits / 8) bytes | unsigned, low nibble first |
| `scales` | blocks float32 or float16 | |
| `zero_points` | ceil(blocks · bits / 8) bytes | asymmetric only, low nibble first |

Scales are rounded to float16 before the integers are chosen, and away from zero, so that no weight
is beyond the last level.
"""

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.nibbles import pack, packed_width, unpack
from rgexport.quantize.scheme import Affine, FloatDtype

Parts = dict[str, np.ndarray]
"""Part name → its rows."""

_TINY = np.float32(np.finfo(np.float32).tiny)


def block_size(columns: int, scheme: Affine) -> int:
    """Weights that share a scale, in rows of `columns` weights."""
    return scheme.block or columns


def num_blocks(columns: int, scheme: Affine) -> int:
    """Blocks of a row of `columns` weights."""
    return -(-columns // block_size(columns, scheme))


def part_shapes(columns: int, scheme: Affine) -> dict[str, tuple[str, int]]:
    """Part name → dtype and elements per row, for rows of `columns` weights."""
    blocks = num_blocks(columns, scheme)
    padded = blocks * block_size(columns, scheme)
    shapes: dict[str, tuple[str, int]] = {
        "data": ("uint8", packed_width(padded, scheme.bits)),
        "scales": (scheme.scale, blocks),
    }
    if not scheme.symmetric:
        shapes["zero_points"] = ("uint8", packed_width(blocks, scheme.bits))
    return shapes


def encode(rows: np.ndarray, scheme: Affine) -> Parts:
    """Quantizes rows [n, K] of any float dtype, each independently of the others.

    Raises:
        RequestError: the weights of a block need a larger scale than float16 holds.
    """
    weights = in_blocks(rows, scheme)
    scales, zeros = extreme_scales(weights, scheme)
    weights *= np.reciprocal(scales)[..., None]
    np.rint(weights, out=weights)
    weights += zeros[..., None]
    np.clip(weights, 0, 2**scheme.bits - 1, out=weights)
    return pack_parts(weights.astype(np.uint8), scales, zeros, scheme)


def in_blocks(rows: np.ndarray, scheme: Affine) -> np.ndarray:
    """Rows [n, K] as float32 [n, blocks, block], with zeros at the end of the last block."""
    count, columns = rows.shape
    blocks, block = num_blocks(columns, scheme), block_size(columns, scheme)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    return padded.reshape(count, blocks, block)


def extreme_scales(weights: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points float32 [n, blocks] by the extremes of blocks [n, blocks, block].

    Raises:
        RequestError: a weight is too large for float16 scales.
    """
    choose = _symmetric_scales if scheme.symmetric else _asymmetric_scales
    return choose(weights, scheme)


def pack_parts(levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray, scheme: Affine) -> Parts:
    """The parts of levels uint8 [n, blocks, block] with scales and zero points [n, blocks]."""
    count, blocks, block = levels.shape
    parts = {
        "data": pack(levels.reshape(count, blocks * block), scheme.bits),
        "scales": scales.astype(scheme.scale),
    }
    if not scheme.symmetric:
        parts["zero_points"] = pack(zeros.astype(np.uint8), scheme.bits)
    return parts


def decode(parts: Parts, scheme: Affine, columns: int) -> np.ndarray:
    """Rows [n, columns] float32 from rows of the parts."""
    scales = parts["scales"].astype(np.float32)
    count, blocks = scales.shape
    shape = (count, blocks, block_size(columns, scheme))
    levels = unpack(parts["data"], scheme.bits)[:, : shape[1] * shape[2]]
    weights = levels.astype(np.float32).reshape(shape)
    if scheme.symmetric:
        weights -= 2 ** (scheme.bits - 1)
    else:
        weights -= unpack(parts["zero_points"], scheme.bits)[:, :blocks, None]
    weights *= scales[..., None]
    return np.ascontiguousarray(weights.reshape(count, shape[1] * shape[2])[:, :columns])


def _symmetric_scales(weights: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, blocks] and the fixed zero point, for weights [n, blocks, block].

    As in ggml's q4_0, the extreme of a block gets the level -2**(bits - 1), with a negative scale
    where the extreme is positive: so 16 levels are used instead of 15.
    """
    high, low = weights.max(-1), weights.min(-1)
    extreme = np.where(high > -low, high, low)
    zero = 2 ** (scheme.bits - 1)
    scales = _storable(extreme / np.float32(-zero), scheme.scale)
    return scales, np.full_like(high, zero)


def _asymmetric_scales(weights: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scales and integer zero points of a range that contains zero and both extremes."""
    high, low = np.maximum(weights.max(-1), 0), np.minimum(weights.min(-1), 0)
    levels = 2**scheme.bits - 1
    scales = _storable((high - low) / np.float32(levels), scheme.scale)
    return scales, np.clip(np.rint(-low / scales), 0, levels)


def _storable(scales: np.ndarray, dtype: FloatDtype) -> np.ndarray:
    """Scales rounded to `dtype`, as float32; 1 for a block of zeros.

    Raises:
        RequestError: a scale is more than `dtype` can hold.
    """
    if dtype == "float16":
        needed, scales = np.abs(scales).max(initial=0), _away_from_zero(scales)
        if not np.isfinite(scales).all():
            raise RequestError(
                f"its weights need a scale of {needed:.4g}, and float16 holds at most 65504; "
                'take a plan with "scale": "float32" for it, or another precision'
            )
    return np.where(np.abs(scales) < _TINY, np.float32(1), scales)


def _away_from_zero(scales: np.ndarray) -> np.ndarray:
    """Rounds to float16, away from zero: at least to 2⁻²⁴, except for zero itself."""
    with np.errstate(over="ignore"):
        near = scales.astype(np.float16)
    away = np.nextafter(near, np.copysign(np.float16(np.inf), near))
    short = np.abs(near.astype(np.float32)) < np.abs(scales)
    return np.where(short, away, near).astype(np.float32)
