"""Lowerings of the ops of the recurrent block, in float32."""

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.program import Node


def causal_conv1d(g: Emitter, node: Node) -> Sequence[Var]:
    """The convolution over the last inputs, which are rounded to the state's dtype first."""
    x, weight, bias, state = node.tensors
    channels, taps = weight.size(0), weight.size(2)
    new = g.cast(g.value(x), state.dtype)
    tokens = new.shape[1]
    window = g.concat([g.value(state), new], 1) if taps > 1 else new
    following = g.slice(window, tokens, tokens + taps - 1, 1) if taps > 1 else None
    by_tap = g.op("transpose", x=g.weight(weight, 1, channels, taps), perm=[0, 2, 1])
    y = _taps(g, g.cast(window, "float32"), by_tap, tokens)
    return [g.op("add", x=y, y=g.weight(bias, 1, 1, channels)), following]


def _taps(g: Emitter, window: Var, weight: Var, tokens: int) -> Var:
    """The sum over the taps [1, C, R] times views of the window [1, C - 1 + T, R]."""
    if tokens == 1:
        products = g.op("mul", x=window, y=weight)
        return g.op("reduce_sum", x=products, axes=[1], keep_dims=True)
    total = None
    for tap in range(weight.shape[1]):
        view = g.slice(window, tap, tap + tokens, 1)
        product = g.op("mul", x=view, y=g.slice(weight, tap, tap + 1, 1))
        total = product if total is None else g.op("add", x=total, y=product)
    return total


def block_diagonal_linear(g: Emitter, node: Node) -> Sequence[Var]:
    """A matmul with the blocks of channels as its batch."""
    x, weight, bias = node.tensors
    heads, block = weight.size(0), weight.size(1)
    x = g.value(x)
    tokens = x.shape[1]
    if tokens == 1:
        blocks = g.reshape(x, heads, 1, block)
    else:
        blocks = g.op("transpose", x=g.reshape(x, tokens, heads, block), perm=[1, 0, 2])
    y = g.op("matmul", x=blocks, y=g.value(weight))
    y = g.op("add", x=y, y=g.weight(bias, heads, 1, block))
    if tokens > 1:
        y = g.op("transpose", x=y, perm=[1, 0, 2])
    return [g.reshape(y, 1, tokens, heads * block)]


def rg_lru_scan(g: Emitter, node: Node) -> Sequence[Var]:
    """Gates and recurrence; the parameter is stored as the factor of its gate (`DECAY`)."""
    a_param = node.tensors[3]
    others = (value for value in node.tensors if value is not a_param)
    x, input_gate, recurrence_gate, positions, state = map(g.value, others)
    tokens, width = x.shape[1:]
    decay = g.weight(a_param, 1, 1, width)
    log_a = g.op("mul", x=g.op("sigmoid", x=recurrence_gate), y=decay)
    first = g.cast(g.op("equal", x=positions, y=np.int32(0)), "float32")
    first = g.reshape(first, 1, tokens, 1)
    later = g.op("sub", x=np.float32(1), y=first)
    a = g.op("mul", x=g.op("exp", x=log_a), y=later)
    # Rounded as in recurrentgemma, see griffin.ops.
    square = g.op("exp", x=g.op("mul", x=log_a, y=np.float32(2)))
    root = g.op("sqrt", x=g.op("sub", x=np.float32(1), y=square))
    scale = g.op("add", x=first, y=g.op("mul", x=root, y=later))
    gated = g.op("mul", x=x, y=g.op("sigmoid", x=input_gate))
    b = g.op("mul", x=gated, y=scale)
    h = linear_scan(g, a, b, g.reshape(state, 1, 1, width))
    return [h, g.reshape(g.slice(h, tokens - 1, tokens, 1), 1, width)]


def linear_scan(g: Emitter, a: Var, b: Var, h0: Var) -> Var:
    """All h of `h_t = a_t · h_{t-1} + b_t` for a, b [1, T, R] and h0 [1, 1, R].

    A Hillis-Steele prefix scan in log2(T) passes, since Core ML has no scan and its loops are slow.
    """
    tokens, shift = b.shape[1], 1
    while shift < tokens:
        before_a, before_b = (g.slice(x, 0, tokens - shift, 1) for x in (a, b))
        later_a, later_b = (g.slice(x, shift, tokens, 1) for x in (a, b))
        sums = g.op("add", x=later_b, y=g.op("mul", x=later_a, y=before_b))
        products = g.op("mul", x=later_a, y=before_a)
        b = g.concat([g.slice(b, 0, shift, 1), sums], 1)
        a = g.concat([g.slice(a, 0, shift, 1), products], 1)
        shift *= 2
    return g.op("add", x=b, y=g.op("mul", x=a, y=h0))
