"""The headers of safetensors files, read strictly and written.

Format: 8 bytes little-endian header length, a JSON header `{name: {"dtype": …, "shape": […],
"data_offsets": [begin, end]}}`, then the data without gaps. (`safetensors.safe_open` drops one of
two tensors with the same name, blocks on a pipe, and maps the file, see `griffin.tensor`.)
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import report_os_errors, require_regular
from rgexport.files.typed_json import Between, Mismatch, from_json, parse_json

MAX_HEADER_BYTES = 16 << 20
"""A hundred times the header of a 9B; parsed JSON takes up to twenty times its size."""

MAX_RANK = 16
"""Axes of a tensor: no model has more than four."""

FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Safetensors' names of the dtypes that weights may have."""

DTYPES = FLOATS | {
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
"""Safetensors' names of the dtypes that we write."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ITEM_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
_MAX_BITS = 1 << 62
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs"
_Size = Annotated[int, Between(0, _MAX_BITS - 1)]


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `offset` counts from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Fields:
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def read_header(path: Path, gaps: list[str] | None = None) -> dict[str, Entry]:
    """Returns the tensors by name, in the order of their data; RequestError for contradictions.

    Gaps in front of a tensor are described in `gaps`, if that is given.
    """
    text, size = _read_text(path)
    data, tensors = 8 + len(text), _parse(path, text)[0]
    entries = [(name, _entry(path, name, fields, data)) for name, fields in tensors.items()]
    entries.sort(key=lambda named: (named[1].offset, named[1].nbytes))
    _check_extents(path, entries, data, size, gaps)
    return dict(entries)


def read_metadata(path: Path) -> dict[str, str]:
    return _parse(path, _read_text(path)[0])[1]


def has_metadata(key: str, path: Path) -> bool:
    try:
        return key in read_metadata(path)
    except RequestError:
        return False


def header(
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Returns the length and the header of a file with arrays (name → dtype and shape)."""
    fields: dict[str, object] = {_METADATA: dict(metadata)}
    start = 0
    for name, (dtype, shape) in arrays.items():
        end = start + dtype.itemsize * math.prod(shape)
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _read_text(path: Path) -> tuple[bytes, int]:
    with report_os_errors(path):
        size = require_regular(path)
        with path.open("rb") as file:
            prefix = file.read(32)
            length = int.from_bytes(prefix[:8], "little")
            _check_prefix(path, prefix, length, size)
            file.seek(8)
            return file.read(length), size


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
    """Returns the entry for each tensor, and the metadata; as strict as the reference reader."""
    try:
        fields = parse_json(text)
    except Mismatch as error:
        raise RequestError(f"{path} is damaged: its header is {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"{path} is damaged: its header is not a JSON object")
    try:
        metadata = fields.pop(_METADATA, None)
        metadata = {} if metadata is None else from_json(dict[str, str], metadata)
    except Mismatch:
        raise RequestError(f"{path} is damaged: its {_METADATA} is no object of texts") from None
    return fields, metadata


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    shape = value.get("shape") if isinstance(value, dict) else None
    if isinstance(shape, list) and len(shape) > MAX_RANK:  # before each number is read
        raise RequestError(f"{path} is damaged: tensor {name} has {len(shape)} axes")
    try:
        fields = from_json(_Fields, value)
    except Mismatch as error:
        raise RequestError(f"{path} is damaged: in the header of tensor {name}, {error}") from None
    dtype, (begin, end) = fields.dtype, fields.data_offsets
    if dtype not in _ITEM_BITS:
        raise RequestError(f"{path}: tensor {name} has the unknown dtype {reprlib.repr(dtype)}")
    bits = _ITEM_BITS[dtype] * math.prod(max(size, 1) for size in fields.shape)
    if bits >= _MAX_BITS or bits % 8:
        raise RequestError(
            f"{path} is damaged: tensor {name} cannot be {dtype} in the shape "
            f"{reprlib.repr(list(fields.shape))}"
        )
    nbytes = 0 if 0 in fields.shape else bits // 8
    if end - begin != nbytes:
        raise RequestError(
            f"{path} is damaged: tensor {name} ({dtype} {list(fields.shape)}) spans "
            f"{end - begin} bytes; expected {nbytes}"
        )
    return Entry(path, dtype, fields.shape, data + begin, nbytes)


def _check_extents(
    path: Path, entries: list[tuple[str, Entry]], data: int, size: int, gaps: list[str] | None
) -> None:
    """Checks that the data follow the header without overlaps and gaps, to the end of the file."""
    expected = data
    for name, entry in entries:
        gap = entry.offset - expected
        if gap < 0 or (gap and gaps is None):
            what = "overlaps the tensor before it" if gap < 0 else f"leaves a gap of {gap} bytes"
            raise RequestError(f"{path} is damaged: tensor {name} {what}")
        if gap and gaps is not None:
            gaps.append(f"{gap} bytes of {path.name}, in front of {name}, belong to no tensor")
        expected = entry.offset + entry.nbytes
    if expected != size:
        what = "is truncated" if expected > size else "is damaged"
        raise RequestError(
            f"{path} {what}: it has {size} bytes; expected {expected} by its header; "
            "copy or download it again"
        )
