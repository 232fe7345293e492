"""The reference file: its format and its writer; `reference_reader` opens one.

It is a safetensors file whose metadata has one text, `rgexport_reference`, the JSON of `Header`.
N tokens of all prompts stand one after another. M positions of a prompt have logits, and C
checkpoints inside it have states.

| name | shape | dtype |
|---|---|---|
| `tokens` | [N] | int64 |
| `logits.{prompt}` | [M, vocab] | uint16, at `PromptRecord.positions`; see `logit_rows` |
| `scales.{prompt}` | [M, 2] | float32: each row's smallest logit and its step |
| `greedy.{prompt}` | [n] | int64: the reference's greedy continuation |
| `states.{prompt}.{state}` | canonical, without batch | keys and values: no zeros at the front |
| `checkpoints.{prompt}.{state}` | [C, …], canonical | after `PromptRecord.checkpoints` tokens |
| `weights.{tensor}` | see `weights.sketch.SketchShape` | float32: a sketch of the checkpoint's |
| `inputs.{site}` | [4, K] | float32: mixtures of a linear's inputs, see `weights.input_mixtures` |
| `outputs.{tensor}` | [rows, 4] | float32: products of the checkpoint's rows with those |
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
from rgexport.files import safetensors
from rgexport.files.hashing import FileRecord
from rgexport.files.safetensors import read_metadata
from rgexport.files.targets import replace_file
from rgexport.files.typed_json import to_json
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.griffin.tensor import RowTensor
from rgexport.validate.identity.text import TextIdentity
from rgexport.validate.reference.logit_rows import decode
from rgexport.validate.structure.elements import Fingerprint

FORMAT_VERSION = 3
"""Version 2 had most logits as bounds, version 1 no sketches of the weights."""
METADATA = "rgexport_reference"


@dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
        name: for people.
        tokens: their number.
        bytes: the text's length in UTF-8; None for token ids.
        positions: those that have logits, ascending; at least one.
        greedy_tokens: length of the continuation.
        checkpoints: the numbers of tokens, ascending, after which there are recurrent states too.
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

    Attributes:
        format_version: see `FORMAT_VERSION`.
        model: the checkpoint's name.
        config: what was computed.
        files: the checkpoint's weight files.
        computed: `implementation`, `device`, `dtype`, `tf32` and versions.
        environment: of the machine.
        prompts: in the order of their tokens.
        structures: of the graphs that the exporter writes for the model.
        identity: the checkpoint's text side.
        data_sha256: of all that follows the header in the file; `write_reference` fills it in.
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
        """The number of tokens of all prompts."""
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
        return decode(*rows)

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

    def sketch(self, tensor: str) -> np.ndarray:
        """The sketch of a tensor, [rows, width] float32; see `weights.sketch`."""
        return self.arrays[sketch_name(tensor)].whole()

    def inputs(self, site: str) -> np.ndarray:
        """Mixtures of the inputs that linears take from a site, [m, K] float32."""
        return self.arrays[inputs_name(site)].whole()

    def outputs(self, tensor: str) -> np.ndarray:
        """Products of a linear's weights with the mixtures of its inputs, [rows, m] float32."""
        return self.arrays[outputs_name(tensor)].whole()

    def square(self, tensor: str) -> float:
        """Σ W² of a tensor."""
        index = list(model_tensors(self.header.config)).index(tensor)
        return float(self.arrays["squares"].read(index, index + 1)[0])


def sketch_name(tensor: str) -> str:
    """The array with the sketch of a tensor."""
    return f"weights.{tensor}"


def inputs_name(site: str) -> str:
    """The array with mixtures of the inputs from a site."""
    return f"inputs.{site}"


def outputs_name(tensor: str) -> str:
    """The array with products of a tensor and the mixtures of its inputs."""
    return f"outputs.{tensor}"


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
