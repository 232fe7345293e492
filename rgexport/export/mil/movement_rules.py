"""Types of the results of operations that move items or pick some of them."""

from math import prod

from rgexport.export.mil.program import TensorType
from rgexport.export.mil.signatures import (
    ALL,
    FLAG,
    FLOATS,
    INT32,
    INTEGERS,
    SETTING,
    STRING,
    VALUES,
    WORD,
    Arguments,
    Misfit,
    Signature,
    Slot,
)

_AXES = Slot(INT32, constant=True)

IDENTITY: Signature = {"x": Slot(ALL | STRING)}
RESHAPE: Signature = {"x": Slot(ALL), "shape": Slot(INTEGERS)}
TRANSPOSE: Signature = {"x": Slot(ALL), "perm": _AXES}
EXPAND_DIMS: Signature = {"x": Slot(ALL), "axes": _AXES}
SQUEEZE: Signature = {"x": Slot(ALL), "axes": SETTING}
REVERSE: Signature = SQUEEZE
CONCAT: Signature = {
    "values": Slot(ALL, "T", many=True),
    "axis": _AXES,
    "interleave": FLAG,
}
STACK: Signature = {"values": Slot(ALL, "T", many=True), "axis": _AXES}
PAD: Signature = {
    "x": Slot(FLOATS, "T"),
    "pad": Slot(INT32),
    "mode": WORD,
    "constant_val": Slot(FLOATS, "T", constant=True, optional=True),
}
TILE: Signature = {"x": Slot(VALUES), "reps": Slot(INT32)}
FILL: Signature = {
    "shape": Slot(INT32),
    "value": Slot(VALUES, constant=True, optional=True),
}
PAD_MODES = ("constant", "reflect", "replicate")


def reshape(given: Arguments) -> list[TensorType] | None:
    """0 stands for the size of x, counted from the last axis; one -1 for what is left."""
    if not given.known("shape"):
        return None
    source, asked = given.shape("x"), given.integers("shape")
    behind = len(source) - len(asked)
    wanted = [
        size if size else (source[i + behind] if i + behind >= 0 else 1)
        for i, size in enumerate(asked)
    ]
    if wanted.count(-1) > 1 or any(size < -1 for size in wanted):
        raise Misfit(f"its input shape is {list(asked)}; expected sizes and at most one -1")
    if -1 in wanted:
        rest = prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = prod(source) // rest if rest else 0
    if prod(wanted) != prod(source):
        raise Misfit(f"it makes {list(asked)} of {list(source)}; expected as many items")
    return [TensorType(given.type("x").dtype, tuple(wanted))]


def transpose(given: Arguments) -> list[TensorType]:
    """Axis i of the result is axis perm[i] of x."""
    shape = given.shape("x")
    order = given.axes("perm", len(shape))
    if len(order) != len(shape):
        raise Misfit(f"its input perm names {len(order)} axes; expected all {len(shape)}")
    return [TensorType(given.type("x").dtype, tuple(shape[axis] for axis in order))]


def expand_dims(given: Arguments) -> list[TensorType]:
    """Axes of size 1, named as they lie in the result."""
    shape = list(given.shape("x"))
    for axis in sorted(given.axes("axes", len(shape) + len(given.integers("axes")))):
        shape.insert(axis, 1)
    return [TensorType(given.type("x").dtype, tuple(shape))]


def squeeze(given: Arguments) -> list[TensorType]:
    """Axes of size 1 go; others that are named stay, as in PyTorch."""
    shape = given.shape("x")
    named = given.axes("axes", len(shape)) if given.has("axes") else range(len(shape))
    kept = tuple(size for axis, size in enumerate(shape) if size != 1 or axis not in named)
    return [TensorType(given.type("x").dtype, kept)]


def concat(given: Arguments) -> list[TensorType]:
    """The values one after another; scalars make a list."""
    shapes = [kind.shape or (1,) for kind in given.types("values")]
    axis = given.axis("axis", 0, len(shapes[0]))
    rests = {shape[:axis] + (0,) + shape[axis + 1 :] for shape in shapes}
    if len(rests) > 1:
        shown = ", ".join(str(list(shape)) for shape in sorted(set(shapes)))
        raise Misfit(f"its inputs have the shapes {shown}; they may differ in axis {axis} alone")
    rest = rests.pop()
    size = sum(shape[axis] for shape in shapes)
    dtype = given.types("values")[0].dtype
    return [TensorType(dtype, rest[:axis] + (size,) + rest[axis + 1 :])]


def stack(given: Arguments) -> list[TensorType]:
    """The values side by side, along a new axis."""
    shapes = {kind.shape for kind in given.types("values")}
    if len(shapes) > 1:
        raise Misfit(f"its inputs have the shapes {sorted(map(list, shapes))}; expected one shape")
    shape = shapes.pop()
    axis = given.axis("axis", 0, len(shape) + 1)
    values = given.types("values")
    return [TensorType(values[0].dtype, shape[:axis] + (len(values),) + shape[axis:])]


def pad(given: Arguments) -> list[TensorType] | None:
    """Items before and after, for the last axes."""
    mode = given.word("mode", PAD_MODES[0])
    if mode not in PAD_MODES:
        raise Misfit(f"its input mode is {mode!r}; expected one of {', '.join(PAD_MODES)}")
    if not given.known("pad"):
        return None
    shape, amounts = list(given.shape("x")), given.integers("pad")
    if len(amounts) % 2 or len(amounts) > 2 * len(shape) or min(amounts, default=0) < 0:
        raise Misfit(f"its input pad is {list(amounts)}; expected two sizes for each last axis")
    start = len(shape) - len(amounts) // 2
    for index, amount in enumerate(amounts):
        shape[start + index // 2] += amount
    return [TensorType(given.type("x").dtype, tuple(shape))]


def tile(given: Arguments) -> list[TensorType] | None:
    """x, repeated along each axis."""
    if not given.known("reps"):
        return None
    shape, times = given.shape("x"), given.integers("reps")
    if len(times) != len(shape) or min(times, default=1) < 1:
        raise Misfit(f"its input reps is {list(times)}; expected a number for each axis")
    sizes = tuple(size * n for size, n in zip(shape, times, strict=True))
    return [TensorType(given.type("x").dtype, sizes)]


def fill(given: Arguments) -> list[TensorType] | None:
    """A constant of a shape."""
    if not given.known("shape"):
        return None
    dtype = given.type("value").dtype if given.has("value") else "float32"
    return [TensorType(dtype, given.integers("shape"))]
