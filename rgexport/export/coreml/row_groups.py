"""Lowers ops with a weight in row groups: one op for each group.

They use the usual lowerings, which see each group as a tensor of its own. Results are put into the
order of the rows by the rows' positions (`quantize.row_groups`), which are in the program.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.emitter import CoreMLEmitter
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import group_name
from rgexport.quantize.scheme import Mixed

Lowering = Callable[[CoreMLEmitter, Node], Sequence[Var | None]]
_WEIGHT = 1
"""The input that may be stored in row groups, of each of these ops."""


def by_groups(g: CoreMLEmitter, node: Node, lower: Lowering) -> Sequence[Var | None]:
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
    return [combine(g, node, lower, groups, scheme.positions(weight.size(0)))]


def _linear(
    g: CoreMLEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> Var:
    """The products side by side, gathered in the order of the rows, plus the bias."""
    x, _, bias = node.inputs
    products = [lower(g, replace(node, inputs=(x, group, None)))[0] for group in groups]
    y = g.concat([product for product in products if product is not None], axis=-1)
    if positions is not None:
        y = g.op("gather", x=y, indices=positions, axis=y.rank - 1)
    return y if bias is None else g.op("add", x=y, y=g.value(bias))


def _embedding(
    g: CoreMLEmitter, node: Node, lower: Lowering, groups: list[Value], positions: np.ndarray | None
) -> Var:
    """Each token's row from its group; the other groups look up some row of theirs."""
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


_OPS = {"embedding": _embedding, "linear": _linear}
"""Griffin op → combines the results of all row groups."""
