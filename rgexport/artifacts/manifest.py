"""The manifest of an artifact, `rgexport.json`: its files and tensors, and how it was made."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rgexport.choices import Profile
from rgexport.errors import printable
from rgexport.files.atomic import write_file
from rgexport.files.hashing import FileRecord
from rgexport.files.typed_json import to_json
from rgexport.griffin.config import NOTHING_ASKED_FOR, AskedFor, GriffinConfig
from rgexport.griffin.tokenizer_files import TOKENIZERS
from rgexport.quantize.schemes.registry import FloatDtype, Scheme, Uniform


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """The outcome of a self-check (`unverified` if it failed), and its measurements if any.

    `reason` says why it was skipped, or the fault. The artifact took `tokens`; at `positions`
    logits were compared: `kl` is the mean KL(original ‖ artifact) in nats, `relative_max` is max
    |Δlogit| / max |logit| against the dequantized reference. `engine` has the runtime's name and
    version.
    """

    status: Literal["verified", "unverified", "skipped"]
    reason: str = ""
    tokens: int = 0
    positions: int = 0
    kl: float | None = None
    kl_standard_error: float | None = None
    relative_max: float | None = None
    engine: str | None = None

    @property
    def sentence(self) -> str:
        if self.status == "skipped":
            return printable(f"Not checked: {self.reason}.")
        verdict = self.status + (f", since {self.reason}" if self.reason else "")
        if not self.positions:
            return printable(f"Checked: {verdict}.")
        compared = f" ({self.positions} compared)" if self.positions < self.tokens else ""
        return printable(
            f"Checked on {self.tokens} tokens{compared} in {self.engine}: "
            f"KL to the original {self.nats}; largest difference to the dequantized reference "
            f"{self.share} of the largest logit: {verdict}."
        )

    @property
    def nats(self) -> str:
        if self.kl is None or self.kl_standard_error is None:
            return "not a number"
        return f"{self.kl:.3g} ± {self.kl_standard_error:.1g} nats"

    @property
    def share(self) -> str:
        return "not a number" if self.relative_max is None else f"{100 * self.relative_max:.2g} %"


def skipped(reason: str) -> CheckRecord:
    return CheckRecord(status="skipped", reason=reason)


NOT_ASKED_FOR = skipped("it was not asked for")
SelfCheck = Callable[[Path], CheckRecord]
MANIFEST = "rgexport.json"
CARD = "README.md"  # the model card; users may edit it
COLUMNS = "columns"
"""Name of the part with the data of a matrix that is stored transposed, [in, out]."""
FORMAT_VERSION = 1
ACTIVATIONS: dict[str, FloatDtype] = {"fp32": "float32", "fp16": "float16"}
"""Word of `--compute` → dtype of the activations."""


@dataclass(frozen=True)
class StoredPart:
    """The place of a part of a tensor, such as `data`: row-major, `shape` in items of `dtype`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """One weight as it is stored; `shape` is the canonical one of `griffin.layout`."""

    shape: tuple[int, ...]
    scheme: Scheme
    parts: dict[str, StoredPart]

    @property
    def uniform(self) -> Uniform:
        """The scheme of a tensor, or of a row group, that has no row groups of its own."""
        (scheme,) = self.scheme.uniform
        return scheme

    @property
    def rows_together(self) -> int:
        """How many rows share stored data, such as a palette, and are read together."""
        if len(self.scheme.uniform) > 1:
            return 1
        by_row = (part for label, part in self.parts.items() if label != COLUMNS)
        return max(map(self._rows_per_row, by_row))

    def row_offset(self, label: str, row: int) -> int:
        """The offset in its file of a row of the part `label`, not `COLUMNS` nor of row groups."""
        part = self.parts[label]
        return part.offset + row // self._rows_per_row(part) * part.row_bytes

    def _rows_per_row(self, part: StoredPart) -> int:
        return self.shape[0] // part.shape[0]


@dataclass(frozen=True)
class StateRecord:
    """A canonical state, and the graph's input and output for it; `shape` is without batch.

    Layouts: `canonical` is oldest first. In a `ring`, position p is in slot p modulo the window.
    A `row` is one of a matrix with a row for each recurrent layer. A `pair` is two float16 states,
    the second the rounding error of the first, times 2048; `hilo` is a row of such a pair.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Literal["canonical", "ring", "row", "pair", "hilo"]
    input: str
    output: str


@dataclass(frozen=True)
class ValueRecord:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class IoRecord:
    inputs: tuple[ValueRecord, ...]
    outputs: tuple[ValueRecord, ...]


@dataclass(frozen=True)
class Source:
    layout: str
    name: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format_version: int = FORMAT_VERSION
    kind: str = "onnx"  # a key of `formats.FORMATS`
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
    files: dict[str, FileRecord]  # every other file of the folder, by its relative name
    check: CheckRecord = NOT_ASKED_FOR  # how the export's self-check ended
    asked_for: AskedFor = NOTHING_ASKED_FOR

    @property
    def has_tokenizer(self) -> bool:
        return any(name in TOKENIZERS for name in self.files)

    @property
    def rounds_activations(self) -> bool:
        """Whether products with quantized weights round activations to int8, as llama.cpp's do."""
        uniform = (one for scheme in self.plan.values() for one in scheme.uniform)
        return not self.exact and any(one.rounds_activations for one in uniform)

    @property
    def weighted(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return dict(to_json(self))


def arithmetic(precision: str, compute: str, rounds_activations: bool) -> str:
    rounded = " (int8 in products)" if rounds_activations else ""
    return f"{precision} weights, {compute} activations{rounded}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file(folder / MANIFEST, [(json.dumps(manifest.to_dict(), indent=1) + "\n").encode()])


@dataclass(frozen=True)
class Identity:
    name: str  # the model's name, only for messages
    weights: str  # a hash of the original checkpoint's files
    window: int  # tokens that local attention sees
    template: str  # a hash of the chat template; only conversations depend on it


def identity_of(manifest: Manifest, template: str) -> Identity:
    return identity_of_files(manifest.name, manifest.source.files, manifest.config, template)


def artifact_hash(manifest: Manifest) -> str:
    """Hashes an artifact's manifest; the result differs between two precisions."""
    return _hash(json.dumps(manifest.to_dict(), sort_keys=True))


def identity_of_files(
    name: str, files: Mapping[str, FileRecord], config: GriffinConfig, template: str
) -> Identity:
    hashes = sorted(record.sha256 for record in files.values())
    weights = _hash("\n".join([*hashes, repr(config.soft_cap)]))
    return Identity(name, weights, config.window, _hash(template))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
