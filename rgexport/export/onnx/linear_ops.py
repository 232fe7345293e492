"""Lowerings of the ops whose weights may be quantized: embedding, linears and head."""

from collections.abc import Sequence
from itertools import chain

import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.functions import (
    QUANT_LINEAR_LEVEL,
    QUANT_LINEAR_SIZES,
    QUANT_LINEARS,
)
from rgexport.export.onnx.graph import MICROSOFT
from rgexport.export.program import Node, Value
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.affine import block_size, num_blocks
from rgexport.quantize.scheme import Affine


def embedding(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """Rows of the table, as float32, times the scale."""
    ids, table = node.tensors
    scheme = g.stored(table).scheme
    if isinstance(scheme, Affine):
        rows = _quantized_rows(g, g.value(ids), table, scheme)
    else:
        gathered = g.op("Gather", g.value(table), g.value(ids))
        rows = g.cast(g.typed(gathered, g.stored(table).parts["data"].dtype), "float32")
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def _quantized_rows(g: Emitter, ids: ir.Value, table: Value, scheme: Affine) -> ir.Value:
    """Rows of a quantized table, gathered from the bytes that the head reads, and dequantized.

    With standard ops, since `GatherBlockQuantized` before ONNX Runtime 1.27 misreads the zero
    points of rows with an odd number of blocks. The padding of rows to whole blocks is cut off.
    """
    columns = table.size(1)
    blocks, block = num_blocks(columns, scheme), block_size(columns, scheme)

    def gather(part: str) -> ir.Value:
        return g.op("Gather", g.part(table, part), ids)

    levels = _unpack(g, gather("data"), scheme.bits)
    levels = g.op("Reshape", g.cast(levels, "float32"), g.constant([0, 0, blocks, block]))
    zero_points = g.constant(2 ** (scheme.bits - 1), "float32")
    if not scheme.symmetric:
        packed = _unpack(g, gather("zero_points"), scheme.bits)
        zero_points = g.slice(g.cast(packed, "float32"), 0, blocks, 2)
        zero_points = g.op("Unsqueeze", zero_points, g.constant([3]))
    stored = g.typed(gather("scales"), g.stored(table).parts["scales"].dtype)
    scales = g.op("Unsqueeze", g.cast(stored, "float32"), g.constant([3]))
    rows = g.op("Mul", g.op("Sub", levels, zero_points), scales)
    rows = g.op("Reshape", rows, g.constant([0, 0, blocks * block]))
    return rows if blocks * block == columns else g.slice(rows, 0, columns, 2)


def _unpack(g: Emitter, packed: ir.Value, bits: int) -> ir.Value:
    """Unsigned integers from bytes [B, T, n]; 4-bit ones come in pairs, low nibble first."""
    if bits == 8:
        return packed
    low = g.op("BitwiseAnd", packed, g.constant(15, "uint8"))
    high = g.op("BitShift", packed, g.constant(4, "uint8"), direction="RIGHT")
    pair = [g.op("Unsqueeze", x, g.constant([3])) for x in (low, high)]
    return g.op("Reshape", g.op("Concat", *pair, axis=3), g.constant([0, 0, -1]))


def linear(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """`x · weightᵀ + bias`; the head's weight is the embedding's table."""
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    scheme, dtype = g.stored(weight).scheme, node.outputs[0].dtype
    addend = None if bias is None else g.value(bias)
    if isinstance(scheme, Affine):
        y = _quantized_linear(g, g.value(x), weight, addend)
    else:
        y = _float_linear(g, g.value(x), weight, addend, dtype)
    return [g.cast(y, dtype)]


def _float_linear(
    g: Emitter, x: ir.Value, weight: Value, bias: ir.Value | None, dtype: str
) -> ir.Value:
    """`Gemm` takes the weight as it is stored, [out, in]; `MatMul` would need a transposed copy."""
    rows, columns = weight.size(0), weight.size(1)
    flat = g.op("Reshape", g.cast(x, dtype), g.constant([-1, columns]))
    addend = () if bias is None else (g.cast(bias, dtype),)
    y = g.op("Gemm", flat, g.cast(g.value(weight), dtype), *addend, transB=1)
    leading = g.op("Shape", x, start=0, end=2)
    shape = g.op("Concat", leading, g.constant([rows]), axis=0)
    return g.typed(g.op("Reshape", y, shape), dtype)


def linears(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """Several quantized linears with one input and one scheme, see `fusion`."""
    x, *rest = node.inputs
    weights, biases = rest[: len(node.outputs)], rest[len(node.outputs) :]
    assert x is not None
    addends = [None if bias is None else g.value(bias) for bias in biases]
    results = _quant_linear(g, g.value(x), [w for w in weights if w is not None], addends)
    return [g.cast(y, out.dtype) for y, out in zip(results, node.outputs, strict=True)]


def _quantized_linear(g: Emitter, x: ir.Value, weight: Value, bias: ir.Value | None) -> ir.Value:
    """`MatMulNBits` over float32 activations, which it may round to int8 itself."""
    if g.native and g.accuracy_level == QUANT_LINEAR_LEVEL:
        return _quant_linear(g, x, [weight], [bias])[0]
    sizes = block_attributes(g, weight) | {"N": weight.size(0)}
    data, scales, zero_points = _parts(g, weight)
    inputs = [g.cast(x, "float32"), data, float32(g, scales), zero_points, None, float32(g, bias)]
    level = g.accuracy_level
    y = g.op("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=level, **sizes)
    return g.typed(y, "float32")


def _quant_linear(
    g: Emitter, x: ir.Value, weights: Sequence[Value], biases: Sequence[ir.Value | None]
) -> list[ir.Value]:
    """The function QuantLinear: its inputs are all data, then all scales, and so on."""
    rows = [weight.size(0) for weight in weights]
    sizes = block_attributes(g, weights[0]) | dict(zip(QUANT_LINEAR_SIZES, rows, strict=False))
    if takes_two_digits(weights[0].name, _affine(g, weights[0])):
        sizes["digits"] = 2
    parts = zip(*(_parts(g, weight) for weight in weights), strict=True)
    inputs = [g.cast(x, "float32"), *chain(*parts), *(float32(g, bias) for bias in biases)]
    results = g.call(QUANT_LINEARS[len(weights) - 1], *inputs, **sizes)
    return [g.typed(y, "float32") for y in results]


def takes_two_digits(weight: str, scheme: Affine) -> bool:
    """Whether native kernels round the activations for a weight, or a row group of one, twice.

    Where weights have 8 bits, rounding activations to int8 costs more than rounding weights does.
    Most of it comes from what follows the embedding, from the channels that the recurrence gives,
    whose sizes differ most, and from the head, whose errors no layer evens out. With these sites
    alone the demo model's KL is 1.7e-4 instead of 3.0e-4. Two digits everywhere give 1.4e-4, but a
    product takes 1.75 times as long in a prompt. A step takes no longer: it waits for the weights.
    """
    parts = weight.split(".")
    here = weight.startswith((EMBEDDING, "layers.0.")) or "linear_out" in parts
    return scheme.bits == 8 and here


def block_attributes(g: Emitter, weight: Value) -> dict[str, int]:
    """The attributes of `MatMulNBits` that describe a weight in blocks, but for its rows."""
    scheme, columns = _affine(g, weight), weight.size(1)
    return {"K": columns, "bits": scheme.bits, "block_size": block_size(columns, scheme)}


def _parts(g: Emitter, weight: Value) -> tuple[ir.Value | None, ...]:
    """Data [N, blocks, bytes], scales, and zero points where there are some."""
    rows, columns = weight.size(0), weight.size(1)
    scheme = _affine(g, weight)
    blob = num_blocks(columns, scheme), block_size(columns, scheme) * scheme.bits // 8
    data = g.part(weight, "data", (rows, *blob))
    return data, g.part(weight, "scales"), g.part(weight, "zero_points")


def _affine(g: Emitter, weight: Value) -> Affine:
    scheme = g.stored(weight).scheme
    assert isinstance(scheme, Affine), weight.name
    return scheme


def float32(g: Emitter, value: ir.Value | None) -> ir.Value | None:
    """A bias or scales as `MatMulNBits` takes them beside float32 activations."""
    return None if value is None else g.cast(value, "float32")
