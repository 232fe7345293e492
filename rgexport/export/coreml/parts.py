"""How a package stores weights: the parts of a tensor, rows first, and their encoding.

Two's complement is what MIL has where `quantize.affine` counts from -2^(bits-1) up: symmetric data
differ from it in the top bit.
"""

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest import StoredTensor
from rgexport.export.row_groups import grouped_layouts
from rgexport.export.transforms import DECAY, NORM, PLAIN, Transform
from rgexport.griffin.layout import Role, role_of
from rgexport.quantize import affine, algorithms, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.fitting import fitted
from rgexport.quantize.scheme import Affine, Float, FloatDtype, Mixed, Palette, Scheme
from rgexport.quantize.statistics import StatisticsOf

Layouts = dict[str, tuple[str, tuple[int, ...]]]
"""Part name → dtype and shape."""

_SIGNED = {4: "uint8", 8: "int8"}
"""Bits → dtype of integers in two's complement; two of 4 bits are a byte."""
_TOP_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}


def part_layouts(shape: tuple[int, ...], scheme: Scheme) -> Layouts:
    """The parts of a tensor of `shape` that is stored by `scheme`.

    Those of `quantize.affine` and `quantize.palette`, except that the integers of a symmetric
    scheme are signed: MIL then needs no offset.

    Raises:
        RequestError: Core ML has no such scheme for that shape.
    """
    if isinstance(scheme, Float):
        return {"data": (scheme.dtype, shape)}
    if (
        not isinstance(scheme, Affine | Palette | Mixed)
        or len(shape) != 2
        or (isinstance(scheme, Affine | Palette) and scheme.bits not in _SIGNED)
        or fitted(scheme, shape) != scheme
    ):
        raise RequestError(
            f"{scheme.label} is a way to store {list(shape)} that Core ML does not have"
        )
    if isinstance(scheme, Mixed):
        return grouped_layouts(shape, scheme, part_layouts)
    rows, columns = shape
    if isinstance(scheme, Palette):
        return palette.part_layouts(rows, columns, scheme)
    layouts: Layouts = {
        name: (dtype, (rows, width))
        for name, (dtype, width) in affine.part_shapes(columns, scheme).items()
    }
    if scheme.symmetric:
        layouts["data"] = (_SIGNED[scheme.bits], layouts["data"][1])
    return layouts


_TRANSFORMS: dict[Role, Transform] = {"norm": NORM, "a_param": DECAY}


def transform_of(name: str) -> Transform:
    """How the values of the tensor `name` are changed before they are stored."""
    return _TRANSFORMS.get(role_of(name), PLAIN)


def encode(
    statistics: StatisticsOf, name: str, rows: np.ndarray, ids: np.ndarray, stored: StoredTensor
) -> Parts:
    """Rows of a checkpoint, whose numbers are `ids`, as they are stored.

    Raises:
        RequestError: a weight that its scheme cannot hold.
    """
    values = transform_of(name).store(rows.astype(np.float32, copy=False))
    scheme = stored.scheme
    if not isinstance(scheme, Affine):
        return algorithms.encode(name, values, scheme, statistics(name), ids)
    _require_held(name, np.abs(values).max(initial=0), scheme.scale)
    parts = algorithms.encode(name, values, scheme, statistics(name), ids)
    levels = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    steps = np.abs(parts["scales"].astype(np.float32))
    _require_held(name, steps.max(initial=0) * np.float32(levels), scheme.scale)
    return _with_sign(parts, scheme, stored.parts["data"].dtype)


def _require_held(name: str, largest: np.float32, dtype: FloatDtype) -> None:
    """Refuses weights that are infinities where an engine multiplies in the dtype of the scales."""
    with np.errstate(over="ignore"):
        held = np.isfinite(largest.astype(dtype))
    if not held:
        raise RequestError(
            f"{name}: weights of {largest:.4g} are more than {dtype} holds; take --compute fp32"
        )


def decode(name: str, parts: Parts, stored: StoredTensor) -> np.ndarray:
    """The inverse of `encode`: float32 [rows, columns]."""
    columns = int(np.prod(stored.shape[1:], dtype=np.int64))
    scheme = stored.scheme
    if isinstance(scheme, Affine):
        rows = affine.decode(_with_sign(parts, scheme, "uint8"), scheme, columns)
        rows = rows.astype(scheme.scale)  # engines multiply in the dtype of the scales
    elif isinstance(scheme, Palette):
        rows = palette.decode(parts, scheme, columns)
    else:
        rows = parts["data"]
    return transform_of(name).restore(rows.astype(np.float32, copy=False))


def _with_sign(parts: Parts, scheme: Affine, dtype: str) -> Parts:
    if not scheme.symmetric:
        return parts
    return parts | {"data": (parts["data"].view(np.uint8) ^ _TOP_BITS[scheme.bits]).view(dtype)}
