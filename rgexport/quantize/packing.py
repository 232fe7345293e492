"""Integers of 2, 3 or 4 bits in bytes: a stream of bits, the low ones of the first integer first.

That is how ONNX Runtime's `MatMulNBits` and MIL's blobs pack them. A row is padded to whole bytes.
"""

import numpy as np

_TOGETHER = 8
"""Integers of `bits` bits that fill `bits` whole bytes, and at most one word of 32 bits."""
_WORD = np.dtype("<u4")


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` integers of 2, 3, 4 or 8 bits."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of unsigned values [n, m], [n, packed_width(m, bits)]; the padding is zeros."""
    if bits == 8:
        return values
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % _TOGETHER)))
    words = np.zeros((rows, padded.shape[1] // _TOGETHER), _WORD)
    for i in range(_TOGETHER):
        words |= padded[:, i::_TOGETHER].astype(_WORD) << _WORD.type(bits * i)
    packed = words.view(np.uint8).reshape(*words.shape, _WORD.itemsize)[..., :bits]
    return packed.reshape(rows, words.shape[1] * bits)[:, : packed_width(columns, bits)]


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`, except that rows end in the zeros that padded them."""
    if bits == 8:
        return packed
    rows, width = packed.shape
    count = -(-width // bits)
    padded = np.pad(packed, ((0, 0), (0, count * bits - width)))
    words = np.zeros((rows, count, _WORD.itemsize), np.uint8)
    words[..., :bits] = padded.reshape(rows, count, bits)
    words = words.view(_WORD)[..., 0]
    values = np.empty((rows, count, _TOGETHER), np.uint8)
    for i in range(_TOGETHER):
        values[..., i] = (words >> _WORD.type(bits * i)) & _WORD.type(2**bits - 1)
    return values.reshape(rows, count * _TOGETHER)[:, : width * 8 // bits]
