"""Writes a GGUF file as a stream: the header with gguf-py, then every tensor slab by slab."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from rgexport.export.gguf import integrity
from rgexport.export.gguf.metadata import Value
from rgexport.export.gguf.naming import ARCHITECTURE, FileTensor
from rgexport.export.gguf.options import Choice
from rgexport.export.storage import SLAB_BYTES, aligned, in_order
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance
from rgexport.quantize.algorithms import Statistics, encode
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.gguf_header import ALIGNMENT
from rgexport.quantize.scheme import Ggml


def data_bytes(choice: Choice) -> int:
    """Bytes of the tensors' data in the file, padding included."""
    sizes = (_tensor_bytes(tensor, choice.types[tensor.name]) for tensor in choice.tensors)
    return sum(aligned(size, ALIGNMENT) for size in sizes)


def _tensor_bytes(tensor: FileTensor, kind: str) -> int:
    *lead, columns = tensor.shape
    return math.prod(lead) * TYPES[kind].row_bytes(columns)


def write_file(
    path: Path,
    values: Iterable[Value],
    choice: Choice,
    weights: WeightSource,
    advance: Advance = lambda done: None,
) -> str:
    """Writes and syncs the file, in memory of a few slabs; returns the SHA-256 of the data.

    Args:
        path: overwritten if it exists.
        values: all metadata, with the hashes of `integrity.placeholders`.
        choice: the tensors and their types.
        weights: by canonical name.
        advance: called with the number of source bytes done.

    Raises:
        RequestError: a weight that its type cannot hold, or no ggml to quantize with.
        OSError: the disk is full, or the file cannot be written.
    """
    _write_header(path, values, choice)
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for stored, source_bytes in in_order(_jobs(choice, weights)):
            file.write(stored)
            digest.update(stored)
            advance(source_bytes)
    integrity.seal(path, digest.hexdigest())
    return digest.hexdigest()


def _write_header(path: Path, values: Iterable[Value], choice: Choice) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    for value in values:
        _add(writer, value)
    for tensor in choice.tensors:
        kind = choice.types[tensor.name]
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # ignored: there is a `raw_dtype`
            _tensor_bytes(tensor, kind),
            raw_dtype=GGMLQuantizationType(TYPES[kind].value),
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: GGUFWriter, value: Value) -> None:
    if isinstance(value.value, list):
        writer.add_key_value(value.key, value.value, GGUFValueType.ARRAY, sub_type=value.kind)
    else:
        writer.add_key_value(value.key, value.value, value.kind)


def _jobs(choice: Choice, weights: WeightSource) -> Iterator[Callable[[], tuple[bytes, int]]]:
    """Jobs that make the slabs of the data, in order; see `_encode`."""
    for tensor in choice.tensors:
        kind, source = choice.types[tensor.name], weights[tensor.canonical]
        importance = choice.importances.get(tensor.name)
        statistics = None if importance is None else Statistics(importance)
        for start, stop in slab_bounds(source.shape[0], source.row_bytes, SLAB_BYTES):
            yield partial(_encode, tensor, source, start, stop, kind, statistics)


def _encode(
    tensor: FileTensor,
    source: RowTensor,
    start: int,
    stop: int,
    kind: str,
    statistics: Statistics | None,
) -> tuple[bytes, int]:
    """Rows as stored, with the padding after the last one; and how many bytes were read."""
    rows = source.read(start, stop)
    values = tensor.transform.store(rows.astype(np.float32, copy=False))
    values = values.reshape(-1, tensor.shape[-1])
    stored = encode(tensor.canonical, values, Ggml(kind), statistics)["data"].tobytes()
    last = stop == source.shape[0]
    return stored + bytes(-_tensor_bytes(tensor, kind) % ALIGNMENT * last), rows.nbytes
