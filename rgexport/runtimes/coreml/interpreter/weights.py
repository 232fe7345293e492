"""Constants of a program that lie in weight files, dequantized a slab at a time.

A weight is float32 here and holds what its declared dtype can: a float16 weight is rounded to it.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.export.mil.elements import numpy_type, unpack
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import (
    BITS,
    Constant,
    FileValue,
    Immediate,
    TensorType,
)
from rgexport.griffin.tensor import slab_bounds

SLAB_BYTES = 16 << 20
"""Of a weight in float32 that exist at a time, beside what the cache keeps."""
CACHE_BYTES = 512 << 20
BLOCK_BYTES = 1 << 20
"""Of a slab that are dequantized at a time: what a processor keeps close."""

_F32 = np.dtype(np.float32)
Read = Callable[[int, int], np.ndarray]
"""(start, stop) → those rows, or those elements."""


class Unsupported(Exception):
    """What this interpreter cannot execute; says what."""


class WeightCache:
    """Keeps slabs in the order in which they are first asked for, until its limit is reached.

    A step reads all weights in turn, so whatever a cache evicted would be what is asked next.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self._left = limit
        self._kept: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The slab `key`, made by `make` unless it was kept; nobody may change it."""
        kept = self._kept.get(key)
        if kept is None:
            kept = make()
            if kept.nbytes <= self._left:
                self._left -= kept.nbytes
                self._kept[key] = kept
        return kept


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant of declared type `type`, of rank 1 or more, read in rows of its first axis."""

    type: TensorType
    key: Hashable
    """Equal for equal values: both functions of a package share what is cached."""
    read: Read
    """(start, stop) → those rows in float32, `[stop - start, *shape[1:]]`."""
    cache: WeightCache

    def slabs(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (start, stop, rows in float32)."""
        for start, stop in slab_bounds(self.type.shape[0], self._row_bytes, SLAB_BYTES):
            yield start, stop, self._slab(start, stop)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows `indices` [*N] in the declared dtype, `[*N, *shape[1:]]`, and no others read."""
        flat = [self.read(index, index + 1) for index in indices.reshape(-1).tolist()]
        shape = (*indices.shape, *self.type.shape[1:])
        rows = np.concatenate(flat) if flat else np.zeros(0, _F32)
        return rows.reshape(shape).astype(numpy_type(self.type.dtype), copy=False)

    def whole(self) -> np.ndarray:
        """All of it in the declared dtype."""
        return self.wide().astype(numpy_type(self.type.dtype), copy=False)

    def wide(self) -> np.ndarray:
        """All of it in float32."""
        slabs = [slab for _, _, slab in self.slabs()]
        return slabs[0] if len(slabs) == 1 else np.concatenate(slabs)

    def _slab(self, start: int, stop: int) -> np.ndarray:
        return self.cache.get((self.key, start), lambda: self._assembled(start, stop))

    def _assembled(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.type.shape[1:]), _F32)
        for first, last in slab_bounds(stop - start, self._row_bytes, BLOCK_BYTES):
            out[first:last] = self.read(start + first, start + last)
        return out

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.type.shape[1:], dtype=np.int64)) * _F32.itemsize


def elements(package: Package, value: Constant) -> Read:
    """A reader of the elements `start` to `stop` of a constant, in the order in which they lie.

    Raises:
        RequestError: its blob is not what the program says.
    """
    if isinstance(value, Immediate):
        flat = value.array.reshape(-1)
        return lambda start, stop: flat[start:stop]
    blob, dtype = package.blob(value), value.type.dtype
    bits = BITS[dtype]

    def read(start: int, stop: int) -> np.ndarray:
        first = start // 8 * 8 if bits < 8 else start  # eight elements fill whole bytes
        packed = blob.read(first * bits // 8, -(-stop * bits // 8))
        return unpack(packed, dtype, stop - first)[start - first :]

    return read


def whole_constant(package: Package, value: Constant) -> np.ndarray:
    """A constant as an array."""
    if isinstance(value, Immediate):
        return value.array
    return elements(package, value)(0, value.type.size).reshape(value.type.shape)


def file_weight(package: Package, value: FileValue, cache: WeightCache) -> Weight:
    """A constant of floats that lies in a file as it is."""
    read = rows_of(package, value)
    return Weight(
        value.type, key_of(value), lambda start, stop: read(start, stop).astype(_F32), cache
    )


def rows_of(package: Package, value: Constant) -> Read:
    """A reader of rows of a constant of rank 1 or more, as they are stored."""
    read, shape = elements(package, value), value.type.shape
    width = int(np.prod(shape[1:], dtype=np.int64))
    return lambda start, stop: read(start * width, stop * width).reshape(stop - start, *shape[1:])


def key_of(value: Constant) -> Hashable:
    """Equal for constants that are the same."""
    if isinstance(value, FileValue):
        return value.file, value.offset, value.type
    return value.type, value.array.tobytes()
