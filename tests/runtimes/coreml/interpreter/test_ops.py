"""Each operation of the interpreter's table against coremltools' own inference, or torch."""

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function as MilFunction
from coremltools.converters.mil.mil import types
from torch.nn.functional import gelu

from rgexport.artifacts.coreml.mil.checks import OPERATIONS
from rgexport.artifacts.coreml.mil.program import Name, TensorType
from rgexport.runtimes.coreml.interpreter.operations import OPS
from tests.runtimes.coreml.interpreter.mil_programs import main, opened, operation

Case = tuple[dict[str, Any], dict[str, Any]]  # operands, and parameters given by value

TOLERANCE = {"float16": 2**-9, "float32": 2**-19}
"""coremltools computes float16 in float16; of ours, only the result is rounded."""

FLOATS = "float16", "float32"
NUMBERS = *FLOATS, "int32"
SHAPES = (1,), (5,), (2, 3), (3, 1, 4), (2, 3, 4, 5)
SHAPES_OF_PAIRS = ((5,), (5,)), ((4, 1, 3), (2, 1)), ((3,), (2, 2, 3)), ((2, 1, 1, 4), (3, 2, 1))
BOTH = False, True
random = np.random.default_rng(0)


def array(dtype, shape, low=-4, high=4):
    """Returns whole numbers, or floats so large that an epsilon does not matter."""
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype == "int32":
        return random.integers(int(low), int(high) + 1, shape).astype(np.int32)
    return random.uniform(low, high, shape).astype(dtype)


def unary(low=-4, **constants):
    return [({"x": array(d, shape, low)}, constants) for d, shape in product(FLOATS, SHAPES)]


def pairs(*dtypes):
    """Returns operands whose shapes can be broadcast."""
    both = product(dtypes, SHAPES_OF_PAIRS)
    return [({"x": array(d, x), "y": array(d, y)}, {}) for d, (x, y) in both]


def with_parameters(dtypes, shape, *parameters):
    # No product of the numbers of a sum overflows on its way.
    return [({"x": array(d, shape, -1.3, 1.3)}, p) for d, p in product(dtypes, parameters)]


def matmul(x, y, dtype, turn_x, turn_y):
    x, y = ([*s[:-2], *s[:-3:-1]] if turn else s for s, turn in ((x, turn_x), (y, turn_y)))
    operands = {"x": array(dtype, x), "y": array(dtype, y)}
    return operands, {"transpose_x": turn_x, "transpose_y": turn_y}


REDUCTIONS = [{"axes": axes, "keep_dims": k} for axes in ([0], [-1], [2, 0], [1, -1]) for k in BOTH]
SLICES = [{"begin": [0, 1, -3], "end": [4, 2, -1]}, {"begin": [-1, 0, 2], "end": [4, 3, 5]}]
CASES = {
    **dict.fromkeys(("add", "sub", "mul", "equal", "less_equal", "greater_equal"), pairs(*NUMBERS)),
    "logical_and": pairs("bool"),
    **dict.fromkeys(("exp", "cos", "sin", "tanh", "sigmoid"), unary()),
    "sqrt": unary(low=0),
    "rsqrt": [
        ({"x": array(d, shape, 0.1)}, {"epsilon": np.dtype(d).type(0.25)})
        for d, shape in product(FLOATS, SHAPES)
    ],
    "gelu": unary(mode="TANH_APPROXIMATION"),
    "softmax": with_parameters(FLOATS, (2, 3, 4), *({"axis": axis} for axis in (0, 1, -1))),
    **dict.fromkeys(
        ("reduce_sum", "reduce_mean"), with_parameters(NUMBERS, (2, 3, 4), *REDUCTIONS)
    ),
    "linear": [
        (
            {"x": array(d, (*lead, size))},
            {"weight": array(d, (4, size))} | ({"bias": array(d, (4,))} if has_bias else {}),
        )
        for d, lead, size, has_bias in product(FLOATS, ((2,), (3, 1, 2)), (1, 5), BOTH)
    ],
    "matmul": [
        matmul(x, y, dtype, *turned)
        for x, y in (((2, 3), (3, 4)), ((2, 1, 2, 3), (3, 3, 1)), ((1, 4), (2, 4, 4)))
        for dtype, *turned in product(FLOATS, BOTH, BOTH)
    ],
    "cast": [
        ({"x": array(dtype, shape)}, {"dtype": target})
        for dtype, shape, target in product((*NUMBERS, "bool"), SHAPES, ("fp16", "fp32"))
    ],
    "reshape": with_parameters(
        NUMBERS, (2, 3, 4), *({"shape": s} for s in ([4, 3, 2], [-1, 3, 2], [2, -1], [24]))
    ),
    "transpose": with_parameters(
        NUMBERS, (2, 3, 4), *({"perm": perm} for perm in ([0, 1, 2], [2, 0, 1], [0, 2, 1]))
    ),
    "concat": [
        ({"values": [array(d, shape) for shape in shapes]}, {"axis": axis, "interleave": False})
        for d in NUMBERS
        for axis, *shapes in ((0, (2,)), (-1, (2, 3), (2, 1), (2, 4)), (1, (2, 3, 2), (2, 1, 2)))
    ],
    "slice_by_index": with_parameters(NUMBERS, (4, 3, 5), *SLICES),
    "gather": [
        (
            {"x": array(d, (4, 3, 5)), "indices": array("int32", shape, 0, (4, 3, 5)[axis] - 1)},
            {"axis": axis, "batch_dims": 0, "validate_indices": False},
        )
        for d, axis, shape in product(NUMBERS, (0, 1, -1), ((2,), (3, 2)))
    ],
    "select": [
        ({"cond": array("bool", cond), "a": array(d, a), "b": array(d, b)}, {})
        for d in NUMBERS
        for cond, a, b in (((2, 3), (2, 3), (2, 3)), ((3,), (2, 1), (1, 3)), ((2, 1), (2, 3), (3,)))
    ],
}


def compute(kind, arrays, result, **constants):
    """Runs one operation on arrays that come in as inputs of the function."""
    feeds = {}
    inputs = {}
    for name, value in arrays.items():
        for one in value if isinstance(value, list) else [value]:
            feeds[feed := f"input_{len(feeds)}"] = one
            inputs.setdefault(name, []).append(Name(feed))
    input_types = {feed: TensorType(one.dtype.name, one.shape) for feed, one in feeds.items()}
    program = [operation(kind, inputs, {"result": result}, **constants)]
    return opened(main(program, input_types, ["result"]))(feeds, {})["result"]


def test_the_table_has_all_that_is_made_and_no_more():
    made = {kind for kind in OPERATIONS if not kind.startswith("constexpr_")}
    assert made - {"const", "read_state", "write_state"} == OPS.keys() == CASES.keys()


@pytest.mark.parametrize("kind", CASES)
def test_equals_coremltools(kind):
    """Which infers the value of an operation of constants."""
    for operands, constants in CASES[kind]:
        with MilFunction({}, opset_version=ct.target.iOS18):
            theirs = getattr(mb, kind)(**operands, **constants)
        assert theirs.val is not None, "coremltools infers no value"
        dtype = np.dtype(types.nptype_from_builtin(theirs.dtype)).name
        type = TensorType(dtype, tuple(theirs.shape))
        result = compute(kind, operands, type, **constants)
        assert (result.dtype.name, result.shape) == (type.dtype, type.shape)
        expected = np.asarray(theirs.val).astype(type.dtype).astype(np.float64).reshape(type.shape)
        limit = TOLERANCE.get(type.dtype, 0)
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(result, expected, rtol=limit, atol=limit * scale)


ABSOLUTE = dict.fromkeys(("gelu", "cos", "sin"), 2.0**-22)
"""gelu subtracts from 1 what is next to it; what is lost there is lost in every runtime."""


@pytest.mark.parametrize("kind", ["exp", "cos", "sin", "tanh", "sigmoid", "gelu", "rsqrt"])
def test_float32_functions_are_accurate(kind):
    """Against float64, at magnitudes from 1e-6 to 1e4, within 4 units in the last place."""
    size = np.geomspace(1e-6, 80, 2001)
    x = np.concatenate([size, -size]) if kind != "rsqrt" else size
    if kind in ("cos", "sin"):
        x = x * 1e4  # positions times frequencies
    x = x.astype(np.float32)
    constants = {"gelu": {"mode": "TANH_APPROXIMATION"}, "rsqrt": {"epsilon": np.float32(0)}}
    result = compute(kind, {"x": x}, TensorType("float32", x.shape), **constants.get(kind, {}))
    function = partial(gelu, approximate="tanh") if kind == "gelu" else getattr(torch, kind)
    expected = function(torch.from_numpy(x).double()).numpy()
    limits = {"rtol": 4 * 2.0**-23, "atol": ABSOLUTE.get(kind, 1e-37)}
    np.testing.assert_allclose(result.astype(np.float64), expected, **limits)


def test_exp_is_rounded_correctly_next_to_one():
    """Near 1, one unit is up to 1 % of 1 - a², and the RG-LRU takes its root."""
    x = -np.geomspace(1e-7, 1, 5000).astype(np.float32)
    result = compute("exp", {"x": x}, TensorType("float32", x.shape))
    np.testing.assert_array_equal(result, np.exp(x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)]
)
def test_float16_is_rounded_once(kind, function):
    x, y = np.random.default_rng(0).uniform(0.5, 100, (2, 4000)).astype(np.float16)
    x[0] = y[0] = 60000  # their sum is infinite
    result = compute(kind, {"x": x, "y": y}, TensorType("float16", x.shape))
    with np.errstate(over="ignore"):
        exact = function(x.astype(np.float64), y.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(result, exact)


def test_float16_is_accumulated_in_float32():
    """4096 halves of 2^-12 would vanish in a float16 sum after the first 1."""
    x = np.full((1, 4096), 2.0**-6, np.float16)
    x[0, 0] = 1
    type = TensorType("float16", (1, 1))
    linear_sum = compute("linear", {"x": x, "weight": x}, type)
    product = compute("matmul", {"x": x, "y": x}, type, transpose_x=False, transpose_y=True)
    assert linear_sum == product == np.float16(1 + 4095 * 2.0**-12)
    ones = {"x": np.ones((1, 4097), np.float16)}
    total = compute("reduce_sum", ones, type, axes=[1], keep_dims=True)
    assert total == 4096  # 4097 rounded; a float16 sum stops at 2048
