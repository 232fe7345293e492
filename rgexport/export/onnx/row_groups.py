"""Lowerings of the ops whose weight is stored in row groups: one op for each group.

They are made of the lowerings of a profile, which see each group as a tensor of its own. Results
are put into the order of the rows by the rows' places (`quantize.row_groups`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import onnx_ir as ir

from rgexport.export.onnx.emitter import Emitter
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import group_name
from rgexport.quantize.scheme import Mixed

Lowering = Callable[[Emitter, Node], Sequence[ir.Value]]
_WEIGHT = 1
"""The input that may be stored in row groups, of each of these ops."""


def by_groups(g: Emitter, node: Node, lower: Lowering) -> Sequence[ir.Value]:
    """What `lower` gives, once for each row group if the weight of `node` has several."""
    make = _OPS.get(node.op)
    weight = node.inputs[_WEIGHT] if make else None
    if make is None or weight is None or not isinstance(g.stored(weight).scheme, Mixed):
        return lower(g, node)
    return [make(g, node, lower, _groups(g, weight))]


def _groups(g: Emitter, weight: Value) -> list[Value]:
    """The groups of a weight, as weights."""
    sizes = _scheme(g, weight).group_sizes(weight.size(0))
    return [
        replace(weight, name=group_name(weight.name, i), shape=(size, *weight.shape[1:]))
        for i, size in enumerate(sizes)
    ]


def _linear(g: Emitter, node: Node, lower: Lowering, groups: list[Value]) -> ir.Value:
    """The products side by side, gathered in the order of the rows, plus the bias."""
    x, weight, bias = node.inputs
    assert weight is not None
    (out,) = node.outputs
    products: list[ir.Value] = []
    for group in groups:
        shape = (*out.shape[:-1], group.size(0))
        part = replace(node, inputs=(x, group, None), outputs=(replace(out, shape=shape),))
        products += lower(g, part)
    y, last = g.op("Concat", *products, axis=-1), len(out.shape) - 1
    if (order := _positions(g, weight)) is not None:
        y = g.op("Gather", y, order, axis=last)
    y = g.typed(y, out.dtype)
    return y if bias is None else g.op("Add", y, g.cast(g.value(bias), out.dtype))


def _embedding(g: Emitter, node: Node, lower: Lowering, groups: list[Value]) -> ir.Value:
    """Of each token, the row of the group that has it; the others look up some row of theirs."""
    ids, table = node.inputs
    assert ids is not None and table is not None
    order, place = _positions(g, table), g.value(ids)
    place = (
        g.cast(place, "int32") if order is None else g.typed(g.op("Gather", order, place), "int32")
    )
    result: ir.Value | None = None
    bounds = pairwise(accumulate((group.size(0) for group in groups), initial=0))
    for group, (start, stop) in zip(groups, bounds, strict=True):
        here = _within(g, place, start, stop, group.size(0) + start == table.size(0))
        local = g.op("Sub", place, g.constant(start, "int32")) if start else place
        local = g.op("Where", here, local, g.constant(0, "int32"))
        index = replace(ids, name=f"{group.name}.ids", dtype="int32")
        g.values[index.name] = local
        (rows,) = lower(g, replace(node, inputs=(index, group)))
        chosen = g.op("Unsqueeze", here, g.constant([2]))
        result = rows if result is None else g.op("Where", chosen, rows, result)
    assert result is not None
    return g.typed(result, node.outputs[0].dtype)


def _within(g: Emitter, place: ir.Value, start: int, stop: int, is_last: bool) -> ir.Value:
    """Whether start ≤ place < stop; every place is below the end of the last group."""
    from_start = g.op("GreaterOrEqual", place, g.constant(start, "int32"))
    if is_last:
        return from_start
    before_stop = g.op("Less", place, g.constant(stop, "int32"))
    return g.op("And", from_start, before_stop) if start else before_stop


def _positions(g: Emitter, weight: Value) -> ir.Value | None:
    """The position of each row, inside the file: a few bytes for each; None if not needed."""
    positions = _scheme(g, weight).positions(weight.size(0))
    return None if positions is None else g.constant(positions, "int32")


def _scheme(g: Emitter, weight: Value) -> Mixed:
    scheme = g.stored(weight).scheme
    assert isinstance(scheme, Mixed), weight.name
    return scheme


_OPS = {"embedding": _embedding, "linear": _linear}
"""Griffin op → what makes its result of that of each row group."""
