"""Tensors that are read in slabs of rows, so that none has to be whole in memory.

Files are read, not mapped: mapped pages count as resident memory, and a file that is truncated
while it is mapped kills the process. Any thread may read.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import report_os_errors
from rgexport.files.safetensors import FLOATS, Entry

SLAB_BYTES = 64 << 20
"""Upper bound of one slab, in bytes of the tensor's own dtype."""

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that weights are stored in."""


@dataclass(frozen=True)
class RowTensor:
    """A lazily read tensor; `read(start, stop)` returns rows of its first axis as a new array.

    The array has the shape `[stop - start, *shape[1:]]` and `dtype`, and belongs to the caller.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def slabs(self, limit: int = SLAB_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(first row, rows)` of at most `limit` bytes (but at least one row) each."""
        for start, stop in slab_bounds(self.shape[0], self.row_bytes, limit):
            yield start, self.read(start, stop)

    def whole(self) -> np.ndarray:
        """Reads the whole tensor; for the small ones: biases, norms, gates."""
        return self.read(0, self.shape[0])


WeightSource = Mapping[str, RowTensor]
"""Canonical tensor name → tensor; see `griffin.layout` for the names."""

FoundTensor = RowTensor | str
"""A readable tensor, or the name of the dtype that makes it unreadable."""

View = Callable[[np.ndarray], np.ndarray]
"""A function that slices or transposes an array, without a copy."""


@dataclass(frozen=True)
class DeepMindTensor:
    """A tensor of a DeepMind checkpoint, in its stored shape; `view_rows` reads a view of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    view_rows: Callable[[View], RowTensor]

    def rows(self, view: View = lambda array: array) -> RowTensor:
        """Returns the tensor, or another view of it such as its transpose, in slabs of rows."""
        return self.view_rows(view)


DeepMindTensors = dict[str, DeepMindTensor | str]
"""DeepMind's name → tensor, or the type of a value that is no tensor."""


def slab_bounds(
    rows: int, row_bytes: int, limit: int = SLAB_BYTES, together: int = 1
) -> Iterator[tuple[int, int]]:
    """Yields `(start, stop)` row ranges of at most `limit` bytes, but at least `together` rows."""
    step = max(1, limit // max(1, row_bytes) // together) * together
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def from_array(array: np.ndarray) -> RowTensor:
    return RowTensor(array.shape, array.dtype, lambda start, stop: array[start:stop].copy())


TRANSPOSE_BYTES = 4 << 20
"""Bytes read at a time while a slab is transposed."""


def entry_rows(entry: Entry) -> RowTensor:
    """Returns a tensor of a safetensors file, for a float dtype and at least one axis."""
    return file_rows(entry.path, entry.shape, FLOATS[entry.dtype], entry.offset)


def entry_columns(entry: Entry) -> RowTensor:
    height, width = entry.shape
    return transposed_rows(entry.path, (height, width), FLOATS[entry.dtype], entry.offset)


def file_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> RowTensor:
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty((1, (stop - start) * row), np.uint8)
        read_lines(path, offset + start * row, 0, out)
        return out.view(dtype).reshape(stop - start, *shape[1:])

    return RowTensor(shape, dtype, read)


def transposed_rows(path: Path, shape: tuple[int, int], dtype: np.dtype, offset: int) -> RowTensor:
    """Returns the transpose [M, W] of a row-major matrix [W, M] in a file, read by columns."""
    height, width = shape
    item = dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, height), dtype)
        for first, last in slab_bounds(height, (stop - start) * item, TRANSPOSE_BYTES):
            block = np.empty((last - first, (stop - start) * item), np.uint8)
            read_lines(path, offset + (first * width + start) * item, width * item, block)
            out[:, first:last] = block.view(dtype).T
        return out

    return RowTensor((width, height), dtype, read)


def read_lines(path: Path, offset: int, stride: int, out: np.ndarray) -> None:
    """Fills each row of `out` [lines, bytes] (uint8) from the file, `stride` bytes apart."""
    with report_os_errors(path), path.open("rb", buffering=0) as file:
        for index, line in enumerate(out):
            file.seek(offset + index * stride)
            done = 0
            while done < len(line):
                count = file.readinto(line[done:].data)
                if not count:
                    raise RequestError(
                        f"{path} ended {len(line) - done} bytes early: it changed while it was read"
                    )
                done += count


def advise_kernel(start: int, end: int, advice: int) -> bool:
    """Calls Linux's `madvise` on the pages of the addresses; returns whether it was accepted."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):
        return False
    start -= start % mmap.PAGESIZE
    return call(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0
