"""Reads the header of a GGUF file; every size in it is checked before it is used.

Format (ggml's gguf.md), little-endian: `GGUF`, version u32, number of tensors u64, number of
values u64; then the values (key, type u32, value), the tensors (name, number of dimensions u32,
dimensions u64 with the row length first, type u32, offset u64), padding, and the data.
A string is its length u64 and its bytes.

Why not `gguf.GGUFReader`: for a vocabulary of 256,000 it takes 700 MB and 10 s (here: 25 MB and
0.2 s), and it does not check sizes: an array of 2⁶² values never ends, and a string that is longer
than the file is cut.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import require_regular
from rgexport.griffin.tensor import DTYPES, RowTensor, file_rows
from rgexport.quantize.ggml_types import BY_VALUE, GgmlType

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
_FLOATS = {"f32": DTYPES["float32"], "f16": DTYPES["float16"], "bf16": DTYPES["bfloat16"]}
_MAX_DIMENSIONS, _MAX_NAME = 4, 127
"""ggml's names are shorter still."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it; `offset` counts from the start of the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    """As numpy has it: the length of a row comes last."""
    type: GgmlType
    offset: int
    nbytes: int

    def rows(self) -> RowTensor:
        """The tensor as it is stored: floats, or the bytes of quantized rows."""
        if dtype := _FLOATS.get(self.type.name):
            return file_rows(self.path, self.shape, dtype, self.offset)
        *lead, columns = self.shape
        shape = (*lead, self.type.row_bytes(columns))
        return file_rows(self.path, shape, np.dtype(np.uint8), self.offset)


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data of a GGUF file."""

    path: Path
    version: int
    values: dict[str, Any]
    """Key → number, bool, str, list of str, or numpy array, in the order of the file."""
    spans: dict[str, tuple[int, int]]
    """Key → begin and end of its type and value in the file."""
    tensors: dict[str, GgufTensor]
    """Name → tensor, in the order of the file."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, RequestError):
        return False


def read_header(path: Path) -> GgufHeader:
    """The values and tensors of a file.

    Raises:
        RequestError: the file cannot be read, is no GGUF file, or its header contradicts itself
            or the file's size.
    """
    with _opened(path) as cursor:
        return _read(cursor)


@contextmanager
def _opened(path: Path) -> Iterator["Cursor"]:
    try:
        size = require_regular(path)
        with path.open("rb") as file:
            yield Cursor(path, file, size, MAX_HEADER_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


class Cursor:
    """Reads a little-endian binary file of `size` bytes forward, up to byte `limit`."""

    def __init__(self, path: Path, file: BinaryIO, size: int, limit: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._file, self._limit = file, limit

    @property
    def left(self) -> int:
        """Bytes up to the end of the file."""
        return self.size - self.at

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            RequestError: see `require`.
        """
        self.require(count)
        taken = self._file.read(count)
        if len(taken) != count:
            raise RequestError(f"{self.path} was changed while it was read")
        self.at += count
        return taken

    def require(self, count: int) -> None:
        """Checks that `count` more bytes can be read.

        Raises:
            RequestError: the file ends before, the limit is exceeded, or `count` is negative.
        """
        if count < 0:
            raise self.damaged(f"it has a length of {count}")
        if self.at + count > self.size:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes, its contents "
                f"need {self.at + count} or more; copy or download it again"
            )
        if self.at + count > self._limit:
            raise self.damaged(f"it would have to be read beyond byte {self._limit}")

    def integer(self, nbytes: int, *, signed: bool = False) -> int:
        """An integer of so many bytes."""
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` numbers."""
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def text(self, nbytes: int) -> str:
        """A UTF-8 string of so many bytes."""
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError:
            raise self.damaged("a string in it is not UTF-8") from None

    def damaged(self, what: str) -> RequestError:
        """The error for contents that contradict themselves."""
        return RequestError(f"{self.path} is damaged: {what}; copy or download it again")


@dataclass(frozen=True)
class _Values:
    """What comes before the tensors, and how many there are; see `GgufHeader`."""

    version: int
    num_tensors: int
    values: dict[str, Any]
    spans: dict[str, tuple[int, int]]


def _read(cursor: Cursor) -> GgufHeader:
    start = _read_values(cursor)
    infos = [_read_info(cursor) for _ in range(start.num_tensors)]
    tensors = _place(cursor, infos, _alignment(cursor, start.values))
    return GgufHeader(cursor.path, start.version, start.values, start.spans, tensors)


def _read_values(cursor: Cursor) -> _Values:
    version = _read_version(cursor)
    num_tensors, num_values = cursor.integer(8), cursor.integer(8)
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(num_values):
        key, start = _name(cursor), cursor.at
        if key in values:
            raise cursor.damaged(f"its header has {key} twice")
        values[key] = _value(cursor, cursor.integer(4))
        spans[key] = start, cursor.at
    return _Values(version, num_tensors, values, spans)


def _name(cursor: Cursor) -> str:
    length = cursor.integer(8)
    if length > _MAX_NAME:
        raise cursor.damaged(f"a name in its header is {length} bytes long")
    name = cursor.text(length)
    if not name.isprintable():
        raise cursor.damaged(f"its header has the name {name!r}")
    return name


def _value(cursor: Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text(cursor.integer(8))
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1)[0].item()
    kind, count = cursor.integer(4), cursor.integer(8)
    if kind != _STRING:
        return _numbers(cursor, kind, count)
    cursor.require(8 * count)
    return [cursor.text(cursor.integer(8)) for _ in range(count)]


def _numbers(cursor: Cursor, kind: int, count: int) -> np.ndarray:
    if kind not in _NUMBERS:
        raise cursor.damaged(f"its header has a value of the unknown type {kind}")
    return cursor.array(_NUMBERS[kind], count)


def _read_version(cursor: Cursor) -> int:
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


def _alignment(cursor: Cursor, values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


_Info = tuple[str, tuple[int, ...], GgmlType, int]


def _read_info(cursor: Cursor) -> _Info:
    """Name, shape, type and offset in the data of one tensor."""
    name, count = _name(cursor), cursor.integer(4)
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


def _place(cursor: Cursor, infos: list[_Info], alignment: int) -> dict[str, GgufTensor]:
    """The tensors, which must follow each other without gaps up to the end of the file."""
    data = _align(cursor.at, alignment)
    end, tensors = data, dict[str, GgufTensor]()
    for name, shape, kind, offset in infos:
        start = _align(end, alignment)
        if name in tensors:
            raise cursor.damaged(f"its header has the tensor {name} twice")
        if data + offset != start:
            raise cursor.damaged(f"tensor {name} does not follow the tensor before it")
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        tensors[name] = GgufTensor(cursor.path, name, shape, kind, start, nbytes)
        end = start + nbytes
    if not end <= cursor.size <= _align(end, alignment):
        what = "is truncated" if cursor.size < end else "is damaged"
        raise RequestError(
            f"{cursor.path} {what}: it has {cursor.size} bytes; expected {end} by its header; "
            "copy or download it again"
        )
    return tensors


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
