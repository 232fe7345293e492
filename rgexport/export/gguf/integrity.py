"""What a GGUF file says of itself: three hashes, and what the export's self-check found.

Another tool may change one part and keep the rest: llama-quantize copies all metadata except those
about types, and writes other tensors. So the metadata have a hash of their own, and the hash of the
data counts only while the tensors have the types that it was made for. The check's result is a text
of fixed width outside of the hashes, written when the file is otherwise complete.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.files.typed_json import Mismatch, from_json, parse_json, to_json
from rgexport.quantize.gguf_header import GgufHeader, read_header

FILE_TYPE = "general.file_type"
DATA, METADATA, TYPES = (f"rgexport.{part}_sha256" for part in ("data", "metadata", "tensor_types"))
HASHES = DATA, METADATA, TYPES
CHECK = "rgexport.check"
CHECK_WIDTH = 1024
"""Bytes of the check's text, padded with spaces."""
_UNKNOWN = "0" * 64
_NOT_HASHED = {DATA, METADATA, TYPES, CHECK, FILE_TYPE, "general.quantization_version"}
_PREFIXES_NOT_HASHED = ("split.", "quantize.imatrix.")


def metadata_sha256(header: GgufHeader) -> str:
    """Over all keys and values except the hashes, the check, and what other tools set anew."""
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        for key, (start, stop) in header.spans.items():
            if key not in _NOT_HASHED and not key.startswith(_PREFIXES_NOT_HASHED):
                file.seek(start)
                digest.update(key.encode() + b"\0" + file.read(stop - start))
    return digest.hexdigest()


def types_sha256(tensors: Iterable[tuple[str, str]]) -> str:
    """Over the names and types of the tensors, in the file's order."""
    lines = "".join(f"{name} {kind}\n" for name, kind in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()


def has_original_types(header: GgufHeader) -> bool:
    """Whether the tensors have the types that the data's hash was made for."""
    kinds = ((name, tensor.type.name) for name, tensor in header.tensors.items())
    return bool(header.values.get(TYPES) == types_sha256(kinds))


def data_start(header: GgufHeader) -> int:
    """The offset of the data; their hash covers the file from there to its end."""
    return min(tensor.offset for tensor in header.tensors.values())


def placeholders(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key → text for a file that is not written yet, from the names and types of its tensors."""
    hashes = {DATA: _UNKNOWN, METADATA: _UNKNOWN, TYPES: types_sha256(tensors)}
    return hashes | {CHECK: check_text(NOT_ASKED_FOR)}


def seal(path: Path, data_sha256: str) -> None:
    """Replaces the placeholders of a complete file's hashes, and syncs the file."""
    header = read_header(path)
    _overwrite(header, {DATA: data_sha256, METADATA: metadata_sha256(header)})


def write_check(path: Path, record: CheckRecord) -> None:
    """Replaces the check of a complete file, and syncs the file."""
    _overwrite(read_header(path), {CHECK: check_text(record)})


def check_text(record: CheckRecord) -> str:
    """ASCII of `CHECK_WIDTH` bytes; a reason that is too long is cut."""
    text, reason = json.dumps(to_json(record)), record.reason
    while len(text) > CHECK_WIDTH:
        reason = reason[: 3 * len(reason) // 4]
        text = json.dumps(to_json(dataclasses.replace(record, reason=f"{reason}...")))
    return text.ljust(CHECK_WIDTH)


def read_check(header: GgufHeader) -> CheckRecord:
    """The check of the tensors that are in the file; llama-quantize copies it beside others.

    Raises:
        Mismatch: it cannot be read.
    """
    if CHECK not in header.values:
        return NOT_ASKED_FOR
    try:
        record = from_json(CheckRecord, parse_json(header.values[CHECK]))
    except Mismatch as error:
        raise Mismatch(f"{CHECK}: {error}") from None
    if not has_original_types(header):
        return skipped("another tool stored its tensors in other types")
    return record


def _overwrite(header: GgufHeader, texts: Mapping[str, str]) -> None:
    """Replaces values by others of the same length."""
    with header.path.open("r+b") as file:
        for key, text in texts.items():
            file.seek(header.spans[key][1] - len(text))  # the text ends the span
            file.write(text.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
