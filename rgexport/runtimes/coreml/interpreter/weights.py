"""Constants of a program in weight files, dequantized a slab at a time in float32."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from rgexport.artifacts.coreml.mil import program as mil
from rgexport.artifacts.coreml.mil.package import Package
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

    Nothing is evicted: a step reads all weights in turn, so what is evicted would be needed first.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self._free_bytes = limit
        self._slabs: dict[Hashable, np.ndarray] = {}

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        slab = self._slabs.get(key)
        if slab is None:
            slab = make()
            if slab.nbytes <= self._free_bytes:
                self._free_bytes -= slab.nbytes
                self._slabs[key] = slab
        return slab


@dataclass(frozen=True, eq=False)
class FileWeight:
    """A constant of rank 1 or more, read in rows of its first axis.

    `read(start, stop)` gives float32 [stop - start, *shape[1:]]. Both functions of a package share
    the cached slabs of equal `key`s.
    """

    type: mil.TensorType
    key: Hashable
    read: Read
    cache: WeightCache

    def slabs(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for start, stop in slab_bounds(self.type.shape[0], self._row_bytes, SLAB_BYTES):
            make = partial(self._assemble, start, stop)
            yield start, stop, self.cache.get((self.key, start), make)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        flat = [self.read(index, index + 1) for index in indices.reshape(-1).tolist()]
        shape = (*indices.shape, *self.type.shape[1:])
        return (np.concatenate(flat) if flat else np.zeros(0, _F32)).reshape(shape)

    def whole(self) -> np.ndarray:
        slabs = [slab for _, _, slab in self.slabs()]
        return slabs[0] if len(slabs) == 1 else np.concatenate(slabs)

    def _assemble(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.type.shape[1:]), _F32)
        for first, last in slab_bounds(stop - start, self._row_bytes, BLOCK_BYTES):
            out[first:last] = self.read(start + first, start + last)
        return out

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.type.shape[1:], dtype=np.int64)) * _F32.itemsize


def elements(package: Package, value: mil.Constant) -> Read:
    if isinstance(value, mil.Immediate):
        flat = value.array.reshape(-1)
        return lambda start, stop: flat[start:stop]
    blob, dtype = package.blob(value), value.type.dtype
    bits = mil.BITS[dtype]

    def read(start: int, stop: int) -> np.ndarray:
        first = start // 8 * 8 if bits < 8 else start  # eight elements fill whole bytes
        packed = blob.read(first * bits // 8, -(-stop * bits // 8))
        return mil.unpack(packed, dtype, stop - first)[start - first :]

    return read


def whole_constant(package: Package, value: mil.Constant) -> np.ndarray:
    if isinstance(value, mil.Immediate):
        return value.array
    return elements(package, value)(0, value.type.size).reshape(value.type.shape)


def file_weight(package: Package, value: mil.FileValue, cache: WeightCache) -> FileWeight:
    read = rows_of(package, value)
    return FileWeight(value.type, key_of(value), lambda *rows: read(*rows).astype(_F32), cache)


def rows_of(package: Package, value: mil.Constant) -> Read:
    read, shape = elements(package, value), value.type.shape
    width = int(np.prod(shape[1:], dtype=np.int64))
    return lambda start, stop: read(start * width, stop * width).reshape(stop - start, *shape[1:])


def key_of(value: mil.Constant) -> Hashable:
    if isinstance(value, mil.FileValue):
        return value.file, value.offset, value.type
    return value.type, value.array.tobytes()


def compressed_weight(package: Package, operation: mil.Operation, cache: WeightCache) -> FileWeight:
    """Returns the output of a `constexpr_` operation; raises Unsupported for unknown forms."""
    if operation.type not in COMPRESSIONS:
        raise Unsupported("it is no operation that this interpreter knows")
    constants: dict[str, mil.Constant] = {}
    for name, values in operation.inputs.items():
        if len(values) != 1 or not isinstance(values[0], mil.Immediate | mil.FileValue):
            raise Unsupported(f"its input {name} is not given by value")
        constants[name] = values[0]
    ((_, type),) = operation.outputs
    if type.dtype not in ("float16", "float32"):
        raise Unsupported(f"it gives {type.dtype}; expected float16 or float32")
    read = COMPRESSIONS[operation.type](package, type, constants)
    rounded = read if type.dtype == "float32" else lambda *rows: rounded_to_half(read(*rows))
    key = (operation.type, type, *(key_of(value) for value in constants.values()))
    return FileWeight(type, key, rounded, cache)


def rounded_to_half(array: np.ndarray) -> np.ndarray:
    """Rounds float32 values to float16 precision; the result stays float32.

    Works on the bits, three times as fast as two casts: adds half of the last bit that remains
    (less where that bit is 0), and clears the bits after it. Below 2^-14 float16 has steps of
    2^-24, as float32 has next to 0.75.
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


_Constants = Mapping[str, mil.Constant]


def _require_exactly(constants: _Constants, *names: str) -> list[mil.Constant]:
    if missing := [name for name in names if name not in constants]:
        raise Unsupported(f"it has no input {missing[0]}")
    if unknown := constants.keys() - {*names}:
        raise Unsupported(f"it has the input {min(unknown)}, which is not known here")
    return [constants[name] for name in names]


def _shift_scale(package: Package, type: mil.TensorType, constants: _Constants) -> Read:
    """Reads `scale * (data - offset)`, with scales and offsets per block of a row, or one scale."""
    names = "data", "scale", *({"offset"} & constants.keys())
    data, scale, *offsets = _require_exactly(constants, *names)
    shape, blocks = data.type.shape, scale.type.shape
    fits = shape == type.shape and all(part.type.shape == blocks for part in offsets)
    if fits and scale.type.size == 1 and not offsets:
        factor = np.float32(whole_constant(package, scale).item())
        read_data = rows_of(package, data)
        return lambda start, stop: read_data(start, stop).astype(_F32) * factor
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


def _lookup(package: Package, type: mil.TensorType, constants: _Constants) -> Read:
    """Reads `lut[group][index]`: a table of single values for each group of rows."""
    indices, lut = _require_exactly(constants, "indices", "lut")
    (count, *_), levels = lut.type.shape or (0,), 1 << mil.BITS[indices.type.dtype]
    shape, tables = indices.type.shape, (count, 1, levels, 1)
    fits = shape == type.shape and len(shape) == 2 and lut.type.shape == tables
    if not fits or _remainder(shape[0], count):
        raise Unsupported(f"its indices {indices.type}, tables {lut.type} and {type} do not fit")
    values = whole_constant(package, lut).astype(_F32).reshape(count, levels)
    read, group = rows_of(package, indices), shape[0] // count
    return lambda start, stop: values[np.arange(start, stop)[:, None] // group, read(start, stop)]


def _remainder(size: int, count: int) -> int:
    return size % count if count else size or 1


COMPRESSIONS: dict[str, Callable[[Package, mil.TensorType, _Constants], Read]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lookup,
}
