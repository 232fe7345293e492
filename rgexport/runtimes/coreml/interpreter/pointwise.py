"""Operations on elements, with broadcasting. Apple's documentation gives the formulas."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rgexport.runtimes.coreml.interpreter.call import Call, Given, Make
from rgexport.runtimes.coreml.interpreter.weights import Unsupported

_CASTS: dict[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    **{w: np.dtype(w) for w in ("bool", "int8", "uint8", "int16", "uint16", "int32")},
}


def unary(function: Callable[[np.ndarray], Any]) -> Make:
    """An operation on `x` alone."""
    return lambda given: given.call(function, "x")


def binary(function: Callable[[np.ndarray, np.ndarray], Any]) -> Make:
    """An operation on `x` and `y`."""
    return lambda given: given.call(function, "x", "y")


def rounded(function: Callable[[np.ndarray], np.ndarray]) -> Make:
    """As `unary`, computed in float64 and rounded once.

    numpy's float32 `exp` may be 2 units off, which at a decay of 0.9999 is 0.5 % of 1 - a².
    """
    return unary(lambda x: function(x.astype(np.float64)).astype(np.float32))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    one = np.float32(1)
    result: np.ndarray = one / (one + np.exp(-x))
    return result


def rsqrt(given: Given) -> Call:
    """1 / sqrt(x + epsilon)."""
    epsilon = given.number("epsilon", 1e-12)
    return given.call(lambda x: np.float32(1) / np.sqrt(x + epsilon), "x")


def gelu(given: Given) -> Call:
    """Gaussian error linear unit, in the approximation by a tanh."""
    mode = given.word("mode", "EXACT")
    if mode != "TANH_APPROXIMATION":
        raise Unsupported(f"its mode is {mode}; expected TANH_APPROXIMATION")
    return given.call(_gelu, "x")


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    result: np.ndarray = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return result


def cast(given: Given) -> Call:
    """Another dtype: floats become whole numbers by dropping what is behind the point."""
    word = given.word("dtype")
    if word not in _CASTS:
        raise Unsupported(f"it casts to {word}; expected one of {', '.join(_CASTS)}")
    dtype = _CASTS[word]
    return given.call(lambda x: x.astype(dtype), "x")


def softmax(given: Given) -> Call:
    """e^x over its sum along an axis."""
    axis = given.integer("axis", -1)

    def function(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        powers /= powers.sum(axis=axis, keepdims=True)
        return powers

    return given.call(function, "x")


def mean(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    """As `np.mean`, in a third of its time."""
    total: np.ndarray = np.add.reduce(x, axis=axis, keepdims=keepdims)
    return total / np.float32(x.size // max(1, total.size))


def reduction(function: Callable[..., Any]) -> Make:
    """Over `axes`, by default all."""

    def make(given: Given) -> Call:
        axes = given.integers("axes", None)
        keep = given.flag("keep_dims", False)
        return given.call(lambda x: function(x, axis=axes, keepdims=keep), "x")

    return make
