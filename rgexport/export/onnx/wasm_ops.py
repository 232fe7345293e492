"""Lowers for WebAssembly: products of int8 weights and of activations in two int8 digits.

ONNX Runtime has a fast integer product there; `MatMulNBits` takes 7 times as long per weight. With
one digit engines differ, and the demo's logits move by 1.3 % of the largest; with the second, the
rounding error of the first, by 0.01 %. Both are rows of one product.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from rgexport.export.manifest import COLUMNS
from rgexport.export.onnx import linear_ops
from rgexport.export.onnx.emitter import OnnxEmitter, initializer
from rgexport.export.onnx.trust import MICROSOFT
from rgexport.export.program import Node, Value
from rgexport.quantize.scheme import INT8_ROWS, Affine

_ZERO_POINT = 128  # of weights and activations, which are symmetric and stored as unsigned bytes
_LARGEST = 127
_FINER = 254
"""Steps of the second digit per step of the first: ±127 of them are half a step to each side."""
PIECE = 1 << 26  # weights in blocks that are unpacked at a time: 256 MB as float32
_LEAST = 1e-30


def linear(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    """`x · weightᵀ + bias`, in integers if the weight has a scale per row."""
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    scheme = g.stored(weight).scheme
    small = weight.size(0) * weight.size(1) <= PIECE
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
    y = g.op("Mul", g.op("Mul", both, scale), _scales(g, weight))
    return g.typed(y if bias is None else g.op("Add", y, bias), "float32")


def _in_pieces(
    g: OnnxEmitter, x: ir.Value, weight: Value, scheme: Affine, bias: ir.Value | None
) -> ir.Value:
    """Splits the product with a large matrix: `MatMulNBits` unpacks it to float32 there."""
    rows, columns = weight.size(0), weight.size(1)
    sizes = linear_ops.block_attributes(g, weight)
    blob = (scheme.num_blocks(columns), sizes["block_size"] * scheme.bits // 8)
    level = g.accuracy_level
    product = partial(g.op, "MatMulNBits", domain=MICROSOFT, accuracy_level=level, **sizes)
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
    return g.initializer(initializer(piece, f"{weight.name}.{label}.from.{start}"))


def embedding(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    """Columns of the head's matrix, as rows of float32, times the scale."""
    ids, table = node.tensors
    if g.stored(table).scheme != INT8_ROWS:
        return linear_ops.embedding(g, node)
    columns = g.op("Gather", g.part(table, COLUMNS), g.value(ids), axis=1)
    levels = g.cast(g.op("Transpose", columns, perm=[1, 2, 0]), "float32")
    scales = g.op("Gather", _scales(g, table), g.value(ids))
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


def _scales(g: OnnxEmitter, weight: Value) -> ir.Value:
    scales = g.part(weight, "scales", (weight.size(0),))
    assert scales is not None
    return scales


LOWERINGS = {"embedding": embedding, "linear": linear}
