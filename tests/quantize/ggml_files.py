"""Small files as llama.cpp's programs read them, written by gguf-py."""

import gguf
import numpy as np


def write_imatrix(path, importances, count=4):
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


def write_tensors(writer, arrays):
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
