"""The hashes that a GGUF file holds of itself.

Three, because another tool may change a part and leave the rest: llama-quantize copies all
metadata but what speaks of types, and writes other tensors. So the metadata have a hash of their
own; and that of the data counts only as long as the tensors have the types that it was made for.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rgexport.quantize.gguf_header import GgufHeader, read_header

FILE_TYPE = "general.file_type"
DATA, METADATA, TYPES = (f"rgexport.{part}_sha256" for part in ("data", "metadata", "tensor_types"))
HASHES = DATA, METADATA, TYPES
CHECK = "rgexport.check"
"""What the self-check found, when all else was written; see `mark`."""
_UNKNOWN = "0" * 64

_OTHERS = {DATA, METADATA, TYPES, CHECK, FILE_TYPE, "general.quantization_version"}
_OTHERS_PREFIXES = ("split.", "quantize.imatrix.")


def metadata_sha256(header: GgufHeader) -> str:
    """Over all keys and values but the hashes and the self-check's, and what others set anew."""
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        for key, (start, stop) in header.spans.items():
            if key not in _OTHERS and not key.startswith(_OTHERS_PREFIXES):
                file.seek(start)
                digest.update(key.encode() + b"\0" + file.read(stop - start))
    return digest.hexdigest()


def types_sha256(tensors: Iterable[tuple[str, str]]) -> str:
    """Over the names and types of the tensors, in the file's order."""
    lines = "".join(f"{name} {kind}\n" for name, kind in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()


def has_its_types(header: GgufHeader) -> bool:
    """Whether the tensors have the types that the data's hash was made for."""
    kinds = ((name, tensor.type.name) for name, tensor in header.tensors.items())
    return bool(header.values.get(TYPES) == types_sha256(kinds))


def data_start(header: GgufHeader) -> int:
    """Where the data begin, which the data's hash covers to the end of the file."""
    return min(tensor.offset for tensor in header.tensors.values())


def placeholders(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key → hash for a file that is to be written, of which only the types are known."""
    return {DATA: _UNKNOWN, METADATA: _UNKNOWN, TYPES: types_sha256(tensors)}


def seal(path: Path, data_sha256: str) -> None:
    """Puts the hashes of a complete file in their places, and the file on the disk."""
    header = read_header(path)
    with path.open("r+b") as file:
        for key, digest in ((DATA, data_sha256), (METADATA, metadata_sha256(header))):
            file.seek(header.spans[key][1] - len(digest))  # the text ends the span
            file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())
