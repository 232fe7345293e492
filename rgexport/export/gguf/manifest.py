"""The manifest of a GGUF file: one half is in its metadata, the other is read from its header.

The half in the metadata does not depend on how tensors are stored, so it stays true when another
tool quantizes the file.
"""

from dataclasses import dataclass
from typing import Literal

from rgexport.export.manifest import FORMAT_VERSION, Manifest, Source
from rgexport.export.manifest_reader import check_config
from rgexport.export.typed_json import Mismatch, parse, read
from rgexport.griffin.config import GriffinConfig


@dataclass(frozen=True, kw_only=True)
class EmbeddedManifest:
    """The half in the metadata; the fields are those of `Manifest`."""

    format_version: int = FORMAT_VERSION
    kind: Literal["gguf"] = "gguf"
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    instruction_tuned: bool | None


def read_embedded(text: str) -> EmbeddedManifest:
    """Reads and checks the half in the metadata.

    Raises:
        Mismatch: no JSON, another format version, or a value of the wrong type.
    """
    fields = parse(text)
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise Mismatch(f"its format version is {version}; this rgexport reads {FORMAT_VERSION}")
    embedded = read(EmbeddedManifest, fields)
    check_config(embedded.config)
    return embedded


@dataclass(frozen=True, kw_only=True)
class GgufManifest(Manifest):
    """The whole manifest; `precision` is the word of the file's type, such as `q4_k_m`.

    `states` and `io` are empty: llama.cpp builds the graph. The one record in `files` has the
    hash of the tensors' data, since no file can hold its own.
    """

    kind: str = "gguf"
    pieces: int
    """Tokens of the vocabulary in the file; 0 where there is none."""
    imatrix: bool
    """Whether an importance matrix was used."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a vocabulary."""
        return self.pieces > 0

    @property
    def weighted(self) -> bool:
        """Whether an importance matrix was used."""
        return self.imatrix
