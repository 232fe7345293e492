"""Lowers the ops with weights that may be quantized or in row groups: embedding, linears, head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise

import numpy as np
import onnx_ir as ir

from rgexport.exporters.onnx.emitter import OnnxEmitter
from rgexport.exporters.onnx.functions import QUANT_LINEAR_SIZES, QUANT_LINEARS
from rgexport.exporters.onnx.trust import MICROSOFT
from rgexport.exporters.program import Node, Value
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantization.scheme import Affine

Lowering = Callable[[OnnxEmitter, Node], Sequence[ir.Value]]
EXACT = 1  # accuracy level of `MatMulNBits` with float32 activations


def _grouped_linear(
    g: OnnxEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> ir.Value:
    x, _, bias = node.inputs
    (out,) = node.outputs
    products: list[ir.Value] = []
    for group in groups:
        shape = (*out.shape[:-1], group.size(0))
        product = replace(node, inputs=(x, group, None), outputs=(replace(out, shape=shape),))
        products += lower(g, product)
    y, last = g.op("Concat", *products, axis=-1), len(out.shape) - 1
    if positions is not None:
        y = g.op("Gather", y, g.constant(positions, "int32"), axis=last)
    y = g.typed(y, out.dtype)
    return y if bias is None else g.op("Add", y, g.cast(g.value(bias), out.dtype))


def _grouped_embedding(
    g: OnnxEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> ir.Value:
    ids, table = node.inputs
    assert ids is not None and table is not None
    position = g.value(ids)
    if positions is None:
        position = g.cast(position, "int32")
    else:
        position = g.op("Gather", g.constant(positions, "int32"), position)
        position = g.typed(position, "int32")
    result: ir.Value | None = None
    bounds = pairwise(accumulate((group.size(0) for group in groups), initial=0))
    for group, (start, stop) in zip(groups, bounds, strict=True):
        inside = g.op("GreaterOrEqual", position, g.constant(start, "int32"))
        if stop < table.size(0):  # the end of the last group is above all positions
            before_stop = g.op("Less", position, g.constant(stop, "int32"))
            inside = g.op("And", inside, before_stop) if start else before_stop
        local = g.op("Sub", position, g.constant(start, "int32")) if start else position
        local = g.op("Where", inside, local, g.constant(0, "int32"))
        index = replace(ids, name=f"{group.name}.ids", dtype="int32")
        g.values[index.name] = local
        (rows,) = lower(g, replace(node, inputs=(index, group)))
        chosen = g.op("Unsqueeze", inside, g.constant([2]))
        result = rows if result is None else g.op("Where", chosen, rows, result)
    assert result is not None
    return g.typed(result, node.outputs[0].dtype)


GROUPED = {"embedding": _grouped_embedding, "linear": _grouped_linear}


def embedding(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    ids, table = node.tensors
    scheme = g.stored(table).scheme
    if isinstance(scheme, Affine):
        rows = _quantized_rows(g, g.value(ids), table, scheme)
    else:
        gathered = g.op("Gather", g.value(table), g.value(ids))
        rows = g.cast(g.typed(gathered, g.stored(table).parts["data"].dtype), "float32")
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def _quantized_rows(g: OnnxEmitter, ids: ir.Value, table: Value, scheme: Affine) -> ir.Value:
    """Gathers rows of the head's bytes; `GatherBlockQuantized` before ORT 1.27 misreads some."""
    columns = table.size(1)
    blocks, block = scheme.num_blocks(columns), scheme.block_size(columns)

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


def _unpack(g: OnnxEmitter, packed: ir.Value, bits: int) -> ir.Value:
    """Unsigned integers from rows of bytes [B, T, n], as `quantize.affine` packs them."""
    if bits == 8:
        return packed
    levels = g.op("Concat", *_levels(g, packed, (0, 0), bits), axis=3)
    return g.op("Reshape", levels, g.constant([0, 0, -1]))


def _levels(g: OnnxEmitter, packed: ir.Value, rows: tuple[int, ...], bits: int) -> list[ir.Value]:
    """Returns the n-th integer of each group of whole bytes, [*rows, m, 1], for each n."""
    size = math.lcm(bits, 8) // 8
    shape = g.constant([*rows, -1, size])
    packed = g.op("Reshape", packed, shape)
    last = len(rows) + 1
    bytes_ = [packed] if size == 1 else [g.slice(packed, i, i + 1, last) for i in range(size)]
    levels = []
    for start in range(0, 8 * size, bits):
        byte, low = divmod(start, 8)
        level = _shifted(g, bytes_[byte], low, "RIGHT")
        if low + bits > 8:  # its last bits are in the next byte
            level = g.op("BitwiseOr", level, _shifted(g, bytes_[byte + 1], 8 - low, "LEFT"))
        if low + bits != 8:
            level = g.op("BitwiseAnd", level, g.constant(2**bits - 1, "uint8"))
        levels.append(level)
    return levels


def _shifted(g: OnnxEmitter, x: ir.Value, bits: int, direction: str) -> ir.Value:
    return g.op("BitShift", x, g.constant(bits, "uint8"), direction=direction) if bits else x


def _widened(g: OnnxEmitter, packed: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """Widens symmetric integers of 3 bits to 4; runtimes fold this when they load the file."""
    levels = _levels(g, packed, (), 3)
    pairs = [
        g.op("BitwiseOr", low, _shifted(g, high, 4, "LEFT"))
        for low, high in zip(levels[::2], levels[1::2], strict=True)
    ]
    both = g.op("Concat", *pairs, axis=1)
    # The middle is 8 instead of 4. Runtimes do not add bytes, but adding 4 changes two bits.
    carried = _shifted(g, g.op("BitwiseAnd", both, g.constant(0x44, "uint8")), 1, "LEFT")
    raised = g.op("BitwiseOr", g.op("BitwiseXor", both, g.constant(0x44, "uint8")), carried)
    return g.op("Reshape", raised, g.constant(shape))


def linear(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    dtype = node.outputs[0].dtype
    addend = None if bias is None else g.value(bias)
    if isinstance(g.stored(weight).scheme, Affine):
        y = _quantized_linear(g, g.value(x), weight, addend)
    else:
        y = _float_linear(g, g.value(x), weight, addend, dtype)
    return [g.cast(y, dtype)]


def _float_linear(
    g: OnnxEmitter, x: ir.Value, weight: Value, bias: ir.Value | None, dtype: str
) -> ir.Value:
    """`Gemm` takes the weight as it is stored, [out, in]; `MatMul` would need a transposed copy."""
    rows, columns = weight.size(0), weight.size(1)
    flat = g.op("Reshape", g.cast(x, dtype), g.constant([-1, columns]))
    addend = () if bias is None else (g.cast(bias, dtype),)
    y = g.op("Gemm", flat, g.cast(g.value(weight), dtype), *addend, transB=1)
    leading = g.op("Shape", x, start=0, end=2)
    shape = g.op("Concat", leading, g.constant([rows]), axis=0)
    return g.typed(g.op("Reshape", y, shape), dtype)


def _quantized_linear(
    g: OnnxEmitter, x: ir.Value, weight: Value, bias: ir.Value | None
) -> ir.Value:
    if g.rounded:
        return _quant_linear(g, x, [weight], [bias])[0]
    sizes = block_attributes(g, weight) | {"N": weight.size(0)}
    data, scales, zero_points = _parts(g, weight)
    inputs = [g.cast(x, "float32"), data, float32(g, scales), zero_points, None, float32(g, bias)]
    y = g.op("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=EXACT, **sizes)
    return g.typed(y, "float32")


def linears(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    """Several quantized linears with one input and one scheme, which `fused` merged."""
    x, *rest = node.inputs
    weights, biases = rest[: len(node.outputs)], rest[len(node.outputs) :]
    assert x is not None
    addends = [None if bias is None else g.value(bias) for bias in biases]
    results = _quant_linear(g, g.value(x), [w for w in weights if w is not None], addends)
    return [g.cast(y, out.dtype) for y, out in zip(results, node.outputs, strict=True)]


def _quant_linear(
    g: OnnxEmitter, x: ir.Value, weights: Sequence[Value], biases: Sequence[ir.Value | None]
) -> list[ir.Value]:
    rows = [weight.size(0) for weight in weights]
    sizes = block_attributes(g, weights[0]) | dict(zip(QUANT_LINEAR_SIZES, rows, strict=False))
    if takes_two_digits(weights[0].name, _affine(g, weights[0])):
        sizes["digits"] = 2
    by_part = zip(*(_parts(g, weight) for weight in weights), strict=True)
    inputs = [g.cast(x, "float32"), *chain(*by_part), *(float32(g, bias) for bias in biases)]
    results = g.call(QUANT_LINEARS[len(weights) - 1], *inputs, **sizes)
    return [g.typed(y, "float32") for y in results]


def takes_two_digits(weight: str, scheme: Affine) -> bool:
    """Whether native kernels round activations twice for a weight, or a row group of one.

    With 8-bit weights, rounding activations costs most, at these sites: with them alone the demo's
    KL is 1.7e-4 instead of 3.0e-4, and 1.4e-4 everywhere, where a prefill takes 1.75 times as long.
    """
    is_site = weight.startswith((EMBEDDING, "layers.0.")) or "linear_out" in weight.split(".")
    return scheme.bits == 8 and is_site


def block_attributes(g: OnnxEmitter, weight: Value) -> dict[str, int]:
    scheme, columns = _affine(g, weight), weight.size(1)
    bits = max(scheme.bits, 4)  # see `_widened`
    return {"K": columns, "bits": bits, "block_size": scheme.block_size(columns)}


def _parts(g: OnnxEmitter, weight: Value) -> tuple[ir.Value | None, ...]:
    rows, columns = weight.size(0), weight.size(1)
    scheme = _affine(g, weight)
    blocks, block = scheme.num_blocks(columns), scheme.block_size(columns)
    data = g.part(weight, "data", (rows, blocks, block * scheme.bits // 8))
    if scheme.bits == 3:
        data = _widened(g, data, (rows, blocks, block // 2))
    return data, g.part(weight, "scales"), zero_points(g, weight, scheme)


def zero_points(g: OnnxEmitter, weight: Value, scheme: Affine) -> ir.Value | None:
    return None if scheme.symmetric else g.part(weight, "zero_points")


def _affine(g: OnnxEmitter, weight: Value) -> Affine:
    scheme = g.stored(weight).scheme
    assert isinstance(scheme, Affine), weight.name
    return scheme


def float32(g: OnnxEmitter, value: ir.Value | None) -> ir.Value | None:
    return None if value is None else g.cast(value, "float32")
