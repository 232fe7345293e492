"""The operations that rgexport emits, in numpy, by the formulas of Apple's documentation.

It has only the emitted forms: when a program is opened, a parameter that is not read here is
refused, and so is an operation that is not in the tables at the end.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgexport.artifacts.coreml.mil import program as mil
from rgexport.runtimes.coreml.interpreter.weights import FileWeight, Unsupported

_CASTS = {"fp16": "float16", "fp32": "float32"}
_ONE = np.float32(1)


@dataclass(frozen=True)
class OperationCall:
    """A function, and the parameters that give its arguments, `lazy` ones as `FileWeight`s."""

    function: Callable[..., Any]
    operands: tuple[str, ...]
    lazy: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class OperationInputs:
    """The inputs of an operation, and their values as far as they are known before a run.

    Every parameter must be read, as an operand or by value: one that is not read may mean something
    that this interpreter does not do.
    """

    constants: Mapping[str, np.ndarray]
    names: Set[str]
    result: mil.TensorType
    names_read: set[str] = field(default_factory=set)

    def call(
        self, function: Callable[..., Any], *operands: str, lazy: tuple[str, ...] = ()
    ) -> OperationCall:
        for name in operands:
            self._read(name)
        return OperationCall(function, operands, lazy)

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(self._constant(name).reshape(-1).tolist())

    def item(self, name: str) -> Any:
        value = self._constant(name)
        if value.size != 1:
            raise Unsupported(f"its input {name} has {value.size} elements; expected 1")
        return value.item()

    def _constant(self, name: str) -> np.ndarray:
        self._read(name)
        if name not in self.constants:
            raise Unsupported(f"its input {name} is computed; expected a constant")
        return self.constants[name]

    def _read(self, name: str) -> None:
        if name not in self.names:
            raise Unsupported(f"it has no input {name}")
        self.names_read.add(name)


MakeCall = Callable[[OperationInputs], OperationCall]


# ---- Elementwise, with broadcasting -----------------------------------------------------------


def _unary(function: Callable[[np.ndarray], Any]) -> MakeCall:
    return lambda inputs: inputs.call(function, "x")


def _binary(function: Callable[[np.ndarray, np.ndarray], Any]) -> MakeCall:
    return lambda inputs: inputs.call(function, "x", "y")


def _rounded(function: Callable[[np.ndarray], np.ndarray]) -> MakeCall:
    """Computes in float64 and rounds once.

    numpy's float32 `exp` may be 2 units off, which at a decay of 0.9999 is 0.5 % of 1 - a².
    """
    return _unary(lambda x: function(x.astype(np.float64)).astype(np.float32))


def _rsqrt(inputs: OperationInputs) -> OperationCall:
    epsilon = np.float32(inputs.item("epsilon"))
    return inputs.call(lambda x: _ONE / np.sqrt(x + epsilon), "x")


def _gelu(inputs: OperationInputs) -> OperationCall:
    mode = inputs.item("mode")
    if mode != "TANH_APPROXIMATION":
        raise Unsupported(f"its mode is {mode}; expected TANH_APPROXIMATION")

    def function(x: np.ndarray) -> Any:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
        return np.float32(0.5) * x * (_ONE + np.tanh(inner))

    return inputs.call(function, "x")


def _cast(inputs: OperationInputs) -> OperationCall:
    name = inputs.item("dtype")
    if _CASTS.get(name) != inputs.result.dtype:
        raise Unsupported(f"it casts to {name} and gives {inputs.result.dtype}")
    return inputs.call(lambda x: x.astype(np.float32), "x")


def _softmax(inputs: OperationInputs) -> OperationCall:
    axis = inputs.item("axis")

    def function(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        powers /= powers.sum(axis=axis, keepdims=True)
        return powers

    return inputs.call(function, "x")


def _reduction(function: Callable[..., Any]) -> MakeCall:
    def make(inputs: OperationInputs) -> OperationCall:
        axes, keep = inputs.integers("axes"), inputs.item("keep_dims")
        return inputs.call(lambda x: function(x, axis=axes, keepdims=keep), "x")

    return make


# ---- Products, accumulated in float32 ---------------------------------------------------------


def _linear(inputs: OperationInputs) -> OperationCall:
    def function(x: np.ndarray, weight: Any, bias: np.ndarray | None = None) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(weight, FileWeight):
            product = np.empty((len(rows), weight.type.shape[0]), np.float32)
            for start, stop, slab in weight.slabs():
                np.matmul(rows, slab.T, out=product[:, start:stop])
        else:
            product = rows @ weight.T
        if bias is not None:
            product += bias
        return product.reshape(*x.shape[:-1], -1)

    bias = ("bias",) if "bias" in inputs.names else ()
    return inputs.call(function, "x", "weight", *bias, lazy=("weight",))


def _matmul(inputs: OperationInputs) -> OperationCall:
    transpose_x, transpose_y = inputs.item("transpose_x"), inputs.item("transpose_y")

    def function(x: np.ndarray, y: np.ndarray) -> Any:
        x = x.swapaxes(-1, -2) if transpose_x else x
        return x @ (y.swapaxes(-1, -2) if transpose_y else y)

    return inputs.call(function, "x", "y")


# ---- Operations that move elements and change none --------------------------------------------


def _arranged(function: Callable[[np.ndarray, Any], np.ndarray], how: str) -> MakeCall:
    def make(inputs: OperationInputs) -> OperationCall:
        integers = inputs.integers(how)
        return inputs.call(lambda x: function(x, integers), "x")

    return make


def _concat(inputs: OperationInputs) -> OperationCall:
    axis = inputs.item("axis")
    if inputs.item("interleave"):
        raise Unsupported("it is interleaved")
    return inputs.call(lambda *values: np.concatenate(values, axis=axis), "values")


def _slice_by_index(inputs: OperationInputs) -> OperationCall:
    begin, end = inputs.integers("begin"), inputs.integers("end")
    index = tuple(slice(*bounds) for bounds in zip(begin, end, strict=True))
    return inputs.call(lambda x: x[index], "x")


def _gather(inputs: OperationInputs) -> OperationCall:
    inputs.item("validate_indices")  # they are always checked
    axis = inputs.item("axis")
    if inputs.item("batch_dims"):
        raise Unsupported("it gathers from each of a batch")

    def function(x: Any, indices: np.ndarray) -> np.ndarray:
        length = (x.type.shape if isinstance(x, FileWeight) else x.shape)[axis]
        if indices.size and (indices.min() < 0 or indices.max() >= length):
            raise ValueError(f"an index is not below {length}")
        if isinstance(x, FileWeight) and axis == 0:
            return x.rows(indices)
        return np.asarray(np.take(x.whole() if isinstance(x, FileWeight) else x, indices, axis))

    return inputs.call(function, "x", "indices", lazy=("x",))


ARITHMETIC: dict[str, MakeCall] = {
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
    "sigmoid": _unary(lambda x: _ONE / (_ONE + np.exp(-x))),
    "rsqrt": _rsqrt,
    "gelu": _gelu,
    "softmax": _softmax,
    "reduce_sum": _reduction(np.add.reduce),
    "reduce_mean": _reduction(np.mean),
    "linear": _linear,
    "matmul": _matmul,
    "cast": _cast,
}
"""Operations whose results are rounded to their declared dtype."""
OPS: dict[str, MakeCall] = ARITHMETIC | {
    "reshape": _arranged(np.reshape, "shape"),
    "transpose": _arranged(np.transpose, "perm"),
    "concat": _concat,
    "slice_by_index": _slice_by_index,
    "gather": _gather,
    "select": lambda inputs: inputs.call(np.where, "cond", "a", "b"),
}
"""All but `const`, `constexpr_*`, `read_state` and `write_state`, which compute nothing."""
