"""Lowers for WebGPU: only ops with kernels there; int64 stays on the CPU.

Masks and slots are computed from positions in float32, which is exact up to 4 million.
"""

from collections.abc import Sequence

import onnx_ir as ir

from rgexport.export.onnx import linear_ops
from rgexport.export.onnx.emitter import END, GraphBuilder, OnnxEmitter
from rgexport.export.onnx.lowering import ring_attention
from rgexport.export.onnx.trust import MICROSOFT
from rgexport.export.program import Node
from rgexport.griffin.config import RG_LRU_C
from rgexport.quantize.scheme import Affine

_FORGOTTEN = -1e4  # the logarithm of a decay of 0: its `exp` is 0, and no product with it is NaN
_UNSEEN = -1e30  # added to the score of a masked key; infinities are not safe in shaders


def embedding(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    """Rows of the table that the head reads, unpacked by one op; padding is cut off."""
    ids, table = node.tensors
    scheme, columns = g.stored(table).scheme, table.size(1)
    if not isinstance(scheme, Affine):
        return linear_ops.embedding(g, node)
    rows = g.op(
        "GatherBlockQuantized",
        g.part(table, "data"),
        g.value(ids),
        linear_ops.float32(g, g.part(table, "scales")),
        g.part(table, "zero_points"),
        domain=MICROSOFT,
        bits=scheme.bits,
        block_size=scheme.block_size(columns),
        gather_axis=0,
        quantize_axis=1,
    )
    if scheme.num_blocks(columns) * scheme.block_size(columns) > columns:
        rows = g.slice(rows, 0, columns, 2)
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def gelu(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    return [g.op("Gelu", *g.inputs(node), approximate="tanh")]


def rg_lru_scan(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    """Emits `LinearAttention` with a head of size 1 per channel; queries and keys are 1."""
    x, input_gate, recurrence_gate, a_param, positions, state = g.inputs(node)
    width = node.tensors[0].size(2)
    one, two = (g.constant(number, "float32") for number in (1, 2))
    zero = g.constant(0, "float32")
    first = g.op("Equal", g.op("Unsqueeze", g.cast(positions, "float32"), g.constant([2])), zero)

    # Not decay · Sigmoid(gate): see `functions`.
    odds = g.op("Exp", g.op("Neg", recurrence_gate))
    log_a = g.op("Div", _decay(g, a_param), g.op("Add", odds, one))
    scale = g.op("Sqrt", g.op("Sub", one, g.op("Exp", g.op("Mul", log_a, two))))
    gated = g.op("Mul", x, g.op("Sigmoid", input_gate))
    b = g.op("Mul", gated, g.op("Where", first, one, scale))

    shape = g.op("Concat", g.op("Shape", positions), g.constant([1]), axis=0)
    ones = g.op("Expand", one, shape)
    h, present = g.ops(
        "LinearAttention",
        ones,
        ones,
        b,
        g.op("Reshape", state, g.constant([0, width, 1, 1])),
        g.op("Where", first, g.constant(_FORGOTTEN, "float32"), log_a),
        outputs=2,
        domain=MICROSOFT,
        q_num_heads=1,
        kv_num_heads=width,
        update_rule="gated",
        scale=1.0,
    )
    return [h, g.op("Reshape", present, g.constant([0, width]))]


def _decay(g: OnnxEmitter, a_param: ir.Value) -> ir.Value:
    """-8 softplus(a_param), which runtimes fold when they load the file.

    softplus(p) = max(p, 0) + log1p(u), u = exp(-|p|), and log1p(u) = u · log(1 + u) / (1 + u - 1),
    or u where 1 + u rounds to 1.
    """
    one, zero = g.constant(1, "float32"), g.constant(0, "float32")
    u = g.op("Exp", g.op("Neg", g.op("Abs", a_param)))
    raised = g.op("Add", u, one)
    digits = g.op("Sub", raised, one)
    lost = g.op("Equal", digits, zero)
    ratio = g.op("Div", g.op("Log", raised), g.op("Where", lost, one, digits))
    log1p = g.op("Mul", u, g.op("Where", lost, one, ratio))
    softplus = g.op("Add", g.op("Relu", a_param), log1p)
    return g.op("Mul", softplus, g.constant(RG_LRU_C, "float32"))


def local_attention(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    return ring_attention(g, node, *g.inputs(node), mask=_mask, slots=_ring_slots)


def _mask(g: GraphBuilder, positions: ir.Value, window: int) -> ir.Value:
    positions = g.cast(positions, "float32")
    last = g.op("Sub", g.slice(positions, 0, 1, 1), g.constant(1, "float32"))
    slots = g.constant(list(range(window)), "float32")
    age = _modulo(g, g.op("Sub", last, slots), window)
    keys = g.op("Concat", g.op("Sub", last, age), positions, axis=1)
    keys = g.op("Unsqueeze", keys, g.constant([1, 2]))
    zero = g.constant(0, "float32")
    distance = g.op("Sub", g.op("Unsqueeze", positions, g.constant([2, 3])), keys)
    near = g.op("LessOrEqual", distance, g.constant(window, "float32"))
    past = g.op("GreaterOrEqual", distance, zero)
    seen = g.op("And", g.op("And", near, past), g.op("GreaterOrEqual", keys, zero))
    return g.op("Where", seen, zero, g.constant(_UNSEEN, "float32"))


def _ring_slots(g: GraphBuilder, positions: ir.Value, attended: ir.Value, window: int) -> ir.Value:
    element = g.slice(g.slice(g.cast(attended, "float32"), 0, 1, 2), 0, 1, 3)
    never = g.op("Less", g.op("Abs", element), g.constant(0, "float32"))
    zero = g.op("Squeeze", g.cast(never, "float32"), g.constant([3]))
    slots = _modulo(g, g.slice(g.cast(positions, "float32"), -window, END, 1), window)
    slots = g.op("Add", g.op("Unsqueeze", slots, g.constant([2])), zero)
    batch = g.op("Squeeze", g.op("Shape", positions, start=0, end=1))
    bounds = g.constant(0, "float32"), g.cast(batch, "float32"), g.constant(1, "float32")
    row = g.op("Unsqueeze", g.op("Range", *bounds), g.constant([1, 2]))
    size = g.op("Shape", slots)
    row, head = (g.op("Expand", x, size) for x in (row, g.constant(0, "float32")))
    return g.cast(g.op("Concat", row, head, slots, axis=2), "int64")


def _modulo(g: GraphBuilder, x: ir.Value, size: int) -> ir.Value:
    """X modulo `size` for integers in float32; adding 0.5 keeps rounding away from integers."""
    halved = g.op("Add", x, g.constant(0.5, "float32"))
    turns = g.op("Floor", g.op("Div", halved, g.constant(size, "float32")))
    return g.op("Sub", x, g.op("Mul", turns, g.constant(size, "float32")))


LOWERINGS = {
    "embedding": embedding,
    "gelu": gelu,
    "local_attention": local_attention,
    "rg_lru_scan": rg_lru_scan,
}
