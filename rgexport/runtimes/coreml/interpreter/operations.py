"""The operations that rgexport emits, in numpy, by the formulas of Apple's documentation.

Only the forms that it emits: a parameter that is not asked for here is refused when a program is
opened, as is an operation that is not in the table at the end.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rgexport.runtimes.coreml.interpreter.call import Call, Given, Make, Op
from rgexport.runtimes.coreml.interpreter.weights import Unsupported, Weight

_CASTS = {"fp16": np.float16, "fp32": np.float32}


# ---- On elements, with broadcasting -----------------------------------------------------------


def _unary(function: Callable[[np.ndarray], Any]) -> Make:
    return lambda given: given.call(function, "x")


def _binary(function: Callable[[np.ndarray, np.ndarray], Any]) -> Make:
    return lambda given: given.call(function, "x", "y")


def _rounded(function: Callable[[np.ndarray], np.ndarray]) -> Make:
    """As `_unary`, computed in float64 and rounded once.

    numpy's float32 `exp` may be 2 units off, which at a decay of 0.9999 is 0.5 % of 1 - a².
    """
    return _unary(lambda x: function(x.astype(np.float64)).astype(np.float32))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    one = np.float32(1)
    result: np.ndarray = one / (one + np.exp(-x))
    return result


def _rsqrt(given: Given) -> Call:
    """1 / sqrt(x + epsilon)."""
    epsilon = np.float32(given.item("epsilon"))
    return given.call(lambda x: np.float32(1) / np.sqrt(x + epsilon), "x")


def _gelu(given: Given) -> Call:
    mode = given.item("mode")
    if mode != "TANH_APPROXIMATION":
        raise Unsupported(f"its mode is {mode}; expected TANH_APPROXIMATION")
    return given.call(_gelu_by_tanh, "x")


def _gelu_by_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    result: np.ndarray = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return result


def _cast(given: Given) -> Call:
    word = given.item("dtype")
    if word not in _CASTS:
        raise Unsupported(f"it casts to {word}; expected one of {', '.join(_CASTS)}")
    dtype = _CASTS[word]
    return given.call(lambda x: x.astype(dtype), "x")


def _softmax(given: Given) -> Call:
    axis = given.item("axis")

    def function(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        powers /= powers.sum(axis=axis, keepdims=True)
        return powers

    return given.call(function, "x")


def _mean(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    """As `np.mean`, in a third of its time."""
    add: Callable[..., np.ndarray] = np.add.reduce  # numpy's overloads take no `bool`
    total = add(x, axis=axis, keepdims=keepdims)
    return total / np.float32(x.size // max(1, total.size))


def _reduction(function: Callable[..., Any]) -> Make:
    def make(given: Given) -> Call:
        axes, keep = given.integers("axes"), given.item("keep_dims")
        return given.call(lambda x: function(x, axis=axes, keepdims=keep), "x")

    return make


# ---- Products, accumulated in float32 ---------------------------------------------------------


def _linear(given: Given) -> Call:
    """`x · weightᵀ + bias`; a weight in a file is read in slabs of rows."""

    def function(x: np.ndarray, weight: Any, bias: np.ndarray | None = None) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        product = _by_slabs(rows, weight) if isinstance(weight, Weight) else rows @ weight.T
        if bias is not None:
            product += bias
        return product.reshape(*x.shape[:-1], -1)

    bias = ("bias",) if given.has("bias") else ()
    return given.call(function, "x", "weight", *bias, lazy=("weight",))


def _by_slabs(x: np.ndarray, weight: Weight) -> np.ndarray:
    out = np.empty((len(x), weight.type.shape[0]), np.float32)
    for start, stop, rows in weight.slabs():
        np.matmul(x, rows.T, out=out[:, start:stop])
    return out


def _matmul(given: Given) -> Call:
    """Product of the last two axes of `x` and `y`; the others are broadcast."""
    transpose_x, transpose_y = given.item("transpose_x"), given.item("transpose_y")

    def function(x: np.ndarray, y: np.ndarray) -> Any:
        x = x.swapaxes(-1, -2) if transpose_x else x
        return x @ (y.swapaxes(-1, -2) if transpose_y else y)

    return given.call(function, "x", "y")


# ---- Operations that move elements and change none --------------------------------------------


def _reshape(given: Given) -> Call:
    shape = given.integers("shape")
    return given.call(lambda x: x.reshape(shape), "x")


def _transpose(given: Given) -> Call:
    order = given.integers("perm")
    return given.call(lambda x: x.transpose(order), "x")


def _concat(given: Given) -> Call:
    axis = given.item("axis")
    if given.item("interleave"):
        raise Unsupported("it is interleaved")
    return given.call(lambda *values: np.concatenate(values, axis=axis), "values")


def _slice_by_index(given: Given) -> Call:
    """`x[begin:end]` of each axis."""
    begin, end = given.integers("begin"), given.integers("end")
    index = tuple(slice(*bounds) for bounds in zip(begin, end, strict=True))
    return given.call(lambda x: x[index], "x")


def _gather(given: Given) -> Call:
    """Slices of `x` along an axis; of a weight in a file, only the wanted rows are read."""
    given.item("validate_indices")  # they are always checked
    axis = given.item("axis")
    if given.item("batch_dims"):
        raise Unsupported("it gathers from each of a batch")

    def function(x: Any, indices: np.ndarray) -> np.ndarray:
        length = (x.type.shape if isinstance(x, Weight) else x.shape)[axis]
        if indices.size and (indices.min() < 0 or indices.max() >= length):
            raise ValueError(f"an index is not below {length}")
        if isinstance(x, Weight) and axis == 0:
            return x.rows(indices)
        return np.asarray(np.take(x.whole() if isinstance(x, Weight) else x, indices, axis))

    return given.call(function, "x", "indices", lazy=("x",))


def _select(given: Given) -> Call:
    """`a` where `cond`, and `b` elsewhere."""
    return given.call(np.where, "cond", "a", "b")


_ARITHMETIC: dict[str, Make] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "equal": _binary(np.equal),
    "less_equal": _binary(np.less_equal),
    "greater_equal": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "sqrt": _unary(np.sqrt),
    "exp": _rounded(np.exp),
    "cos": _rounded(np.cos),
    "sin": _rounded(np.sin),
    "tanh": _unary(np.tanh),
    "sigmoid": _unary(_sigmoid),
    "rsqrt": _rsqrt,
    "gelu": _gelu,
    "softmax": _softmax,
    "reduce_sum": _reduction(np.add.reduce),
    "reduce_mean": _reduction(_mean),
    "linear": _linear,
    "matmul": _matmul,
}
_MOVES: dict[str, Make] = {
    "cast": _cast,
    "reshape": _reshape,
    "transpose": _transpose,
    "concat": _concat,
    "slice_by_index": _slice_by_index,
    "gather": _gather,
    "select": _select,
}
OPS: dict[str, Op] = {
    **{name: Op(make, arithmetic=True) for name, make in _ARITHMETIC.items()},
    **{name: Op(make, arithmetic=False) for name, make in _MOVES.items()},
}
"""All but `const`, `constexpr_*`, `read_state` and `write_state`, which compute nothing."""
