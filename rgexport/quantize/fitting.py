"""Adapts schemes to the shape of a matrix, for formats without padding.

Core ML wants blocks that divide a row and groups that divide the rows, and packs two 4-bit
values to a byte.
"""

from dataclasses import replace

from rgexport.quantize.scheme import Affine, FloatDtype, Mixed, Palette, Scheme

SMALLEST_BLOCK = 8
"""Smaller blocks cost more in scales than they gain."""


def fitted(scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme closest to `scheme` that stores a matrix [N, K] without padding.

    Rows of an odd number of weights are stored in 8 bits.
    """
    if isinstance(scheme, Mixed):
        return scheme.each(lambda one: _fitted_affine(one, shape[1]))
    if isinstance(scheme, Palette):
        if shape[1] % 2:
            return _fitted_affine(_in_8_bits(scheme), shape[1])
        return replace(scheme, group=largest_divisor(shape[0], scheme.group))
    return _fitted_affine(scheme, shape[1]) if isinstance(scheme, Affine) else scheme


def _fitted_affine(scheme: Affine, columns: int) -> Affine:
    if scheme.bits == 4 and columns % 2:
        scheme = replace(scheme, bits=8)
    return replace(scheme, block=fitting_block(columns, scheme))


def fitting_block(columns: int, scheme: Affine) -> int | None:
    """The largest divisor of a row up to the scheme's block; None means the whole row.

    4-bit zero points are packed too, so they need an even number of blocks.
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
    """The scheme with scales or tables in `dtype`."""
    if isinstance(scheme, Mixed):
        return scheme.each(lambda one: replace(one, scale=dtype))
    if isinstance(scheme, Affine):
        return replace(scheme, scale=dtype)
    return replace(scheme, lut=dtype) if isinstance(scheme, Palette) else scheme


def _in_8_bits(scheme: Palette) -> Affine:
    return Affine(8, None, symmetric=True, scale=scheme.lut)
