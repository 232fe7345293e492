"""Lowerings of the ops of the recurrent block."""

from collections.abc import Sequence

import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.functions import RG_LRU_SCAN, UNGATED_SCAN
from rgexport.export.onnx.graph import END, GraphBuilder
from rgexport.export.program import Node
from rgexport.griffin.config import RG_LRU_C


def causal_conv1d(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """A function `CausalConv1d`, which a native kernel can replace."""
    return g.native_op("CausalConv1d", node, _shifted_products)


def _shifted_products(
    g: GraphBuilder,
    node: Node,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value,
    state: ir.Value,
) -> Sequence[ir.Value]:
    """One multiply-add per tap over shifted views: faster than `Conv` with a group per channel."""
    taps, dtype = node.tensors[1].size(2), node.tensors[3].dtype
    window = g.typed(g.op("Concat", state, g.cast(x, dtype), axis=1), dtype)
    present = g.slice(window, -(taps - 1), END, 1)
    inputs = g.cast(window, "float32")
    by_tap = g.op("Transpose", weight, perm=[1, 2, 0])
    y = bias
    for tap in range(taps):
        stop = tap - (taps - 1) or END
        shifted = g.slice(inputs, tap, stop, 1)
        y = g.op("Add", y, g.op("Mul", shifted, g.slice(by_tap, tap, tap + 1, 1)))
    return [y, present]


def block_diagonal_linear(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """One batched `MatMul` with a matrix per block of channels."""
    x, weight, bias = g.inputs(node)
    heads, block = (node.tensors[1].size(axis) for axis in (0, 1))
    split = g.op("Reshape", x, g.constant([0, 0, heads, block]))
    y = g.op("MatMul", g.op("Transpose", split, perm=[0, 2, 1, 3]), weight)
    y = g.op("Add", g.op("Transpose", y, perm=[0, 2, 1, 3]), bias)
    return [g.op("Reshape", y, g.constant([0, 0, heads * block]))]


def rg_lru_scan(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """The scan without its gates, for graphs without native kernels; it is inlined there."""
    x, input_gate, recurrence_gate, a_param, positions, state = g.inputs(node)
    inputs = (x, input_gate, recurrence_gate, _decay(g, a_param), positions, state)
    return g.call(UNGATED_SCAN, *inputs)


def gated_rg_lru_scan(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """The scan with its gates: a function, see `functions`."""
    *inputs, a_param, positions, state = g.inputs(node)
    return g.call(RG_LRU_SCAN, *inputs, _decay(g, a_param), positions, state)


def _decay(g: Emitter, a_param: ir.Value) -> ir.Value:
    """-8 softplus(a_param), which runtimes fold when they load the file."""
    return g.op("Mul", g.op("Softplus", a_param), g.constant(RG_LRU_C, "float32"))
