"""Unsigned integers of 4 and 8 bits, packed into the bytes of rows."""

import numpy as np

_LOW_NIBBLE = np.uint8(15)
_NIBBLE_BITS = np.uint8(4)


def packed_width(count: int, bits: int) -> int:
    """Returns the bytes of so many integers, the last one filled up with zeros."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned values [n, m] of 4 or 8 bits: of two of 4 bits, the even one is low."""
    if bits == 8:
        return values
    padding = values.shape[1] % 2
    padded = np.pad(values, ((0, 0), (0, padding)))
    low = padded[:, ::2]
    high = padded[:, 1::2]
    return np.asarray(low | high << _NIBBLE_BITS)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks bytes uint8 [n, m], also the zeros that pad rows."""
    if bits == 8:
        return packed
    low = packed & _LOW_NIBBLE
    high = packed >> _NIBBLE_BITS
    pairs = np.stack((low, high), -1)
    return pairs.reshape(len(packed), 2 * packed.shape[1])
