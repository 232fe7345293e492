"""Lowers for browsers: WebAssembly and WebGPU.

ONNX Runtime for WebAssembly has a fast integer product; `MatMulNBits` takes 7 times as long per
weight. With activations in one int8 digit, engines differ, and the demo's logits move by 1.3 % of
the largest; with a second one, the rounding error of the first, by 0.01 %. Both are rows of one
product.

For WebGPU there are only ops with kernels there; int64 stays on the CPU. Masks and slots are
computed from positions in float32, which is exact up to 4 million.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from rgexport.artifacts.manifest import COLUMNS
from rgexport.artifacts.onnx.trust import MICROSOFT
from rgexport.export.onnx import linear_ops
from rgexport.export.onnx.emitter import END, GraphBuilder, OnnxEmitter
from rgexport.export.onnx.functions import EXACT
from rgexport.export.onnx.lowering import ring_attention
from rgexport.export.program import Node, Value
from rgexport.griffin.config import RG_LRU_C
from rgexport.quantize.schemes.registry import INT8_ROWS, Affine

_ZERO_POINT = 128  # of weights and activations, which are symmetric and stored as unsigned bytes
_LARGEST = 127
_FINER = 254
"""Steps of the second digit per step of the first: ±127 of them are half a step to each side."""
PIECE = 1 << 26  # weights in blocks that are unpacked at a time: 256 MB as float32
_LEAST = 1e-30


def wasm_linear(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    scheme = g.stored(weight).scheme
    small = weight.size(0) * weight.size(1) <= PIECE
    # The class is asked for, not its layout: `_in_pieces` needs its fields.
    if not isinstance(scheme, Affine) or (scheme != INT8_ROWS and small):
        return linear_ops.linear(g, node)
    addend = None if bias is None else g.cast(g.value(bias), "float32")
    inputs = g.cast(g.value(x), "float32")
    if scheme == INT8_ROWS:
        y = _by_digits(g, inputs, weight, addend)
    else:
        y = _in_pieces(g, inputs, weight, scheme, addend)
    return [g.cast(y, node.outputs[0].dtype)]


def _by_digits(g: OnnxEmitter, x: ir.Value, weight: Value, bias: ir.Value | None) -> ir.Value:
    digits, scale = _digits(g, x)
    zero = g.constant(_ZERO_POINT, "uint8")
    sums = g.op("MatMulInteger", digits, g.part(weight, COLUMNS), zero, zero)
    first, second = g.ops("Split", g.cast(sums, "float32"), outputs=2, axis=0, num_outputs=2)
    both = g.op("Add", first, g.op("Mul", second, g.constant(1 / _FINER, "float32")))
    y = g.op("Mul", g.op("Mul", both, scale), g.part(weight, "scales", (weight.size(0),)))
    return g.typed(y if bias is None else g.op("Add", y, bias), "float32")


def _in_pieces(
    g: OnnxEmitter, x: ir.Value, weight: Value, scheme: Affine, bias: ir.Value | None
) -> ir.Value:
    """Splits the product with a large matrix: `MatMulNBits` unpacks it to float32 there."""
    rows, columns = weight.size(0), weight.size(1)
    sizes = linear_ops.block_attributes(g, weight)
    blob = (scheme.num_blocks(columns), sizes["block_size"] * scheme.bits // 8)
    product = partial(g.op, "MatMulNBits", domain=MICROSOFT, accuracy_level=EXACT, **sizes)
    pieces = []
    for start in range(0, rows, count := max(1, PIECE // columns)):
        n = min(count, rows - start)
        inputs = (
            _rows_of(g, weight, "data", start, (n, *blob)),
            linear_ops.float32(g, _rows_of(g, weight, "scales", start, (n, blob[0]))),
            _rows_of(g, weight, "zero_points", start, (n, -(-blob[0] * scheme.bits // 8))),
        )
        pieces.append(product(x, *inputs, N=n))
    y = g.op("Concat", *pieces, axis=2)
    return g.typed(y if bias is None else g.op("Add", y, bias), "float32")


def _rows_of(
    g: OnnxEmitter, weight: Value, label: str, start: int, shape: tuple[int, ...]
) -> ir.Value | None:
    part = g.stored(weight).parts.get(label)
    if part is None:
        return None
    piece = replace(part, offset=part.offset + start * part.row_bytes, shape=shape)
    return g.external(piece, f"{weight.name}.{label}.from.{start}")


def wasm_embedding(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    ids, table = node.tensors
    if g.stored(table).scheme != INT8_ROWS:
        return linear_ops.embedding(g, node)
    columns = g.op("Gather", g.part(table, COLUMNS), g.value(ids), axis=1)
    levels = g.cast(g.op("Transpose", columns, perm=[1, 2, 0]), "float32")
    scales = g.op("Gather", g.part(table, "scales", (table.size(0),)), g.value(ids))
    centred = g.op("Sub", levels, g.constant(_ZERO_POINT, "float32"))
    rows = g.op("Mul", centred, g.op("Unsqueeze", scales, g.constant([2])))
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def _digits(g: OnnxEmitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Digits [2 · B, T, K] uint8 of x [B, T, K] float32, and the scales [B, T, 1] of its rows."""
    largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    largest = g.op("Max", largest, g.constant(_LEAST, "float32"))
    scale = g.op("Mul", largest, g.constant(1 / _LARGEST, "float32"))
    levels = g.op("Div", x, scale)
    first = g.op("Round", levels)
    rest = g.op("Mul", g.op("Sub", levels, first), g.constant(_FINER, "float32"))
    both = g.op("Concat", first, g.op("Round", rest), axis=0)
    return g.cast(g.op("Add", both, g.constant(_ZERO_POINT, "float32")), "uint8"), scale


WASM = {"embedding": wasm_embedding, "linear": wasm_linear}

_FORGOTTEN = -1e4  # the logarithm of a decay of 0: its `exp` is 0, and no product with it is NaN
_UNSEEN = -1e30  # added to the score of a masked key; infinities are not safe in shaders


def webgpu_embedding(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    ids, table = node.tensors
    scheme, columns = g.stored(table).scheme, table.size(1)
    if not isinstance(scheme, Affine):  # `GatherBlockQuantized` gets fields of the class
        return linear_ops.embedding(g, node)
    rows = g.op(
        "GatherBlockQuantized",
        g.part(table, "data"),
        g.value(ids),
        linear_ops.float32(g, g.part(table, "scales")),
        linear_ops.zero_points(g, table, scheme),
        domain=MICROSOFT,
        bits=scheme.bits,
        block_size=scheme.block_size(columns),
        gather_axis=0,
        quantize_axis=1,
    )
    if scheme.num_blocks(columns) * scheme.block_size(columns) > columns:
        rows = g.slice(rows, 0, columns, 2)
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def webgpu_gelu(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    return [g.op("Gelu", *g.inputs(node), approximate="tanh")]


def webgpu_rg_lru_scan(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
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


def webgpu_local_attention(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
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


WEBGPU = {
    "embedding": webgpu_embedding,
    "gelu": webgpu_gelu,
    "local_attention": webgpu_local_attention,
    "rg_lru_scan": webgpu_rg_lru_scan,
}
