"""The manifest of a GGUF file: one half lies in its metadata, the other is read off its header.

What lies in the file does not depend on how its tensors are stored, so that another tool may
store them otherwise without making it a lie.
"""

from dataclasses import dataclass
from typing import Any, Literal

from rgexport.export.manifest import FORMAT_VERSION, Manifest, Source
from rgexport.export.manifest_reader import check_config
from rgexport.export.typed_json import Mismatch, Reader, parse, plain
from rgexport.griffin.config import GriffinConfig

KIND: Literal["gguf"] = "gguf"


@dataclass(frozen=True, kw_only=True)
class EmbeddedManifest:
    """The half that lies in the file; the fields are those of `Manifest`."""

    format_version: int = FORMAT_VERSION
    kind: Literal["gguf"] = KIND
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    instruction_tuned: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        fields: dict[str, Any] = plain(self)
        return fields


def read_embedded(text: str) -> EmbeddedManifest:
    """Reads what a file's metadata hold.

    Raises:
        Mismatch: no JSON, another format version, or a value of the wrong type.
    """
    fields = parse(text)
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise Mismatch(f"its format version is {version}; this rgexport reads {FORMAT_VERSION}")
    embedded = Reader().read(EmbeddedManifest, fields)
    check_config(embedded.config)
    return embedded


@dataclass(frozen=True, kw_only=True)
class GgufManifest(Manifest):
    """The whole of it; `precision` is the word of the file's type, such as `q4_k_m`.

    `states` and `io` are empty: llama.cpp builds the graph. The one record in `files` has the
    hash of the tensors' data, since no file can hold its own.
    """

    kind: str = KIND
    pieces: int
    """Tokens of the vocabulary in the file; 0 where it takes token ids alone."""
    imatrix: bool
    """Whether an importance matrix was used."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file understands text, not only token ids."""
        return self.pieces > 0

    @property
    def weighted(self) -> bool:
        """Whether an importance matrix had a say in how weights were rounded."""
        return self.imatrix
