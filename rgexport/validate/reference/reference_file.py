"""The reference file: its format, its writer and its reader.

It is a safetensors file whose metadata has one text, `rgexport_reference`, the JSON of `Header`.
N tokens of all prompts stand one after another. M positions of a prompt have logits, and C
checkpoints inside it have states. `array_layouts` has the shapes and dtypes.

| name | array |
|---|---|
| `tokens` | [N] |
| `logits.{prompt}` | [M, vocab] at `PromptRecord.positions`, as multiples of a step |
| `scales.{prompt}` | [M, 2]: each row's smallest logit and its step |
| `greedy.{prompt}` | [n]: the reference's greedy continuation; missing where there is none |
| `states.{prompt}.{state}` | canonical, without batch; keys and values without zeros at the front |
| `checkpoints.{prompt}.{state}` | [C, …], canonical, after `PromptRecord.checkpoints` tokens |
| `weights.{tensor}` | a sketch of the checkpoint's tensor, see `weights.sketch` |
| `inputs.{site}` | [4, K]: mixtures of a linear's inputs, see `weights.sketch` |
| `outputs.{tensor}` | [rows, 4]: products of the checkpoint's rows with those |
| `squares` | [tensors], in the order of `griffin.layout`: Σ W² of each |

A logit has 16 bits: measured on the demo, their rounding moves a KL of 1e-5 by 0.03 %. Checkpoints
have no keys and values: those of a whole window are 33 MB in a 2B.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from rgexport.artifacts.manifest_reader import check_config
from rgexport.errors import RequestError
from rgexport.files import safetensors
from rgexport.files.hashing import FileRecord, hash_file
from rgexport.files.kinds import read_typed_metadata
from rgexport.files.safetensors import DTYPES, has_metadata, read_header
from rgexport.files.targets import replace_file
from rgexport.files.typed_json import Mismatch, to_json
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import linear_inputs, model_tensors
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.griffin.tensor import RowTensor, file_rows
from rgexport.validate.structure.elements import Fingerprint
from rgexport.validate.text_items import TextIdentity
from rgexport.validate.weights.sketch import MIXTURES, sketch_shape

FORMAT_VERSION = 3
METADATA = "rgexport_reference"

_LAST_CODE = 2**16 - 1


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: logits are known at token `positions`, states after `checkpoints` tokens.

    Both ascend. `bytes` is the text's length in UTF-8, None for token ids.
    """

    name: str
    tokens: int
    bytes: int | None
    positions: tuple[int, ...]
    greedy_tokens: int
    checkpoints: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of the file but its arrays.

    `files` are the checkpoint's weight files, `computed` has the implementation, device, dtype and
    versions, `structures` are of the graphs that the exporter writes for the model. `data_sha256`
    is of all that follows the header in the file; `write_reference` fills it in.
    """

    format_version: int = FORMAT_VERSION
    model: str
    config: GriffinConfig
    files: dict[str, FileRecord]
    computed: dict[str, str]
    environment: dict[str, str | int]
    prompts: tuple[PromptRecord, ...]
    structures: tuple[Fingerprint, ...] = ()
    identity: TextIdentity | None = None
    data_sha256: str = ""

    @property
    def tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True)
class ReferenceFile:
    """An open file; its large arrays are read in rows."""

    path: Path
    header: Header
    tokens: np.ndarray
    arrays: Mapping[str, RowTensor]

    def spans(self) -> Iterator[tuple[int, PromptRecord, slice]]:
        """Yields each prompt's index, record, and slice of `tokens`."""
        start = 0
        for index, prompt in enumerate(self.header.prompts):
            yield index, prompt, slice(start, start + prompt.tokens)
            start += prompt.tokens

    def logits(self, prompt: int, start: int, stop: int) -> np.ndarray:
        """Logits [stop - start, vocab] float64 at `PromptRecord.positions[start:stop]`."""
        rows = (self.arrays[f"{name}.{prompt}"].read(start, stop) for name in ("logits", "scales"))
        return decode_logits(*rows)

    def greedy(self, prompt: int) -> np.ndarray:
        """The reference's greedy continuation of a prompt, [n] int64; may be empty."""
        name = f"greedy.{prompt}"
        return self.arrays[name].whole() if name in self.arrays else np.empty(0, np.int64)

    def state(self, prompt: int) -> State:
        """The canonical state after a prompt, of batch 1."""
        state: State = {}
        for spec in state_specs(self.header.config):
            stored = self.arrays[f"states.{prompt}.{spec.name}"].whole()
            padded = np.zeros(spec.shape, np.float32)
            padded[len(padded) - len(stored) :] = stored
            state[spec.name] = padded[None]
        state[POSITION] = np.array([self.header.prompts[prompt].tokens], np.int64)
        return state

    def checkpoints(self, prompt: int) -> dict[int, State]:
        """Returns number of tokens → the recurrent states after them, of batch 1."""
        states: dict[int, State] = {n: {} for n in self.header.prompts[prompt].checkpoints}
        for spec in checkpoint_specs(self.header.config) if states else ():
            arrays = self.arrays[f"checkpoints.{prompt}.{spec.name}"].whole()
            for state, array in zip(states.values(), arrays, strict=True):
                state[spec.name] = array[None]
        return states

    def array(self, name: str) -> np.ndarray:
        """Reads a whole array; the module's table has the shapes."""
        return self.arrays[name].whole()

    def square(self, tensor: str) -> float:
        index = list(model_tensors(self.header.config)).index(tensor)
        return float(self.arrays["squares"].read(index, index + 1)[0])


def array_layouts(header: Header) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yields the name of each array, its dtype and shape."""
    config = header.config
    tensors = model_tensors(config)
    yield "tokens", ("I64", (header.tokens,))
    for index, prompt in enumerate(header.prompts):
        rows = len(prompt.positions)
        yield f"logits.{index}", ("U16", (rows, config.vocab_size))
        yield f"scales.{index}", ("F32", (rows, 2))
        if prompt.greedy_tokens:
            yield f"greedy.{index}", ("I64", (prompt.greedy_tokens,))
        for spec in state_specs(config):
            yield f"states.{index}.{spec.name}", ("F32", stored_shape(spec, prompt.tokens))
        if count := len(prompt.checkpoints):
            for spec in checkpoint_specs(config):
                yield f"checkpoints.{index}.{spec.name}", ("F32", (count, *spec.shape))
    for name, tensor in tensors.items():
        sketched = sketch_shape(tensor.shape)
        yield f"weights.{name}", ("F32", (sketched.rows, sketched.width))
    for name, site in linear_inputs(config).items():
        rows, columns = tensors[name].shape
        yield f"outputs.{name}", ("F32", (rows, MIXTURES))
        yield f"inputs.{site}", ("F32", (MIXTURES, columns))
    yield "squares", ("F64", (len(tensors),))


def checkpoint_specs(config: GriffinConfig) -> list[StateSpec]:
    """Returns the states of a checkpoint inside a prompt: all but keys and values."""
    return [spec for spec in state_specs(config) if not _is_cache(spec)]


def stored_shape(spec: StateSpec, tokens: int) -> tuple[int, ...]:
    """Returns a state's shape in the file: a cache has no more keys than there were tokens."""
    return (min(tokens, spec.shape[0]), *spec.shape[1:]) if _is_cache(spec) else spec.shape


def _is_cache(spec: StateSpec) -> bool:
    return spec.name.endswith((".key", ".value"))


def encode_logits(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds logits [n, vocab] float32 to uint16; returns scales [n, 2], too: least logit, step."""
    least = logits.min(1)
    step = (logits.max(1) - least) / np.float32(_LAST_CODE)
    codes = np.rint((logits - least[:, None]) / np.where(step, step, 1)[:, None])
    return np.clip(codes, 0, _LAST_CODE).astype(np.uint16), np.stack([least, step], 1)


def decode_logits(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns logits [n, vocab] float64 from the two results of `encode_logits`."""
    least, step = scales.astype(np.float64).T[:, :, None]
    return np.asarray(least + step * codes)


is_reference = partial(has_metadata, METADATA)


def write_reference(
    path: Path, header: Header, arrays: Mapping[str, np.ndarray], *, force: bool = False
) -> None:
    """Writes the file, which appears once it is complete."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
    header = dataclasses.replace(header, data_sha256=digest.hexdigest())
    layouts = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    metadata = {METADATA: json.dumps(to_json(header))}
    with (
        replace_file(path, force=force, replaceable=is_reference) as partial,
        partial.open("wb") as file,
    ):
        file.write(safetensors.header(layouts, metadata))
        file.writelines(array.tobytes() for array in arrays.values())
        file.flush()
        os.fsync(file.fileno())


def read_reference(path: Path) -> ReferenceFile:
    """Opens a file and checks all of it; raises RequestError for another one, or damage."""
    header = read_typed_metadata(path, METADATA, Header, FORMAT_VERSION)
    try:
        _check_header(header)
        arrays = _open_arrays(path, header)
        _check_values(arrays, header.config.vocab_size)
    except ValueError as error:
        raise RequestError(f"{path} is damaged: {error}; record it again") from None
    return ReferenceFile(path, header, arrays["tokens"].whole(), arrays)


def _check_header(header: Header) -> None:
    check_config(header.config)
    if not header.prompts or any(prompt.tokens < 1 for prompt in header.prompts):
        raise Mismatch("prompts: there is none, or one without tokens")
    for prompt in header.prompts:
        if not prompt.positions or not _ascends_inside(prompt.positions, 0, prompt.tokens):
            raise Mismatch("positions of logits lie outside of their prompt, or do not ascend")
        if not _ascends_inside(prompt.checkpoints, 1, prompt.tokens):
            raise Mismatch("checkpoints lie outside of their prompt, or do not ascend")


def _ascends_inside(values: Sequence[int], start: int, stop: int) -> bool:
    return all(a < b for a, b in pairwise((start - 1, *values, stop)))


def _open_arrays(path: Path, header: Header) -> dict[str, RowTensor]:
    entries, layouts = read_header(path), dict(array_layouts(header))
    for name in entries.keys() ^ layouts.keys():
        raise Mismatch(f"{name} is {'unknown' if name in entries else 'missing'}")
    for name, entry in entries.items():
        if (entry.dtype, entry.shape) != layouts[name]:
            raise Mismatch(f"{name} is {entry.dtype} {list(entry.shape)}")
    start = min(entry.offset for entry in entries.values())
    if hash_file(path, start=start).sha256 != header.data_sha256:
        raise Mismatch("its data has another hash")
    return {
        name: file_rows(path, entry.shape, DTYPES[entry.dtype], entry.offset)
        for name, entry in entries.items()
    }


def _check_values(arrays: Mapping[str, RowTensor], vocab_size: int) -> None:
    for name, array in arrays.items():
        if name.startswith("logits."):  # every code is a logit
            continue
        for _, rows in array.slabs():
            if array.dtype.kind == "f":
                sound = np.isfinite(rows).all() and (name != "squares" or (rows >= 0).all())
            else:
                sound = ((rows >= 0) & (rows < vocab_size)).all()
            if not sound:
                raise Mismatch(f"{name} has impossible values")
