"""Palettes: every weight is one of 16 values, which a group of rows shares.

What is stored, for N rows of K weights:

| part | rows | per row | |
|---|---|---|---|
| `data` | N | ceil(K / 2) bytes | indices, low nibble first |
| `lut` | N / group | 16 float16 or float32 | ascending |

The values of a group minimize its squared error: k-means in one dimension, see `clusters`. They
are rounded to the table's dtype before the nearest of them is chosen for each weight.
"""

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.affine import Parts
from rgexport.quantize.clusters import centers
from rgexport.quantize.nibbles import pack, packed_width, unpack
from rgexport.quantize.scheme import Palette


def part_layouts(
    rows: int, columns: int, scheme: Palette
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name → dtype and shape, for a matrix whose rows are whole groups."""
    return {
        "data": ("uint8", (rows, packed_width(columns, scheme.bits))),
        "lut": (scheme.lut, (rows // scheme.group, 2**scheme.bits)),
    }


def encode(rows: np.ndarray, scheme: Palette) -> Parts:
    """Quantizes rows [n, K] of any float dtype, in whole groups that are independent.

    Raises:
        RequestError: a weight is too large for the table's dtype.
    """
    lut, indices = choose(rows, scheme)
    return pack_parts(indices, lut, scheme)


def choose(rows: np.ndarray, scheme: Palette) -> tuple[np.ndarray, np.ndarray]:
    """Tables [groups, 2**bits] in their dtype, and the index of each weight, uint8 [n, K].

    Raises:
        RequestError: a weight is too large for the table's dtype.
    """
    groups = rows.astype(np.float32).reshape(len(rows) // scheme.group, -1)
    with np.errstate(over="ignore"):
        tables = np.stack([centers(group, 2**scheme.bits) for group in groups])
        lut = tables.astype(scheme.lut)
    if not np.isfinite(lut).all():
        raise RequestError(
            f"weights of {np.abs(groups).max():.4g} are more than {scheme.lut} holds; "
            "take --compute fp32"
        )
    return lut, _nearest(groups, lut.astype(np.float32)).reshape(rows.shape)


def pack_parts(indices: np.ndarray, lut: np.ndarray, scheme: Palette) -> Parts:
    """The parts of indices [n, K] into tables."""
    return {"data": pack(indices, scheme.bits), "lut": lut}


def decode(parts: Parts, scheme: Palette, columns: int) -> np.ndarray:
    """Rows [n, columns] float32 from rows of the parts, in whole groups."""
    lut = parts["lut"].astype(np.float32)
    indices = unpack(parts["data"], scheme.bits)[:, :columns].reshape(len(lut), -1)
    rows = np.take_along_axis(lut, indices.astype(np.intp), axis=1)
    return rows.reshape(-1, columns)


def _nearest(groups: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """The index of the nearest value for each weight [groups, n], in ascending tables.

    15 comparisons are faster than a binary search.
    """
    borders = lut[:, :-1] + (lut[:, 1:] - lut[:, :-1]) / 2
    indices = np.zeros(groups.shape, np.uint8)
    for border in borders.T:
        indices += groups > border[:, None]
    return indices
