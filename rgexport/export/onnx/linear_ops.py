"""Lowers the ops with weights that may be quantized or in row groups: embedding, linears, head."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise

import numpy as np
import onnx_ir as ir

from rgexport.artifacts.onnx.trust import MICROSOFT
from rgexport.export.onnx import functions
from rgexport.export.onnx.emitter import OnnxEmitter
from rgexport.export.program import Node, Value
from rgexport.quantize.schemes.registry import Affine, TwoLevel
from rgexport.quantize.schemes.two_level import PLANES, RUN

Lowering = Callable[[OnnxEmitter, Node], Sequence[ir.Value]]


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
    # The classes are asked for: their parts and fields differ.
    if isinstance(scheme, Affine | TwoLevel):
        rows = _quantized_rows(g, g.value(ids), table, scheme)
    else:
        gathered = g.op("Gather", g.value(table), g.value(ids))
        rows = g.cast(g.typed(gathered, g.stored(table).parts["data"].dtype), "float32")
    return [g.op("Mul", rows, g.constant(node.attributes["scale"], "float32"))]


def _quantized_rows(
    g: OnnxEmitter, ids: ir.Value, table: Value, scheme: Affine | TwoLevel
) -> ir.Value:
    """Gathers rows of the head's bytes; `GatherBlockQuantized` before ORT 1.27 misreads some."""
    columns = table.size(1)
    blocks, block = scheme.num_blocks(columns), scheme.block or columns

    def gather(part: str) -> ir.Value:
        stored = g.op("Gather", g.part(table, part), ids)
        return g.typed(stored, g.stored(table).parts[part].dtype)

    data = gather("planes" if isinstance(scheme, TwoLevel) else "data")
    zero_points, scales = g.constant(2 ** (scheme.bits - 1), "float32"), gather("scales")
    if isinstance(scheme, TwoLevel):
        joined = _joined(g, data, scheme, scheme.tile(columns))
        levels = _unpack(g, joined, scheme.unpacked_bits)
        units = g.op("Unsqueeze", g.cast(gather("units"), "float32"), g.constant([3]))
        units = g.op("Expand", units, g.constant([1, 1, 1, RUN]))
        units = g.slice(g.op("Reshape", units, g.constant([0, 0, -1])), 0, blocks, 2)
        scales = g.typed(g.op("Mul", g.cast(scales, "float32"), units), "float32")
    else:
        levels = _unpack(g, data, scheme.bits)
        if not scheme.symmetric:
            packed = _unpack(g, gather("zero_points"), scheme.bits)
            zero_points = g.slice(g.cast(packed, "float32"), 0, blocks, 2)
            zero_points = g.op("Unsqueeze", zero_points, g.constant([3]))
    levels = g.op("Reshape", g.cast(levels, "float32"), g.constant([0, 0, blocks, block]))
    scales = g.op("Unsqueeze", g.cast(scales, "float32"), g.constant([3]))
    rows = g.op("Mul", g.op("Sub", levels, zero_points), scales)
    rows = g.op("Reshape", rows, g.constant([0, 0, blocks * block]))
    return rows if blocks * block == columns else g.slice(rows, 0, columns, 2)


def _joined(g: OnnxEmitter, planes: ir.Value, scheme: TwoLevel, tile: int) -> ir.Value:
    """Returns the unpacked bytes, [B, T, n], of rows of planes [B, T, tiles, packed bytes]."""
    start, rows = 0, []
    for plane in PLANES[scheme.bits]:
        packed = g.slice(planes, start, start := start + tile // plane.groups, 3)
        groups = []
        for group in range(plane.groups):
            bits = _shifted(g, packed, group * plane.step, "RIGHT")
            bits = g.op("BitwiseAnd", bits, g.constant(plane.mask, "uint8"))
            groups.append(_shifted(g, bits, plane.shift, "LEFT"))
        rows.append(g.op("Concat", *groups, axis=3))
    joined = rows[0] if len(rows) == 1 else g.op("BitwiseOr", *rows)
    return g.op("Reshape", joined, g.constant([0, 0, -1]))


def _unpack(g: OnnxEmitter, packed: ir.Value, bits: int) -> ir.Value:
    """Unsigned integers from rows of bytes [B, T, n], as `quantization.affine` packs them."""
    if bits == 8:
        return packed
    low = g.op("BitwiseAnd", packed, g.constant(15, "uint8"))
    pair = [g.op("Unsqueeze", x, g.constant([3])) for x in (low, _shifted(g, packed, 4, "RIGHT"))]
    return g.op("Reshape", g.op("Concat", *pair, axis=3), g.constant([0, 0, -1]))


def _shifted(g: OnnxEmitter, x: ir.Value, bits: int, direction: str) -> ir.Value:
    return g.op("BitShift", x, g.constant(bits, "uint8"), direction=direction) if bits else x


def linear(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    x, weight, bias = node.inputs
    assert x is not None and weight is not None
    dtype = node.outputs[0].dtype
    addend = None if bias is None else g.value(bias)
    scheme = g.stored(weight).scheme
    # The classes are asked for: each has an op, or a function, with parts of its own.
    if isinstance(scheme, Affine):
        y = _quantized_linear(g, g.value(x), weight, addend)
    elif isinstance(scheme, TwoLevel):
        y = _two_level_linear(g, g.value(x), weight, addend, scheme)
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
    shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.constant([rows]), axis=0)
    return g.typed(g.op("Reshape", y, shape), dtype)


def _quantized_linear(
    g: OnnxEmitter, x: ir.Value, weight: Value, bias: ir.Value | None
) -> ir.Value:
    if g.rounded:
        return _quant_linear(g, x, [weight], [bias])[0]
    sizes = block_attributes(g, weight) | {"N": weight.size(0)}
    data, scales, zero_points = _parts(g, weight)
    inputs = [g.cast(x, "float32"), data, float32(g, scales), zero_points, None, float32(g, bias)]
    y = g.op("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=functions.EXACT, **sizes)
    return g.typed(y, "float32")


def _two_level_linear(
    g: OnnxEmitter, x: ir.Value, weight: Value, bias: ir.Value | None, scheme: TwoLevel
) -> ir.Value:
    sizes = {"K": weight.size(1), "N": weight.size(0), "block_size": scheme.block}
    stored = [g.part(weight, name) for name in ("planes", "scales", "units")]
    function = functions.two_level_linear(scheme.bits, rounded=g.rounded)
    (y,) = g.call(function, g.cast(x, "float32"), *stored, float32(g, bias), **sizes)
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
    sizes = block_attributes(g, weights[0]) | dict(
        zip(functions.QUANT_LINEAR_SIZES, rows, strict=False)
    )
    if takes_two_digits(weights[0].name, _affine(g, weights[0])):
        sizes["digits"] = 2
    by_part = zip(*(_parts(g, weight) for weight in weights), strict=True)
    inputs = [g.cast(x, "float32"), *chain(*by_part), *(float32(g, bias) for bias in biases)]
    results = g.call(functions.QUANT_LINEARS[len(weights) - 1], *inputs, **sizes)
    return [g.typed(y, "float32") for y in results]


def takes_two_digits(weight: str, scheme: Affine) -> bool:
    """Whether native kernels round activations twice for a weight, or a row group of one.

    With 8-bit weights they do, except in the MLPs behind the first layer, where most time would go.
    """
    return scheme.bits == 8 and (weight.startswith("layers.0.") or ".mlp_block." not in weight)


def block_attributes(g: OnnxEmitter, weight: Value) -> dict[str, int]:
    scheme, columns = _affine(g, weight), weight.size(1)
    return {"K": columns, "bits": scheme.bits, "block_size": scheme.block_size(columns)}


def _parts(g: OnnxEmitter, weight: Value) -> tuple[ir.Value | None, ...]:
    rows, columns = weight.size(0), weight.size(1)
    scheme = _affine(g, weight)
    blocks, block = scheme.num_blocks(columns), scheme.block_size(columns)
    data = g.part(weight, "data", (rows, blocks, block * scheme.bits // 8))
    return data, g.part(weight, "scales"), zero_points(g, weight, scheme)


def zero_points(g: OnnxEmitter, weight: Value, scheme: Affine) -> ir.Value | None:
    return None if scheme.symmetric else g.part(weight, "zero_points")


def _affine(g: OnnxEmitter, weight: Value) -> Affine:
    scheme = g.stored(weight).scheme
    assert isinstance(scheme, Affine), weight.name  # for its fields
    return scheme


def float32(g: OnnxEmitter, value: ir.Value | None) -> ir.Value | None:
    return None if value is None else g.cast(value, "float32")
