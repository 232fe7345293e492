"""Lowerings of the ops of the attention block."""

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.program import Node
from rgexport.griffin.ops import rope_frequencies

_UNSEEN = np.float32(3e4)
"""Subtracted from the score of a masked key: within float16's range, and exp of it is 0."""


def rope(g: Emitter, node: Node) -> Sequence[Var]:
    """Angles in float32 from the integer positions; all layers share the cosines and sines."""
    x, positions = g.inputs(node)
    head_dim, dims = int(node.attributes["head_dim"]), int(node.attributes["dims"])
    tokens, width = x.shape[1:]
    cos, sin = _rotation(g, positions, dims, node.attributes["theta"])
    heads = g.cast(g.reshape(x, 1, tokens, width // head_dim, head_dim), "float32")
    half = dims // 2
    first, second = g.slice(heads, 0, half, 3), g.slice(heads, half, dims, 3)
    rotated = [
        g.op("sub", x=g.op("mul", x=first, y=cos), y=g.op("mul", x=second, y=sin)),
        g.op("add", x=g.op("mul", x=second, y=cos), y=g.op("mul", x=first, y=sin)),
    ]
    if dims < head_dim:
        rotated.append(g.slice(heads, dims, head_dim, 3))
    turned = g.reshape(g.concat(rotated, 3), 1, tokens, width)
    return [g.cast(turned, node.outputs[0].dtype)]


def _rotation(g: Emitter, positions: Var, dims: int, theta: float) -> tuple[Var, Var]:
    """Cosines and sines [1, T, 1, dims / 2] from the reference's own frequencies."""
    position = g.reshape(g.cast(positions, "float32"), 1, positions.shape[1], 1, 1)
    frequencies = rope_frequencies(dims, theta).numpy().reshape(1, 1, 1, -1)
    angles = g.op("mul", x=position, y=frequencies)
    return g.op("cos", x=angles), g.op("sin", x=angles)


def local_attention(g: Emitter, node: Node) -> Sequence[Var]:
    """Attention to the past keys and the new ones, and the states with the new keys and values.

    The whole state is written at every call. That is 2 % of what a step reads, needs no index that
    depends on the position, and works for chunks at any position.
    """
    q, k, v, past_k, past_v, positions = g.inputs(node)
    dtype = node.outputs[0].dtype
    window, head_dim = past_k.shape[1:]
    tokens, heads = q.shape[1], q.shape[2] // head_dim

    # All heads of a token are rows of one matrix, since they share the keys.
    rows = g.reshape(q, 1, tokens * heads, head_dim)
    scaled = g.op("mul", x=g.cast(rows, "float32"), y=np.float32(head_dim**-0.5))
    rows = g.cast(scaled, dtype)
    scores = [g.op("matmul", x=rows, y=keys, transpose_y=True) for keys in (past_k, k)]
    weights = _softmax(g, g.concat(scores, 2), positions, window, dtype)
    parts = g.slice(weights, 0, window, 2), g.slice(weights, window, window + tokens, 2)
    sums = [g.op("matmul", x=part, y=x) for part, x in zip(parts, (past_v, v), strict=True)]
    attended = g.reshape(g.op("add", x=sums[0], y=sums[1]), 1, tokens, heads * head_dim)
    return [attended, _latest(g, past_k, k), _latest(g, past_v, v)]


def _softmax(g: Emitter, scores: Var, positions: Var, window: int, dtype: str) -> Var:
    """Attention weights in `dtype` from scores [1, T · H, window + T]."""
    tokens = positions.shape[1]
    by_row = scores.shape
    by_token = (1, tokens, by_row[1] // tokens, by_row[2])
    bias = g.cast(_bias(g, positions, window), dtype)
    masked = g.op("add", x=g.reshape(scores, *by_token), y=bias)
    return g.reshape(g.op("softmax", x=masked, axis=-1), *by_row)


def _bias(g: Emitter, positions: Var, window: int) -> Var:
    """The mask, float32 [1, T, 1, window + T]: 0 where a token sees a key, else -30,000.

    A token at q sees the keys at q - window ≤ k ≤ q. If the first token is at p, slot s of the past
    holds the key at p - window + s, or none if that is negative.
    """
    tokens = positions.shape[1]
    back = np.arange(-window, 0, dtype=np.int32).reshape(1, window)
    past = g.op("add", x=g.slice(positions, 0, 1, 1), y=back)
    keys = g.reshape(g.concat([past, positions], 1), 1, 1, 1, window + tokens)
    distance = g.op("sub", x=g.reshape(positions, 1, tokens, 1, 1), y=keys)
    near = g.op("less_equal", x=distance, y=np.int32(window))
    before = g.op("greater_equal", x=distance, y=np.int32(0))
    written = g.op("greater_equal", x=keys, y=np.int32(0))
    seen = g.op("logical_and", x=g.op("logical_and", x=near, y=before), y=written)
    unseen = g.op("sub", x=g.cast(seen, "float32"), y=np.float32(1))
    return g.op("mul", x=unseen, y=_UNSEEN)


def _latest(g: Emitter, past: Var, new: Var) -> Var:
    """The last `window` of the past [1, window, D] and the new [1, T, D]."""
    window, tokens = past.shape[1], new.shape[1]
    if tokens >= window:
        return g.slice(new, tokens - window, tokens, 1)
    return g.concat([g.slice(past, tokens, window, 1), new], 1)
