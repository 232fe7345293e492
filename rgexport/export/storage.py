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
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import needs_statistics
from rgexport.quantize.scheme import Plan, Scheme

SLAB_BYTES = 1 << 20
"""Bytes of source weights. As float32 a slab fits the L2 cache, which makes encoding 2x faster."""
_LARGER = 4
"""Times as large are slabs of what is stored by columns, which are written in runs of a few bytes,
and of what is encoded by statistics, which are read once for many rows."""
_MOST_WORKERS = 8
_IN_FLIGHT = 3
"""Slabs for each worker that are being made, or wait to be taken in order."""

Shape = tuple[int, ...]
Layouts = Callable[[Shape, Scheme], Mapping[str, tuple[str, Shape]]]
"""From shape and scheme of a tensor to part name → dtype and shape."""
Encode = Callable[[str, np.ndarray, np.ndarray, StoredTensor], Parts]
"""From name, rows in the checkpoint's dtype, their numbers, and stored form of a tensor to these
rows' parts.

The stored form is that of a row group, where the tensor has several."""
_Result = TypeVar("_Result")


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


@dataclass
class Places:
    """Assigns places in a data file, one after another; `size` is what is taken so far.

    Every part begins `header` bytes after a multiple of `alignment`.
    """

    file: str
    alignment: int
    size: int = 0
    header: int = 0

    def tensors(
        self, plan: Plan, shapes: Mapping[str, Shape], layouts: Layouts
    ) -> dict[str, StoredTensor]:
        """Places for all tensors, in the plan's order."""
        return {
            name: StoredTensor(shapes[name], scheme, self._parts(layouts(shapes[name], scheme)))
            for name, scheme in plan.items()
        }

    def _parts(self, layouts: Mapping[str, tuple[str, Shape]]) -> dict[str, StoredPart]:
        return {name: self._part(*layout) for name, layout in layouts.items()}

    def _part(self, dtype: str, shape: Shape) -> StoredPart:
        offset = aligned(self.size, self.alignment) + self.header
        part = StoredPart(self.file, offset, dtype, shape)
        self.size = part.offset + part.nbytes
        return part


def fill(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    weights: WeightSource,
    encode: Encode,
    written: Callable[[str, Parts], None] = lambda name, parts: None,
) -> None:
    """Writes every weight to its place in the files in `folder`, which exist and have their sizes.

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
        for name, parts, source_bytes in in_order(slabs):
            written(name, parts)
            advance(source_bytes)


def slab_bytes(scheme: Scheme, *, by_columns: bool = False) -> int:
    """Bytes of source weights that are encoded together."""
    return SLAB_BYTES * (_LARGER if by_columns or needs_statistics(scheme) else 1)


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

    Each row group gets the rows that are its own, as a tensor that is stored by one scheme.
    """
    rows = source.read(start, stop)
    written: Parts = {}
    for group in groups_of(stored):
        chosen = group.chosen(start, stop)
        own, ids = rows[chosen], np.arange(start, stop)[chosen]
        if not len(own):
            continue
        parts = {
            label: np.ascontiguousarray(array)
            for label, array in encode(name, own, ids, group.stored).items()
        }
        _write_rows(folder, group.stored, *group.run(start, stop), parts)
        written |= {group.prefix + label: array for label, array in parts.items()}
    return name, written, rows.nbytes


def _write_rows(folder: Path, stored: StoredTensor, start: int, stop: int, parts: Parts) -> None:
    for label, array in parts.items():
        part = stored.parts[label]
        if label == COLUMNS:
            mapped = np.memmap(folder / part.file, part.dtype, "r+", part.offset, part.shape)
            mapped[:, start:stop] = array.T
            continue
        # Each thread opens the file itself: `pwrite` does not exist on Windows.
        with open(folder / part.file, "r+b") as file:
            file.seek(stored.row_offset(label, start))
            file.write(array.reshape(-1).view(np.uint8).data)


def in_order(jobs: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """Results of jobs, in order; few of them run at a time, each on its thread."""
    pending: deque[Future[_Result]] = deque()
    workers = parallel_jobs(_MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > _IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
