"""The parts of a stored tensor in an ONNX artifact, rows first unless they are `COLUMNS`."""

from rgexport.errors import RequestError
from rgexport.export.manifest import COLUMNS
from rgexport.quantize import affine
from rgexport.quantize.scheme import BLOCKS, INT8_ROWS, Affine, Float, Scheme


def part_layouts(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part name → dtype and shape, for a tensor of `shape` that is stored by `scheme`.

    A matrix of int8 with a scale per row is stored by columns, as `MatMulInteger` wants it.

    Raises:
        RequestError: ONNX does not have that scheme.
    """
    if isinstance(scheme, Float):
        return {"data": (scheme.dtype, shape)}
    if scheme == INT8_ROWS:
        rows, columns = shape
        return {COLUMNS: ("uint8", (columns, rows)), "scales": ("float32", (rows, 1))}
    if not isinstance(scheme, Affine) or scheme.block not in BLOCKS or scheme.scale != "float32":
        raise RequestError(f"{scheme.label} is a way to store weights that ONNX does not have")
    rows, columns = shape
    widths = affine.part_shapes(columns, scheme)
    return {name: (dtype, (rows, width)) for name, (dtype, width) in widths.items()}
