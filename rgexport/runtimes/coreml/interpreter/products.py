"""Matrix products, accumulated in float32 whatever the dtype of their operands."""

from typing import Any

import numpy as np

from rgexport.runtimes.coreml.interpreter.call import Call, Given
from rgexport.runtimes.coreml.interpreter.weights import Weight


def linear(given: Given) -> Call:
    """`x · weightᵀ + bias`; a weight in a file passes by in slabs of rows."""

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


def matmul(given: Given) -> Call:
    """Product of the last two axes of `x` and `y`; the others are broadcast."""
    turn_x, turn_y = given.flag("transpose_x", False), given.flag("transpose_y", False)

    def function(x: np.ndarray, y: np.ndarray) -> Any:
        x = x.swapaxes(-1, -2) if turn_x and x.ndim > 1 else x
        return x @ (y.swapaxes(-1, -2) if turn_y and y.ndim > 1 else y)

    return given.call(function, "x", "y")
