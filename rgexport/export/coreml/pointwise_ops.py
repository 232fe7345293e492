"""Lowerings of the ops that work on each token by itself."""

from collections.abc import Callable, Sequence

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.program import Node

_NO_EPSILON = np.float32(1e-30)
"""`rsqrt` adds an epsilon of its own, 1e-12 by default; ours is in its argument already."""


def rms_norm(g: Emitter, node: Node) -> Sequence[Var]:
    """In float32; what is stored of the weight is 1 + weight."""
    x, weight = g.value(node.tensors[0]), node.tensors[1]
    square = g.op("reduce_mean", x=g.op("mul", x=x, y=x), axes=[-1], keep_dims=True)
    biased = g.op("add", x=square, y=np.float32(node.attributes["eps"]))
    normed = g.op("mul", x=x, y=g.op("rsqrt", x=biased, epsilon=_NO_EPSILON))
    return [g.op("mul", x=normed, y=g.weight(weight, 1, 1, weight.size(0)))]


def gelu(g: Emitter, node: Node) -> Sequence[Var]:
    """The tanh form, in the dtype of its input."""
    (x,) = g.inputs(node)
    return [g.op("gelu", x=x, mode="TANH_APPROXIMATION")]


def elementwise(kind: str) -> Callable[[Emitter, Node], Sequence[Var]]:
    """A lowering to `kind` in the dtype of the result."""

    def lower(g: Emitter, node: Node) -> Sequence[Var]:
        x, y = (g.cast(x, node.outputs[0].dtype) for x in g.inputs(node))
        return [g.op(kind, x=x, y=y)]

    return lower


def last_tokens(g: Emitter, node: Node) -> Sequence[Var]:
    """All tokens or the last one: shapes are fixed, so the function has decided already."""
    x = g.value(node.tensors[0])
    return [g.slice(x, x.shape[1] - g.num_logits, x.shape[1], 1)]


def soft_cap(g: Emitter, node: Node) -> Sequence[Var]:
    """`cap · tanh(x / cap)` in float32; a cap of 0 is none, but an output has a name of its own."""
    (x,) = g.inputs(node)
    x, cap = g.cast(x, "float32"), np.float32(node.attributes["cap"])
    if not cap:
        return [g.op("mul", x=x, y=np.float32(1))]
    return [g.op("mul", x=g.op("tanh", x=g.op("mul", x=x, y=1 / cap)), y=cap)]
