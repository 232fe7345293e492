"""Integers of 2, 3 or 4 bits in bytes: a stream of bits, the low ones of the first integer first.

ONNX Runtime's `MatMulNBits` and MIL's blobs pack them likewise. A row is padded to whole bytes.
"""

import numpy as np

_COUNT = 8  # integers of `bits` bits that fill `bits` whole bytes, and at most 32 bits
_UINT32 = np.dtype("<u4")


def packed_width(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned values [n, m], [n, packed_width(m, bits)]; the padding is zeros."""
    if bits == 8:
        return values
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % _COUNT)))
    integers = np.zeros((rows, padded.shape[1] // _COUNT), _UINT32)
    for i in range(_COUNT):
        integers |= padded[:, i::_COUNT].astype(_UINT32) << _UINT32.type(bits * i)
    packed = integers.view(np.uint8).reshape(*integers.shape, _UINT32.itemsize)[..., :bits]
    return packed.reshape(rows, integers.shape[1] * bits)[:, : packed_width(columns, bits)]


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Inverts `pack`, except that rows end in the zeros that padded them."""
    if bits == 8:
        return packed
    rows, width = packed.shape
    count = -(-width // bits)
    padded = np.pad(packed, ((0, 0), (0, count * bits - width)))
    integers = np.zeros((rows, count, _UINT32.itemsize), np.uint8)
    integers[..., :bits] = padded.reshape(rows, count, bits)
    integers = integers.view(_UINT32)[..., 0]
    values = np.empty((rows, count, _COUNT), np.uint8)
    for i in range(_COUNT):
        values[..., i] = (integers >> _UINT32.type(bits * i)) & _UINT32.type(2**bits - 1)
    return values.reshape(rows, count * _COUNT)[:, : width * 8 // bits]
