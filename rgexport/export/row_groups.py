"""A stored tensor as its row groups; a tensor with one scheme is a single group.

A group is stored as a matrix of its own. The names of its parts begin with its number: `0.data`,
`0.scales`, `1.data`, and so on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.scheme import PartShapes, Scheme, Uniform

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredGroup:
    """Some rows of a tensor.

    Attributes:
        prefix: the beginning of the names of the group's parts in the tensor.
        stored: the rows as a tensor of their own.
        label: the scheme for people: `int8/128 (1,024 rows)`.
        rows: their numbers in the tensor, ascending; None for all rows.
    """

    prefix: str
    stored: StoredTensor
    label: str
    rows: np.ndarray | None = None

    def run(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the group's range of rows among the tensor's rows `start` to `stop`."""
        if self.rows is None:
            return start, stop
        first, last = np.searchsorted(self.rows, [start, stop]).tolist()
        return first, last

    def chosen(self, start: int, stop: int) -> slice | np.ndarray:
        """Returns the group's rows as an index of the tensor's rows `start` to `stop`."""
        if self.rows is None:
            return slice(None)
        return self.rows[slice(*self.run(start, stop))] - start


def groups_of(stored: StoredTensor) -> tuple[StoredGroup, ...]:
    """Returns the row groups of a tensor; together they have all its rows."""
    return tuple(
        StoredGroup("", stored, label)
        if rows is None
        else StoredGroup(f"{i}.", _group(stored, i, len(rows)), label, rows)
        for i, (label, _, rows) in enumerate(stored.scheme.row_groups(stored.shape[0]))
    )


def with_groups(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors, and the row groups of those that have several, by `group_name`."""
    groups = {
        group_name(name, i): _group(stored, i, size)
        for name, stored in tensors.items()
        if len(stored.scheme.uniform) > 1
        for i, size in enumerate(stored.scheme.group_sizes(stored.shape[0]))
    }
    return {**tensors, **groups}


def group_name(tensor: str, index: int) -> str:
    """Returns the name of a row group as a tensor of its own."""
    return f"{tensor}.{index}"


def part_shapes_by_group(
    shape: Shape, scheme: Scheme, part_shapes: Callable[[Shape, Uniform], PartShapes]
) -> PartShapes:
    """Returns the parts of a tensor, whose names begin with the group's number if it has several.

    `part_shapes` returns the parts of a tensor without groups.

    Raises:
        RequestError: the groups do not fit the shape.
    """
    if len(scheme.uniform) == 1:
        return part_shapes(shape, scheme.uniform[0])
    sizes = scheme.group_sizes(shape[0])
    return {
        f"{i}.{label}": dtype_and_shape
        for i, (uniform, size) in enumerate(zip(scheme.uniform, sizes, strict=True))
        for label, dtype_and_shape in part_shapes((size, *shape[1:]), uniform).items()
    }


def _group(stored: StoredTensor, index: int, size: int) -> StoredTensor:
    prefix = f"{index}."
    parts = {
        label.removeprefix(prefix): part
        for label, part in stored.parts.items()
        if label.startswith(prefix)
    }
    return StoredTensor((size, *stored.shape[1:]), stored.scheme.uniform[index], parts)
