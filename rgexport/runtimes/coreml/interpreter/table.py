"""Operation → what computes it. What stands not here is refused when a program is opened."""

import numpy as np

from rgexport.runtimes.coreml.interpreter import pointwise, products, shaping
from rgexport.runtimes.coreml.interpreter.call import Make, Op

_ARITHMETIC: dict[str, Make] = {
    "add": pointwise.binary(np.add),
    "sub": pointwise.binary(np.subtract),
    "mul": pointwise.binary(np.multiply),
    "equal": pointwise.binary(np.equal),
    "less_equal": pointwise.binary(np.less_equal),
    "greater_equal": pointwise.binary(np.greater_equal),
    "logical_and": pointwise.binary(np.logical_and),
    "sqrt": pointwise.unary(np.sqrt),
    "exp": pointwise.rounded(np.exp),
    "cos": pointwise.rounded(np.cos),
    "sin": pointwise.rounded(np.sin),
    "tanh": pointwise.unary(np.tanh),
    "sigmoid": pointwise.unary(pointwise.sigmoid),
    "rsqrt": pointwise.rsqrt,
    "gelu": pointwise.gelu,
    "softmax": pointwise.softmax,
    "reduce_sum": pointwise.reduction(np.add.reduce),
    "reduce_mean": pointwise.reduction(pointwise.mean),
    "linear": products.linear,
    "matmul": products.matmul,
}

_MOVES: dict[str, Make] = {
    "cast": pointwise.cast,
    "reshape": shaping.reshape,
    "transpose": shaping.transpose,
    "concat": shaping.concat,
    "slice_by_index": shaping.slice_by_index,
    "gather": shaping.gather,
}

OPS: dict[str, Op] = {
    **{name: Op(make, arithmetic=True) for name, make in _ARITHMETIC.items()},
    **{name: Op(make, arithmetic=False) for name, make in _MOVES.items()},
}
"""What rgexport makes, beside `const`, `constexpr_*`, `read_state` and `write_state`, which compute
nothing."""
