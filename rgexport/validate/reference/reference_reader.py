"""Opens a reference file, and refuses one that is damaged or contradicts itself."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest_reader import check_config
from rgexport.files.hashing import hash_file
from rgexport.files.safetensors import DTYPES, read_header, read_metadata
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.griffin.layout import linear_inputs, model_tensors
from rgexport.griffin.state import state_specs
from rgexport.griffin.tensor import RowTensor, file_rows
from rgexport.validate.reference.reference_file import (
    FORMAT_VERSION,
    METADATA,
    Header,
    ReferenceFile,
    checkpoint_name,
    checkpoint_specs,
    inputs_name,
    outputs_name,
    sketch_name,
    state_name,
    stored_shape,
)
from rgexport.validate.weights.input_mixtures import MIXTURES
from rgexport.validate.weights.sketch import sketch_shape

MAX_STATE_BYTES = 1 << 30
"""States of one prompt: thirty times those of a 2B."""


def read_reference(path: Path) -> ReferenceFile:
    """Opens a file and checks all of it.

    Raises:
        RequestError: no such file, another kind of file, a newer format, or damage.
    """
    header = _read_header(path)
    arrays = _read_arrays(path, header)
    reference = ReferenceFile(path, header, arrays["tokens"].whole(), arrays)
    _check_values(reference)
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
        fields = parse_json(text)
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            raise RequestError(
                f"{path} has format version {version}; this rgexport reads {FORMAT_VERSION}: "
                + ("update rgexport" if newer else "record it again with `rgexport reference`")
            )
        header = from_json(Header, fields)
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
        "prompts: there is none, or one without tokens": bool(prompts)
        and all(prompt.tokens >= 1 for prompt in prompts),
        "positions of logits lie outside of their prompt, or do not ascend": all(
            prompt.positions and _is_inside(prompt.positions, 0, prompt.tokens)
            for prompt in prompts
        ),
        "checkpoints lie outside of their prompt, or do not ascend": all(
            _is_inside(prompt.checkpoints, 1, prompt.tokens) for prompt in prompts
        ),
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
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise _damaged(path, f"{name} is {entry.dtype} {list(entry.shape)}")
    start = min(entry.offset for entry in entries.values())
    if hash_file(path, start=start).sha256 != header.data_sha256:
        raise _damaged(path, "its data has another hash")
    return {
        name: file_rows(path, entry.shape, DTYPES[entry.dtype], entry.offset)
        for name, entry in entries.items()
    }


def _expected(header: Header) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    yield "tokens", ("I64", (header.tokens,))
    for index, prompt in enumerate(header.prompts):
        rows = len(prompt.positions)
        yield f"logits.{index}", ("U16", (rows, header.config.vocab_size))
        yield f"scales.{index}", ("F32", (rows, 2))
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
    for name, site in linear_inputs(header.config).items():
        rows, columns = model_tensors(header.config)[name].shape
        yield outputs_name(name), ("F32", (rows, MIXTURES))
        yield inputs_name(site), ("F32", (MIXTURES, columns))
    yield "squares", ("F64", (len(model_tensors(header.config)),))


def _check_values(reference: ReferenceFile) -> None:
    """Refuses ids that the model lacks, and numbers that are not finite or negative squares."""
    vocab = reference.header.config.vocab_size
    for name, array in reference.arrays.items():
        if name.startswith("logits."):  # every code is a logit
            continue
        for _, rows in array.slabs():
            if array.dtype.kind == "f":
                sound = np.isfinite(rows).all() and (name != "squares" or (rows >= 0).all())
            else:
                sound = ((rows >= 0) & (rows < vocab)).all()
            if not sound:
                raise _damaged(reference.path, f"{name} has impossible values")


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged: {what}; record it again")
