"""A weight file, MIL's blob format of version 2, read where it is asked for.

Little-endian: 64 bytes at the start (number of blobs u32, version u32), and 64 before each blob:
`0xDEADBEEF` u32, dtype u32, bytes u64, where they start u64, unused bits at their end u64.
Elements of fewer than 8 bits are packed, the lowest bits first.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.mil.program import BITS, TensorType
from rgexport.griffin.file_rows import read_lines

SENTINEL, VERSION = 0xDEADBEEF, 2
HEADER_BYTES = 64
"""Of the file, and of each blob."""

BLOB_TYPES: dict[int, str] = {
    **{1: "float16", 2: "float32", 3: "uint8", 4: "int8", 5: "bfloat16", 6: "int16", 7: "uint16"},
    **{8: "int4", 9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32"},
    **{15: "uint32", 16: "float8e4m3fn", 17: "float8e5m2"},
}
"""The number of a dtype in a blob's header → its name."""

_FILE, _BLOB = struct.Struct("<II"), struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class BlobHeader:
    """What stands before a blob, as it is; `BlobFile.blob` says whether it can be true."""

    sentinel: int
    type_number: int
    nbytes: int
    data_offset: int
    padding_bits: int

    @property
    def dtype(self) -> str:
        """The name of the dtype, or what says that there is none."""
        return BLOB_TYPES.get(self.type_number, f"type {self.type_number}")


@dataclass(frozen=True)
class Blob:
    """A tensor of a weight file, whose header has been checked; `offset` is that of its data."""

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
    """A weight file of `size` bytes that says that it has `count` blobs."""

    path: Path
    size: int
    count: int

    @classmethod
    def open(cls, path: Path) -> "BlobFile":
        """Reads the head of the file, and nothing more.

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
        count, version = _FILE.unpack_from(head)
        if version != VERSION:
            raise RequestError(
                f"{path} is damaged: a weight file of version {version}; expected {VERSION}"
            )
        return cls(path, size, count)

    def header(self, offset: int) -> BlobHeader:
        """What stands at `offset`, unchecked.

        Raises:
            RequestError: it would lie outside of the file.
        """
        if not 0 < offset <= self.size - HEADER_BYTES:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes, and a blob's "
                f"header should lie at {offset}"
            )
        out = np.empty((1, HEADER_BYTES), np.uint8)
        read_lines(self.path, offset, 0, out)
        return BlobHeader(*_BLOB.unpack_from(out.tobytes()))

    def complaints(self, offset: int, type: TensorType) -> list[str]:
        """What is wrong with the blob whose header lies at `offset`, if it should be `type`."""
        try:
            header = self.header(offset)
        except RequestError as error:
            return [str(error)]
        if header.sentinel != SENTINEL:
            return [f"there is no blob at offset {offset}"]
        found = []
        if header.dtype != type.dtype:
            found.append(f"the blob at {offset} holds {header.dtype}; expected {type.dtype}")
        elif header.nbytes != type.nbytes:
            found.append(
                f"the blob at {offset} has {header.nbytes} bytes; {type} needs {type.nbytes}"
            )
        elif header.padding_bits != 8 * type.nbytes - type.size * BITS[type.dtype]:
            found.append(f"the blob at {offset} has {header.padding_bits} unused bits")
        if header.data_offset != offset + HEADER_BYTES:
            found.append(f"the data of the blob at {offset} begin at {header.data_offset}")
        elif header.data_offset + header.nbytes > self.size:
            found.append(
                f"the blob at {offset} ends at {header.data_offset + header.nbytes}, "
                f"beyond the {self.size} bytes of the file"
            )
        return found

    def blob(self, offset: int, type: TensorType) -> Blob:
        """The blob whose header lies at `offset`, of the type that the program gives it.

        Raises:
            RequestError: the header says otherwise, or it does not fit into the file.
        """
        if found := self.complaints(offset, type):
            raise RequestError(f"{self.path} is damaged: {found[0]}")
        return Blob(self.path, type, offset + HEADER_BYTES)
