"""Reads a safetensors file: a strictly checked header, and tensors in slabs of rows.

Format: 8 bytes little-endian header length, a JSON header
`{name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}}`, then the data without gaps.

Why not `safetensors.safe_open(…).get_slice(…)`: it drops one of two tensors with the same name,
blocks on a pipe, and maps the file (see `file_rows`).
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.regular_file import require_regular
from rgexport.griffin.file_rows import file_rows, transposed_rows
from rgexport.griffin.json_fields import strict_json
from rgexport.griffin.tensor import DTYPES, RowTensor

MAX_HEADER_BYTES = 16 << 20
"""A hundred times the header of a 9B; parsed JSON takes up to twenty times its size. The reference
implementation allows 100 MB."""

MAX_RANK = 16
"""Axes of a tensor: no model has more than four."""

FLOATS: dict[str, np.dtype] = {
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
}
"""Safetensors' names of the dtypes that weights may have."""

_ITEM_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `offset` counts from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self) -> RowTensor:
        """The tensor, for a float dtype and at least one axis."""
        return file_rows(self.path, self.shape, FLOATS[self.dtype], self.offset)

    def columns(self) -> RowTensor:
        """The transpose of a matrix of floats."""
        height, width = self.shape
        return transposed_rows(self.path, (height, width), FLOATS[self.dtype], self.offset)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order of their data.

    Raises:
        RequestError: the file is no safetensors file, or its header contradicts itself or
            the file's size.
    """
    text, size = _read_text(path)
    data = 8 + len(text)
    tensors, _ = _parse(path, text)
    entries = [_entry(path, name, fields, data) for name, fields in tensors.items()]
    entries.sort(key=lambda named: (named[1].offset, named[1].nbytes))
    _check_extents(path, entries, data, size)
    return dict(entries)


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a file: texts by name.

    Raises:
        RequestError: the file is no safetensors file, or its metadata are not texts.
    """
    return _parse(path, _read_text(path)[0])[1]


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the file's size."""
    try:
        size = require_regular(path)
        with path.open("rb") as file:
            prefix = file.read(32)
            length = int.from_bytes(prefix[:8], "little")
            _check_prefix(path, prefix, length, size)
            file.seek(8)
            return file.read(length), size
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _check_prefix(path: Path, prefix: bytes, length: int, size: int) -> None:
    if prefix.startswith(_LFS_POINTER):
        raise RequestError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    if size < 8 or prefix[8:9] != b"{":
        raise RequestError(f"{path} is not a safetensors file: it does not start with a header")
    if length > MAX_HEADER_BYTES:
        raise RequestError(
            f"{path} is not a safetensors file: its header would be {length} bytes long; "
            f"expected at most {MAX_HEADER_BYTES}"
        )
    if 8 + length > size:
        raise RequestError(
            f"{path} is truncated: it has {size} bytes, its header alone needs {8 + length}; "
            "copy or download it again"
        )


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entry for each tensor, and the metadata.

    As strict as the reference implementation, so that both see the same tensors.
    """
    try:
        header = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise RequestError(f"{path} is damaged: its header is not a JSON object")
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise RequestError(f"{path} is damaged: its {_METADATA} is no object of texts")
    return header, metadata


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _sizes(value: Any) -> list[int] | None:
    """`value` if it is a list of sizes."""
    return value if isinstance(value, list) and all(map(_is_size, value)) else None


def _entry(path: Path, name: str, fields: Any, data: int) -> tuple[str, Entry]:
    fields = fields if isinstance(fields, dict) else {}
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise RequestError(f"{path}: tensor {name} has the unknown dtype {reprlib.repr(dtype)}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise RequestError(
            f"{path} is damaged: the header of tensor {name} has no valid shape and data_offsets"
        )
    begin, end = offsets
    nbytes = _nbytes(shape, _ITEM_BITS[dtype])
    if nbytes is None:
        raise RequestError(
            f"{path} is damaged: tensor {name} cannot be {dtype} in the shape {reprlib.repr(shape)}"
        )
    if end - begin != nbytes:
        raise RequestError(
            f"{path} is damaged: tensor {name} ({dtype} {shape}) spans {end - begin} bytes; "
            f"expected {nbytes}"
        )
    return name, Entry(path, dtype, tuple(shape), data + begin, nbytes)


def _nbytes(shape: list[int], item_bits: int) -> int | None:
    """The bytes of a tensor; None if it has too many axes or elements, or ends within a byte."""
    if len(shape) > MAX_RANK:
        return None
    bits = item_bits
    for size in shape:
        bits *= max(size, 1)
        if bits >= 1 << 62:
            return None
    return None if bits % 8 else 0 if 0 in shape else bits // 8


def _check_extents(path: Path, entries: list[tuple[str, Entry]], data: int, size: int) -> None:
    """The data must follow the header without overlaps and gaps, to the end of the file."""
    expected = data
    for name, entry in entries:
        if entry.offset != expected:
            what = "overlaps" if entry.offset < expected else "leaves a gap after"
            raise RequestError(f"{path} is damaged: tensor {name} {what} the tensor before it")
        expected += entry.nbytes
    if expected != size:
        what = "is truncated" if expected > size else "is damaged"
        raise RequestError(
            f"{path} {what}: it has {size} bytes; expected {expected} by its header; "
            "copy or download it again"
        )
