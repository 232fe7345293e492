"""The manifest of an artifact, `rgexport.json`: what the folder holds and how it was made."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord
from rgexport.export.typed_json import plain
from rgexport.files.hashing import FileRecord
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.tokenizer_files import TOKENIZERS
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import Affine, Ggml, Scheme

MANIFEST = "rgexport.json"
COLUMNS = "columns"
"""A part of a matrix that is stored [in, out]: a row of the matrix is a column of it."""
FORMAT_VERSION = 1
Profile = Literal["cpu", "wasm", "webgpu"]
"""What the graph of an ONNX artifact is lowered for; see `export.onnx.profiles`."""
ACTIVATIONS = {"fp32": "float32", "fp16": "float16"}
"""Compute word → activation dtype."""


@dataclass(frozen=True)
class StoredPart:
    """Where a part of a tensor lies: row-major, `shape` in items of `dtype`.

    A float tensor and one in a ggml type have one part, `data`; `quantize.affine` and `.palette`
    say what the parts of a quantized one are.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """One weight as it is stored; `shape` is the canonical one of `griffin.layout`."""

    shape: tuple[int, ...]
    scheme: Scheme
    parts: dict[str, StoredPart]

    @property
    def rows_together(self) -> int:
        """How many rows share something, as those of a palette do, and are read as one."""
        by_row = (part for label, part in self.parts.items() if label != COLUMNS)
        return max(map(self._rows_per_row, by_row))

    def row_offset(self, label: str, row: int) -> int:
        """Where in its file the part `label`, which is not `COLUMNS`, of a row begins."""
        part = self.parts[label]
        return part.offset + row // self._rows_per_row(part) * part.row_bytes

    def _rows_per_row(self, part: StoredPart) -> int:
        return self.shape[0] // part.shape[0]


@dataclass(frozen=True)
class StateRecord:
    """A canonical state and the graph's input and output that carry it (shape without batch).

    In a `ring`, position p lies in slot p modulo the window; `canonical` is oldest first. A `row`
    is one of a matrix that has one for each recurrent layer. A `pair` is two float16 states that
    `input` and `output` name, the second one being what the first one's rounding left over, times
    2048; `hilo` is a row of such a pair.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Literal["canonical", "ring", "row", "pair", "hilo"]
    input: str
    output: str


@dataclass(frozen=True)
class ValueRecord:
    """One input or output of the graph; a dimension is a number or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class IoRecord:
    """All inputs and outputs of the graph, in its order."""

    inputs: tuple[ValueRecord, ...]
    outputs: tuple[ValueRecord, ...]


@dataclass(frozen=True)
class Source:
    """The checkpoint that an artifact was made from."""

    layout: str
    name: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an artifact; a runtime needs nothing else but the files listed here."""

    format_version: int = FORMAT_VERSION
    kind: str = "onnx"
    """A key of `formats.FORMATS`."""
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    precision: str
    compute: str
    exact: bool
    profile: Profile = "cpu"
    plan: dict[str, Scheme]
    tensors: dict[str, StoredTensor]
    states: tuple[StateRecord, ...]
    io: IoRecord
    instruction_tuned: bool | None
    files: dict[str, FileRecord]
    """Every other file of the folder, by its relative name."""
    check: CheckRecord = NOT_ASKED_FOR
    """How the export's self-check ended."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact understands text, not only token ids."""
        return any(name in TOKENIZERS for name in self.files)

    @property
    def rounds_activations(self) -> bool:
        """Whether products with quantized weights round activations to int8.

        llama.cpp's always do.
        """
        return not self.exact and any(_meets_int8(scheme) for scheme in self.plan.values())

    @property
    def weighted(self) -> bool:
        """Whether an importance matrix had a say in how weights were rounded."""
        return False

    def with_files(self, files: dict[str, FileRecord]) -> "Manifest":
        """This manifest of other files."""
        return dataclasses.replace(self, files=files)

    def with_check(self, check: CheckRecord) -> "Manifest":
        """This manifest after a self-check."""
        return dataclasses.replace(self, check=check)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        fields: dict[str, Any] = plain(self)
        return fields


def arithmetic(precision: str, compute: str, rounds_activations: bool) -> str:
    """For people: how an artifact stores and computes."""
    rounded = " (int8 in products)" if rounds_activations else ""
    return f"{precision} weights, {compute} activations{rounded}"


def _meets_int8(scheme: Scheme) -> bool:
    if isinstance(scheme, Ggml):
        return TYPES[scheme.type].is_quantized
    return isinstance(scheme, Affine)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `rgexport.json` into `folder` and has it on the disk when it returns."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest.to_dict(), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
