"""Block-wise affine quantization, rounded to nearest, and its inverse.

A row of K weights is cut into ceil(K / block) blocks; the last one is padded with zeros. What is
stored is ONNX Runtime's `MatMulNBits` layout (its ContribOperators.md), one row after another:

| part | per row | |
|---|---|---|
| `data` | blocks · block · bits / 8 bytes | unsigned, low nibble first |
| `scales` | blocks float32 | |
| `zero_points` | ceil(blocks · bits / 8) bytes | asymmetric only, low nibble first |
"""

import numpy as np

from rgexport.quantize.scheme import Affine

Parts = dict[str, np.ndarray]
"""Part name → its rows."""

_TINY = np.float32(np.finfo(np.float32).tiny)


def num_blocks(columns: int, scheme: Affine) -> int:
    """Blocks of a row of `columns` weights."""
    return -(-columns // scheme.block)


def part_shapes(columns: int, scheme: Affine) -> dict[str, tuple[str, int]]:
    """Part name → dtype and elements per row, for rows of `columns` weights."""
    blocks = num_blocks(columns, scheme)
    shapes: dict[str, tuple[str, int]] = {
        "data": ("uint8", blocks * scheme.block * scheme.bits // 8),
        "scales": ("float32", blocks),
    }
    if not scheme.symmetric:
        shapes["zero_points"] = ("uint8", -(-blocks * scheme.bits // 8))
    return shapes


def encode(rows: np.ndarray, scheme: Affine) -> Parts:
    """Quantizes rows [n, K] of any float dtype; each row stands for itself."""
    count, columns = rows.shape
    blocks = num_blocks(columns, scheme)
    padded = np.zeros((count, blocks * scheme.block), np.float32)
    padded[:, :columns] = rows
    weights = padded.reshape(count, blocks, scheme.block)
    choose = _symmetric_scales if scheme.symmetric else _asymmetric_scales
    scales, zeros = choose(weights, scheme.bits)

    weights *= np.reciprocal(scales)[..., None]
    np.rint(weights, out=weights)
    weights += zeros[..., None]
    np.clip(weights, 0, 2**scheme.bits - 1, out=weights)
    parts = {
        "data": _pack(padded.astype(np.uint8), scheme.bits),
        "scales": scales,
    }
    if not scheme.symmetric:
        parts["zero_points"] = _pack(zeros.astype(np.uint8), scheme.bits)
    return parts


def decode(parts: Parts, scheme: Affine, columns: int) -> np.ndarray:
    """Rows [n, columns] float32 from rows of the parts."""
    scales = parts["scales"]
    blocks = scales.shape[1]
    shape = (len(scales), blocks, scheme.block)
    weights = _unpack(parts["data"], scheme.bits).astype(np.float32).reshape(shape)
    if scheme.symmetric:
        weights -= 2 ** (scheme.bits - 1)
    else:
        weights -= _unpack(parts["zero_points"], scheme.bits)[:, :blocks, None]
    weights *= scales[..., None]
    return np.ascontiguousarray(weights.reshape(len(scales), blocks * scheme.block)[:, :columns])


def _symmetric_scales(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, blocks] and the fixed zero point, for weights [n, blocks, block].

    The extreme of a block lands on the one level that a two's-complement range has more on one
    side (its scale is negative where that extreme is positive), as in ggml's q4_0: 16 levels
    are used instead of 15.
    """
    high, low = weights.max(-1), weights.min(-1)
    extreme = np.where(high > -low, high, low)
    zero = 2 ** (bits - 1)
    return _nonzero(extreme / np.float32(-zero)), np.full_like(high, zero)


def _asymmetric_scales(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and integer zero points of a range that holds zero and both extremes."""
    high, low = np.maximum(weights.max(-1), 0), np.minimum(weights.min(-1), 0)
    levels = np.float32(2**bits - 1)
    scales = _nonzero((high - low) / levels)
    return scales, np.clip(np.rint(-low / scales), 0, levels)


def _nonzero(scales: np.ndarray) -> np.ndarray:
    """A block of zeros gets the scale 1, so that its reciprocal is finite."""
    return np.where(np.abs(scales) < _TINY, np.float32(1), scales)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of unsigned values [n, m]: two nibbles to a byte for 4 bits, low nibble first."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, ::2] | (values[:, 1::2] << 4)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_pack`, up to a padding nibble at the end of a row."""
    if bits == 8:
        return packed
    values = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    values[:, ::2] = packed & 15
    values[:, 1::2] = packed >> 4
    return values
