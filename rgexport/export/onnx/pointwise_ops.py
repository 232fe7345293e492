"""Lowerings of the ops that work on each token by itself."""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.graph import END, GraphBuilder
from rgexport.export.program import Node


def rms_norm(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """A function `RmsNorm`, which a native kernel can replace."""
    return g.native_op("RmsNorm", node, _norm, eps=node.attributes["eps"])


def _norm(g: GraphBuilder, node: Node, x: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    """One node of opset 23, and `1 + weight`, which runtimes fold when they load the file."""
    scale = g.op("Add", weight, g.constant(1, "float32"))
    return [g.op("RMSNormalization", x, scale, axis=-1, epsilon=node.attributes["eps"])]


def add_rms_norm(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """A function: the residual sum, and its norm."""
    return g.native_op("AddRmsNorm", node, _add_norm, eps=node.attributes["eps"])


def _add_norm(
    g: GraphBuilder, node: Node, x: ir.Value, residual: ir.Value, weight: ir.Value
) -> Sequence[ir.Value]:
    total = g.op("Add", x, residual)
    return [total, *_norm(g, node, total, weight)]


def gelu_mul(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """A function: `gelu(gate) · up`."""
    return g.native_op("GeluMul", node, _gelu_mul)


def _gelu_mul(g: GraphBuilder, node: Node, gate: ir.Value, up: ir.Value) -> Sequence[ir.Value]:
    return [g.op("Mul", g.op("Gelu", gate, approximate="tanh"), up)]


def gelu(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """Gelu in its tanh form, in float32: processors have no kernel for float16."""
    (x,) = g.inputs(node)
    y = g.typed(g.op("Gelu", g.cast(x, "float32"), approximate="tanh"), "float32")
    return [g.cast(y, node.outputs[0].dtype)]


def elementwise(op: str) -> Callable[[Emitter, Node], Sequence[ir.Value]]:
    """A lowering to the ONNX op `op`, computed in the dtype of the result."""

    def lower(g: Emitter, node: Node) -> Sequence[ir.Value]:
        dtype = node.outputs[0].dtype
        return [g.op(op, *(g.cast(x, dtype) for x in g.inputs(node)))]

    return lower


def last_tokens(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """The last tokens; all of them where there are fewer."""
    x, count = g.inputs(node)
    start = g.op("Reshape", g.op("Neg", count), g.constant([1]))
    return [g.slice(x, start, END, 1)]


def soft_cap(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """`cap · tanh(x / cap)`, or x where the cap is 0."""
    if not node.attributes["cap"]:
        return [g.op("Identity", g.cast(g.inputs(node)[0], "float32"))]
    return g.native_op("SoftCap", node, _soft_cap, cap=node.attributes["cap"])


def _soft_cap(g: GraphBuilder, node: Node, x: ir.Value) -> Sequence[ir.Value]:
    cap = g.constant(node.attributes["cap"], "float32")
    return [g.op("Mul", g.op("Tanh", g.op("Div", g.cast(x, "float32"), cap)), cap)]
