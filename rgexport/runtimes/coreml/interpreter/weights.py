"""Constants of a program in weight files, dequantized a slab at a time.

A weight is held in float32, rounded to its declared dtype.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import (
    BITS,
    Constant,
    FileValue,
    Immediate,
    Operation,
    TensorType,
    numpy_type,
    unpack,
)
from rgexport.griffin.tensor import slab_bounds

SLAB_BYTES = 16 << 20
"""Size of a slab in float32; one exists at a time beside the cache."""
CACHE_BYTES = 512 << 20
BLOCK_BYTES = 1 << 20
"""Bytes of a slab that are dequantized at a time, so that they stay in the processor's cache."""

_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_HALF_MAX, _HALF_NORMAL, _NEXT_TO = np.float32(65504), np.float32(2**-14), np.float32(0.75)
Read = Callable[[int, int], np.ndarray]
"""(start, stop) → these rows, or these elements."""


class Unsupported(Exception):
    """An operation that this interpreter cannot execute."""


class WeightCache:
    """Keeps the slabs that are read first, up to a limit of bytes.

    Nothing is evicted: a step reads all weights in turn, so an evicted slab would be needed again
    before any that is kept.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self._left = limit
        self._kept: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The slab `key`, made by `make` unless it is kept; it must not be changed."""
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
    """Equal for equal values: both functions of a package share cached slabs."""
    read: Read
    """(start, stop) → these rows in float32, `[stop - start, *shape[1:]]`."""
    cache: WeightCache

    def slabs(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (start, stop, rows in float32)."""
        for start, stop in slab_bounds(self.type.shape[0], self._row_bytes, SLAB_BYTES):
            yield start, stop, self._slab(start, stop)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows `indices` [*N] in the declared dtype, `[*N, *shape[1:]]`; reads no others."""
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
    """A reader of the elements `start` to `stop` of a constant, in the order of storage.

    Raises:
        RequestError: its blob does not agree with the program.
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
    """A constant of floats that a weight file holds unquantized."""
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


def compressed_weight(package: Package, operation: Operation, cache: WeightCache) -> Weight:
    """The output of a `constexpr_` operation.

    Raises:
        Unsupported: an operation, or a form of one, that rgexport does not emit.
    """
    make = COMPRESSIONS.get(operation.type)
    if make is None:
        raise Unsupported("it is no operation that this interpreter knows")
    parts: dict[str, Constant] = {}
    for name, values in operation.inputs.items():
        if len(values) != 1 or not isinstance(values[0], Immediate | FileValue):
            raise Unsupported(f"its input {name} is not given by value")
        parts[name] = values[0]
    ((_, type),) = operation.outputs
    if type.dtype not in ("float16", "float32"):
        raise Unsupported(f"it gives {type.dtype}; expected float16 or float32")
    read = make(package, type, parts)
    rounded = read if type.dtype == "float32" else lambda *rows: rounded_to_half(read(*rows))
    key = (operation.type, type, *(key_of(value) for value in parts.values()))
    return Weight(type, key, rounded, cache)


def rounded_to_half(array: np.ndarray) -> np.ndarray:
    """Float32 values rounded to what float16 can hold, as float32.

    On the bits, which is three times as fast as two casts: half of the last bit that is kept is
    added (less where that bit is 0), and the bits after it are cleared. Below 2^-14 float16 has
    steps of 2^-24, as float32 has next to 0.75.
    """
    size = np.abs(array)
    if not size.max(initial=0) < _HALF_MAX:  # also where there is a NaN
        return array.astype(_F16).astype(_F32)
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = bits >> 13
    rounded &= 1
    rounded += bits
    rounded += 0x0FFF
    rounded &= 0xFFFFE000
    result = rounded.view(_F32)
    np.copyto(result, (array + _NEXT_TO) - _NEXT_TO, where=size < _HALF_NORMAL)
    return result


_Parts = Mapping[str, Constant]


def _take(parts: _Parts, *names: str) -> list[Constant]:
    """The named parts, which must be all."""
    if missing := [name for name in names if name not in parts]:
        raise Unsupported(f"it has no input {missing[0]}")
    if strange := parts.keys() - {*names}:
        raise Unsupported(f"it has the input {min(strange)}, which is not known here")
    return [parts[name] for name in names]


def _shift_scale(package: Package, type: TensorType, parts: _Parts) -> Read:
    """`scale * (data - offset)`: a scale and an offset per block of a row, or one scale for all."""
    data, scale, *offsets = _take(parts, "data", "scale", *({"offset"} & parts.keys()))
    shape, blocks = data.type.shape, scale.type.shape
    fits = shape == type.shape and all(part.type.shape == blocks for part in offsets)
    if fits and scale.type.size == 1 and not offsets:
        return _scaled(package, data, scale)
    if not fits or len(blocks) != 2 or blocks[:1] != shape[:1] or _remainder(shape[-1], blocks[1]):
        raise Unsupported(f"its data {data.type}, scales {scale.type} and result {type} do not fit")
    read, read_scale, *read_offset = (rows_of(package, part) for part in (data, scale, *offsets))

    def rows(start: int, stop: int) -> np.ndarray:
        values = read(start, stop).astype(_F32).reshape(stop - start, blocks[1], -1)
        for reader in read_offset:
            values -= reader(start, stop)[..., None]
        values *= read_scale(start, stop)[..., None]
        return values.reshape(stop - start, -1)

    return rows


def _scaled(package: Package, data: Constant, scale: Constant) -> Read:
    factor = np.float32(whole_constant(package, scale).item())
    read = rows_of(package, data)
    return lambda start, stop: read(start, stop).astype(_F32) * factor


def _lookup(package: Package, type: TensorType, parts: _Parts) -> Read:
    """`lut[group][index]`: a table of single values for each group of rows."""
    indices, lut = _take(parts, "indices", "lut")
    (count, *_), levels = lut.type.shape or (0,), 1 << BITS[indices.type.dtype]
    shape, tables = indices.type.shape, (count, 1, levels, 1)
    fits = shape == type.shape and len(shape) == 2 and lut.type.shape == tables
    if not fits or _remainder(shape[0], count):
        raise Unsupported(f"its indices {indices.type}, tables {lut.type} and {type} do not fit")
    values = whole_constant(package, lut).astype(_F32).reshape(count, levels)
    read, group = rows_of(package, indices), shape[0] // count
    return lambda start, stop: values[np.arange(start, stop)[:, None] // group, read(start, stop)]


def _remainder(size: int, parts: int) -> int:
    """What is left over if `size` is divided into equal `parts`; all of it for 0 parts."""
    return size % parts if parts else size or 1


COMPRESSIONS: dict[str, Callable[[Package, TensorType, _Parts], Read]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lookup,
}
