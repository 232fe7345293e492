"""Types of the results of products, reductions, packed weights and states."""

from collections.abc import Callable

from rgexport.export.mil.program import BITS, TensorType
from rgexport.export.mil.signatures import (
    ALL,
    FLAG,
    FLOATS,
    NUMBERS,
    SETTING,
    WORD,
    Arguments,
    Misfit,
    Signature,
    Slot,
    broadcast,
    checked_axis,
)

_QUANTIZED = frozenset({"int4", "uint4", "int8", "uint8"}) | FLOATS
_INDICES = frozenset({"uint1", "uint2", "uint3", "uint4", "uint6", "uint8"})

LINEAR: Signature = {
    "x": Slot(NUMBERS),
    "weight": Slot(NUMBERS, "U", constant=True),
    "bias": Slot(NUMBERS, "U", constant=True, optional=True),
}
MATMUL: Signature = {
    "x": Slot(NUMBERS),
    "y": Slot(NUMBERS),
    "transpose_x": FLAG,
    "transpose_y": FLAG,
}
REDUCE: Signature = {"x": Slot(NUMBERS), "axes": SETTING, "keep_dims": FLAG}
ARG_REDUCE: Signature = {
    "x": Slot(NUMBERS),
    "axis": SETTING,
    "keep_dims": FLAG,
    "output_dtype": WORD,
}
SOFTMAX: Signature = {"x": Slot(FLOATS), "axis": SETTING}
CUMSUM: Signature = {"x": Slot(NUMBERS), "axis": SETTING, "exclusive": FLAG, "reverse": FLAG}
BLOCKWISE: Signature = {
    "data": Slot(_QUANTIZED, constant=True),
    "scale": Slot(FLOATS, constant=True),
    "offset": Slot(_QUANTIZED, constant=True, optional=True),
}
LUT: Signature = {
    "indices": Slot(_INDICES, constant=True),
    "lut": Slot(frozenset({"int8", "uint8"}) | FLOATS, constant=True),
    "vector_axis": SETTING,
}
READ_STATE: Signature = {"input": Slot(ALL, state=True)}
WRITE_STATE: Signature = {"input": Slot(ALL, "T", state=True), "data": Slot(ALL, "T")}


def linear(given: Arguments) -> list[TensorType]:
    """X · weightᵀ + bias, in the dtype of x."""
    x, weight = given.shape("x"), given.shape("weight")
    if len(weight) != 2 or not x or x[-1] != weight[1]:
        raise Misfit(f"its weight has the shape {list(weight)}, its x {list(x)}")
    if given.has("bias") and given.shape("bias") != weight[:1]:
        raise Misfit(f"its bias has the shape {list(given.shape('bias'))}; expected [{weight[0]}]")
    return [TensorType(given.type("x").dtype, (*x[:-1], weight[0]))]


def matmul(given: Arguments) -> list[TensorType]:
    """Products of matrices in the last two axes; the axes before are stretched."""
    x, y = _matrix(given, "x"), _matrix(given, "y")
    (dtype, other), fixed = (given.type(name).dtype for name in "xy"), given.constant("x")
    if dtype != other and fixed == given.constant("y"):
        raise Misfit(f"its x is {dtype} and its y {other}; expected one dtype")
    if x[-1] != y[-2]:
        raise Misfit(f"it multiplies {list(x)} by {list(y)}")
    shape = (*broadcast(x[:-2], y[:-2]), x[-2], y[-1])
    if len(given.shape("x")) == 1:
        shape = (*shape[:-2], shape[-1])
    return [TensorType(other if fixed else dtype, shape)]


def _matrix(given: Arguments, name: str) -> tuple[int, ...]:
    shape, turned = given.shape(name), bool(given.integer(f"transpose_{name}", 0))
    if len(shape) < (1 if name == "x" else 2) or turned and len(shape) < 2:
        raise Misfit(f"its {name} has the shape {list(shape)}; expected a matrix")
    shape = (1,) * (2 - len(shape)) + shape
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


def reduced(given: Arguments) -> list[TensorType]:
    """X without the axes, or with axes of size 1 in their place."""
    rank = len(given.shape("x"))
    axes = given.axes("axes", rank) if given.has("axes") else tuple(range(rank))
    return [TensorType(given.type("x").dtype, _without(given, axes))]


def arg_reduced(given: Arguments) -> list[TensorType]:
    """Indices along an axis."""
    dtype = given.word("output_dtype", "int32")
    if dtype not in ("int32", "uint16"):
        raise Misfit(f"its input output_dtype is {dtype!r}; expected int32 or uint16")
    axis = given.axis("axis", -1, len(given.shape("x")))
    return [TensorType(dtype, _without(given, (axis,)))]


def _without(given: Arguments, axes: tuple[int, ...]) -> tuple[int, ...]:
    kept = bool(given.integer("keep_dims", 0))
    sizes = [(1 if axis in axes else size) for axis, size in enumerate(given.shape("x"))]
    return tuple(size for axis, size in enumerate(sizes) if kept or axis not in axes)


def along_axis(default: int) -> Callable[[Arguments], list[TensorType]]:
    """A rule for results as x, which must have the axis."""

    def rule(given: Arguments) -> list[TensorType]:
        given.axis("axis", default, len(given.shape("x")))
        return [given.type("x")]

    return rule


def blockwise(given: Arguments) -> list[TensorType]:
    """Scale · (data - offset), a scale for each block of data."""
    data, scale = given.type("data"), given.type("scale")
    if len(data.shape) != len(scale.shape) or not data.shape:
        raise Misfit(f"its scale has the shape {list(scale.shape)}, its data {list(data.shape)}")
    if any(not n or size % n for size, n in zip(data.shape, scale.shape, strict=True)):
        raise Misfit(f"its scale {list(scale.shape)} does not divide its data {list(data.shape)}")
    if given.has("offset"):
        offset = given.type("offset")
        if offset.shape != scale.shape:
            raise Misfit(f"its offset is {offset}; expected the shape {list(scale.shape)}")
        if offset.dtype not in FLOATS | {data.dtype}:
            raise Misfit(f"its offset is {offset.dtype}; expected {data.dtype} as its data")
    return [TensorType(scale.dtype, data.shape)]


def lut(given: Arguments) -> list[TensorType]:
    """Entries of a table by their indices; a table for each block."""
    indices, table = given.type("indices"), given.type("lut")
    shape = indices.shape
    if len(table.shape) != len(shape) + 2 or not shape:
        raise Misfit(f"its lut has the shape {list(table.shape)}, its indices {list(shape)}")
    *tables, entries, vector = table.shape
    if any(not n or size % n for size, n in zip(shape, tables, strict=True)):
        raise Misfit(f"its lut {list(table.shape)} does not divide its indices {list(shape)}")
    if entries != 1 << BITS[indices.dtype]:
        raise Misfit(
            f"its lut has {entries} entries; expected {1 << BITS[indices.dtype]} for "
            f"{indices.dtype} indices"
        )
    if vector > 1:
        if not given.has("vector_axis"):
            raise Misfit(f"its lut has entries of {vector} items, but it has no vector_axis")
        axis = checked_axis("vector_axis", given.integer("vector_axis", 0), len(shape))
        shape = (*shape[:axis], shape[axis] * vector, *shape[axis + 1 :])
    return [TensorType(table.dtype, shape)]


def read_state(given: Arguments) -> list[TensorType]:
    """What the state holds."""
    return [given.type("input")]


def write_state(given: Arguments) -> list[TensorType]:
    """Nothing: the state holds the data from then on."""
    state, data = given.shape("input"), given.shape("data")
    if state != data:
        raise Misfit(f"its data have the shape {list(data)}; expected {list(state)} as the state")
    return []
