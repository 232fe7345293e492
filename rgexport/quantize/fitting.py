"""Schemes made to fit a matrix, where nothing may be padded.

Core ML wants blocks that divide a row and groups that divide the rows, and packs two 4-bit
values to a byte.
"""

from dataclasses import replace

from rgexport.quantize.scheme import Affine, FloatDtype, Palette, Scheme

SMALLEST_BLOCK = 8
"""A scale for fewer weights than these costs more than it is worth."""


def fitted(scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme nearest to `scheme` that stores a matrix [N, K] without padding.

    Rows of an odd number of weights are not packed: they are stored in 8 bits.
    """
    if isinstance(scheme, Affine | Palette):
        rows, columns = shape
        if scheme.bits == 4 and columns % 2:
            scheme = _in_8_bits(scheme)
        if isinstance(scheme, Palette):
            return replace(scheme, group=largest_divisor(rows, scheme.group))
        return replace(scheme, block=fitting_block(columns, scheme))
    return scheme


def fitting_block(columns: int, scheme: Affine) -> int | None:
    """The largest block that divides a row and is not larger than the scheme's; None: the row.

    Zero points of 4 bits are packed too, so there must be an even number of blocks of them.
    """
    if scheme.bits == 4 and not scheme.symmetric:
        half = columns // 2
        found = largest_divisor(half, scheme.block or half)
        return found if found >= SMALLEST_BLOCK else half
    found = largest_divisor(columns, scheme.block or columns)
    return found if SMALLEST_BLOCK <= found < columns else None


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not larger than `limit`; at least 1."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def with_dtype(scheme: Scheme, dtype: FloatDtype) -> Scheme:
    """The scheme whose scales or tables are of `dtype`."""
    if isinstance(scheme, Affine):
        return replace(scheme, scale=dtype)
    return replace(scheme, lut=dtype) if isinstance(scheme, Palette) else scheme


def _in_8_bits(scheme: Affine | Palette) -> Affine:
    if isinstance(scheme, Palette):
        return Affine(8, None, symmetric=True, scale=scheme.lut)
    return replace(scheme, bits=8)
