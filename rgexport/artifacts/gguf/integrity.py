"""Reads and writes the manifest, hashes and self-check in a GGUF file's metadata.

llama-quantize copies all metadata except those about types, and writes other tensors. So metadata
have a hash of their own, and the hash of the data counts only for the types that it was made for.
The check's text of fixed width is outside of the hashes, and is written last.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rgexport.artifacts.manifest import FORMAT_VERSION, NOT_ASKED_FOR, CheckRecord, Source, skipped
from rgexport.artifacts.manifest_reader import check_config
from rgexport.files.typed_json import Mismatch, from_json, parse_json, to_json
from rgexport.griffin.config import NOTHING_ASKED_FOR, AskedFor, GriffinConfig
from rgexport.quantize.gguf_header import GgufHeader, read_header

MANIFEST_KEY = "rgexport.manifest"
FILE_TYPE = "general.file_type"
DATA, METADATA, TYPES = (f"rgexport.{part}_sha256" for part in ("data", "metadata", "tensor_types"))
CHECK = "rgexport.check"
CHECK_WIDTH = 1024  # bytes of the check's text, padded with spaces
_NOT_HASHED = {DATA, METADATA, TYPES, CHECK, FILE_TYPE, "general.quantization_version"}
_PREFIXES_NOT_HASHED = ("split.", "quantize.imatrix.")


@dataclass(frozen=True, kw_only=True)
class EmbeddedManifest:
    """The fields of `Manifest` in the metadata, which hold when another tool quantizes the file."""

    format_version: int = FORMAT_VERSION
    kind: Literal["gguf"] = "gguf"
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    instruction_tuned: bool | None
    asked_for: AskedFor = NOTHING_ASKED_FOR


def read_embedded(text: str) -> EmbeddedManifest:
    fields = parse_json(text)
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise Mismatch(f"its format version is {version}; this rgexport reads {FORMAT_VERSION}")
    embedded = from_json(EmbeddedManifest, fields)
    check_config(embedded.config)
    return embedded


def metadata_sha256(header: GgufHeader) -> str:
    """Hashes all keys and values except the hashes, the check, and those that other tools set."""
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        for key, (start, stop) in header.spans.items():
            if key not in _NOT_HASHED and not key.startswith(_PREFIXES_NOT_HASHED):
                file.seek(start)
                digest.update(key.encode() + b"\0" + file.read(stop - start))
    return digest.hexdigest()


def types_sha256(tensors: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"{name} {kind}\n" for name, kind in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()


def has_original_types(header: GgufHeader) -> bool:
    kinds = ((name, tensor.type.name) for name, tensor in header.tensors.items())
    return bool(header.values.get(TYPES) == types_sha256(kinds))


def data_start(header: GgufHeader) -> int:
    """Returns the offset of the data; their hash covers the file from it to the end."""
    return min(tensor.offset for tensor in header.tensors.values())


def placeholders(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    hashes = {DATA: "0" * 64, METADATA: "0" * 64, TYPES: types_sha256(tensors)}
    return hashes | {CHECK: check_text(NOT_ASKED_FOR)}


def seal(path: Path, data_sha256: str) -> None:
    header = read_header(path)
    _overwrite(header, {DATA: data_sha256, METADATA: metadata_sha256(header)})


def write_check(path: Path, record: CheckRecord) -> None:
    _overwrite(read_header(path), {CHECK: check_text(record)})


def check_text(record: CheckRecord) -> str:
    """Formats a check as ASCII of `CHECK_WIDTH` bytes; a reason that is too long is cut."""
    text, reason = json.dumps(to_json(record)), record.reason
    while len(text) > CHECK_WIDTH:
        reason = reason[: 3 * len(reason) // 4]
        text = json.dumps(to_json(dataclasses.replace(record, reason=f"{reason}...")))
    return text.ljust(CHECK_WIDTH)


def read_check(header: GgufHeader) -> CheckRecord:
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
    with header.path.open("r+b") as file:
        for key, text in texts.items():
            file.seek(header.spans[key][1] - len(text))  # the text ends the span
            file.write(text.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
