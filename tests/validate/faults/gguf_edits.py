"""Faults in a GGUF file: wrong metadata, wrong tensors; its hashes are made to fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rgexport.export.gguf.integrity import data_start, seal
from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.files.hashing import hash_file
from rgexport.quantize.gguf_header import read_header

Edit = Callable[[Path], None]


def with_number(key: str, value: float) -> Edit:
    """Sets a number of the architecture's metadata, in the type that it has."""

    def edit(path: Path) -> None:
        _, stop = read_header(path).spans[f"{ARCHITECTURE}.{key}"]
        dtype = np.dtype("<u4" if isinstance(value, int) else "<f4")
        _overwrite(path, stop - dtype.itemsize, np.array(value, dtype))

    return edit


def scaled(name: str, gain: float) -> Edit:
    """Multiplies a tensor: all of it in f32, its float16 scales in q4_0 and q8_0."""

    def edit(path: Path) -> None:
        tensor = read_header(path).tensors[name]
        rows = tensor.rows().whole()
        if tensor.type.name == "f32":
            return _overwrite(path, tensor.offset, rows * np.float32(gain))
        blocks = rows.reshape(-1, _BLOCK_BYTES[tensor.type.name]).copy()
        scales = blocks[:, :2].copy().view(np.float16) * np.float16(gain)
        blocks[:, :2] = scales.view(np.uint8)
        return _overwrite(path, tensor.offset, blocks)

    return edit


_BLOCK_BYTES = {"q4_0": 2 + 16, "q8_0": 2 + 32}
"""Type → bytes of a block, which begins with its scale."""


def with_transposed_block(name: str) -> Edit:
    """Transposes the first block of a gate, [heads, block, block] float32."""

    def edit(path: Path) -> None:
        tensor = read_header(path).tensors[name]
        blocks = tensor.rows().whole()
        blocks[0] = blocks[0].T.copy()
        _overwrite(path, tensor.offset, blocks)

    return edit


def _overwrite(path: Path, offset: int, array: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(array.tobytes())
    seal(path, hash_file(path, start=data_start(read_header(path))).sha256)
