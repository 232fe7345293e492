"""The layout of weights in data files, and the writer that fills them.

The layout is known before the first weight is read. The writer then streams: each slab is read,
encoded and written at its own offset, several at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rgexport.export.manifest import COLUMNS, StoredPart, StoredTensor
from rgexport.export.row_groups import groups_of
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.parallelism import parallel_jobs
from rgexport.progress import task
from rgexport.quantize.scheme import Parts, PartShapes, Plan, Scheme

SLAB_BYTES = 1 << 20
"""Bytes of source weights. As float32 a slab fits the L2 cache, which makes encoding 2x faster."""
_LARGER = 4
"""Factor by which some slabs are larger: column-major tensors are written in runs of a few bytes,
and statistics are read once for many rows."""
_MAX_WORKERS = 8
_PENDING = 3
"""Slabs for each worker that are being encoded, or wait for their turn."""

Shape = tuple[int, ...]
PartShapesOf = Callable[[Shape, Scheme], PartShapes]
"""Shape and scheme of a tensor → part name → dtype and shape."""
Encode = Callable[[str, np.ndarray, np.ndarray, StoredTensor], Parts]
"""Name, rows in the checkpoint's dtype, their numbers, and stored form of a tensor (or of one of
its row groups) → the parts of these rows."""
_Result = TypeVar("_Result")


def aligned(size: int, alignment: int) -> int:
    """Returns `size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


@dataclass
class OffsetAllocator:
    """Assigns offsets in a data file, one after another; `size` is the end of the last part.

    Every part begins `header` bytes after a multiple of `alignment`.
    """

    file: str
    alignment: int
    size: int = 0
    header: int = 0

    def allocate(
        self, plan: Plan, shapes: Mapping[str, Shape], part_shapes: PartShapesOf
    ) -> dict[str, StoredTensor]:
        """Assigns offsets to all tensors, in the plan's order."""
        tensors = {}
        for name, scheme in plan.items():
            parts = {}
            for label, (dtype, shape) in part_shapes(shapes[name], scheme).items():
                offset = aligned(self.size, self.alignment) + self.header
                parts[label] = StoredPart(self.file, offset, dtype, shape)
                self.size = offset + parts[label].nbytes
            tensors[name] = StoredTensor(shapes[name], scheme, parts)
        return tensors


def fill(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    weights: WeightSource,
    encode: Encode,
    written: Callable[[str, Parts], None] = lambda name, slab: None,
) -> None:
    """Writes every weight into the files in `folder`, which exist and have their sizes.

    `written` is called for each slab with the tensor's name and the parts, in order.

    Raises:
        RequestError: a weight that its scheme cannot hold.
        OSError: the disk is full, or the file cannot be written.
    """
    total = sum(weights[name].nbytes for name in tensors)
    slabs = (
        partial(_write_slab, folder, name, stored, weights[name], encode, *bounds)
        for name, stored in tensors.items()
        for bounds in slab_bounds(
            stored.shape[0],
            weights[name].row_bytes,
            slab_bytes(stored.scheme, by_columns=COLUMNS in stored.parts),
            stored.rows_together,
        )
    )
    with task("Writing the weights", total) as advance:
        for name, slab, source_bytes in in_order(slabs):
            written(name, slab)
            advance(source_bytes)


def slab_bytes(scheme: Scheme, *, by_columns: bool = False) -> int:
    """Returns the bytes of source weights that are encoded together."""
    return SLAB_BYTES * (_LARGER if by_columns or scheme.needs_statistics else 1)


def _write_slab(
    folder: Path,
    name: str,
    stored: StoredTensor,
    source: RowTensor,
    encode: Encode,
    start: int,
    stop: int,
) -> tuple[str, Parts, int]:
    """Encodes and writes rows `start` to `stop`; returns the name, their parts, and bytes read.

    Each row group gets its rows, as a tensor that is stored by one scheme.
    """
    rows = source.read(start, stop)
    slab: Parts = {}
    for group in groups_of(stored):
        chosen = group.chosen(start, stop)
        ids = np.arange(start, stop)[chosen]
        if not len(ids):
            continue
        first, last = group.run(start, stop)
        for label, encoded in encode(name, rows[chosen], ids, group.stored).items():
            array = np.ascontiguousarray(encoded)
            _write_part(folder, group.stored, label, first, last, array)
            slab[group.prefix + label] = array
    return name, slab, rows.nbytes


def _write_part(
    folder: Path, stored: StoredTensor, label: str, start: int, stop: int, array: np.ndarray
) -> None:
    part = stored.parts[label]
    if label == COLUMNS:
        mapped = np.memmap(folder / part.file, part.dtype, "r+", part.offset, part.shape)
        mapped[:, start:stop] = array.T
        return
    # Each thread opens the file itself: `pwrite` does not exist on Windows.
    with open(folder / part.file, "r+b") as file:
        file.seek(stored.row_offset(label, start))
        file.write(array.reshape(-1).view(np.uint8).data)


def in_order(jobs: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """Yields results of jobs, in order; few of them run at a time, each on its thread."""
    pending: deque[Future[_Result]] = deque()
    workers = parallel_jobs(_MAX_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > _PENDING * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
