"""Lowerings of the ops of the attention block."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.graph import END, GraphBuilder
from rgexport.export.program import Node
from rgexport.griffin.ops import rope_frequencies


def rope(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """RoPE, with angles computed in float32; all layers share their cosines and sines."""
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


def local_attention(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """A function; the attribute tells its native kernel the number of heads."""
    heads = node.tensors[0].size(2) // node.tensors[1].size(2)
    return g.native_op("LocalAttention", node, _ring_attention, heads=heads)


def _ring_attention(g: GraphBuilder, node: Node, *inputs: ir.Value) -> Sequence[ir.Value]:
    return ring_attention(g, node, *inputs, mask=_mask, slots=_ring_slots)


def ring_attention(
    g: GraphBuilder,
    node: Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    past_k: ir.Value,
    past_v: ir.Value,
    positions: ir.Value,
    *,
    mask: Callable[[GraphBuilder, ir.Value, int], ir.Value],
    slots: Callable[[GraphBuilder, ir.Value, ir.Value, int], ir.Value],
) -> Sequence[ir.Value]:
    """Attention to a ring of past keys and to the step's keys, which then enter the ring.

    Where a runtime binds input and output to one buffer, the ring is written in place and nothing
    of the window is copied. All heads of a token are rows of one matrix, since they share the keys:
    axis 1 of what is multiplied is the one head that keys and values have.
    """
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
    seen = mask(g, positions, window)
    weights = _softmax(g, g.op("Concat", *scores, axis=3), seen, positions, node)
    parts = (g.slice(weights, 0, window, 3), g.slice(weights, window, END, 3))
    sums = [g.op("MatMul", part, x) for part, x in zip(parts, (past_v, new_v), strict=True)]
    attended = g.typed(g.op("Add", *sums), dtype)

    places = slots(g, positions, attended, window)
    present = [
        g.op("ScatterND", past, places, g.slice(new, -window, END, 1))
        for past, new in ((past_k, k), (past_v, v))
    ]
    shape = g.op("Concat", g.op("Shape", positions), g.constant([heads * head_dim]), axis=0)
    return [g.op("Reshape", attended, shape), *present]


def _softmax(
    g: GraphBuilder, scores: ir.Value, mask: ir.Value, positions: ir.Value, node: Node
) -> ir.Value:
    """Float32 scores [B, 1, T · H, window + T] to weights in the activation dtype, same shape."""
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

    A 0 that is computed from the attention's result is added to the slots, so that no runtime can
    write the ring in place before the attention has read it.
    """
    element = g.slice(g.slice(g.cast(attended, "float32"), 0, 1, 2), 0, 1, 3)
    never = g.op("Less", g.op("Abs", element), g.constant(0, "float32"))
    zero = g.op("Squeeze", g.cast(never, "int64"), g.constant([2, 3]))
    recent = g.slice(positions, -window, END, 1)
    slots = g.op("Add", g.op("Mod", recent, g.constant(window)), zero)
    batch = g.op("Squeeze", g.op("Shape", positions, start=0, end=1))
    row = g.op("Range", g.constant(0), batch, g.constant(1))
    size = g.op("Shape", slots)
    row = g.op("Expand", g.op("Unsqueeze", row, g.constant([1])), size)
    head = g.op("Expand", g.constant(0), size)
    place = [g.op("Unsqueeze", x, g.constant([2])) for x in (row, head, slots)]
    return g.op("Concat", *place, axis=2)
