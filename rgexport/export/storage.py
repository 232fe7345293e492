"""Lays out weights in data files, and fills them.

Each slab is read, encoded and written at its own offset, several at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rgexport.artifacts.manifest import COLUMNS, StoredPart, StoredTensor
from rgexport.artifacts.storage import aligned, groups_of
from rgexport.artifacts.transforms import Shape
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.parallelism import parallel_jobs
from rgexport.progress import task
from rgexport.quantize.schemes.registry import Parts, PartShapes, Plan, Scheme

SLAB_BYTES = 1 << 20
"""Bytes of source weights. As float32 a slab fits the L2 cache, which makes encoding 2x faster."""

_LARGER = 4
"""Factor by which slabs are larger that are written in short runs, or need statistics."""

_MAX_WORKERS = 8

_PENDING = 3
"""Slabs for each worker that are being encoded, or wait until earlier ones are done."""

PartShapesOf = Callable[[Shape, Scheme], PartShapes]
Encode = Callable[[str, np.ndarray, np.ndarray, StoredTensor], Parts]
"""Name, rows in the checkpoint's dtype, their numbers, stored tensor or group → parts."""

Written = Callable[[str, Parts], None]
"""Takes the name and the parts of a slab that was written."""

_Result = TypeVar("_Result")


@dataclass
class OffsetAllocator:
    """The layout of one data file, which grows with each call of `allocate`.

    Attributes:
        file: the name of the file.
        alignment: each part begins, before its header, at a multiple of this.
        size: the bytes that are allocated.
        header: the bytes in front of each part's data.
    """

    file: str
    alignment: int
    size: int = 0
    header: int = 0

    def allocate(
        self, plan: Plan, shapes: Mapping[str, Shape], part_shapes: PartShapesOf
    ) -> dict[str, StoredTensor]:
        """Returns the tensors of a plan, each part at its offset in the file."""
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
    sizes: Mapping[str, int],
    tensors: Mapping[str, StoredTensor],
    weights: WeightSource,
    encode: Encode,
    written: Written | None = None,
) -> None:
    """Writes data files.

    Args:
        folder: the folder of the files.
        sizes: name of a file → its bytes.
        tensors: the places of the weights in the files.
        weights: the weights, which are read in slabs.
        encode: encodes the rows of a slab.
        written: called with each slab, in order.
    """
    for file_name, file_size in sizes.items():
        path = folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(file_size)

    total = sum(weights[name].nbytes for name in tensors)
    jobs = _slab_jobs(folder, tensors, weights, encode)
    with task("Writing the weights", total) as advance:
        for name, slab, source_bytes in in_order(jobs):
            if written is not None:
                written(name, slab)
            advance(source_bytes)


def _slab_jobs(
    folder: Path, tensors: Mapping[str, StoredTensor], weights: WeightSource, encode: Encode
) -> Iterator[Callable[[], tuple[str, Parts, int]]]:
    """Yields a function for each slab, which writes it as `_write_slab` does."""
    for name, stored in tensors.items():
        source = weights[name]
        size = slab_bytes(stored.scheme, by_columns=COLUMNS in stored.parts)
        bounds = slab_bounds(stored.shape[0], source.row_bytes, size, stored.rows_together)
        for start, stop in bounds:
            yield partial(_write_slab, folder, name, stored, source, encode, start, stop)


def slab_bytes(scheme: Scheme, *, by_columns: bool = False) -> int:
    """Returns the bytes of source weights in a slab of a tensor."""
    if by_columns or scheme.needs_statistics:
        return SLAB_BYTES * _LARGER
    return SLAB_BYTES


def _write_slab(
    folder: Path,
    name: str,
    stored: StoredTensor,
    source: RowTensor,
    encode: Encode,
    start: int,
    stop: int,
) -> tuple[str, Parts, int]:
    """Encodes and writes rows; returns the name, their parts, and the bytes that were read."""
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
