"""The layout of the weights in files of external data, and their initializers."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rgexport.errors import RequestError
from rgexport.export.manifest import COLUMNS, StoredPart, StoredTensor
from rgexport.export.onnx.artifact import DATA_FILE, part_shapes
from rgexport.export.onnx.graph import DTYPES
from rgexport.export.storage import OffsetAllocator, aligned, fill
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.scheme import Parts, Plan
from rgexport.quantize.statistics import StatisticsOf, no_statistics

_ALIGNMENT = 4096
"""Of every part: runtimes map the file, and a mapping starts at a page."""


@dataclass(frozen=True)
class FileLimit:
    """The most bytes of a file: of several tensors (`filled`), and of one (`largest`)."""

    filled: int
    largest: int


class OnnxStorage:
    """The layout of the data files: tensors in the plan's order."""

    def __init__(
        self, plan: Plan, shapes: dict[str, tuple[int, ...]], limit: FileLimit | None = None
    ):
        """Lays out one file, or more if there is a `limit`; a tensor is never in two files.

        Raises:
            RequestError: a tensor that is larger than `limit` allows a file to be.
        """
        self.tensors: dict[str, StoredTensor] = {}
        self.sizes: dict[str, int] = {}
        """File → its size."""
        allocator = OffsetAllocator(DATA_FILE, _ALIGNMENT)
        for name, scheme in plan.items():
            before = allocator.size
            stored = allocator.allocate({name: scheme}, shapes, part_shapes)
            if limit and before and aligned(allocator.size, _ALIGNMENT) > limit.filled:
                allocator = OffsetAllocator(f"{DATA_FILE}.{len(self.sizes)}", _ALIGNMENT)
                stored = allocator.allocate({name: scheme}, shapes, part_shapes)
            if limit and allocator.size > limit.largest:
                raise RequestError(
                    f"{name} takes {allocator.size:,} bytes as {scheme.label}, more than the "
                    f"{limit.largest:,} of a file that a browser loads; store it in fewer bits, "
                    "such as with --embedding-precision int8"
                )
            self.tensors |= stored
            self.sizes[allocator.file] = aligned(allocator.size, _ALIGNMENT)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def write(
        self, folder: Path, weights: WeightSource, statistics: StatisticsOf = no_statistics
    ) -> None:
        """Fills the data files in `folder` from `weights`; algorithms use `statistics`.

        Raises:
            RequestError: a weight that its scheme cannot hold.
            OSError: the disk is full, or the folder cannot be written.
        """
        for name, size in self.sizes.items():
            with open(folder / name, "wb") as file:
                file.truncate(size)
        fill(folder, self.tensors, weights, partial(_encode, statistics))


def initializer(
    part: StoredPart, name: str, shape: tuple[int, ...] | None = None
) -> ir.ExternalTensor:
    """Returns a tensor of the graph over a stored part, optionally in another shape."""
    dtype, dims = DTYPES[part.dtype], ir.Shape(shape or part.shape)
    return ir.ExternalTensor(part.file, part.offset, part.nbytes, dtype, shape=dims, name=name)


def _encode(
    statistics: StatisticsOf, name: str, rows: np.ndarray, ids: np.ndarray, tensor: StoredTensor
) -> Parts:
    arrays = tensor.uniform.encode(name, rows, statistics(name), ids)
    return arrays if "data" in tensor.parts else {COLUMNS: arrays.pop("data"), **arrays}
