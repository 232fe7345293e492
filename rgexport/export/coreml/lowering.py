"""The lowering table: Griffin op → MIL operations; those of the two blocks have their own files."""

from collections.abc import Callable, Sequence

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml import attention_ops, recurrent_ops
from rgexport.export.coreml.emitter import Emitter
from rgexport.export.coreml.row_groups import by_groups
from rgexport.export.coreml.states import feature_name
from rgexport.export.program import Node

Lowering = Callable[[Emitter, Node], Sequence[Var | None]]
_NO_EPSILON = np.float32(1e-30)
"""MIL's `rsqrt` adds an epsilon, 1e-12 by default; its argument has the model's epsilon already."""


def _embedding(g: Emitter, node: Node) -> Sequence[Var]:
    """Rows of the table, as float32, times the scale."""
    ids, table = g.inputs(node)
    rows = g.cast(g.op("gather", x=table, indices=ids, axis=0), "float32")
    return [g.op("mul", x=rows, y=np.float32(node.attributes["scale"]))]


def _linear(g: Emitter, node: Node) -> Sequence[Var]:
    """`x · weightᵀ + bias` in the activation dtype; the head's weight is the embedding table."""
    x, weight, bias = (None if value is None else g.value(value) for value in node.inputs)
    arguments = {} if bias is None else {"bias": bias}
    return [g.op("linear", x=g.cast(x, node.outputs[0].dtype), weight=weight, **arguments)]


def _rms_norm(g: Emitter, node: Node) -> Sequence[Var]:
    """In float32; 1 + weight is stored as the weight."""
    x, weight = g.value(node.tensors[0]), node.tensors[1]
    square = g.op("reduce_mean", x=g.op("mul", x=x, y=x), axes=[-1], keep_dims=True)
    biased = g.op("add", x=square, y=np.float32(node.attributes["eps"]))
    normed = g.op("mul", x=x, y=g.op("rsqrt", x=biased, epsilon=_NO_EPSILON))
    return [g.op("mul", x=normed, y=g.weight(weight, 1, 1, weight.size(0)))]


def _gelu(g: Emitter, node: Node) -> Sequence[Var]:
    """The tanh form, in the dtype of its input."""
    (x,) = g.inputs(node)
    return [g.op("gelu", x=x, mode="TANH_APPROXIMATION")]


def _elementwise(kind: str) -> Lowering:
    """A lowering to `kind` in the dtype of the result."""

    def lower(g: Emitter, node: Node) -> Sequence[Var]:
        x, y = (g.cast(x, node.outputs[0].dtype) for x in g.inputs(node))
        return [g.op(kind, x=x, y=y)]

    return lower


def _last_tokens(g: Emitter, node: Node) -> Sequence[Var]:
    """The tokens that want logits: all or the last one, fixed for each function."""
    x = g.value(node.tensors[0])
    return [g.slice(x, x.shape[1] - g.num_logits, x.shape[1], 1)]


def _soft_cap(g: Emitter, node: Node) -> Sequence[Var]:
    """`cap · tanh(x / cap)` in float32; without a cap (0), x · 1 gives the output its own name."""
    (x,) = g.inputs(node)
    x, cap = g.cast(x, "float32"), np.float32(node.attributes["cap"])
    if not cap:
        return [g.op("mul", x=x, y=np.float32(1))]
    return [g.op("mul", x=g.op("tanh", x=g.op("mul", x=x, y=1 / cap)), y=cap)]


LOWERINGS: dict[str, Lowering] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "block_diagonal_linear": recurrent_ops.block_diagonal_linear,
    "gelu": _gelu,
    "causal_conv1d": recurrent_ops.causal_conv1d,
    "rg_lru_scan": recurrent_ops.rg_lru_scan,
    "rope": attention_ops.rope,
    "local_attention": attention_ops.local_attention,
    "add": _elementwise("add"),
    "mul": _elementwise("mul"),
    "last_tokens": _last_tokens,
    "soft_cap": _soft_cap,
}


def lower(emitter: Emitter, node: Node) -> None:
    """Adds the operations of one op, and names its results as the step program does."""
    with emitter.site(feature_name(node.site)):
        results = by_groups(emitter, node, LOWERINGS[node.op])
    for declared, value in zip(node.outputs, results, strict=True):
        if value is not None:
            emitter.declare(declared, value)
