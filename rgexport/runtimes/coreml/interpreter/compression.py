"""Weights that are stored in fewer bits: integers with scales, and indices into tables."""

from collections.abc import Callable, Mapping

import numpy as np

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import BITS, Constant, FileValue, Immediate, Operation, TensorType
from rgexport.runtimes.coreml.interpreter.weights import (
    Read,
    Unsupported,
    Weight,
    WeightCache,
    key_of,
    rows_of,
    whole_constant,
)

_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_HALF_MAX, _HALF_NORMAL, _NEXT_TO = np.float32(65504), np.float32(2**-14), np.float32(0.75)


def compressed_weight(package: Package, operation: Operation, cache: WeightCache) -> Weight:
    """What a `constexpr_` operation gives.

    Raises:
        Unsupported: an operation, or a form of one, that is not known here.
    """
    make = COMPRESSIONS.get(operation.type)
    if make is None:
        raise Unsupported("it is no operation that this interpreter knows")
    parts: dict[str, Constant] = {}
    for name, values in operation.inputs.items():
        if len(values) != 1 or not isinstance(values[0], Immediate | FileValue):
            raise Unsupported(f"its input {name} is not given by value")
        parts[name] = values[0]
    (_, type), *_ = operation.outputs or (("", TensorType("", ())),)
    if type.dtype not in ("float16", "float32"):
        raise Unsupported(f"it gives {type.dtype}; expected float16 or float32")
    read = make(package, type, parts)
    rounded = read if type.dtype == "float32" else lambda *rows: rounded_to_half(read(*rows))
    key = (operation.type, type, *(key_of(value) for value in parts.values()))
    return Weight(type, key, rounded, cache)


def rounded_to_half(array: np.ndarray) -> np.ndarray:
    """Float32 values rounded to what float16 can hold, as float32.

    By way of the bits, which is three times as fast as two casts: half of the last bit that stays
    is added (less where it is even), and what is behind it cut off. Below 2^-14 float16 has steps
    of 2^-24, as float32 has next to 0.75.
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


def _take(parts: _Parts, *names: str, optional: tuple[str, ...] = ()) -> list[Constant | None]:
    """The named parts; no others may be there."""
    if missing := [name for name in names if name not in parts]:
        raise Unsupported(f"it has no input {missing[0]}")
    if strange := parts.keys() - {*names, *optional}:
        raise Unsupported(f"it has the input {sorted(strange)[0]}, which is not known here")
    return [parts.get(name) for name in (*names, *optional)]


def _group_sizes(whole: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    """How many neighbours share one of `groups` along each axis."""
    fits = len(whole) == len(groups) > 0 and all(
        g and n % g == 0 for n, g in zip(whole, groups, strict=True)
    )
    if not fits:
        raise Unsupported(f"its shape {list(whole)} cannot be cut into {list(groups)} groups")
    return tuple(n // g for n, g in zip(whole, groups, strict=True))


def _shift_scale(package: Package, type: TensorType, parts: _Parts) -> Read:
    """`scale * (data - offset)`, each scale and offset for a block of neighbours."""
    data, scale, offset = _take(parts, "data", "scale", optional=("offset",))
    assert data is not None and scale is not None
    shape, groups = data.type.shape, scale.type.shape
    if type.shape != shape or offset is not None and offset.type.shape != groups:
        raise Unsupported("its data, offsets and result do not have shapes that fit")
    lead, *sizes = _group_sizes(shape, groups)
    split = [n for pair in zip(groups[1:], sizes, strict=True) for n in pair]
    per_group = [n for count in groups[1:] for n in (count, 1)]
    read, read_scale = rows_of(package, data), rows_of(package, scale)
    read_offset = rows_of(package, offset) if offset is not None else None

    def expanded(reader: Read, start: int, stop: int) -> np.ndarray:
        first = start // lead
        rows = np.arange(start, stop) // lead - first
        values = reader(first, first + int(rows[-1]) + 1).astype(_F32)[rows]
        return values.reshape(stop - start, *per_group)

    def rows(start: int, stop: int) -> np.ndarray:
        values = read(start, stop).astype(_F32).reshape(stop - start, *split)
        if read_offset is not None:
            values -= expanded(read_offset, start, stop)
        values *= expanded(read_scale, start, stop)
        return values.reshape(stop - start, *shape[1:])

    return rows


def _lookup(package: Package, type: TensorType, parts: _Parts) -> Read:
    """`lut[group][index]`, each table for a group of neighbours; single values only."""
    indices, lut, _ = _take(parts, "indices", "lut", optional=("vector_axis",))
    assert indices is not None and lut is not None
    shape = indices.type.shape
    palette = 1 << BITS[indices.type.dtype]
    if type.shape != shape or lut.type.shape[-2:] != (palette, 1):
        raise Unsupported(f"it has a table {lut.type} for {indices.type}")
    groups = lut.type.shape[:-2]
    sizes = _group_sizes(shape, groups)
    tables = whole_constant(package, lut).astype(_F32).reshape(*groups, palette)
    read = rows_of(package, indices)
    inner = np.ix_(*(np.arange(n) // size for n, size in zip(shape[1:], sizes[1:], strict=True)))

    def rows(start: int, stop: int) -> np.ndarray:
        group = (np.arange(start, stop) // sizes[0]).reshape(-1, *(1,) * len(inner))
        return tables[(group, *(axis[None] for axis in inner), read(start, stop))]

    return rows


COMPRESSIONS: dict[str, Callable[[Package, TensorType, _Parts], Read]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lookup,
}
