"""The reference file: its format and its writer; `reference_reader` opens one.

It is a safetensors file whose metadata has one text, `rgexport_reference`, the JSON of `Header`.
Positions count through all prompts, N in all. M of them are *full*: all their logits are there. The
others are condensed (see `condensed`), with K kept tokens in all. A positions are *watched*: the
residual stream after each layer is there.

| name | shape | dtype |
|---|---|---|
| `tokens` | [N] | int64 |
| `full.positions` | [M] | int64, ascending |
| `full.logits` | [M, vocab] | float32 |
| `kept.counts` | [N] | int64; 0 where a position is full |
| `kept.ids`, `kept.logits` | [K] | int32, float32; most likely first |
| `sums` | [N, 8] | float64; see `SUMS` |
| `codes` | [N - M, vocab] | uint8 or uint16; there if `tail_bits` is not 0 |
| `greedy.{prompt}` | [n] | int64: the reference's greedy continuation |
| `states.{prompt}.{state}` | canonical, without batch | keys and values: no zeros at the front |
| `checkpoints.{prompt}.{state}` | [C, …], canonical | after `PromptRecord.checkpoints` tokens |
| `activations` | [A, layers, width] | float32, at the positions `Header.watched` |
| `weights.{tensor}` | see `weights.sketch.SketchShape` | float32: a sketch of the checkpoint's |
| `squares` | [tensors], in the order of `griffin.layout` | float64: Σ W² of each |

Checkpoints have no keys and values: those of a whole window are 33 MB in a 2B, and a prompt's last
window is there with the states at its end.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.typed_json import plain
from rgexport.files.atomic import replace_file
from rgexport.files.hashing import FileRecord
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.safetensors_file import read_metadata
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.griffin.tensor import RowTensor
from rgexport.validate.identity.text import TextIdentity
from rgexport.validate.reference.condensed import Condensed, Tail

FORMAT_VERSION = 3
READABLE_VERSIONS = 2, FORMAT_VERSION
"""Version 1 had no sketches of the weights, and could not notice other weights; version 2 did not
record the tokenizer, the chat template and the settings."""
METADATA = "rgexport_reference"
SUMS = "log_sum_exp", "next_nll", "variance", "mass", "offset", "moved", "floor", "step"
"""Of each position: the log-sum-exp of its logits, -log p of the prompt's next token (0 at the
end), the variance of the logits, and the numbers of `condensed.Tail`, which are 0 at a full
position."""

DTYPES: dict[str, np.dtype] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    `exact` says how exactly each metric is known from the file. `checkpoints` are the counts of
    tokens, ascending, after which there are recurrent states too.
    """

    name: str
    tokens: int
    bytes: int | None
    full_positions: int
    greedy_tokens: int
    exact: dict[str, str]
    checkpoints: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of the file but its arrays.

    Attributes:
        format_version: see `FORMAT_VERSION`.
        model: the checkpoint's name.
        config: what was computed.
        files: the checkpoint's weight files.
        computed: `implementation`, `device`, `dtype`, `tf32` and versions.
        environment: of the machine.
        tail_bits: see `condensed.CODES`.
        prompts: in the order of the positions.
        watched: positions, ascending.
        identity: the checkpoint's text side; None in files of version 2.
        data_sha256: of all that follows the header in the file; `write_reference` fills it in.
    """

    format_version: int = FORMAT_VERSION
    model: str
    config: GriffinConfig
    files: dict[str, FileRecord]
    computed: dict[str, str]
    environment: dict[str, str | int]
    tail_bits: int
    prompts: tuple[PromptRecord, ...]
    watched: tuple[int, ...] = ()
    identity: TextIdentity | None = None
    data_sha256: str = ""

    @property
    def positions(self) -> int:
        """Of all prompts."""
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True)
class ReferenceFile:
    """An open file; its large arrays are read in rows.

    `ends` [N + 1] has the place where each position's kept tokens begin.
    """

    path: Path
    header: Header
    tokens: np.ndarray
    sums: np.ndarray
    full_positions: np.ndarray
    arrays: Mapping[str, RowTensor]
    ends: np.ndarray

    def spans(self) -> Iterator[tuple[int, PromptRecord, slice]]:
        """Each prompt's index, record, and place among the positions."""
        start = 0
        for index, prompt in enumerate(self.header.prompts):
            yield index, prompt, slice(start, start + prompt.tokens)
            start += prompt.tokens

    def is_full(self, position: int) -> bool:
        """Whether the file has all logits of a position."""
        return bool(self.ends[position] == self.ends[position + 1])

    def next_nll(self, position: int) -> float:
        """-log p of the prompt's next token; 0 at its end."""
        return float(self.sums[position, SUMS.index("next_nll")])

    def variance(self, position: int) -> float:
        """Of the position's logits."""
        return float(self.sums[position, SUMS.index("variance")])

    def full_logits(self, position: int) -> np.ndarray:
        """Logits [vocab] float32 of a full position."""
        row = int(np.searchsorted(self.full_positions, position))
        return self.arrays["full.logits"].read(row, row + 1)[0]

    def condensed(self, position: int) -> Condensed:
        """The distribution at a position that is not full."""
        start, stop = self.ends[position : position + 2].tolist()
        row = position - int(np.searchsorted(self.full_positions, position))
        codes = self.arrays["codes"].read(row, row + 1)[0] if "codes" in self.arrays else None
        total, _, _, mass, offset, moved, floor, step = self.sums[position].tolist()
        return Condensed(
            ids=self.arrays["kept.ids"].read(start, stop),
            logits=self.arrays["kept.logits"].read(start, stop),
            log_sum_exp=total,
            tail=Tail(mass, offset, moved, floor, step, codes),
        )

    def greedy(self, prompt: int) -> np.ndarray:
        """The reference's greedy continuation of a prompt, [n] int64; may be empty."""
        name = f"greedy.{prompt}"
        return self.arrays[name].whole() if name in self.arrays else np.empty(0, np.int64)

    def state(self, prompt: int) -> State:
        """The canonical state after a prompt, of batch 1."""
        state: State = {}
        for spec in state_specs(self.header.config):
            found = self.arrays[state_name(prompt, spec)].whole()
            whole = np.zeros(spec.shape, np.float32)
            whole[len(whole) - len(found) :] = found
            state[spec.name] = whole[None]
        state[POSITION] = np.array([self.header.prompts[prompt].tokens], np.int64)
        return state

    def checkpoints(self, prompt: int) -> dict[int, State]:
        """Count of tokens → the recurrent states after them, of batch 1."""
        found: dict[int, State] = {n: {} for n in self.header.prompts[prompt].checkpoints}
        for spec in checkpoint_specs(self.header.config) if found else ():
            arrays = self.arrays[checkpoint_name(prompt, spec)].whole()
            for state, array in zip(found.values(), arrays, strict=True):
                state[spec.name] = array[None]
        return found

    def activations(self, place: int) -> np.ndarray:
        """The residual stream [layers, width] after each layer, at `Header.watched[place]`."""
        return self.arrays["activations"].read(place, place + 1)[0]

    def sketch(self, tensor: str) -> np.ndarray:
        """The sketch of a tensor, [rows, width] float32; see `weights.sketch`."""
        return self.arrays[sketch_name(tensor)].whole()

    def square(self, tensor: str) -> float:
        """Σ W² of a tensor."""
        index = list(model_tensors(self.header.config)).index(tensor)
        return float(self.arrays["squares"].read(index, index + 1)[0])


def sketch_name(tensor: str) -> str:
    """The array with the sketch of a tensor."""
    return f"weights.{tensor}"


def state_name(prompt: int, spec: StateSpec) -> str:
    """The array with a state after a prompt."""
    return f"states.{prompt}.{spec.name}"


def checkpoint_name(prompt: int, spec: StateSpec) -> str:
    """The array with a state at all checkpoints of a prompt."""
    return f"checkpoints.{prompt}.{spec.name}"


def checkpoint_specs(config: GriffinConfig) -> list[StateSpec]:
    """The states that a checkpoint has."""
    return [spec for spec in state_specs(config) if not _is_cache(spec)]


def stored_shape(spec: StateSpec, tokens: int) -> tuple[int, ...]:
    """A state's shape in the file: a cache has no more keys than there were tokens."""
    if _is_cache(spec):
        return min(tokens, spec.shape[0]), *spec.shape[1:]
    return spec.shape


def _is_cache(spec: StateSpec) -> bool:
    return spec.name.endswith((".key", ".value"))


def is_reference(path: Path) -> bool:
    """Whether a file says in its metadata that it is a reference."""
    try:
        return METADATA in read_metadata(path)
    except RequestError:
        return False


def write_reference(
    path: Path, header: Header, arrays: Mapping[str, np.ndarray], *, force: bool = False
) -> None:
    """Writes the file, which appears once it is complete.

    Raises:
        RequestError: it exists and may not be replaced, or cannot be written.
    """
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
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
    with (
        replace_file(path, force=force, replaceable=is_reference) as partial,
        partial.open("wb") as file,
    ):
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(array.tobytes() for array in arrays.values())
        file.flush()
        os.fsync(file.fileno())
