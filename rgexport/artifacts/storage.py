"""The layout of weights in data files: row groups, and the parts of each tensor.

A tensor with several row groups has a matrix for each; the group's number begins its parts' names:
`0.data`, `0.scales`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.transforms import Shape
from rgexport.quantize.schemes.registry import PartShapes, Scheme, Uniform


def aligned(size: int, alignment: int) -> int:
    """Returns the smallest multiple of `alignment` that is not below `size`."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True)
class StoredGroup:
    """A group of a tensor's rows, which are stored in one scheme.

    Attributes:
        prefix: begins the names of the group's parts in the tensor; empty for a whole tensor.
        stored: the group as a tensor of its own.
        label: the name of the group's scheme.
        rows: the numbers of the group's rows in the tensor, ascending; None for all rows.
    """

    prefix: str
    stored: StoredTensor
    label: str
    rows: np.ndarray | None = None

    def run(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the range of the group's rows that lie in the tensor's rows `start` to `stop`."""
        if self.rows is None:
            return start, stop
        first, last = np.searchsorted(self.rows, [start, stop]).tolist()
        return first, last

    def chosen(self, start: int, stop: int) -> slice | np.ndarray:
        """Returns the indices of the group's rows in an array of rows `start` to `stop`."""
        if self.rows is None:
            return slice(None)
        first, last = self.run(start, stop)
        return self.rows[first:last] - start


def groups_of(stored: StoredTensor) -> tuple[StoredGroup, ...]:
    """Returns the row groups of a tensor; the tensor itself if all rows are stored alike."""
    groups = []
    for index, (label, scheme, rows) in enumerate(stored.scheme.row_groups(stored.shape[0])):
        if rows is None:
            groups.append(StoredGroup("", stored, label))
        else:
            prefix = f"{index}."
            tensor = _group_tensor(stored, prefix, scheme, len(rows))
            groups.append(StoredGroup(prefix, tensor, label, rows))
    return tuple(groups)


def _group_tensor(stored: StoredTensor, prefix: str, scheme: Uniform, size: int) -> StoredTensor:
    parts = {}
    for label, part in stored.parts.items():
        if label.startswith(prefix):
            parts[label.removeprefix(prefix)] = part
    return StoredTensor((size, *stored.shape[1:]), scheme, parts)


def part_shapes_by_group(
    shape: Shape, scheme: Scheme, part_shapes: Callable[[Shape, Uniform], PartShapes]
) -> PartShapes:
    """Returns the parts of a tensor; the group's number begins their names if it has several."""
    if len(scheme.uniform) == 1:
        return part_shapes(shape, scheme.uniform[0])
    shapes: PartShapes = {}
    sizes = scheme.group_sizes(shape[0])
    for index, (uniform, size) in enumerate(zip(scheme.uniform, sizes, strict=True)):
        for label, dtype_and_shape in part_shapes((size, *shape[1:]), uniform).items():
            shapes[f"{index}.{label}"] = dtype_and_shape
    return shapes
