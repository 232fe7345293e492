"""Elements of MIL's dtypes in numpy: those of fewer than 8 bits are stored packed."""

import ml_dtypes
import numpy as np

from rgexport.export.mil.program import BITS

_STORED: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def numpy_type(dtype: str) -> np.dtype:
    """The dtype in which the elements are held in memory: 1 byte for those of fewer bits."""
    if BITS[dtype] < 8:
        return np.dtype(dtype.rstrip("0123456789") + "8")
    return _STORED.get(dtype) or np.dtype(dtype)


def unpack(packed: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Elements `[..., count]` of `dtype` from their bytes `[..., n]`, lowest bits first.

    Args:
        packed: uint8.
        dtype: one of `BITS`.
        count: elements of a row.
    """
    bits, held = BITS[dtype], numpy_type(dtype)
    if bits >= 8:
        return packed.view(held)[..., :count]
    if bits == 4:
        pairs = np.stack([packed & 15, packed >> 4], -1)
        elements = pairs.reshape(*packed.shape[:-1], -1)[..., :count]
    else:
        single = np.unpackbits(packed, -1, bitorder="little")[..., : count * bits]
        weights = (1 << np.arange(bits)).astype(np.uint8)
        elements = single.reshape(*packed.shape[:-1], count, bits) @ weights
    if held.kind == "i":
        elements = ((elements << (8 - bits)).view(np.int8)) >> (8 - bits)
    return elements.astype(held, copy=False)
