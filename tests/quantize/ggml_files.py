"""Small files as llama.cpp's programs read them, written by gguf-py."""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_imatrix(path: Path, importances: Mapping[str, np.ndarray], count: int = 4) -> None:
    """As llama-imatrix does after `count` tokens: name → mean squares [columns]."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in importances.items():
        writer.add_tensor(f"{name}.in_sum2", (values * np.float32(count))[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    write_tensors(writer, {})


def legacy_imatrix(entries: Mapping[str, tuple[int, np.ndarray]], end: bytes = b"") -> bytes:
    """The older format: name → number of calls, and values summed over them."""
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", calls, len(values)) + values.astype("<f4").tobytes()
    return content + end


def write_tensors(writer: gguf.GGUFWriter, arrays: Mapping[str, np.ndarray]) -> None:
    """Completes a file."""
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
