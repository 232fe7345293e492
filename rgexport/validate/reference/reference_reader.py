"""Opens a reference file, and refuses one that is damaged or contradicts itself."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest_reader import check_config
from rgexport.export.typed_json import Mismatch, parse, read
from rgexport.files.hashing import hash_file
from rgexport.griffin.file_rows import file_rows
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.safetensors_file import read_header, read_metadata
from rgexport.griffin.state import state_specs
from rgexport.griffin.tensor import RowTensor
from rgexport.validate.reference.condensed import CODES
from rgexport.validate.reference.reference_file import (
    DTYPE_NAMES,
    DTYPES,
    FORMAT_VERSION,
    METADATA,
    READABLE_VERSIONS,
    SUMS,
    Header,
    ReferenceFile,
    checkpoint_name,
    checkpoint_specs,
    sketch_name,
    state_name,
    stored_shape,
)
from rgexport.validate.weights.sketch import sketch_shape

MAX_STATE_BYTES = 1 << 30
"""States of one prompt: thirty times those of a 2B."""
_STREAMED = "full.logits", "kept.logits", "states.", "checkpoints."
"""Beginnings of the names of large arrays of finite numbers."""
_ANY = -1
"""A length that does not follow from the header."""


def read_reference(path: Path) -> ReferenceFile:
    """Opens a file and checks all of it.

    Raises:
        RequestError: no such file, another kind of file, a newer format, or damage.
    """
    header = _read_header(path)
    arrays = _read_arrays(path, header)
    tokens, sums, full, counts = (
        arrays[name].whole() for name in ("tokens", "sums", "full.positions", "kept.counts")
    )
    ends = np.concatenate([[0], np.cumsum(counts)])
    reference = ReferenceFile(path, header, tokens, sums, full, arrays, ends)
    _check_values(reference, counts)
    return reference


def _read_header(path: Path) -> Header:
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise RequestError(f"cannot read the reference {path}: {what}")
    text = read_metadata(path).get(METADATA)
    if text is None:
        raise RequestError(
            f"{path} is not a reference file; expected one that `rgexport reference` made"
        )
    try:
        fields = parse(text)
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version not in READABLE_VERSIONS:
            newer = version > FORMAT_VERSION
            raise RequestError(
                f"{path} has format version {version}; this rgexport reads {FORMAT_VERSION}: "
                + ("update rgexport" if newer else "capture it again with `rgexport reference`")
            )
        header = read(Header, fields)
        _check_header(header)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return header


def _check_header(header: Header) -> None:
    """Raises `Mismatch` for what no capture writes."""
    check_config(header.config)
    states = sum(4 * math.prod(spec.shape) for spec in state_specs(header.config))
    prompts = header.prompts
    rules = {
        f"config: a state would take {states} bytes": states <= MAX_STATE_BYTES,
        f"tail_bits is {header.tail_bits}": header.tail_bits in CODES,
        "prompts: there is none, or one without tokens": bool(prompts)
        and all(prompt.tokens >= 1 for prompt in prompts),
        "no position is full": sum(prompt.full_positions for prompt in prompts) >= 1,
        "checkpoints lie outside of their prompt, or do not ascend": all(
            _is_inside(prompt.checkpoints, 1, prompt.tokens) for prompt in prompts
        ),
        f"watched is {header.watched}": _is_inside(header.watched, 0, header.positions),
    }
    for problem, holds in rules.items():
        if not holds:
            raise Mismatch(problem)


def _is_inside(values: Sequence[int], start: int, stop: int) -> bool:
    """Whether values ascend from `start` or more and stay below `stop`."""
    edges = start - 1, *values, stop
    return all(a < b for a, b in pairwise(edges))


def _read_arrays(path: Path, header: Header) -> dict[str, RowTensor]:
    """The arrays, which must be those that the header implies."""
    entries = read_header(path)
    expected = dict(_expected(header))
    for name in entries.keys() ^ expected.keys():
        raise _damaged(path, f"{name} is {'unknown' if name in entries else 'missing'}")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        fits = len(entry.shape) == len(shape) and all(
            found == wanted or wanted == _ANY
            for found, wanted in zip(entry.shape, shape, strict=True)
        )
        if entry.dtype != dtype or not fits:
            raise _damaged(path, f"{name} is {entry.dtype} {list(entry.shape)}")
    start = min(entry.offset for entry in entries.values())
    if hash_file(path, start=start).sha256 != header.data_sha256:
        raise _damaged(path, "its data has another hash")
    if entries["kept.ids"].shape != entries["kept.logits"].shape:
        raise _damaged(path, "not as many kept logits as ids")
    return {
        name: file_rows(path, entry.shape, DTYPES[entry.dtype], entry.offset)
        for name, entry in entries.items()
    }


def _expected(header: Header) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    count, vocab = header.positions, header.config.vocab_size
    full = sum(prompt.full_positions for prompt in header.prompts)
    yield "tokens", ("I64", (count,))
    yield "full.positions", ("I64", (full,))
    yield "full.logits", ("F32", (full, vocab))
    yield "kept.counts", ("I64", (count,))
    yield "kept.ids", ("I32", (_ANY,))
    yield "kept.logits", ("F32", (_ANY,))
    yield "sums", ("F64", (count, len(SUMS)))
    if dtype := CODES[header.tail_bits]:
        yield "codes", (DTYPE_NAMES[dtype], (count - full, vocab))
    for index, prompt in enumerate(header.prompts):
        if prompt.greedy_tokens:
            yield f"greedy.{index}", ("I64", (prompt.greedy_tokens,))
        for spec in state_specs(header.config):
            yield state_name(index, spec), ("F32", stored_shape(spec, prompt.tokens))
        if points := len(prompt.checkpoints):
            for spec in checkpoint_specs(header.config):
                yield checkpoint_name(index, spec), ("F32", (points, *spec.shape))
    for name, tensor in model_tensors(header.config).items():
        sketched = sketch_shape(tensor.shape)
        yield sketch_name(name), ("F32", (sketched.rows, sketched.width))
    yield "squares", ("F64", (len(model_tensors(header.config)),))
    if header.watched:
        shape = len(header.watched), header.config.num_layers, header.config.width
        yield "activations", ("F32", shape)


def _check_values(reference: ReferenceFile, counts: np.ndarray) -> None:
    """Refuses values that would lead out of an array later, or are not finite."""
    vocab, ids = reference.header.config.vocab_size, reference.arrays["kept.ids"]
    full = np.isin(np.arange(len(counts)), reference.full_positions)
    squares = reference.arrays["squares"].whole()
    greedy = [reference.greedy(index) for index in range(len(reference.header.prompts))]
    rules = {
        "full.positions": _is_inside(reference.full_positions.tolist(), 0, len(counts)),
        "kept.counts": bool(((counts > 0) != full).all() and (counts >= 0).all())
        and sum(counts.tolist()) == ids.shape[0],
        "tokens": _are_ids(reference.tokens, vocab),
        "kept.ids": _are_ids(ids.whole(), vocab),
        "greedy": all(_are_ids(found, vocab) for found in greedy),
        "sums": _finite(reference.sums),
        "squares": _finite(squares) and bool((squares >= 0).all()),
        "weights": all(
            _finite(reference.sketch(name)) for name in model_tensors(reference.header.config)
        ),
        "activations": all(
            _finite(reference.activations(place)) for place in range(len(reference.header.watched))
        ),
    }
    for name, holds in rules.items():
        if not holds:
            raise _damaged(reference.path, f"{name} has impossible values")
    if not _are_distinct(ids.whole(), counts, vocab):
        raise _damaged(reference.path, "kept.ids has an id twice at a position")
    for name, array in reference.arrays.items():
        if name.startswith(_STREAMED) and not all(_finite(rows) for _, rows in array.slabs()):
            raise _damaged(reference.path, f"{name} has impossible values")


def _are_ids(values: np.ndarray, vocab: int) -> bool:
    return bool(((values >= 0) & (values < vocab)).all())


def _are_distinct(ids: np.ndarray, counts: np.ndarray, vocab: int) -> bool:
    """Checks that no position keeps an id twice."""
    keys = np.repeat(np.arange(len(counts)), counts) * vocab + ids
    return len(np.unique(keys)) == len(ids)


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged: {what}; capture it again")
