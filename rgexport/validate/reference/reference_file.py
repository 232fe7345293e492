"""What a reference said to some prompts, as one file that travels; `reference_reader` opens it.

A safetensors file; its metadata has one text, `rgexport_reference`, the JSON of `Header`. All
prompts stand one behind another, N positions in all. M of them are *full*: their logits are
there as they are. The others are condensed (see `condensed`), K kept tokens in all. A of them are
*watched*: the residual stream is there, as it is behind each layer.

| name | shape | dtype |
|---|---|---|
| `tokens` | [N] | int64 |
| `full.positions` | [M] | int64, ascending |
| `full.logits` | [M, vocab] | float32 |
| `kept.counts` | [N] | int64; 0 where a position is full |
| `kept.ids`, `kept.logits` | [K] | int32, float32; most likely first |
| `sums` | [N, 8] | float64; see `SUMS` |
| `codes` | [N - M, vocab] | uint8 or uint16; there if `tail_bits` is not 0 |
| `greedy.{prompt}` | [n] | int64: how the reference goes on |
| `states.{prompt}.{state}` | canonical, without batch | keys and values: no zeros at the front |
| `checkpoints.{prompt}.{state}` | [C, …], canonical | behind `PromptRecord.checkpoints` tokens |
| `activations` | [A, layers, width] | float32, at the positions `Header.watched` |
| `weights.{tensor}` | see `weights.sketch.SketchShape` | float32: a sketch of the checkpoint's |
| `squares` | [tensors], in the order of `griffin.layout` | float64: Σ W² of each |

At checkpoints there are no keys and values: those of a whole window are 33 MB in a 2B, and the
ones at the prompt's end tell of the last window what they would.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.files.hashing import FileRecord
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.griffin.tensor import RowTensor
from rgexport.validate.reference.condensed import Condensed, Tail

FORMAT_VERSION = 2
"""1 had no sketches of the weights, and could not tell them from other ones."""
METADATA = "rgexport_reference"
SUMS = "log_sum_exp", "next_nll", "variance", "mass", "offset", "moved", "floor", "step"
"""Of each position: the log-sum-exp of its logits, -log p of the prompt's next token (0 at the
end), the variance of the logits, and what `condensed.Tail` says; the last five are 0 where a
position is full."""

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
    """One prompt; `exact` says for each metric how exactly it can be known from the file."""

    name: str
    tokens: int
    bytes: int | None
    full_positions: int
    greedy_tokens: int
    exact: dict[str, str]
    checkpoints: tuple[int, ...] = ()
    """Counts of tokens, ascending, behind which there are recurrent states too."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of the file but its arrays."""

    format_version: int = FORMAT_VERSION
    model: str
    config: GriffinConfig
    """What was computed."""
    files: dict[str, FileRecord]
    """The checkpoint's weight files."""
    computed: dict[str, str]
    """`implementation`, `device`, `dtype`, `tf32` and versions."""
    environment: dict[str, str | int]
    tail_bits: int
    prompts: tuple[PromptRecord, ...]
    watched: tuple[int, ...] = ()
    """Positions, ascending, of all prompts one behind another."""
    data_sha256: str = ""
    """Of all that follows the header in the file; `write_reference` fills it in."""

    @property
    def positions(self) -> int:
        """Of all prompts."""
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True)
class ReferenceFile:
    """A file whose header and small arrays have been read; the large ones are read in rows."""

    path: Path
    header: Header
    tokens: np.ndarray
    sums: np.ndarray
    full_positions: np.ndarray
    arrays: Mapping[str, RowTensor]
    ends: np.ndarray
    """[N + 1], where each position's kept tokens begin."""

    def spans(self) -> Iterator[tuple[int, PromptRecord, slice]]:
        """Each prompt's index, record, and place among the positions."""
        start = 0
        for index, prompt in enumerate(self.header.prompts):
            yield index, prompt, slice(start, start + prompt.tokens)
            start += prompt.tokens

    def is_full(self, position: int) -> bool:
        """Whether all logits of a position are there."""
        return bool(self.ends[position] == self.ends[position + 1])

    def next_nll(self, position: int) -> float:
        """What the prompt's next token costs, -log p; 0 at its end."""
        return float(self.sums[position, SUMS.index("next_nll")])

    def variance(self, position: int) -> float:
        """Of the logits."""
        return float(self.sums[position, SUMS.index("variance")])

    def full_logits(self, position: int) -> np.ndarray:
        """Logits [vocab] float32 of a full position."""
        row = int(np.searchsorted(self.full_positions, position))
        return self.arrays["full.logits"].read(row, row + 1)[0]

    def condensed(self, position: int) -> Condensed:
        """One of the other positions."""
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
        """How the reference goes on behind a prompt, [n] int64; perhaps nothing."""
        name = f"greedy.{prompt}"
        return self.arrays[name].whole() if name in self.arrays else np.empty(0, np.int64)

    def state(self, prompt: int) -> State:
        """The canonical state behind a prompt, of one conversation."""
        state: State = {}
        for spec in state_specs(self.header.config):
            found = self.arrays[state_name(prompt, spec)].whole()
            whole = np.zeros(spec.shape, np.float32)
            whole[len(whole) - len(found) :] = found
            state[spec.name] = whole[None]
        state[POSITION] = np.array([self.header.prompts[prompt].tokens], np.int64)
        return state

    def checkpoints(self, prompt: int) -> dict[int, State]:
        """The recurrent states inside a prompt: count of tokens → states of one conversation."""
        found: dict[int, State] = {n: {} for n in self.header.prompts[prompt].checkpoints}
        for spec in checkpoint_specs(self.header.config) if found else ():
            arrays = self.arrays[checkpoint_name(prompt, spec)].whole()
            for state, array in zip(found.values(), arrays, strict=True):
                state[spec.name] = array[None]
        return found

    def activations(self, place: int) -> np.ndarray:
        """The residual stream [layers, width] behind each layer, at one of `Header.watched`."""
        return self.arrays["activations"].read(place, place + 1)[0]

    def sketch(self, tensor: str) -> np.ndarray:
        """The sketch of a tensor, [rows, width] float32; see `weights.sketch`."""
        return self.arrays[sketch_name(tensor)].whole()

    def square(self, tensor: str) -> float:
        """Σ W² of a tensor."""
        index = list(model_tensors(self.header.config)).index(tensor)
        return float(self.arrays["squares"].read(index, index + 1)[0])


def sketch_name(tensor: str) -> str:
    """Of the array that holds the sketch of a tensor."""
    return f"weights.{tensor}"


def state_name(prompt: int, spec: StateSpec) -> str:
    """Of the array that holds a state behind a prompt."""
    return f"states.{prompt}.{spec.name}"


def checkpoint_name(prompt: int, spec: StateSpec) -> str:
    """Of the array that holds a state at all checkpoints of a prompt."""
    return f"checkpoints.{prompt}.{spec.name}"


def checkpoint_specs(config: GriffinConfig) -> list[StateSpec]:
    """The states that a checkpoint has."""
    return [spec for spec in state_specs(config) if not _is_cache(spec)]


def stored_shape(spec: StateSpec, tokens: int) -> tuple[int, ...]:
    """A state's shape in the file: a cache has only as many keys as there were tokens."""
    if _is_cache(spec):
        return min(tokens, spec.shape[0]), *spec.shape[1:]
    return spec.shape


def _is_cache(spec: StateSpec) -> bool:
    return spec.name.endswith((".key", ".value"))
