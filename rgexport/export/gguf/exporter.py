"""Exports a checkpoint to a GGUF file: metadata and header with gguf-py, then tensors by slabs."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf import GGUFValueType as Kind

from rgexport.artifacts.gguf import integrity
from rgexport.artifacts.gguf.format import algorithms_value
from rgexport.artifacts.gguf.integrity import MANIFEST_KEY, EmbeddedManifest
from rgexport.artifacts.gguf.naming import ARCHITECTURE, FileTensor, architecture
from rgexport.artifacts.gguf.vocabulary import Vocabulary, read_vocabulary
from rgexport.artifacts.manifest import SelfCheck
from rgexport.artifacts.origin import GEMMA_TERMS, folder_of, origin_of
from rgexport.artifacts.storage import aligned
from rgexport.export.exporter import Exporter
from rgexport.export.folder import common_fields
from rgexport.export.gguf.options import GgufOptions, GgufStorage
from rgexport.export.storage import in_order, slab_bytes
from rgexport.files.hashing import remember_hashes
from rgexport.files.targets import check_file_target, replace_file, require_free_disk
from rgexport.files.typed_json import to_json
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import FileHashes, require_sound
from rgexport.griffin.control_tokens import chosen_template
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance, expect_stages, group, note, task, warn
from rgexport.quantize.algorithms.statistics import Known, Statistics, StatisticsOf, no_statistics
from rgexport.quantize.gguf_header import ALIGNMENT, is_gguf, read_header
from rgexport.quantize.schemes.ggml_library import load_library
from rgexport.quantize.schemes.ggml_types import TYPES
from rgexport.quantize.schemes.registry import Ggml

Metadata = dict[str, Any]
"""Key → value, of a type that has a kind here; a list has values of one type."""
_KINDS = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
_ITEM_KINDS = _KINDS | {int: Kind.INT32}


def metadata(checkpoint: Checkpoint, hashes: FileHashes, vocabulary: Vocabulary | None) -> Metadata:
    template = None
    if vocabulary is not None:
        special = vocabulary.control.special
        template = chosen_template(folder_of(checkpoint), special, checkpoint.name)
    embedded = EmbeddedManifest(**common_fields(checkpoint, hashes, ("gguf", "numpy")))
    return {
        **_general(checkpoint),
        **architecture(checkpoint.config),
        **tokenizer_values(vocabulary, template),
        MANIFEST_KEY: json.dumps(to_json(embedded)),
    }


def _general(checkpoint: Checkpoint) -> Metadata:
    count = sum(math.prod(spec.shape) for spec in model_tensors(checkpoint.config).values())
    origin = origin_of(checkpoint)
    page = origin.hub_id and f"https://huggingface.co/{origin.hub_id}"
    terms: dict[str, str | None] = {"license": origin.licence}
    if origin.released:
        names = {"license.name": "Gemma Terms of Use", "license.link": GEMMA_TERMS}
        terms = {"organization": "Google", **terms, **names}
    texts = {
        "type": "model",
        "name": checkpoint.name,
        "basename": ARCHITECTURE,
        "finetune": "it" if checkpoint.instruction_tuned else None,
        "size_label": gguf.size_label(count, count, 0, 0),
        **terms,
        "source.url": page,
        "source.huggingface.repository": origin.hub_id,
    }
    values = {f"general.{key}": text for key, text in texts.items() if text}
    return {**values, "general.tags": ["text-generation", "griffin"]}


def tokenizer_values(vocabulary: Vocabulary | None, template: str | None) -> Metadata:
    if vocabulary is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    control = vocabulary.control
    tokens = {
        "bos": control.bos,
        "eos": control.eos or control.end_of_turn,  # llama.cpp assumes 2 where there is none
        "unknown": control.unk,
        "padding": control.pad,
        "eot": control.end_of_turn,
    }
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": vocabulary.tokens,
        "scores": vocabulary.scores.tolist(),
        "token_type": vocabulary.types.tolist(),
        **{f"{name}_token_id": token.id for name, token in tokens.items() if token is not None},
        "add_bos_token": control.bos is not None,
        "add_eos_token": False,
        "add_space_prefix": vocabulary.add_space_prefix,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return named | ({"tokenizer.chat_template": template} if template else {})


_HEADER_BYTES = 32 << 20  # upper bound of the header: a vocabulary of 256k takes 7 MB
Job = Callable[[], tuple[bytes, int]]
"""Encodes a slab; returns its bytes, and the number of bytes of weights that were read."""


def export_gguf(
    checkpoint: Checkpoint,
    options: GgufOptions,
    target: Path,
    *,
    force: bool = False,
    check: SelfCheck | None = None,
    statistics: StatisticsOf = no_statistics,
) -> Path:
    """Exports to the file `target`, which appears when it is complete, and returns it.

    Memory, `check` and `statistics` are as in `export_onnx`. Raises RequestError: an unsound
    checkpoint, a target that exists or cannot be written, too little disk, an option that does not
    fit, or no ggml to quantize with.
    """
    check_file_target(target, force=force, replaceable=is_gguf)
    storage = options.choose(checkpoint.config)
    _announce(storage)
    if any(TYPES[kind].is_quantized for kind in storage.types.values()):
        load_library()  # fails before any work is done
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
    if vocabulary is None:
        warn(f"{checkpoint.name} has no tokenizer: the file will take token ids, not text")
    sizes = (_tensor_bytes(tensor, storage.types[tensor.name]) for tensor in storage.tensors)
    data_bytes = sum(aligned(size, ALIGNMENT) for size in sizes)
    require_free_disk(target.resolve().parent, data_bytes + _HEADER_BYTES)
    expect_stages(2 if check is None else 3)
    hashes = require_sound(checkpoint)

    values = metadata(checkpoint, hashes, vocabulary) | _values_of_types(storage)
    total = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    with replace_file(target, force=force, replaceable=is_gguf) as unfinished:
        _write_header(unfinished, values, storage)
        with task("Writing the weights", total) as advance:
            jobs = _jobs(storage, checkpoint.weights, statistics)
            digest = _append_data(unfinished, jobs, advance)
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


def _values_of_types(storage: GgufStorage) -> Metadata:
    types = ((tensor.name, storage.types[tensor.name]) for tensor in storage.tensors)
    return {
        **integrity.placeholders(types),
        **algorithms_value(storage.schemes),
        "general.quantization_version": 2,  # ggml.h's `GGML_QNT_VERSION`
        integrity.FILE_TYPE: storage.file_type.value,
        **(storage.imatrix.metadata() if storage.imatrix else {}),
    }


def _tensor_bytes(tensor: FileTensor, kind: str) -> int:
    *lead, columns = tensor.shape
    return math.prod(lead) * TYPES[kind].row_bytes(columns)


def _append_data(path: Path, jobs: Iterable[Job], advance: Advance) -> str:
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


def _write_header(path: Path, values: Metadata, storage: GgufStorage) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, Kind.ARRAY, _ITEM_KINDS[type(value[0])])
        else:
            writer.add_key_value(key, value, _KINDS[type(value)])
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
    for tensor in storage.tensors:
        scheme, source = storage.schemes[tensor.name], weights[tensor.canonical]
        known = _statistics(tensor, storage, statistics)
        for start, stop in slab_bounds(source.shape[0], source.row_bytes, slab_bytes(scheme)):
            yield partial(_encode, tensor, source, start, stop, scheme, known)


def _statistics(tensor: FileTensor, storage: GgufStorage, statistics: StatisticsOf) -> Known:
    """Returns a tensor's statistics, of columns as stored: the importance matrix's, or others."""
    if not TYPES[storage.types[tensor.name]].is_quantized:
        return None
    if storage.imatrix is None:
        return statistics(tensor.canonical)
    importance = storage.importances.get(tensor.name)
    return None if importance is None else Statistics(importance)


def _encode(
    tensor: FileTensor, source: RowTensor, start: int, stop: int, scheme: Ggml, statistics: Known
) -> tuple[bytes, int]:
    rows = source.read(start, stop)
    values = tensor.transform.store(rows.astype(np.float32, copy=False))
    values = values.reshape(-1, tensor.shape[-1])
    ids = np.arange(start, stop)
    stored = scheme.encode(tensor.canonical, values, statistics, ids)["data"].tobytes()
    last = stop == source.shape[0]
    return stored + bytes(-_tensor_bytes(tensor, scheme.type) % ALIGNMENT * last), rows.nbytes


FORMAT = Exporter(
    make_options=GgufOptions,
    export=export_gguf,
    default_target=lambda model, options: Path(f"{model}-{options.file_type.name.upper()}.gguf"),
)
