"""Lowers ops on weights in row groups, which are stored in several schemes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import groups_of
from rgexport.export.program import Node, Value


def with_groups(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors, and each of their row groups as a tensor of its own."""
    groups = {}
    for name, stored in tensors.items():
        for index, group in enumerate(groups_of(stored)):
            if group.rows is not None:
                groups[group_name(name, index)] = group.stored
    return {**tensors, **groups}


def group_name(tensor: str, index: int) -> str:
    """Returns the name of a row group as a tensor."""
    return f"{tensor}.{index}"


def lower_by_groups(
    g: Any, node: Node, lower: Callable[..., Any], grouped: Mapping[str, Callable[..., Any]]
) -> Any:
    """Lowers a node; one with a weight in row groups by its function in `grouped`.

    Args:
        g: the format's emitter.
        node: the node to lower.
        lower: lowers the op of a weight that is stored in one scheme.
        grouped: op → function that combines the results of the groups. It gets the groups as
            weights, and the position of each row among their rows, or None for the same order.
    """
    combine = grouped.get(node.op)
    if combine is None:
        return lower(g, node)
    weight = node.inputs[1]
    if weight is None:
        return lower(g, node)
    scheme = g.stored(weight).scheme
    if not scheme.has_row_groups:
        return lower(g, node)
    rows = weight.size(0)
    groups = _group_weights(weight, scheme.group_sizes(rows))
    return [combine(g, node, lower, groups, scheme.positions(rows))]


def _group_weights(weight: Value, sizes: Sequence[int]) -> list[Value]:
    """Returns the weight of each row group, named as `with_groups` names it."""
    groups = []
    for index, size in enumerate(sizes):
        name = group_name(weight.name, index)
        groups.append(replace(weight, name=name, shape=(size, *weight.shape[1:])))
    return groups
