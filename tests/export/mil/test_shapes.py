"""Every rule against coremltools' own inference: same types, and no less strict."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from coremltools.converters.mil.mil.input_type import TensorInputType
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.mil.program import UNKNOWN, TensorType
from rgexport.export.mil.shapes import RULES, WITHOUT_RULE, result_types
from rgexport.export.mil.signatures import Misfit, Operand
from tests.export.mil.mil_types import (
    DTYPES,
    Input,
    build,
    definition,
    operands,
    tensor_type,
)

Draw = Callable[[st.SearchStrategy], Any]
Arguments = dict[str, Any]

FLOATS = st.sampled_from(["float16", "float32"])
NUMBERS = st.sampled_from(["float16", "float32", "int32"])
VALUES = st.sampled_from(["float16", "float32", "int32", "bool"])
SIZES = st.integers(1, 5)


def shapes(low: int = 1, high: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(SIZES, min_size=low, max_size=high).map(tuple)


def thinned(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that is stretched to `shape`: some sizes 1, some of the first axes gone."""
    sizes = [draw(st.sampled_from([1, size])) for size in shape]
    return tuple(sizes[draw(st.integers(0, len(shape) - 1)) :])


def axis(draw: Draw, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


def axes(draw: Draw, rank: int) -> list[int]:
    chosen = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    return [number - rank * draw(st.integers(0, 1)) for number in chosen]


def zeros(dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
    return np.zeros(shape, dtype)


# Arguments of an operation, by its type.


def one(dtypes: st.SearchStrategy[str]) -> Callable[[Draw], Arguments]:
    return lambda draw: {"x": (draw(dtypes), draw(shapes()))}


def two(dtypes: st.SearchStrategy[str]) -> Callable[[Draw], Arguments]:
    def arguments(draw: Draw) -> Arguments:
        dtype, shape = draw(dtypes), draw(shapes())
        pair = [(dtype, thinned(draw, shape)), (dtype, shape)]
        x, y = draw(st.permutations(pair))
        return {"x": x, "y": y}

    return arguments


def clip(draw: Draw) -> Arguments:
    dtype = draw(FLOATS)
    bounds = {"alpha": np.dtype(dtype).type(-1), "beta": np.dtype(dtype).type(1)}
    return {"x": (dtype, draw(shapes())), **bounds}


def select(draw: Draw) -> Arguments:
    dtype, shape = draw(VALUES), draw(shapes())
    a, b = draw(st.permutations([thinned(draw, shape), shape]))
    return {"cond": ("bool", thinned(draw, shape)), "a": (dtype, a), "b": (dtype, b)}


def cast(draw: Draw) -> Arguments:
    words = ["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "bool"]
    return one(VALUES)(draw) | {"dtype": draw(st.sampled_from(words))}


def gelu(draw: Draw) -> Arguments:
    return one(FLOATS)(draw) | {"mode": draw(st.sampled_from(["EXACT", "TANH_APPROXIMATION"]))}


def reshape(draw: Draw) -> Arguments:
    shape = draw(shapes())
    wanted = list(draw(st.permutations(shape)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(wanted)))
        wanted[at : at + 2] = [int(np.prod(wanted[at : at + 2]))]
    if draw(st.booleans()):
        wanted[draw(st.integers(0, len(wanted) - 1))] = -1
    elif draw(st.booleans()):
        wanted = [1, *(0 for _ in shape)]
    return {"x": (draw(VALUES), shape), "shape": wanted}


def transpose(draw: Draw) -> Arguments:
    x = one(VALUES)(draw)
    return x | {"perm": draw(st.permutations(range(len(x["x"][1]))))}


def expand_dims(draw: Draw) -> Arguments:
    x = one(VALUES)(draw)
    new = draw(st.integers(1, 2))
    rank = len(x["x"][1]) + new
    chosen = draw(st.lists(st.integers(0, rank - 1), min_size=new, max_size=new, unique=True))
    return x | {"axes": [number - rank * draw(st.integers(0, 1)) for number in chosen]}


def with_axes(dtypes: st.SearchStrategy[str], **flags: bool) -> Callable[[Draw], Arguments]:
    def arguments(draw: Draw) -> Arguments:
        x = one(dtypes)(draw)
        given = {name: draw(st.booleans()) for name in flags}
        if draw(st.booleans()):
            given["axes"] = axes(draw, len(x["x"][1]))
        return x | given

    return arguments


def squeeze(draw: Draw) -> Arguments:
    shape = (2, *(draw(st.sampled_from([1, size])) for size in draw(shapes())))
    given = {"axes": axes(draw, len(shape))} if draw(st.booleans()) else {}
    return {"x": (draw(VALUES), shape), **given}


def ranges(draw: Draw, shape: tuple[int, ...]) -> tuple[Arguments, tuple[int, ...]]:
    """Arguments of a slice that is not empty, and its shape."""
    begin, end, stride, masks, result = [], [], [], [], []
    for size in shape:
        step = draw(st.integers(1, 3))
        first = draw(st.integers(0, size - 1))
        last = draw(st.integers(first + 1, size))
        mask = [draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 5)) == 0]
        back = draw(st.booleans()), draw(st.booleans())
        begin.append(first - size if back[0] else first)
        end.append(last - size if back[1] and last < size else last)
        stride.append(step)
        masks.append(mask)
        if not mask[2]:
            span = range(0 if mask[0] else first, size if mask[1] else last, step)
            result.append(len(span))
    given: Arguments = {"begin": begin, "end": end}
    if draw(st.booleans()):
        given |= {"stride": stride}
    elif any(step > 1 for step in stride):
        return ranges(draw, shape)
    columns = zip(*masks, strict=True)
    given |= dict(zip(("begin_mask", "end_mask", "squeeze_mask"), map(list, columns), strict=True))
    return given, tuple(result)


def slice_by_index(draw: Draw) -> Arguments:
    shape = draw(shapes())
    return {"x": (draw(VALUES), shape), **ranges(draw, shape)[0]}


def slice_update(draw: Draw) -> Arguments:
    dtype, shape = draw(VALUES), draw(shapes())
    given, result = ranges(draw, shape)
    if not result:
        given["squeeze_mask"] = [False] * len(shape)
        given |= {"begin": [0] * len(shape), "end": list(shape), "stride": [1] * len(shape)}
        result = shape
    return {"x": (dtype, shape), "update": (dtype, result), **given}


def slice_by_size(draw: Draw) -> Arguments:
    shape = draw(shapes())
    begin = [draw(st.integers(0, size - 1)) for size in shape]
    size = [draw(st.sampled_from([-1, n - b])) for n, b in zip(shape, begin, strict=True)]
    return {"x": (draw(VALUES), shape), "begin": begin, "size": size}


def concat(draw: Draw) -> Arguments:
    dtype, shape = draw(VALUES), draw(shapes())
    along = axis(draw, len(shape))
    sizes = draw(st.lists(SIZES, min_size=1, max_size=4))
    values = []
    for size in sizes:
        item = list(shape)
        item[along] = size
        values.append((dtype, tuple(item)))
    return {"values": values, "axis": along}


def stack(draw: Draw) -> Arguments:
    value = draw(VALUES), draw(shapes())
    return {
        "values": [value] * draw(st.integers(1, 3)),
        "axis": draw(st.integers(-len(value[1]) - 1, len(value[1]))),
    }


def split(draw: Draw) -> Arguments:
    sizes = draw(st.lists(SIZES, min_size=2, max_size=4))
    shape = list(draw(shapes()))
    along = axis(draw, len(shape))
    if draw(st.booleans()):
        shape[along] = sum(sizes)
        how: Arguments = {"split_sizes": sizes}
    else:
        shape[along] = 3 * sizes[0]
        how = {"num_splits": 3}
    return {"x": (draw(VALUES), tuple(shape)), "axis": along, **how}


def pad(draw: Draw) -> Arguments:
    dtype, shape = draw(FLOATS), draw(shapes())
    last = draw(st.integers(1, len(shape)))
    amounts = draw(st.lists(st.integers(0, 3), min_size=2 * last, max_size=2 * last))
    value = np.dtype(dtype).type(0)
    return {"x": (dtype, shape), "pad": amounts, "mode": "constant", "constant_val": value}


def tile(draw: Draw) -> Arguments:
    shape = draw(shapes())
    return {"x": (draw(VALUES), shape), "reps": [draw(st.integers(1, 3)) for _ in shape]}


def fill(draw: Draw) -> Arguments:
    return {"shape": list(draw(shapes())), "value": np.dtype(draw(VALUES)).type(1)}


def gather(draw: Draw) -> Arguments:
    shape, indices = draw(shapes()), draw(shapes(high=2))
    batch = draw(st.integers(0, min(len(shape) - 1, len(indices))))
    along = draw(st.integers(batch, len(shape) - 1))
    return {
        "x": (draw(NUMBERS), shape),
        "indices": ("int32", shape[:batch] + indices[batch:]),
        "axis": along - len(shape) * draw(st.integers(0, 1)),
        "batch_dims": batch,
    }


def gather_along_axis(draw: Draw) -> Arguments:
    shape = draw(shapes())
    along = axis(draw, len(shape))
    indices = list(shape)
    indices[along] = draw(SIZES)
    return {"x": (draw(NUMBERS), shape), "indices": ("int32", tuple(indices)), "axis": along}


def linear(draw: Draw) -> Arguments:
    dtype, shape, rows = draw(FLOATS), draw(shapes(high=3)), draw(SIZES)
    bias = {"bias": zeros(dtype, (rows,))} if draw(st.booleans()) else {}
    return {"x": (dtype, shape), "weight": zeros(dtype, (rows, shape[-1])), **bias}


def matmul(draw: Draw) -> Arguments:
    dtype, batch = draw(NUMBERS), draw(shapes(high=3))
    rows, inner, columns = draw(SIZES), draw(SIZES), draw(SIZES)
    turned = draw(st.booleans()), draw(st.booleans())
    x = (*thinned(draw, batch), *((inner, rows) if turned[0] else (rows, inner)))
    y = (*batch, *((columns, inner) if turned[1] else (inner, columns)))
    if not turned[0] and draw(st.integers(0, 4)) == 0:
        x, y = (inner,), y[-2:]  # with more, coremltools takes the wrong axis away
    kind = dict(zip(("transpose_x", "transpose_y"), turned, strict=True))
    return {"x": (dtype, x), "y": (dtype, y), **kind}


def arg_reduce(draw: Draw) -> Arguments:
    x = one(NUMBERS)(draw)
    words = st.sampled_from(["int32", "uint16"])
    rank = len(x["x"][1])
    return x | {
        "axis": axis(draw, rank),
        "keep_dims": draw(st.booleans()),
        "output_dtype": draw(words),
    }


def with_axis(dtypes: st.SearchStrategy[str]) -> Callable[[Draw], Arguments]:
    def arguments(draw: Draw) -> Arguments:
        x = one(dtypes)(draw)
        return x | {"axis": draw(st.integers(-1, len(x["x"][1]) - 1))}

    return arguments


def blockwise(draw: Draw) -> Arguments:
    scale = draw(shapes(high=3))
    data = tuple(size * draw(st.integers(1, 3)) for size in scale)
    dtype = draw(st.sampled_from(["int8", "uint8"]))
    offset = {"offset": zeros(dtype, scale)} if draw(st.booleans()) else {}
    return {"data": zeros(dtype, data), "scale": zeros(draw(FLOATS), scale), **offset}


def lut(draw: Draw) -> Arguments:
    tables = draw(shapes(high=3))
    indices = tuple(size * draw(st.integers(1, 3)) for size in tables)
    vector = draw(st.integers(1, 2))
    table = zeros(draw(FLOATS), (*tables, 256, vector))
    along = {"vector_axis": axis(draw, len(indices))} if vector > 1 else {}
    return {"indices": zeros("uint8", indices), "lut": table, **along}


MAKERS: dict[str, Callable[[Draw], Arguments]] = {
    **dict.fromkeys(
        "acos asin atan atanh ceil cos cosh erf exp floor inverse log relu relu6 round rsqrt "
        "sigmoid silu sin sinh softplus softsign sqrt tan tanh".split(),
        one(FLOATS),
    ),
    **dict.fromkeys(["abs", "exp2", "sign", "square"], one(NUMBERS)),
    "leaky_relu": lambda draw: one(FLOATS)(draw) | {"alpha": np.float32(0.1)},
    "logical_not": one(st.just("bool")),
    "identity": one(VALUES),
    "reverse": with_axes(VALUES),
    **dict.fromkeys(
        "add equal floor_div greater greater_equal less less_equal maximum minimum mod mul "
        "not_equal pow real_div sub".split(),
        two(NUMBERS),
    ),
    **dict.fromkeys(["logical_and", "logical_or", "logical_xor"], two(st.just("bool"))),
    **dict.fromkeys(
        (kind for kind in RULES if kind.startswith("reduce_") and "_arg" not in kind),
        with_axes(NUMBERS, keep_dims=True),
    ),
    "reduce_argmax": arg_reduce,
    "reduce_argmin": arg_reduce,
    "softmax": with_axis(FLOATS),
    "cumsum": with_axis(NUMBERS),
    "constexpr_blockwise_shift_scale": blockwise,
    "constexpr_lut_to_dense": lut,
    "clip": clip,
    "select": select,
    "cast": cast,
    "gelu": gelu,
    "reshape": reshape,
    "transpose": transpose,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "slice_by_size": slice_by_size,
    "concat": concat,
    "stack": stack,
    "split": split,
    "pad": pad,
    "tile": tile,
    "fill": fill,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "linear": linear,
    "matmul": matmul,
}


def test_every_rule_is_compared():
    assert RULES.keys() - MAKERS.keys() == {"read_state", "write_state"}
    assert not RULES.keys() & WITHOUT_RULE


def test_every_operation_of_coremltools_is_known():
    internal = {"const", "_const_symbolic"}
    known = RULES.keys() | WITHOUT_RULE | internal
    assert SSAOpRegistry.core_ops.keys() <= known
    assert known - SSAOpRegistry.core_ops.keys() == {"write_state"}  # it is made on saving


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_agrees_with_coremltools(kind, data):
    arguments = MAKERS[kind](data.draw)
    operation = build(kind, arguments)
    assert operation.op_type == kind
    expected = [tensor_type(var.sym_type) for var in operation.outputs]
    assert result_types(kind, operands(operation)) == expected


@pytest.mark.parametrize("kind", sorted(RULES.keys() - {"read_state", "write_state"}))
def test_signature_agrees_with_coremltools(kind):
    """Names, what is optional, what must be constant, and the dtypes that are taken."""
    theirs = definition(kind)
    ours = RULES[kind].signature
    assert ours.keys() == theirs.input_spec.input_types.keys()
    for name, slot in theirs.input_spec.input_types.items():
        assert (ours[name].optional, ours[name].constant) == (slot.optional, slot.const), name
        if isinstance(slot, TensorInputType):
            domain = theirs.type_domains.get(slot.type_domain_id, slot.type_domain)
            assert ours[name].dtypes == {n for n, kind in DTYPES.items() if kind in domain}, name


def test_state_is_read_as_what_it_holds():
    state: Input = ("float16", (1, 1, 3, 32))
    operation = build("read_state", {}, state)
    expected = tensor_type(operation.outputs[0].sym_type)
    assert result_types("read_state", operands(operation)) == [expected]


# What coremltools refuses too, or would only notice on the device.


def value(dtype: str, *shape: int) -> tuple[Operand, ...]:
    return (Operand(TensorType(dtype, shape)),)


def fixed(content: Any, dtype: str = "int32") -> tuple[Operand, ...]:
    array = np.array(content)
    return (Operand(TensorType(dtype, array.shape), constant=True, array=array),)


def state(dtype: str, *shape: int) -> tuple[Operand, ...]:
    return (Operand(TensorType(dtype, shape), state=True),)


X = value("float32", 2, 3)
MISFITS: dict[str, tuple[str, dict[str, tuple[Operand, ...]], str]] = {
    "no operand": ("exp", {}, "its input x has 0 values"),
    "two operands": ("exp", {"x": X + X}, "its input x has 2 values"),
    "foreign operand": ("exp", {"x": X, "z": X}, "no input 'z'; expected x"),
    "wrong dtype": ("exp", {"x": value("int32", 2)}, "x is int32; expected float16 or float32"),
    "two dtypes": ("add", {"x": X, "y": value("float16", 1)}, "y is float16, but x is float32"),
    "no common shape": ("add", {"x": X, "y": value("float32", 2)}, r"\[2, 3\] and \[2\]"),
    "state as value": ("exp", {"x": state("float16", 2)}, "x is a state; expected a value"),
    "value as state": ("read_state", {"input": X}, "input is a value; expected a state"),
    "state of another shape": (
        "write_state",
        {"input": state("float16", 1, 32), "data": value("float16", 1, 31)},
        r"data have the shape \[1, 31\]; expected \[1, 32\]",
    ),
    "state of another dtype": (
        "write_state",
        {"input": state("float16", 1, 32), "data": value("float32", 1, 32)},
        "data is float32, but input is float16",
    ),
    "computed axes": ("reduce_sum", {"x": X, "axes": value("int32", 1)}, "axes is computed"),
    "axis outside": ("softmax", {"x": X, "axis": fixed(2)}, "axis is 2, but there are 2 axes"),
    "axis twice": ("reduce_sum", {"x": X, "axes": fixed([1, -1])}, "each axis once"),
    "axes as matrix": ("reduce_sum", {"x": X, "axes": fixed([[1]])}, "expected a list"),
    "reshape": ("reshape", {"x": X, "shape": fixed([4])}, r"\[4\] of \[2, 3\]"),
    "reshape, odd": ("reshape", {"x": X, "shape": fixed([4, -1])}, r"\[4, -1\] of \[2, 3\]"),
    "reshape, twice -1": ("reshape", {"x": X, "shape": fixed([-1, -1])}, "at most one -1"),
    "short perm": ("transpose", {"x": X, "perm": fixed([0])}, "perm names 1 axes"),
    "empty slice": (
        "slice_by_index",
        {"x": X, "begin": fixed([0, 2]), "end": fixed([2, 2])},
        "which is nothing",
    ),
    "short begin": (
        "slice_by_index",
        {"x": X, "begin": fixed([0]), "end": fixed([2, 2])},
        r"begin has the shape \[1\]; expected \[2\]",
    ),
    "no step": (
        "slice_by_index",
        {"x": X, "begin": fixed([0, 0]), "end": fixed([2, 2]), "stride": fixed([1, 0])},
        "stride is 0",
    ),
    "update": (
        "slice_update",
        {"x": X, "update": X, "begin": fixed([0, 0]), "end": fixed([1, 3])},
        r"\[2, 3\] in place of a slice of the shape \[1, 3\]",
    ),
    "concat": ("concat", {"values": X + value("float32", 3, 3), "axis": fixed(1)}, "in axis 1"),
    "stack": ("stack", {"values": X + value("float32", 3, 3), "axis": fixed(1)}, "one shape"),
    "split": ("split", {"x": X, "num_splits": fixed(2), "axis": fixed(1)}, "2 equal pieces of 3"),
    "split sizes": ("split", {"x": X, "split_sizes": fixed([1, 1]), "axis": fixed(1)}, "of 3"),
    "pad": ("pad", {"x": X, "pad": fixed([1])}, "two sizes for each"),
    "tile": ("tile", {"x": X, "reps": fixed([1])}, "a number for each axis"),
    "gather": (
        "gather",
        {"x": X, "indices": value("int32", 5), "axis": fixed(1), "batch_dims": fixed(1)},
        "batch_dims is 1",
    ),
    "cast": ("cast", {"x": X, "dtype": fixed("fp64", "string")}, "'fp64'; expected one of fp16"),
    "gelu": ("gelu", {"x": X, "mode": fixed("TANH", "string")}, "'TANH'; expected one of EXACT"),
    "clip": (
        "clip",
        {"x": X, "alpha": fixed(1.0, "float32"), "beta": fixed(0.0, "float32")},
        r"\[1.0, 0.0\]",
    ),
    "linear": (
        "linear",
        {"x": X, "weight": fixed(np.ones((4, 2)), "float32")},
        r"weight has the shape \[4, 2\], its x \[2, 3\]",
    ),
    "bias": (
        "linear",
        {
            "x": X,
            "weight": fixed(np.ones((4, 3)), "float32"),
            "bias": fixed(np.ones(3), "float32"),
        },
        r"bias has the shape \[3\]; expected \[4\]",
    ),
    "computed weight": ("linear", {"x": X, "weight": value("float32", 4, 3)}, "weight is computed"),
    "matmul": ("matmul", {"x": X, "y": X}, r"\[2, 3\] by \[2, 3\]"),
    "matmul, dtypes": ("matmul", {"x": X, "y": value("float16", 3, 2)}, "expected one dtype"),
    "matmul, vector": ("matmul", {"x": X, "y": value("float32", 3)}, "expected a matrix"),
    "blocks": (
        "constexpr_blockwise_shift_scale",
        {"data": fixed(np.ones((4, 3)), "int8"), "scale": fixed(np.ones((4, 2)), "float16")},
        "does not divide",
    ),
    "offset": (
        "constexpr_blockwise_shift_scale",
        {
            "data": fixed(np.ones((4, 3)), "int8"),
            "scale": fixed(np.ones((4, 1)), "float16"),
            "offset": fixed(np.ones((4, 1)), "uint8"),
        },
        "offset is uint8; expected int8",
    ),
    "short table": (
        "constexpr_lut_to_dense",
        {
            "indices": fixed(np.ones((4, 2)), "uint4"),
            "lut": fixed(np.ones((1, 1, 8, 1)), "float16"),
        },
        "8 entries; expected 16 for uint4",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfit(case):
    kind, given, complaint = MISFITS[case]
    with pytest.raises(Misfit, match=complaint):
        result_types(kind, given)


def test_what_only_running_gives_is_not_told():
    begin, end = value("int32", 2), fixed([2, 3])
    assert result_types("slice_by_index", {"x": X, "begin": begin, "end": end}) is None
    assert result_types("exp", {"x": value("float32", 2, UNKNOWN)}) is None
    assert result_types("conv", {"x": X}) is None
    update = {"x": X, "update": value("float32", 1, 3), "begin": begin, "end": end}
    assert result_types("slice_update", update) == [TensorType("float32", (2, 3))]
