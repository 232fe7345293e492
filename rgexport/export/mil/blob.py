"""Reads weight files: MIL's blob format, version 2.

Little-endian. The file's header has 64 bytes (number of blobs u32, version u32), and so has the
header before each blob: `0xDEADBEEF` u32, dtype u32, size in bytes u64, offset of the data u64,
unused bits at their end u64. Elements of fewer than 8 bits are packed, the lowest bits first.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.mil.program import TensorType
from rgexport.griffin.tensor import read_lines

HEADER_BYTES = 64
"""Of the file, and of each blob."""
_SENTINEL, _VERSION = 0xDEADBEEF, 2
_BLOB_TYPES: dict[int, str] = {
    **{1: "float16", 2: "float32", 3: "uint8", 4: "int8", 5: "bfloat16", 6: "int16", 7: "uint16"},
    **{8: "int4", 9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32"},
    **{15: "uint32", 16: "float8e4m3fn", 17: "float8e5m2"},
}
"""The number of a dtype in a blob's header → its name."""

_FILE, _BLOB = struct.Struct("<4xI"), struct.Struct("<IIQQ")


@dataclass(frozen=True)
class Blob:
    """A tensor in a weight file, its header checked; `offset` is where its data begin."""

    path: Path
    type: TensorType
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its bytes from `start` to `stop`, uint8.

        Raises:
            RequestError: the file has changed since it was opened.
        """
        out = np.empty((1, stop - start), np.uint8)
        read_lines(self.path, self.offset + start, 0, out)
        return out[0]


@dataclass(frozen=True)
class BlobFile:
    """A weight file of `size` bytes."""

    path: Path
    size: int

    @classmethod
    def open(cls, path: Path) -> "BlobFile":
        """Reads the file's header.

        Raises:
            RequestError: it is missing, or no weight file of version 2.
        """
        try:
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
            size = path.stat().st_size
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from None
        if len(head) < HEADER_BYTES:
            raise RequestError(f"{path} is truncated: it has {size} bytes, less than its header")
        (version,) = _FILE.unpack_from(head)
        if version != _VERSION:
            raise RequestError(
                f"{path} is damaged: a weight file of version {version}; expected {_VERSION}"
            )
        return cls(path, size)

    def blob(self, offset: int, type: TensorType) -> Blob:
        """The blob with its header at `offset` and the type that the program declares.

        Raises:
            RequestError: the header says otherwise, or the file is too short.
        """
        data_offset = offset + HEADER_BYTES
        if not 0 < offset <= self.size - HEADER_BYTES - type.nbytes:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes; expected "
                f"{type.nbytes} bytes of a weight at {data_offset}"
            )
        header = np.empty((1, HEADER_BYTES), np.uint8)
        read_lines(self.path, offset, 0, header)
        sentinel, number, nbytes, start = _BLOB.unpack_from(header.tobytes())
        if sentinel != _SENTINEL:
            raise RequestError(f"{self.path} is damaged: there is no weight at offset {offset}")
        dtype = _BLOB_TYPES.get(number, f"type {number}")
        if (dtype, nbytes, start) != (type.dtype, type.nbytes, data_offset):
            raise RequestError(
                f"{self.path} is damaged: its header at {offset} describes {nbytes} bytes of "
                f"{dtype} at {start}; the program needs {type.nbytes} of {type.dtype} at "
                f"{data_offset}"
            )
        return Blob(self.path, type, data_offset)
