"""The parts of a stored tensor in a Core ML package, rows first."""

from rgexport.errors import RequestError
from rgexport.quantize import affine, palette
from rgexport.quantize.fitting import fitted
from rgexport.quantize.scheme import Affine, Float, Palette, Scheme

Layouts = dict[str, tuple[str, tuple[int, ...]]]
"""Part name → dtype and shape."""

_SIGNED = {4: "uint8", 8: "int8"}
"""Bits → dtype of integers in two's complement; two of 4 bits are a byte."""


def part_layouts(shape: tuple[int, ...], scheme: Scheme) -> Layouts:
    """The parts of a tensor of `shape` that is stored by `scheme`.

    Those of `quantize.affine` and `quantize.palette`, but that the integers of a symmetric scheme
    are signed, for then MIL needs no offset.

    Raises:
        RequestError: Core ML does not have that scheme, or not for that shape.
    """
    if isinstance(scheme, Float):
        return {"data": (scheme.dtype, shape)}
    if (
        not isinstance(scheme, Affine | Palette)
        or len(shape) != 2
        or fitted(scheme, shape) != scheme
    ):
        raise RequestError(
            f"{scheme.label} is a way to store {list(shape)} that Core ML does not have"
        )
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
