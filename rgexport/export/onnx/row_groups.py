"""Lowers ops with a weight in row groups: one op for each group.

They use the lowerings of a profile, which see each group as a tensor of its own. Results are put
into the order of the rows by the rows' positions (`quantize.row_groups`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import onnx_ir as ir

from rgexport.export.onnx.emitter import OnnxEmitter
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import group_name
from rgexport.quantize.scheme import Mixed

Lowering = Callable[[OnnxEmitter, Node], Sequence[ir.Value]]
_WEIGHT = 1
"""The input that may be stored in row groups, of each of these ops."""


def by_groups(g: OnnxEmitter, node: Node, lower: Lowering) -> Sequence[ir.Value]:
    """Lowers a node, once for each row group if its weight has several."""
    combine = _OPS.get(node.op)
    weight = node.inputs[_WEIGHT] if combine else None
    scheme = g.stored(weight).scheme if weight else None
    if combine is None or weight is None or not isinstance(scheme, Mixed):
        return lower(g, node)
    groups = [
        replace(weight, name=group_name(weight.name, i), shape=(size, *weight.shape[1:]))
        for i, size in enumerate(scheme.group_sizes(weight.size(0)))
    ]
    return [combine(g, node, lower, groups, scheme)]


def _linear(
    g: OnnxEmitter, node: Node, lower: Lowering, groups: list[Value], scheme: Mixed
) -> ir.Value:
    """The products side by side, gathered in the order of the rows, plus the bias."""
    x, weight, bias = node.inputs
    assert weight is not None
    (out,) = node.outputs
    products: list[ir.Value] = []
    for group in groups:
        shape = (*out.shape[:-1], group.size(0))
        product = replace(node, inputs=(x, group, None), outputs=(replace(out, shape=shape),))
        products += lower(g, product)
    y, last = g.op("Concat", *products, axis=-1), len(out.shape) - 1
    if (positions := scheme.positions(weight.size(0))) is not None:
        y = g.op("Gather", y, g.constant(positions, "int32"), axis=last)
    y = g.typed(y, out.dtype)
    return y if bias is None else g.op("Add", y, g.cast(g.value(bias), out.dtype))


def _embedding(
    g: OnnxEmitter, node: Node, lower: Lowering, groups: list[Value], scheme: Mixed
) -> ir.Value:
    """Each token's row from its group; the other groups look up some row of theirs."""
    ids, table = node.inputs
    assert ids is not None and table is not None
    position, positions = g.value(ids), scheme.positions(table.size(0))
    if positions is None:
        position = g.cast(position, "int32")
    else:
        position = g.op("Gather", g.constant(positions, "int32"), position)
        position = g.typed(position, "int32")
    result: ir.Value | None = None
    bounds = pairwise(accumulate((group.size(0) for group in groups), initial=0))
    for group, (start, stop) in zip(groups, bounds, strict=True):
        inside = _within(g, position, start, stop, stop == table.size(0))
        local = g.op("Sub", position, g.constant(start, "int32")) if start else position
        local = g.op("Where", inside, local, g.constant(0, "int32"))
        index = replace(ids, name=f"{group.name}.ids", dtype="int32")
        g.values[index.name] = local
        (rows,) = lower(g, replace(node, inputs=(index, group)))
        chosen = g.op("Unsqueeze", inside, g.constant([2]))
        result = rows if result is None else g.op("Where", chosen, rows, result)
    assert result is not None
    return g.typed(result, node.outputs[0].dtype)


def _within(g: OnnxEmitter, position: ir.Value, start: int, stop: int, is_last: bool) -> ir.Value:
    """Whether start ≤ position < stop; every position is below the end of the last group."""
    from_start = g.op("GreaterOrEqual", position, g.constant(start, "int32"))
    if is_last:
        return from_start
    before_stop = g.op("Less", position, g.constant(stop, "int32"))
    return g.op("And", from_start, before_stop) if start else before_stop


_OPS = {"embedding": _embedding, "linear": _linear}
"""Griffin op → combines the results of all row groups."""
