"""Lowers each Griffin op to ONNX nodes; linears and the embedding are in `linear_ops`."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rgexport.export.onnx import linear_ops
from rgexport.export.onnx.emitter import END, Body, GraphBuilder, OnnxEmitter
from rgexport.export.onnx.functions import RG_LRU_SCAN, UNGATED_SCAN
from rgexport.export.onnx.linear_ops import GROUPED
from rgexport.export.program import Node
from rgexport.export.row_groups import lower_by_groups
from rgexport.griffin.config import RG_LRU_C
from rgexport.griffin.ops import rope_frequencies

Lowering = Callable[[OnnxEmitter, Node], Sequence[ir.Value]]


def _native(name: str, body: Body, *attributes: str) -> Lowering:
    """Makes a lowering to a function `name` of our domain, which a native kernel can replace."""

    def lower(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
        return g.native_op(name, node, body, **{key: node.attributes[key] for key in attributes})

    return lower


def _elementwise(op: str) -> Lowering:
    def lower(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
        return [g.op(op, *(g.cast(x, node.outputs[0].dtype) for x in g.inputs(node)))]

    return lower


def norm(g: GraphBuilder, node: Node, x: ir.Value, weight: ir.Value) -> Sequence[ir.Value]:
    """One node of opset 23, and `1 + weight`, which runtimes fold when they load the file."""
    scale = g.op("Add", weight, g.constant(1, "float32"))
    return [g.op("RMSNormalization", x, scale, axis=-1, epsilon=node.attributes["eps"])]


def _add_norm(
    g: GraphBuilder, node: Node, x: ir.Value, residual: ir.Value, weight: ir.Value
) -> Sequence[ir.Value]:
    total = g.op("Add", x, residual)
    return [total, *norm(g, node, total, weight)]


def gelu_mul(g: GraphBuilder, node: Node, gate: ir.Value, up: ir.Value) -> Sequence[ir.Value]:
    return [g.op("Mul", g.op("Gelu", gate, approximate="tanh"), up)]


def _gelu(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    (x,) = g.inputs(node)
    y = g.typed(g.op("Gelu", g.cast(x, "float32"), approximate="tanh"), "float32")
    return [g.cast(y, node.outputs[0].dtype)]


def _last_tokens(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, count = g.inputs(node)
    start = g.op("Reshape", g.op("Neg", count), g.constant([1]))
    return [g.slice(x, start, END, 1)]


def _soft_cap(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    if not node.attributes["cap"]:
        return [g.op("Identity", g.cast(g.inputs(node)[0], "float32"))]
    return g.native_op("SoftCap", node, capped, cap=node.attributes["cap"])


def capped(g: GraphBuilder, node: Node, x: ir.Value) -> Sequence[ir.Value]:
    cap = g.constant(node.attributes["cap"], "float32")
    return [g.op("Mul", g.op("Tanh", g.op("Div", g.cast(x, "float32"), cap)), cap)]


def convolved(
    g: GraphBuilder, node: Node, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value
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


def _block_diagonal_linear(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, weight, bias = g.inputs(node)
    heads, block = (node.tensors[1].size(axis) for axis in (0, 1))
    split = g.op("Reshape", x, g.constant([0, 0, heads, block]))
    y = g.op("MatMul", g.op("Transpose", split, perm=[0, 2, 1, 3]), weight)
    y = g.op("Add", g.op("Transpose", y, perm=[0, 2, 1, 3]), bias)
    return [g.op("Reshape", y, g.constant([0, 0, heads * block]))]


def _scan(function: ir.Function) -> Lowering:
    def lower(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
        *inputs, a_param, positions, state = g.inputs(node)
        # -8 softplus(a_param), which runtimes fold when they load the file.
        decay = g.op("Mul", g.op("Softplus", a_param), g.constant(RG_LRU_C, "float32"))
        return g.call(function, *inputs, decay, positions, state)

    return lower


def _rope(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, positions = g.inputs(node)
    head_dim, dims = int(node.attributes["head_dim"]), int(node.attributes["dims"])
    # The frequencies of the reference: another pow differs in the last bit, which at position
    # 100,000 rotates a head by 0.3 degrees.
    frequencies = rope_frequencies(dims, node.attributes["theta"]).numpy()
    position = g.op("Unsqueeze", g.cast(positions, "float32"), g.constant([2]))
    angles = g.op("Mul", position, g.constant(frequencies, "float32"))
    rotated = g.op(
        "RotaryEmbedding",
        g.cast(x, "float32"),
        g.op("Cos", angles),
        g.op("Sin", angles),
        num_heads=node.tensors[0].size(2) // head_dim,
        rotary_embedding_dim=dims,
    )
    return [g.cast(g.typed(rotated, "float32"), node.outputs[0].dtype)]


def _local_attention(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    heads = node.tensors[0].size(2) // node.tensors[1].size(2)
    return g.native_op("LocalAttention", node, attention, heads=heads)


def attention(g: GraphBuilder, node: Node, *inputs: ir.Value) -> Sequence[ir.Value]:
    return ring_attention(g, node, *inputs, mask=_mask, slots=_ring_slots)


def ring_attention(
    g: GraphBuilder,
    node: Node,
    *inputs: ir.Value,
    mask: Callable[[GraphBuilder, ir.Value, int], ir.Value],
    slots: Callable[[GraphBuilder, ir.Value, ir.Value, int], ir.Value],
) -> Sequence[ir.Value]:
    """Attention to a ring of past keys, written in place, and to the step's keys.

    All heads of a token are rows of one matrix, since they share the keys.
    """
    q, k, v, past_k, past_v, positions = inputs
    dtype = node.outputs[0].dtype
    window, head_dim = (node.tensors[3].size(axis) for axis in (2, 3))
    heads = node.tensors[0].size(2) // head_dim

    # Scores in float32: float16 would lose most in sums of head_dim products.
    rows = g.op("Reshape", g.cast(q, "float32"), g.constant([0, 1, -1, head_dim]))
    new_k, new_v = (g.typed(g.op("Unsqueeze", x, g.constant([1])), dtype) for x in (k, v))
    scores = [
        g.op("MatMul", rows, g.op("Transpose", g.cast(keys, "float32"), perm=[0, 1, 3, 2]))
        for keys in (past_k, new_k)
    ]
    bias = mask(g, positions, window)
    weights = _softmax(g, g.op("Concat", *scores, axis=3), bias, positions, node)
    halves = (g.slice(weights, 0, window, 3), g.slice(weights, window, END, 3))
    sums = [g.op("MatMul", half, x) for half, x in zip(halves, (past_v, new_v), strict=True)]
    attended = g.typed(g.op("Add", *sums), dtype)

    indices = slots(g, positions, attended, window)
    present = [
        g.op("ScatterND", past, indices, g.slice(new, -window, END, 1))
        for past, new in ((past_k, k), (past_v, v))
    ]
    shape = g.op("Concat", g.op("Shape", positions), g.constant([heads * head_dim]), axis=0)
    return [g.op("Reshape", attended, shape), *present]


def _softmax(
    g: GraphBuilder, scores: ir.Value, mask: ir.Value, positions: ir.Value, node: Node
) -> ir.Value:
    head_dim = node.tensors[3].size(3)
    heads = node.tensors[0].size(2) // head_dim
    by_row = g.op("Shape", scores)
    by_token = g.op("Concat", g.op("Shape", positions), g.constant([heads, -1]), axis=0)
    scaled = g.op("Mul", scores, g.constant(head_dim**-0.5, "float32"))
    masked = g.op("Add", g.op("Reshape", scaled, by_token), mask)
    weights = g.op("Reshape", g.op("Softmax", masked, axis=-1), by_row)
    return g.cast(g.typed(weights, "float32"), node.outputs[0].dtype)


def _mask(g: GraphBuilder, positions: ir.Value, window: int) -> ir.Value:
    """[B, T, 1, window + T]: 0 where a token sees a key, minus infinity elsewhere.

    A token at q sees keys at q - window ≤ k ≤ q. Before a step whose first token is at p, slot s
    of the ring holds the key at the last position below p that is s modulo the window.
    """
    one, size = g.constant(1), g.constant(window)
    last = g.op("Sub", g.slice(positions, 0, 1, 1), one)
    slots = g.op("Range", g.constant(0), size, one)
    age = g.op("Mod", g.op("Sub", last, slots), size)
    keys = g.op("Concat", g.op("Sub", last, age), positions, axis=1)
    keys = g.op("Unsqueeze", keys, g.constant([1, 2]))
    queries = g.op("Unsqueeze", positions, g.constant([2, 3]))
    distance = g.op("Sub", queries, keys)
    near = g.op("LessOrEqual", distance, size)
    past = g.op("GreaterOrEqual", distance, g.constant(0))
    written = g.op("GreaterOrEqual", keys, g.constant(0))
    seen = g.op("And", g.op("And", near, past), written)
    return g.op("Where", seen, g.constant(0, "float32"), g.constant(-np.inf, "float32"))


def _ring_slots(g: GraphBuilder, positions: ir.Value, attended: ir.Value, window: int) -> ir.Value:
    """Indices (row, 0, slot) [B, n, 3] at which the last `window` keys of the step are written.

    Adds a 0 made from the attention's result, so that the ring is read before it is written.
    """
    element = g.slice(g.slice(g.cast(attended, "float32"), 0, 1, 2), 0, 1, 3)
    never = g.op("Less", g.op("Abs", element), g.constant(0, "float32"))
    zero = g.op("Squeeze", g.cast(never, "int64"), g.constant([2, 3]))
    slots = g.op("Add", g.op("Mod", g.slice(positions, -window, END, 1), g.constant(window)), zero)
    batch = g.op("Squeeze", g.op("Shape", positions, start=0, end=1))
    row = g.op("Range", g.constant(0), batch, g.constant(1))
    size = g.op("Shape", slots)
    row = g.op("Expand", g.op("Unsqueeze", row, g.constant([1])), size)
    head = g.op("Expand", g.constant(0), size)
    indices = [g.op("Unsqueeze", x, g.constant([2])) for x in (row, head, slots)]
    return g.op("Concat", *indices, axis=2)


LOWERINGS: dict[str, Lowering] = {
    "embedding": linear_ops.embedding,
    "rms_norm": _native("RmsNorm", norm, "eps"),
    "linear": linear_ops.linear,
    "linears": linear_ops.linears,
    "block_diagonal_linear": _block_diagonal_linear,
    "gelu": _gelu,
    "gelu_mul": _native("GeluMul", gelu_mul),
    "add_rms_norm": _native("AddRmsNorm", _add_norm, "eps"),
    "causal_conv1d": _native("CausalConv1d", convolved),
    "rg_lru_scan": _scan(UNGATED_SCAN),  # for graphs without native kernels, which inline it
    "gated_rg_lru_scan": _scan(RG_LRU_SCAN),
    "rope": _rope,
    "local_attention": _local_attention,
    "add": _elementwise("Add"),
    "mul": _elementwise("Mul"),
    "last_tokens": _last_tokens,
    "soft_cap": _soft_cap,
}


def lower(emitter: OnnxEmitter, node: Node, lowerings: Mapping[str, Lowering]) -> None:
    with emitter.site(node.site):
        results = lower_by_groups(emitter, node, lowerings[node.op], GROUPED)
    for declared, value in zip(node.outputs, results, strict=True):
        emitter.declare(declared, value)
