"""Each operation of the interpreter's table against coremltools' own inference, or torch."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import torch

from rgexport.export.mil.describe import OPERATIONS
from rgexport.export.mil.program import TensorType
from rgexport.runtimes.coreml.interpreter.operations import OPS
from tests.runtimes.coreml.interpreter.mil_programs import compute, inferred

Case = tuple[dict[str, Any], dict[str, Any]]
"""Operands, and parameters given by value."""

TOLERANCE = {"float16": 2**-9, "float32": 2**-19}
"""coremltools computes float16 in float16; of ours, only the result is rounded."""

FLOATS = "float16", "float32"
NUMBERS = *FLOATS, "int32"
SHAPES = (1,), (5,), (2, 3), (3, 1, 4), (2, 3, 4, 5)
SHAPES_OF_PAIRS = ((5,), (5,)), ((4, 1, 3), (2, 1)), ((3,), (2, 2, 3)), ((2, 1, 1, 4), (3, 2, 1))
BOTH = False, True
random = np.random.default_rng(0)


def array(dtype: str, shape: Sequence[int], low: float = -4, high: float = 4) -> Any:
    """Returns whole numbers, or floats of which none is so small that an epsilon matters."""
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype == "int32":
        return random.integers(int(low), int(high) + 1, shape).astype(np.int32)
    return random.uniform(low, high, shape).astype(dtype)


def unary(low: float = -4, **constants: Any) -> list[Case]:
    return [({"x": array(d, shape, low)}, constants) for d, shape in product(FLOATS, SHAPES)]


def pairs(*dtypes: str) -> list[Case]:
    """Returns operands whose shapes can be broadcast."""
    both = product(dtypes, SHAPES_OF_PAIRS)
    return [({"x": array(d, x), "y": array(d, y)}, {}) for d, (x, y) in both]


def with_parameters(
    dtypes: Sequence[str], shape: Sequence[int], *parameters: dict[str, Any]
) -> list[Case]:
    # No product of the numbers of a sum overflows on its way.
    return [({"x": array(d, shape, -1.3, 1.3)}, p) for d, p in product(dtypes, parameters)]


def linear(lead: Sequence[int], size: int, out: int, bias: bool, dtype: str) -> Case:
    constants = {"weight": array(dtype, (out, size))}
    constants |= {"bias": array(dtype, (out,))} if bias else {}
    return {"x": array(dtype, (*lead, size))}, constants


def matmul(x: Sequence[int], y: Sequence[int], dtype: str, turn_x: bool, turn_y: bool) -> Case:
    x, y = ([*s[:-2], *s[:-3:-1]] if turn else s for s, turn in ((x, turn_x), (y, turn_y)))
    operands = {"x": array(dtype, x), "y": array(dtype, y)}
    return operands, {"transpose_x": turn_x, "transpose_y": turn_y}


def concat(dtype: str, axis: int, *shapes: Sequence[int]) -> Case:
    values = [array(dtype, shape) for shape in shapes]
    return {"values": values}, {"axis": axis, "interleave": False}


def gather(dtype: str, axis: int, shape: Sequence[int]) -> Case:
    x = array(dtype, (4, 3, 5))
    indices = array("int32", shape, 0, x.shape[axis] - 1)
    constants = {"axis": axis, "batch_dims": 0, "validate_indices": False}
    return {"x": x, "indices": indices}, constants


def select(dtype: str, cond: Sequence[int], a: Sequence[int], b: Sequence[int]) -> Case:
    return {"cond": array("bool", cond), "a": array(dtype, a), "b": array(dtype, b)}, {}


REDUCTIONS = [{"axes": axes, "keep_dims": k} for axes in ([0], [-1], [2, 0], [1, -1]) for k in BOTH]
SLICES = [{"begin": [0, 1, -3], "end": [4, 2, -1]}, {"begin": [-1, 0, 2], "end": [4, 3, 5]}]
CASES: dict[str, list[Case]] = {
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
    "linear": [linear(*case) for case in product(((2,), (3, 1, 2)), (1, 5), (4,), BOTH, FLOATS)],
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
        case
        for dtype in NUMBERS
        for case in (
            concat(dtype, 0, (2,)),
            concat(dtype, -1, (2, 3), (2, 1), (2, 4)),
            concat(dtype, 1, (2, 3, 2), (2, 1, 2)),
        )
    ],
    "slice_by_index": with_parameters(NUMBERS, (4, 3, 5), *SLICES),
    "gather": [gather(*case) for case in product(NUMBERS, (0, 1, -1), ((2,), (3, 2)))],
    "select": [
        select(dtype, *shapes)
        for dtype in NUMBERS
        for shapes in (((2, 3), (2, 3), (2, 3)), ((3,), (2, 1), (1, 3)), ((2, 1), (2, 3), (3,)))
    ],
}


def test_every_operation_of_the_table_has_a_case() -> None:
    assert CASES.keys() == OPS.keys()


def test_the_table_has_all_that_is_made_and_no_more() -> None:
    made = {kind for kind in OPERATIONS if not kind.startswith("constexpr_")}
    assert made - {"const", "read_state", "write_state"} == OPS.keys()


@pytest.mark.parametrize("kind", CASES)
def test_equals_coremltools(kind: str) -> None:
    for operands, constants in CASES[kind]:
        outputs, expected = inferred(kind, **operands, **constants)
        found = compute(kind, operands, outputs, **constants)
        for array, type, value in zip(found, outputs, expected, strict=True):
            assert value is not None, "coremltools infers no value"
            assert (array.dtype.name, array.shape) == (type.dtype, type.shape)
            result = np.asarray(value).astype(type.dtype).astype(np.float64).reshape(type.shape)
            limit = TOLERANCE.get(type.dtype, 0)
            scale = max(1.0, float(np.abs(result).max(initial=0)))
            np.testing.assert_allclose(array, result, rtol=limit, atol=limit * scale)


UNARY_IN_TORCH = {
    "exp": torch.exp,
    "cos": torch.cos,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "rsqrt": torch.rsqrt,
}


@pytest.mark.parametrize("kind", UNARY_IN_TORCH)
def test_float32_functions_are_accurate(kind: str) -> None:
    """Against float64, at magnitudes from 1e-6 to 1e4, within 4 units in the last place."""
    size = np.geomspace(1e-6, 80, 2001)
    x = np.concatenate([size, -size]) if kind != "rsqrt" else size
    if kind in ("cos", "sin"):
        x = x * 1e4  # positions times frequencies
    x = x.astype(np.float32)
    constants = {"gelu": {"mode": "TANH_APPROXIMATION"}, "rsqrt": {"epsilon": np.float32(0)}}
    (found,) = compute(kind, {"x": x}, [TensorType("float32", x.shape)], **constants.get(kind, {}))
    expected = UNARY_IN_TORCH[kind](torch.from_numpy(x).double()).numpy()
    relative = 4 * 2.0**-23
    # gelu subtracts from 1 what is next to it; what is lost there is lost in every runtime
    absolute = 2.0**-22 if kind in ("gelu", "cos", "sin") else 1e-37
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=relative, atol=absolute)


def test_exp_is_rounded_correctly_next_to_one() -> None:
    """There one unit is up to 1 % of 1 - a², of which the RG-LRU takes the root."""
    x = -np.geomspace(1e-7, 1, 5000).astype(np.float32)
    (found,) = compute("exp", {"x": x}, [TensorType("float32", x.shape)])
    np.testing.assert_array_equal(found, np.exp(x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
def test_float16_is_rounded_once(kind: str) -> None:
    random = np.random.default_rng(0)
    x, y = random.uniform(0.5, 100, (2, 4000)).astype(np.float16)
    (found,) = compute(kind, {"x": x, "y": y}, [TensorType("float16", x.shape)])
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[kind]
    exact = function(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_array_equal(found, exact.astype(np.float16))


@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_products_of_float16_are_accumulated_in_float32(kind: str) -> None:
    """4096 halves of 2^-12 would vanish in a float16 sum after the first 1."""
    x = np.full((1, 4096), 2.0**-6, np.float16)
    x[0, 0] = 1
    name = "weight" if kind == "linear" else "y"
    turned = {"transpose_x": False, "transpose_y": True} if kind == "matmul" else {}
    (found,) = compute(kind, {"x": x, name: x}, [TensorType("float16", (1, 1))], **turned)
    assert found.item() == np.float16(1 + 4095 * 2.0**-12)


def test_sums_of_float16_are_accumulated_in_float32() -> None:
    x = np.full((4097,), 1, np.float16)
    (found,) = compute(
        "reduce_sum", {"x": x}, [TensorType("float16", ())], axes=[0], keep_dims=False
    )
    assert found.item() == 4096  # 4097 rounded; a float16 sum stops at 2048


def test_overflow_is_infinite() -> None:
    x = np.array([60000], np.float16)
    (found,) = compute("add", {"x": x, "y": x}, [TensorType("float16", (1,))])
    assert np.isinf(found).all()
