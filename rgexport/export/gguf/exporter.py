"""Exports a checkpoint to a GGUF file: the header with gguf-py, then every tensor by slabs."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf import GGUFValueType as Kind

from rgexport.export.checked import SelfCheck
from rgexport.export.gguf import integrity
from rgexport.export.gguf.artifact import ALGORITHMS_KEY, algorithms_text
from rgexport.export.gguf.metadata import KeyValue, metadata
from rgexport.export.gguf.naming import ARCHITECTURE, FileTensor
from rgexport.export.gguf.options import GgufOptions, GgufStorage
from rgexport.export.gguf.vocabulary import read_vocabulary
from rgexport.export.storage import aligned, in_order, slab_bytes
from rgexport.files.hashing import remember_hashes
from rgexport.files.targets import check_file_target, replace_file, require_free_disk
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance, expect_stages, group, note, task, warn
from rgexport.quantize.ggml_library import load_library
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.gguf_header import ALIGNMENT, is_gguf, read_header
from rgexport.quantize.scheme import Ggml
from rgexport.quantize.statistics import Known, Statistics, StatisticsOf, no_statistics

QUANTIZATION_VERSION = 2
"""ggml.h's `GGML_QNT_VERSION`."""
_HEADER_BYTES = 32 << 20
"""Upper bound of the header: a vocabulary of 256k takes 7 MB."""
Job = Callable[[], tuple[bytes, int]]
"""Encodes a slab; returns its bytes, and the number of bytes of weights that were read."""


def default_target(model: str, file_type: str) -> Path:
    """Returns the file for an export without `-o`, such as `./recurrentgemma-2b-Q4_K_M.gguf`."""
    return Path(f"{model}-{file_type.upper()}.gguf")


def export_gguf(
    checkpoint: Checkpoint,
    options: GgufOptions,
    target: Path,
    *,
    force: bool = False,
    check: SelfCheck | None = None,
    statistics: StatisticsOf = no_statistics,
) -> Path:
    """Exports `checkpoint` to the file `target`, which appears when it is complete.

    Peak memory does not depend on the model's size: weights are read, quantized and written in
    slabs of a few MB. `check` runs the complete file, and takes memory of its own. `statistics` are
    for algorithms that need them.

    Raises:
        RequestError: an unsound checkpoint (all problems at once), a target that exists or
            cannot be written, too little disk, an option that does not fit, or no ggml to
            quantize with.
    """
    check_file_target(target, force=force, replaceable=is_gguf)
    storage = options.choose(checkpoint.config)
    _announce(storage)
    if any(TYPES[kind].is_quantized for kind in storage.types.values()):
        load_library()  # fails before any work is done
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
    if vocabulary is None:
        warn(f"{checkpoint.name} has no tokenizer: the file will take token ids, not text")
    require_free_disk(target.resolve().parent, _data_bytes(storage) + _HEADER_BYTES)
    expect_stages(2 if check is None else 3)
    hashes = require_sound(checkpoint)

    values = [*metadata(checkpoint, hashes, vocabulary), *_values_of_types(storage)]
    total = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    with replace_file(target, force=force, replaceable=is_gguf) as unfinished:
        with task("Writing the weights", total) as advance:
            jobs = _jobs(storage, checkpoint.weights, statistics)
            digest = _write_file(unfinished, values, storage, jobs, advance)
        start = integrity.data_start(read_header(unfinished))
        if check is not None:
            remember_hashes({unfinished: digest}, start=start)
            with group("Self-check"):
                record = check(unfinished)
            integrity.write_check(unfinished, record)
    remember_hashes({target: digest}, start=start)
    return target


def _announce(storage: GgufStorage) -> None:
    """Notes the tensors that get another type because their rows are no whole number of blocks."""
    default = storage.file_type.default
    unfit = [
        tensor.name
        for tensor in storage.tensors
        if tensor.quantizable and not TYPES[default].fits(tensor.shape[-1])
    ]
    if unfit:
        note(
            f"{len(unfit)} tensors have rows that {default} does not fit, such as {unfit[0]}; "
            f"they are stored in another type, as llama-quantize does ({storage.types[unfit[0]]})"
        )


def _values_of_types(storage: GgufStorage) -> Iterator[KeyValue]:
    """Yields the values that depend on the types: last, where llama-quantize appends them."""
    types = ((tensor.name, storage.types[tensor.name]) for tensor in storage.tensors)
    for key, text in integrity.placeholders(types).items():
        yield KeyValue(key, text, Kind.STRING)
    if text := algorithms_text(storage.schemes):
        yield KeyValue(ALGORITHMS_KEY, text, Kind.STRING)
    yield KeyValue("general.quantization_version", QUANTIZATION_VERSION, Kind.UINT32)
    yield KeyValue(integrity.FILE_TYPE, storage.file_type.value, Kind.UINT32)
    for key, value in (storage.imatrix.metadata() if storage.imatrix else {}).items():
        yield KeyValue(key, value, Kind.STRING if isinstance(value, str) else Kind.UINT32)


def _data_bytes(storage: GgufStorage) -> int:
    sizes = (_tensor_bytes(tensor, storage.types[tensor.name]) for tensor in storage.tensors)
    return sum(aligned(size, ALIGNMENT) for size in sizes)


def _tensor_bytes(tensor: FileTensor, kind: str) -> int:
    *lead, columns = tensor.shape
    return math.prod(lead) * TYPES[kind].row_bytes(columns)


def _write_file(
    path: Path,
    values: Iterable[KeyValue],
    storage: GgufStorage,
    jobs: Iterable[Job],
    advance: Advance,
) -> str:
    """Writes and syncs the file, in memory of a few slabs; returns the SHA-256 of the data."""
    _write_header(path, values, storage)
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for stored, source_bytes in in_order(jobs):
            file.write(stored)
            digest.update(stored)
            advance(source_bytes)
    integrity.seal(path, digest.hexdigest())
    return digest.hexdigest()


def _write_header(path: Path, values: Iterable[KeyValue], storage: GgufStorage) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    for value in values:
        kinds = (Kind.ARRAY, value.kind) if isinstance(value.value, list) else (value.kind, None)
        writer.add_key_value(value.key, value.value, *kinds)
    for tensor in storage.tensors:
        kind = storage.types[tensor.name]
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


def _jobs(storage: GgufStorage, weights: WeightSource, statistics: StatisticsOf) -> Iterator[Job]:
    """Yields jobs that encode the slabs of the data, in order."""
    for tensor in storage.tensors:
        scheme, source = storage.schemes[tensor.name], weights[tensor.canonical]
        known = _statistics(tensor, storage, statistics)
        for start, stop in slab_bounds(source.shape[0], source.row_bytes, slab_bytes(scheme)):
            yield partial(_encode, tensor, source, start, stop, scheme, known)


def _statistics(tensor: FileTensor, storage: GgufStorage, statistics: StatisticsOf) -> Known:
    """Returns a tensor's statistics from the importance matrix, or else from `statistics`.

    Both are of columns as they are stored: no transform moves those of a matrix.
    """
    if not TYPES[storage.types[tensor.name]].is_quantized:
        return None
    if storage.imatrix is None:
        return statistics(tensor.canonical)
    importance = storage.importances.get(tensor.name)
    return None if importance is None else Statistics(importance)


def _encode(
    tensor: FileTensor,
    source: RowTensor,
    start: int,
    stop: int,
    scheme: Ggml,
    statistics: Known,
) -> tuple[bytes, int]:
    """Encodes rows, with the padding after the last one; also returns the bytes read."""
    rows = source.read(start, stop)
    values = tensor.transform.store(rows.astype(np.float32, copy=False))
    values = values.reshape(-1, tensor.shape[-1])
    ids = np.arange(start, stop)
    stored = scheme.encode(tensor.canonical, values, statistics, ids)["data"].tobytes()
    last = stop == source.shape[0]
    return stored + bytes(-_tensor_bytes(tensor, scheme.type) % ALIGNMENT * last), rows.nbytes
