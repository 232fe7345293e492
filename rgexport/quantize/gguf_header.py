"""Reads the header of a GGUF file; every size in it is checked before it is used.

Format (ggml's gguf.md), little-endian: `GGUF`, version u32, number of tensors u64, number of values
u64; then the values (key, type u32, value), the tensors (name, number of dimensions u32, dimensions
u64 with the row length first, type u32, offset u64), padding, and the data. A string is its length
u64 and its bytes. (`gguf.GGUFReader` checks no sizes, and takes fifty times as long.)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import report_os_errors, require_regular
from rgexport.quantize.schemes.ggml_types import BY_VALUE, GgmlType

MAX_HEADER_BYTES = 64 << 20
"""Far above what a vocabulary needs (that of Gemma: 7 MB)."""
MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
"""Used if a file has no `general.alignment`."""

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype] = {
    number: np.dtype(code)
    for number, code in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
        **{_BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
_MAX_DIMENSIONS, _MAX_NAME = 4, 127  # ggml's names are shorter still


@dataclass(frozen=True)
class GgufTensor:
    """A tensor; the row length is last in `shape`, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data of a GGUF file, in its order.

    Values are numbers, bools, strings, lists of strings, or numpy arrays. `spans` has the begin and
    the end of each key's type and value.
    """

    path: Path
    version: int
    values: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    try:
        require_regular(path)
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, RequestError):
        return False


def read_header(path: Path) -> GgufHeader:
    """Reads the values and tensors of a file; RequestError for damage or another kind of file."""
    with report_os_errors(path):
        size = require_regular(path)
        with path.open("rb") as file:
            return _read(_Cursor(path, file, size))


class _Cursor:
    """Reads a little-endian binary file of `size` bytes forward."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.at, self._file = path, size, 0, file

    def take(self, count: int) -> bytes:
        self.require(count)
        data = self._file.read(count)
        if len(data) != count:
            raise RequestError(f"{self.path} was changed while it was read")
        self.at += count
        return data

    def require(self, count: int) -> None:
        if self.at + count > self.size:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes, its contents "
                f"need {self.at + count} or more; copy or download it again"
            )
        if self.at + count > MAX_HEADER_BYTES:
            raise self.damaged(f"it would have to be read beyond byte {MAX_HEADER_BYTES}")

    def integer(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def text(self, nbytes: int) -> str:
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError:
            raise self.damaged("a string in it is not UTF-8") from None

    def damaged(self, what: str) -> RequestError:
        """Returns the error for contents that contradict themselves."""
        return RequestError(f"{self.path} is damaged: {what}; copy or download it again")


def _read(cursor: _Cursor) -> GgufHeader:
    version = _read_version(cursor)
    num_tensors, num_values = cursor.integer(8), cursor.integer(8)
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(num_values):
        key, start = _read_name(cursor), cursor.at
        if key in values:
            raise cursor.damaged(f"its header has {key} twice")
        values[key] = _read_value(cursor, cursor.integer(4))
        spans[key] = start, cursor.at
    tensors = _read_tensors(cursor, num_tensors, values)
    return GgufHeader(cursor.path, version, values, spans, tensors)


def _read_version(cursor: _Cursor) -> int:
    start = cursor.take(min(cursor.size, 8))
    if len(start) < 8 or not start.startswith(MAGIC):
        raise RequestError(
            f"{cursor.path} is not a GGUF file: it does not start with {MAGIC.decode()}"
        )
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise RequestError(
            f"{cursor.path} is a GGUF file {what}; expected version 3, little-endian"
        )
    return version


def _read_name(cursor: _Cursor) -> str:
    length = cursor.integer(8)
    name = cursor.text(length) if length <= _MAX_NAME else None
    if name is None or not name.isprintable():
        raise cursor.damaged(f"its header has the name {name!r} of {length} bytes")
    return name


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text(cursor.integer(8))
    if kind != _ARRAY:
        return _read_numbers(cursor, kind, 1)[0].item()
    kind, count = cursor.integer(4), cursor.integer(8)
    if kind != _STRING:
        return _read_numbers(cursor, kind, count)
    cursor.require(8 * count)
    return [cursor.text(cursor.integer(8)) for _ in range(count)]


def _read_numbers(cursor: _Cursor, kind: int, count: int) -> np.ndarray:
    if kind not in _NUMBERS:
        raise cursor.damaged(f"its header has a value of the unknown type {kind}")
    return np.frombuffer(cursor.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])


def _read_tensors(cursor: _Cursor, count: int, values: dict[str, Any]) -> dict[str, GgufTensor]:
    infos = [_read_info(cursor) for _ in range(count)]
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    data = end = _align(cursor.at, alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        start = _align(end, alignment)
        if name in tensors:
            raise cursor.damaged(f"its header has the tensor {name} twice")
        if data + offset != start:
            raise cursor.damaged(f"tensor {name} does not follow the tensor before it")
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        tensors[name] = GgufTensor(name, shape, kind, start, nbytes)
        end = start + nbytes
    if not end <= cursor.size <= _align(end, alignment):
        what = "is truncated" if cursor.size < end else "is damaged"
        raise RequestError(
            f"{cursor.path} {what}: it has {cursor.size} bytes; expected {end} by its header; "
            "copy or download it again"
        )
    return tensors


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GgmlType, int]:
    name, count = _read_name(cursor), cursor.integer(4)
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name} has {count} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(count))[::-1]
    number, offset = cursor.integer(4), cursor.integer(8)
    if number not in BY_VALUE:
        known = ", ".join(kind.name for kind in BY_VALUE.values())
        raise RequestError(
            f"{cursor.path}: tensor {name} has the ggml type {number}; expected one of {known}"
        )
    kind = BY_VALUE[number]
    if not all(shape) or not kind.fits(shape[-1]):
        raise cursor.damaged(f"tensor {name} cannot be {kind.name} in the shape {list(shape)}")
    return name, shape, kind, offset


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
