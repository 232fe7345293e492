"""Lowers each Griffin op to MIL operations; with a weight in row groups, once for each group."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.artifacts.coreml.manifest import feature_name
from rgexport.export.coreml.emitter import CoreMLEmitter
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import lower_by_groups
from rgexport.griffin.ops import rope_frequencies

Lowering = Callable[[CoreMLEmitter, Node], Sequence[Var | None]]


def _grouped_linear(
    g: CoreMLEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> Var:
    x, _, bias = node.inputs
    products = [lower(g, replace(node, inputs=(x, group, None)))[0] for group in groups]
    y = g.concat([product for product in products if product is not None], axis=-1)
    if positions is not None:
        y = g.op("gather", x=y, indices=positions, axis=y.rank - 1)
    return y if bias is None else g.op("add", x=y, y=g.value(bias))


def _grouped_embedding(
    g: CoreMLEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> Var:
    ids = node.inputs[0]
    assert ids is not None
    position = g.value(ids)
    if positions is not None:
        position = g.op("gather", x=positions, indices=position, axis=0)
    result: Var | None = None
    bounds = pairwise(accumulate((group.size(0) for group in groups), initial=0))
    for group, (start, stop) in zip(groups, bounds, strict=True):
        from_start = g.op("greater_equal", x=position, y=np.int32(start))
        before_stop = g.op("less_equal", x=position, y=np.int32(stop - 1))
        inside = g.op("logical_and", x=from_start, y=before_stop)
        local = g.op("sub", x=position, y=np.int32(start))
        index = replace(ids, name=f"{group.name}.ids")
        g.values[index.name] = g.op("select", cond=inside, a=local, b=np.int32(0))
        (rows,) = lower(g, replace(node, inputs=(index, group)))
        chosen = g.reshape(inside, *inside.shape, 1)
        result = rows if result is None else g.op("select", cond=chosen, a=rows, b=result)
    return result


GROUPED = {"embedding": _grouped_embedding, "linear": _grouped_linear}

_NO_EPSILON = np.float32(1e-30)
"""MIL's `rsqrt` adds an epsilon, 1e-12 by default; its argument has the model's epsilon already."""
_UNSEEN = np.float32(3e4)
"""Subtracted from the score of a masked key: within float16's range, and exp of it is 0."""


def _embedding(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    ids, table = g.inputs(node)
    rows = g.cast(g.op("gather", x=table, indices=ids, axis=0), "float32")
    return [g.op("mul", x=rows, y=np.float32(node.attributes["scale"]))]


def _linear(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    x, weight, bias = (None if value is None else g.value(value) for value in node.inputs)
    arguments = {} if bias is None else {"bias": bias}
    return [g.op("linear", x=g.cast(x, node.outputs[0].dtype), weight=weight, **arguments)]


def _rms_norm(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    """In float32; 1 + weight is stored as the weight."""
    x, weight = g.value(node.tensors[0]), node.tensors[1]
    square = g.op("reduce_mean", x=g.op("mul", x=x, y=x), axes=[-1], keep_dims=True)
    biased = g.op("add", x=square, y=np.float32(node.attributes["eps"]))
    normed = g.op("mul", x=x, y=g.op("rsqrt", x=biased, epsilon=_NO_EPSILON))
    return [g.op("mul", x=normed, y=g.weight(weight, 1, 1, weight.size(0)))]


def _gelu(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    (x,) = g.inputs(node)
    return [g.op("gelu", x=x, mode="TANH_APPROXIMATION")]


def _elementwise(kind: str) -> Lowering:
    def lower(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
        x, y = (g.cast(x, node.outputs[0].dtype) for x in g.inputs(node))
        return [g.op(kind, x=x, y=y)]

    return lower


def _last_tokens(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    x = g.value(node.tensors[0])
    return [g.slice(x, x.shape[1] - g.num_logits, x.shape[1], 1)]


def _soft_cap(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    """`cap · tanh(x / cap)` in float32; without a cap (0), x · 1 gives the output its own name."""
    (x,) = g.inputs(node)
    x, cap = g.cast(x, "float32"), np.float32(node.attributes["cap"])
    if not cap:
        return [g.op("mul", x=x, y=np.float32(1))]
    return [g.op("mul", x=g.op("tanh", x=g.op("mul", x=x, y=1 / cap)), y=cap)]


def _causal_conv1d(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
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


def _taps(g: CoreMLEmitter, window: Var, weight: Var, tokens: int) -> Var:
    """The sum over the taps [1, C, R] times views of the window [1, C - 1 + T, R]."""
    if tokens == 1:
        return g.op("reduce_sum", x=g.op("mul", x=window, y=weight), axes=[1], keep_dims=True)
    total = None
    for tap in range(weight.shape[1]):
        view = g.slice(window, tap, tap + tokens, 1)
        product = g.op("mul", x=view, y=g.slice(weight, tap, tap + 1, 1))
        total = product if total is None else g.op("add", x=total, y=product)
    return total


def _block_diagonal_linear(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
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


def _rg_lru_scan(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    """Gates and recurrence; the parameter is stored as the factor of its gate (`DECAY`)."""
    a_param = node.tensors[3]
    activations = (value for value in node.tensors if value is not a_param)
    x, input_gate, recurrence_gate, positions, state = map(g.value, activations)
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
    h = _linear_scan(g, a, g.op("mul", x=gated, y=scale), g.reshape(state, 1, 1, width))
    return [h, g.reshape(g.slice(h, tokens - 1, tokens, 1), 1, width)]


def _linear_scan(g: CoreMLEmitter, a: Var, b: Var, h0: Var) -> Var:
    """All h_t = a_t · h_{t-1} + b_t for a, b [1, T, R], h0 [1, 1, R], by Hillis-Steele."""
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


def _rope(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    x, positions = g.inputs(node)
    head_dim, dims = int(node.attributes["head_dim"]), int(node.attributes["dims"])
    tokens, width = x.shape[1:]
    position = g.reshape(g.cast(positions, "float32"), 1, tokens, 1, 1)
    frequencies = rope_frequencies(dims, node.attributes["theta"]).numpy().reshape(1, 1, 1, -1)
    angles = g.op("mul", x=position, y=frequencies)
    cos, sin = g.op("cos", x=angles), g.op("sin", x=angles)
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


def _local_attention(g: CoreMLEmitter, node: Node) -> Sequence[Var]:
    """Attention to past and new keys; all of the states is written, 2 % of what a step reads."""
    q, k, v, past_k, past_v, positions = g.inputs(node)
    dtype = node.outputs[0].dtype
    window, head_dim = past_k.shape[1:]
    tokens, heads = q.shape[1], q.shape[2] // head_dim

    # All heads of a token are rows of one matrix, since they share the keys.
    rows = g.reshape(q, 1, tokens * heads, head_dim)
    scaled = g.op("mul", x=g.cast(rows, "float32"), y=np.float32(head_dim**-0.5))
    rows = g.cast(scaled, dtype)
    scores = [g.op("matmul", x=rows, y=keys, transpose_y=True) for keys in (past_k, k)]
    both = g.concat(scores, 2)
    by_row = (1, tokens * heads, window + tokens)
    by_token = (1, tokens, heads, window + tokens)
    bias = g.cast(_bias(g, positions, window), dtype)
    masked = g.op("add", x=g.reshape(both, *by_token), y=bias)
    weights = g.reshape(g.op("softmax", x=masked, axis=-1), *by_row)
    halves = g.slice(weights, 0, window, 2), g.slice(weights, window, window + tokens, 2)
    sums = [g.op("matmul", x=half, y=x) for half, x in zip(halves, (past_v, v), strict=True)]
    attended = g.reshape(g.op("add", x=sums[0], y=sums[1]), 1, tokens, heads * head_dim)
    return [attended, _latest(g, past_k, k), _latest(g, past_v, v)]


def _bias(g: CoreMLEmitter, positions: Var, window: int) -> Var:
    """The mask, float32 [1, T, 1, window + T]: 0 where a token sees a key, else -30,000.

    A token at q sees keys at q - window ≤ k ≤ q. If the first token is at p, slot s of the past
    has the key at p - window + s, or none if that is negative.
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


def _latest(g: CoreMLEmitter, past: Var, new: Var) -> Var:
    window, tokens = past.shape[1], new.shape[1]
    if tokens >= window:
        return g.slice(new, tokens - window, tokens, 1)
    return g.concat([g.slice(past, tokens, window, 1), new], 1)


LOWERINGS: dict[str, Lowering] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "block_diagonal_linear": _block_diagonal_linear,
    "gelu": _gelu,
    "causal_conv1d": _causal_conv1d,
    "rg_lru_scan": _rg_lru_scan,
    "rope": _rope,
    "local_attention": _local_attention,
    "add": _elementwise("add"),
    "mul": _elementwise("mul"),
    "last_tokens": _last_tokens,
    "soft_cap": _soft_cap,
}


def lower(emitter: CoreMLEmitter, node: Node) -> None:
    with emitter.site(feature_name(node.site)):
        results = lower_by_groups(emitter, node, LOWERINGS[node.op], GROUPED)
    for declared, value in zip(node.outputs, results, strict=True):
        if value is not None:
            emitter.declare(declared, value)
