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


def with_epsilon(function: Callable[[np.ndarray], np.ndarray], default: float) -> Make:
    """`function(x + epsilon)`."""

    def make(given: Given) -> Call:
        epsilon = given.number("epsilon", default)
        return given.call(lambda x: function(x + epsilon), "x")

    return make


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    one = np.float32(1)
    result: np.ndarray = one / (one + np.exp(-x))
    return result


def silu(x: np.ndarray) -> np.ndarray:
    """Of x: x · sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x)."""
    result: np.ndarray = np.logaddexp(np.float32(0), x)
    return result


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(x)."""
    result: np.ndarray = np.float32(1) / np.sqrt(x)
    return result


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    result: np.ndarray = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return result


def _gelu_sigmoid(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(np.float32(1.702) * x)


def _gelu_exact(x: np.ndarray) -> np.ndarray:
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.reshape(-1).tolist()], np.float32)
    result: np.ndarray = np.float32(0.5) * x * (np.float32(1) + erf.reshape(x.shape))
    return result


_GELUS = {
    "EXACT": _gelu_exact,
    "TANH_APPROXIMATION": _gelu_tanh,
    "SIGMOID_APPROXIMATION": _gelu_sigmoid,
}


def gelu(given: Given) -> Call:
    """Gaussian error linear unit, exact or in one of two approximations."""
    mode = given.word("mode", "EXACT")
    if mode not in _GELUS:
        raise Unsupported(f"its mode is {mode}; expected one of {', '.join(_GELUS)}")
    return given.call(_GELUS[mode], "x")


def clip(given: Given) -> Call:
    """Not below `alpha`, not above `beta`."""
    low, high = given.number("alpha"), given.number("beta")
    return given.call(lambda x: np.clip(x, low, high), "x")


def cast(given: Given) -> Call:
    """Another dtype: floats become whole numbers by dropping what is behind the point."""
    word = given.word("dtype")
    if word not in _CASTS:
        raise Unsupported(f"it casts to {word}; expected one of {', '.join(_CASTS)}")
    dtype = _CASTS[word]
    return given.call(lambda x: x.astype(dtype), "x")


def select(given: Given) -> Call:
    """Elements of `a` where `cond` is true, of `b` elsewhere."""
    return given.call(np.where, "cond", "a", "b")


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


def argument_reduction(function: Callable[..., Any]) -> Make:
    """The index of the extreme along one axis."""

    def make(given: Given) -> Call:
        axis = given.integer("axis", -1)
        keep = given.flag("keep_dims", False)
        given.word("output_dtype", "int32")  # the declared type says it
        return given.call(lambda x: function(x, axis=axis, keepdims=keep), "x")

    return make


def cumsum(given: Given) -> Call:
    """Sums of all elements up to each one along an axis."""
    axis = given.integer("axis", 0)
    if given.flag("exclusive", False) or given.flag("reverse", False):
        raise Unsupported("it is exclusive or reversed")
    return given.call(lambda x: np.cumsum(x, axis=axis, dtype=x.dtype), "x")
