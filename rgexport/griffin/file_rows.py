"""Tensors in a file, as stored or transposed, read in slabs of rows.

Files are read, not mapped: mapped pages count as resident memory, and a file that is truncated
while it is mapped kills the process. Reading a file of 2.9 GB in slabs takes 0.16 GB of memory at
most; with `safe_open` of safetensors, which maps it, 2.9 GB and twice the time. A file is opened
for each slab, so that any thread may read.
"""

import math
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.safetensors import FLOATS, Entry
from rgexport.griffin.tensor import RowTensor, slab_bounds

TRANSPOSE_BYTES = 4 << 20
"""Bytes read at a time while a slab is transposed."""


def entry_rows(entry: Entry) -> RowTensor:
    """Returns a tensor of a safetensors file, for a float dtype and at least one axis."""
    return file_rows(entry.path, entry.shape, FLOATS[entry.dtype], entry.offset)


def entry_columns(entry: Entry) -> RowTensor:
    """Returns the transpose of a matrix of floats in a safetensors file."""
    height, width = entry.shape
    return transposed_rows(entry.path, (height, width), FLOATS[entry.dtype], entry.offset)


def file_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> RowTensor:
    """A row-major tensor at byte `offset` of a file."""
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        out = np.empty((1, (stop - start) * row), np.uint8)
        read_lines(path, offset + start * row, 0, out)
        return out.view(dtype).reshape(stop - start, *shape[1:])

    return RowTensor(shape, dtype, read)


def transposed_rows(path: Path, shape: tuple[int, int], dtype: np.dtype, offset: int) -> RowTensor:
    """The transpose [M, W] of a row-major matrix [W, M] in a file.

    A slab reads only its own columns of the file.
    """
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
    """Fills each row of `out` [lines, bytes] (uint8) from the file, `stride` bytes apart.

    Raises:
        RequestError: the file cannot be read or ends too early.
    """
    try:
        with path.open("rb", buffering=0) as file:
            for index, line in enumerate(out):
                file.seek(offset + index * stride)
                done = 0
                while done < len(line):
                    count = file.readinto(line[done:].data)
                    if not count:
                        raise RequestError(
                            f"{path} ended {len(line) - done} bytes too early: "
                            "it was changed while it was read"
                        )
                    done += count
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
