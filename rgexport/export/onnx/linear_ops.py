"""Lowerings of the ops whose weights may be quantized: the embedding, the linears, the head."""

from collections.abc import Sequence

import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.graph import MICROSOFT
from rgexport.export.onnx.storage import StoredTensor
from rgexport.export.program import Node, Value
from rgexport.quantize.scheme import Affine


def embedding(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """Rows of the table, as float32, times the scale."""
    ids, table = node.tensors
    stored = g.stored(table)
    if isinstance(stored.scheme, Affine):
        rows = _quantized_rows(g, g.value(ids), stored, stored.scheme)
    else:
        gathered = g.op("Gather", g.value(table), g.value(ids))
        rows = g.cast(g.typed(gathered, stored.scheme.dtype), "float32")
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def _quantized_rows(g: Emitter, ids: ir.Value, stored: StoredTensor, scheme: Affine) -> ir.Value:
    """Rows of a quantized table: the head's own bytes, seen as `GatherBlockQuantized` wants them.

    The stored row is padded to whole blocks, so the padding is gathered too and cut off.
    """
    gathered = g.op(
        "GatherBlockQuantized",
        g.part(stored, "data", view=".rows"),
        ids,
        g.part(stored, "scales"),
        g.part(stored, "zero_points"),
        domain=MICROSOFT,
        bits=scheme.bits,
        block_size=scheme.block,
        gather_axis=0,
        quantize_axis=1,
    )
    columns = stored.shape[1]
    padded = stored.parts["data"].shape[1] * 8 // scheme.bits
    return gathered if padded == columns else g.slice(gathered, 0, columns, 2)


def linear(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """`x · weightᵀ + bias`; the head is one over the embedding's table."""
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    stored, dtype = g.stored(weight), node.outputs[0].dtype
    addend = None if bias is None else g.value(bias)
    if isinstance(stored.scheme, Affine):
        y = _quantized_linear(g, g.value(x), stored, stored.scheme, addend)
    else:
        y = _float_linear(g, g.value(x), weight, addend, dtype)
    return [g.cast(y, dtype)]


def _float_linear(
    g: Emitter, x: ir.Value, weight: Value, bias: ir.Value | None, dtype: str
) -> ir.Value:
    """`Gemm` takes the weight as it is stored, [out, in]; `MatMul` would need a transposed copy."""
    rows, columns = g.stored(weight).shape
    flat = g.op("Reshape", g.cast(x, dtype), g.constant([-1, columns]))
    addend = () if bias is None else (g.cast(bias, dtype),)
    y = g.op("Gemm", flat, g.cast(g.value(weight), dtype), *addend, transB=1)
    leading = g.op("Shape", x, start=0, end=2)
    shape = g.op("Concat", leading, g.constant([rows]), axis=0)
    return g.typed(g.op("Reshape", y, shape), dtype)


def _quantized_linear(
    g: Emitter, x: ir.Value, stored: StoredTensor, scheme: Affine, bias: ir.Value | None
) -> ir.Value:
    """`MatMulNBits` over float32 activations, which it may round to int8 itself."""
    rows, columns = stored.shape
    blocks = stored.parts["scales"].shape[1]
    y = g.op(
        "MatMulNBits",
        g.cast(x, "float32"),
        g.part(stored, "data", (rows, blocks, scheme.block * scheme.bits // 8)),
        g.part(stored, "scales"),
        g.part(stored, "zero_points"),
        None,
        None if bias is None else g.cast(bias, "float32"),
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=scheme.bits,
        block_size=scheme.block,
        accuracy_level=g.accuracy_level,
    )
    return g.typed(y, "float32")
