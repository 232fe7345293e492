"""Two values of four bits in a byte, low nibble first."""

import numpy as np


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` values of 4 or 8 bits."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of unsigned values [n, m]; a row of an odd number of nibbles ends in a zero."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, ::2] | (values[:, 1::2] << 4)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`, up to a padding nibble at the end of a row."""
    if bits == 8:
        return packed
    values = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    values[:, ::2] = packed & 15
    values[:, 1::2] = packed >> 4
    return values
