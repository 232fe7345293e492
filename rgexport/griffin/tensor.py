"""Tensors that are read in slabs of rows, so that none has to be whole in memory."""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

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
    """A lazily read tensor; `read(start, stop)` returns rows of its first axis.

    `read` returns an array of shape `[stop - start, *shape[1:]]` in `dtype` that the caller owns.
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
        """Reads the whole tensor; for the small ones (biases, norms, gates) and for tests."""
        return self.read(0, self.shape[0])


WeightSource = Mapping[str, RowTensor]
"""Canonical tensor name → tensor; see `griffin.layout` for the names."""

FoundTensor = RowTensor | str
"""A readable tensor, or the name of the dtype that makes it unreadable."""


def slab_bounds(
    rows: int, row_bytes: int, limit: int = SLAB_BYTES, together: int = 1
) -> Iterator[tuple[int, int]]:
    """Yields `(start, stop)` row ranges of at most `limit` bytes each.

    A range is a multiple of `together` rows long, at least that many, except at the end.
    """
    step = max(1, limit // max(1, row_bytes) // together) * together
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def from_array(array: np.ndarray) -> RowTensor:
    return RowTensor(array.shape, array.dtype, lambda start, stop: array[start:stop].copy())


def advise_kernel(start: int, end: int, advice: int) -> bool:
    """Calls Linux's `madvise` on the pages of the addresses; returns whether it was accepted.

    Other systems take no advice, nor does a C library without that function.
    """
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):
        return False
    start -= start % mmap.PAGESIZE
    return call(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0
