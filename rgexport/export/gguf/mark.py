"""What a GGUF file's self-check found: a text of fixed width, written when the file is complete."""

import dataclasses
import json
import os
from pathlib import Path

from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.export.gguf import integrity
from rgexport.export.typed_json import Mismatch, Reader, parse, plain
from rgexport.quantize.gguf_header import GgufHeader, read_header

WIDTH = 1024
"""Bytes of the text, filled up with blanks."""
_STORED_ANEW = skipped("another tool stored its tensors anew")


def mark_text(record: CheckRecord) -> str:
    """ASCII of `WIDTH` bytes; a reason that is too long is cut."""
    text = json.dumps(plain(record))
    reason = record.reason
    while len(text) > WIDTH:
        reason = reason[: 3 * len(reason) // 4]
        text = json.dumps(plain(dataclasses.replace(record, reason=f"{reason}...")))
    return text.ljust(WIDTH)


def read_mark(header: GgufHeader) -> CheckRecord:
    """What it says of the tensors that are in the file.

    It says nothing of those that another tool stored in other types: llama-quantize copies it.

    Raises:
        Mismatch: it cannot be read.
    """
    text = header.values.get(integrity.CHECK)
    if text is None:
        return NOT_ASKED_FOR
    try:
        record = Reader().read(CheckRecord, parse(text))
    except Mismatch as error:
        raise Mismatch(f"{integrity.CHECK}: {error}") from None
    return record if integrity.has_its_types(header) else _STORED_ANEW


def write_mark(path: Path, record: CheckRecord) -> None:
    """Puts it in its place in a complete file, and that on the disk."""
    _, stop = read_header(path).spans[integrity.CHECK]
    with path.open("r+b") as file:
        file.seek(stop - WIDTH)  # the text ends the span
        file.write(mark_text(record).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
