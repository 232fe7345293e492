"""Writes a reference file; see `reference_file` for what it holds."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.typed_json import plain
from rgexport.files.atomic import replace_file
from rgexport.griffin.safetensors_file import read_metadata
from rgexport.validate.reference.reference_file import DTYPE_NAMES, METADATA, Header


def is_reference(path: Path) -> bool:
    """Whether a file is a reference, by its metadata."""
    try:
        return METADATA in read_metadata(path)
    except RequestError:
        return False


def write_reference(
    path: Path, header: Header, arrays: Mapping[str, np.ndarray], *, force: bool = False
) -> None:
    """Writes the file, which appears when it is complete.

    Raises:
        RequestError: it exists and may not be replaced, or cannot be written.
    """
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    header = dataclasses.replace(header, data_sha256=digest.hexdigest())
    fields: dict[str, object] = {"__metadata__": {METADATA: json.dumps(plain(header))}}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        dtype, shape = DTYPE_NAMES[array.dtype], list(array.shape)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replace_file(path, force=force, replaceable=is_reference) as partial:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())
            file.flush()
            os.fsync(file.fileno())
