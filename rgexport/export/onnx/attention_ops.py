"""Lowerings of the ops of the attention block."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rgexport.export.onnx.emitter import END, Emitter
from rgexport.export.program import Node


def rope(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """Angles from the integer positions, in float32; all layers share their cosines and sines."""
    x, positions = g.inputs(node)
    head_dim, dims = int(node.attributes["head_dim"]), int(node.attributes["dims"])
    # The exponents in float32, as recurrentgemma rounds them.
    exponents = 2 * np.arange(dims // 2, dtype=np.float32) / np.float32(dims)
    frequencies = np.float32(1) / np.power(np.float32(node.attributes["theta"]), exponents)
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
    """All heads of a token are rows of one matrix, since they share the keys."""
    q, k, v, past_k, past_v, positions = g.inputs(node)
    dtype = node.outputs[0].dtype
    window, head_dim = (node.tensors[3].size(axis) for axis in (1, 2))
    heads = node.tensors[0].size(2) // head_dim
    keys, values = g.op("Concat", past_k, k, axis=1), g.op("Concat", past_v, v, axis=1)
    batch, tokens = (g.op("Shape", positions, start=axis, end=axis + 1) for axis in (0, 1))
    slots = g.op("Shape", keys, start=1, end=2)

    rows = g.op("Reshape", q, g.constant([0, -1, head_dim]))
    scores = g.op("MatMul", rows, g.op("Transpose", keys, perm=[0, 2, 1]))
    scores = g.cast(g.typed(scores, dtype), "float32")
    scores = g.op("Mul", scores, g.constant(head_dim**-0.5, "float32"))
    by_token = g.op("Concat", batch, tokens, g.constant([heads]), slots, axis=0)
    mask = _window_mask(g, positions, tokens, slots, window)
    masked = g.op("Add", g.op("Reshape", scores, by_token), mask)
    weights = g.cast(g.typed(g.op("Softmax", masked, axis=-1), "float32"), dtype)
    by_row = g.op("Concat", batch, g.constant([-1]), slots, axis=0)
    attended = g.op("MatMul", g.op("Reshape", weights, by_row), values)

    shape = g.op("Concat", batch, tokens, g.constant([heads * head_dim]), axis=0)
    present = [g.slice(cache, -window, END, 1) for cache in (keys, values)]
    return [g.op("Reshape", attended, shape), *present]


def _window_mask(
    g: Emitter, positions: ir.Value, tokens: ir.Value, slots: ir.Value, window: int
) -> ir.Value:
    """[B, T, 1, window + T]: 0 where token t sees slot j, minus infinity elsewhere.

    Slot j holds position p0 + j - window: token t sees t ≤ j ≤ t + window, from position 0 on.
    """

    def count(size: ir.Value, shape: list[int]) -> ir.Value:
        numbers = g.op("Range", g.constant(0), g.op("Squeeze", size), g.constant(1))
        return g.op("Reshape", numbers, g.constant(shape))

    token, slot = count(tokens, [1, -1, 1, 1]), count(slots, [1, 1, 1, -1])
    first = g.op("Reshape", g.slice(positions, 0, 1, 1), g.constant([-1, 1, 1, 1]))
    last_slot = g.op("Add", token, g.constant(window))
    seen = g.op("And", g.op("GreaterOrEqual", slot, token), g.op("LessOrEqual", slot, last_slot))
    filled = g.op("GreaterOrEqual", g.op("Add", first, slot), g.constant(window))
    seen_and_filled = g.op("And", seen, filled)
    nothing, hidden = g.constant(0, "float32"), g.constant(-np.inf, "float32")
    return g.op("Where", seen_and_filled, nothing, hidden)
