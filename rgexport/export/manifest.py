"""The manifest of an artifact, `rgexport.json`: what the folder holds and how it was made."""

import dataclasses
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rgexport.errors import RequestError
from rgexport.export.typed_json import Mismatch, Reader
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.json_fields import read_json
from rgexport.griffin.layout import model_tensors
from rgexport.hashing import FileRecord
from rgexport.quantize.plan import PRECISIONS
from rgexport.quantize.scheme import Scheme, scheme_from_dict, scheme_to_dict

MANIFEST = "rgexport.json"
FORMAT_VERSION = 1
TOKENIZERS = frozenset({"tokenizer.model", "tokenizer.json"})
"""Either is enough."""

Transform = Literal["one_plus", "neg8_softplus"]
"""What was done to a tensor before it was stored: 1 + w (norms), -8 softplus(w) (decays)."""

_COMPUTE = ("fp32", "fp16")
_ITEM_BYTES = {"uint8": 1, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class StoredPart:
    """Where a part of a tensor lies: `shape` is [rows, …] in items of `dtype`, row-major."""

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
        items = 1
        for size in self.shape:
            items *= size
        return items * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """One weight as it is stored; `shape` is the canonical one of `griffin.layout`."""

    shape: tuple[int, ...]
    scheme: Scheme
    parts: dict[str, StoredPart]
    transform: Transform | None = None


@dataclass(frozen=True)
class StateRecord:
    """A canonical state and the graph's input and output that carry it (shape without batch)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
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
    kind: Literal["onnx"] = "onnx"
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    precision: str
    compute: str
    exact: bool
    plan: dict[str, Scheme]
    tensors: dict[str, StoredTensor]
    states: tuple[StateRecord, ...]
    io: IoRecord
    instruction_tuned: bool | None
    files: dict[str, FileRecord]
    """Every other file of the folder, by its relative name."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact understands text, not only token ids."""
        return not TOKENIZERS.isdisjoint(self.files)

    def with_files(self, files: dict[str, FileRecord]) -> "Manifest":
        """This manifest of other files."""
        return dataclasses.replace(self, files=files)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _plain(fields | {"config": self.config.to_dict()})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `rgexport.json` into `folder` and has it on the disk when it returns."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest.to_dict(), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of the artifact in `folder`.

    Raises:
        RequestError: no artifact, foreign or damaged JSON, a newer format version, or content
            that contradicts itself; the line names the file and the place.
    """
    path = folder / MANIFEST
    fields = _load(path)
    version = fields.get("format_version")
    if fields.get("kind") != "onnx" or type(version) is not int:
        raise RequestError(f"{path} is not the manifest of an rgexport artifact")
    if version != FORMAT_VERSION:
        raise RequestError(
            f"{path} has format version {version}; this rgexport reads {FORMAT_VERSION}: "
            + ("update rgexport" if version > FORMAT_VERSION else "export the model again")
        )
    try:
        manifest = Reader({Scheme: scheme_from_dict}).read(Manifest, fields)
        _check(manifest)
    except (Mismatch, RequestError) as error:
        raise RequestError(f"{path} is damaged: {error}") from None
    return manifest


def is_artifact(folder: Path) -> bool:
    """Whether `folder` is an artifact, by its manifest's presence."""
    return (folder / MANIFEST).is_file()


def _load(path: Path) -> dict[str, Any]:
    if not path.parent.exists():
        raise RequestError(f"there is no {path.parent}")
    if not path.is_file():
        raise RequestError(f"{path.parent} is not an rgexport artifact: it has no {MANIFEST}")
    return read_json(path).values


def _check(manifest: Manifest) -> None:
    """What the types alone do not say.

    Raises:
        Mismatch: an unsafe file name, a part outside its file, or a tensor that the
            configuration does not have.
    """
    for name, record in manifest.files.items():
        _require(_is_safe(name), f"files: {name!r} leads out of the artifact")
        _require(
            record.size >= 0 and len(record.sha256) == 64, f"files.{name}: not a hash and size"
        )
    _require_word("precision", manifest.precision, PRECISIONS)
    _require_word("compute", manifest.compute, _COMPUTE)
    for name, size in manifest.config.to_dict().items():
        _require(type(size) is not int or size > 0, f"config.{name} is {size}")
    expected = {name: spec.shape for name, spec in model_tensors(manifest.config).items()}
    found = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in expected.keys() | found.keys():
        _require(
            found.get(name) == expected.get(name),
            f"tensors.{name} has shape {found.get(name)}; expected {expected.get(name)}",
        )
        _require(
            manifest.plan.get(name) == manifest.tensors[name].scheme,
            f"tensors.{name} is not stored as the plan says",
        )
        for label, part in manifest.tensors[name].parts.items():
            _check_part(f"tensors.{name}.parts.{label}", manifest, expected[name][0], part)


def _check_part(place: str, manifest: Manifest, rows: int, part: StoredPart) -> None:
    record = manifest.files.get(part.file)
    _require(record is not None, f"{place}: {part.file!r} is not among the files")
    assert record is not None
    _require_word(f"{place}.dtype", part.dtype, _ITEM_BYTES)
    _require(part.shape[:1] == (rows,), f"{place} has shape {part.shape}; expected {rows} rows")
    inside = part.offset >= 0 and part.offset + part.nbytes <= record.size
    _require(min(part.shape) > 0 and inside, f"{place} lies outside of {part.file}")


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name not in ("", MANIFEST) and not set(name) & set("\\:\0")
    return plain and str(path) == name and not path.is_absolute() and ".." not in path.parts


def _require_word(place: str, word: str, words: Collection[str]) -> None:
    _require(word in words, f"{place} is {word!r}; expected {' or '.join(words)}")


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise Mismatch(complaint)


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if isinstance(value, Scheme):
        return scheme_to_dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
