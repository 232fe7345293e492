"""Each operation of the interpreter's table against coremltools' own inference, or torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.export.mil.describe import OPERATIONS
from rgexport.export.mil.program import TensorType
from rgexport.runtimes.coreml.interpreter.operations import OPS
from tests.runtimes.coreml.interpreter.mil_programs import compute, inferred

Draw = Callable[[st.SearchStrategy], Any]
Case = tuple[dict[str, Any], dict[str, Any]]
"""Operands, and parameters given by value."""

TOLERANCE = {"float16": 2**-9, "float32": 2**-19}
"""coremltools computes float16 in float16; of ours, only the result is rounded."""

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)
SHAPES_OF_PAIRS = hnp.mutually_broadcastable_shapes(
    num_shapes=2, min_dims=1, max_dims=4, max_side=4
)
FLOATS = st.sampled_from(["float16", "float32"])
NUMBERS = st.sampled_from(["float16", "float32", "int32"])


def array(draw: Draw, dtype: str, shape: tuple[int, ...], low: float = -4, high: float = 4) -> Any:
    """Whole numbers, or floats of which none is so small that an epsilon matters."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype == "int32":
        return random.integers(int(low), int(high) + 1, shape).astype(np.int32)
    return random.uniform(low, high, shape).astype(dtype)


def of_floats(low: float = -4, high: float = 4, dtypes: st.SearchStrategy = FLOATS) -> Any:
    return lambda draw: ({"x": array(draw, draw(dtypes), draw(SHAPES), low, high)}, {})


def pair(draw: Draw, dtype: str, low: float = -4, high: float = 4) -> dict[str, Any]:
    """Two operands whose shapes can be broadcast."""
    x, y = draw(SHAPES_OF_PAIRS).input_shapes
    return {"x": array(draw, dtype, x, low, high), "y": array(draw, dtype, y, low, high)}


def of_pairs(dtypes: st.SearchStrategy = NUMBERS, low: float = -4) -> Any:
    return lambda draw: (pair(draw, draw(dtypes), low), {})


def axis(draw: Draw, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


def axes(draw: Draw, rank: int) -> list[int]:
    chosen = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    return [a - rank * draw(st.integers(0, 1)) for a in chosen]


def x_of(draw: Draw, dtypes: st.SearchStrategy = NUMBERS) -> np.ndarray:
    return array(draw, draw(dtypes), draw(SHAPES))


def softmax(draw: Draw) -> Case:
    x = x_of(draw, FLOATS)
    return {"x": x}, {"axis": axis(draw, x.ndim)}


def reduction(draw: Draw) -> Case:
    # no product of these overflows on its way
    x = array(draw, draw(NUMBERS), draw(SHAPES), -1.3, 1.3)
    return {"x": x}, {"axes": axes(draw, x.ndim), "keep_dims": draw(st.booleans())}


def linear(draw: Draw) -> Case:
    dtype = draw(FLOATS)
    *lead, size, out = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=5))
    operands = {"x": array(draw, dtype, (*lead, size))}
    constants = {"weight": array(draw, dtype, (out, size))}
    if draw(st.booleans()):
        constants["bias"] = array(draw, dtype, (out,))
    return operands, constants


def matmul(draw: Draw) -> Case:
    dtype = draw(FLOATS)
    batch = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3))
    rows, inner, columns = draw(st.tuples(*[st.integers(1, 4)] * 3))
    turn_x, turn_y = draw(st.booleans()), draw(st.booleans())
    x_shape, y_shape = batch.input_shapes
    x = array(draw, dtype, (*x_shape, *((inner, rows) if turn_x else (rows, inner))))
    y = array(draw, dtype, (*y_shape, *((columns, inner) if turn_y else (inner, columns))))
    return {"x": x, "y": y}, {"transpose_x": turn_x, "transpose_y": turn_y}


def cast(draw: Draw) -> Case:
    x = array(draw, draw(st.sampled_from(["float16", "float32", "int32", "bool"])), draw(SHAPES))
    return {"x": x}, {"dtype": draw(st.sampled_from(["fp16", "fp32"]))}


def reshape(draw: Draw) -> Case:
    x = x_of(draw)
    shape = [int(n) for n in draw(st.permutations(x.shape))]
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = -1
    return {"x": x}, {"shape": shape}


def transpose(draw: Draw) -> Case:
    x = x_of(draw)
    return {"x": x}, {"perm": draw(st.permutations(range(x.ndim)))}


def concat(draw: Draw) -> Case:
    shape, dtype = draw(SHAPES), draw(NUMBERS)
    at = axis(draw, len(shape))
    values = []
    for _ in range(draw(st.integers(1, 3))):
        own = list(shape)
        own[at] = draw(st.integers(1, 4))
        values.append(array(draw, dtype, tuple(own)))
    return {"values": values}, {"axis": at, "interleave": False}


def slice_by_index(draw: Draw) -> Case:
    """Slices that are not empty, some from the end."""
    x = x_of(draw)
    begin, end = [], []
    for n in x.shape:
        low = draw(st.integers(0, n - 1))
        high = draw(st.integers(low + 1, n))
        from_end = draw(st.booleans())
        begin.append(low - n if from_end else low)
        end.append(high - n if from_end and high < n else high)
    return {"x": x}, {"begin": begin, "end": end}


def gather(draw: Draw) -> Case:
    x = x_of(draw)
    shape, at = draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=3)), axis(draw, x.ndim)
    indices = array(draw, "int32", shape, 0, x.shape[at] - 1)
    return {"x": x, "indices": indices}, {"axis": at, "batch_dims": 0, "validate_indices": False}


def select(draw: Draw) -> Case:
    """Operands and a condition that are broadcast; coremltools infers the shape of the operands."""
    shapes = draw(SHAPES_OF_PAIRS)
    whole = shapes.result_shape
    cond = [draw(st.sampled_from((1, n))) for n in whole][draw(st.integers(0, len(whole) - 1)) :]
    dtype = draw(NUMBERS)
    operands = {
        name: array(draw, dtype, x) for name, x in zip("ab", shapes.input_shapes, strict=True)
    }
    return {"cond": array(draw, "bool", tuple(cond)), **operands}, {}


def gelu(draw: Draw) -> Case:
    return {"x": x_of(draw, FLOATS)}, {"mode": "TANH_APPROXIMATION"}


def with_epsilon(draw: Draw) -> Case:
    x = array(draw, draw(FLOATS), draw(SHAPES), 0.1, 4)
    return {"x": x}, {"epsilon": x.dtype.type(0.25)}


CASES: dict[str, Callable[[Draw], Case]] = {
    **dict.fromkeys(("add", "sub", "mul", "equal", "less_equal", "greater_equal"), of_pairs()),
    "logical_and": of_pairs(st.just("bool")),
    **dict.fromkeys(("exp", "cos", "sin", "tanh", "sigmoid"), of_floats()),
    "sqrt": of_floats(low=0),
    "rsqrt": with_epsilon,
    "gelu": gelu,
    "softmax": softmax,
    **dict.fromkeys(("reduce_sum", "reduce_mean"), reduction),
    "linear": linear,
    "matmul": matmul,
    "cast": cast,
    "reshape": reshape,
    "transpose": transpose,
    "concat": concat,
    "slice_by_index": slice_by_index,
    "gather": gather,
    "select": select,
}


def test_every_operation_of_the_table_has_a_case() -> None:
    assert CASES.keys() == OPS.keys()


def test_the_table_has_all_that_is_made_and_no_more() -> None:
    made = {kind for kind in OPERATIONS if not kind.startswith("constexpr_")}
    assert made - {"const", "read_state", "write_state"} == OPS.keys()


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_coremltools(kind: str, data: st.DataObject) -> None:
    compare(kind, *CASES[kind](data.draw))


def compare(kind: str, operands: dict[str, Any], constants: dict[str, Any]) -> None:
    outputs, expected = inferred(kind, **operands, **constants)
    found = compute(kind, operands, outputs, **constants)
    for array, type, value in zip(found, outputs, expected, strict=True):
        assert value is not None, "coremltools infers no value"
        assert (array.dtype.name, array.shape) == (type.dtype, type.shape)
        wanted = np.asarray(value).astype(type.dtype).astype(np.float64).reshape(type.shape)
        limit = TOLERANCE.get(type.dtype, 0)
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(array.astype(np.float64), wanted, rtol=limit, atol=limit * scale)


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
