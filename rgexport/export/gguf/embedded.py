"""The half of the manifest that is in a GGUF file's metadata."""

from dataclasses import dataclass
from typing import Literal

from rgexport.export.manifest import FORMAT_VERSION, Source
from rgexport.export.manifest_reader import check_config
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.griffin.config import NOTHING_ASKED_FOR, AskedFor, GriffinConfig

MANIFEST_KEY = "rgexport.manifest"


@dataclass(frozen=True, kw_only=True)
class EmbeddedManifest:
    """The half of a manifest that is in the metadata; the other half is read from the header.

    It does not depend on how tensors are stored, so it stays true when another tool quantizes the
    file. The fields are those of `Manifest`.
    """

    format_version: int = FORMAT_VERSION
    kind: Literal["gguf"] = "gguf"
    name: str
    created_with: dict[str, str]
    source: Source
    config: GriffinConfig
    instruction_tuned: bool | None
    asked_for: AskedFor = NOTHING_ASKED_FOR


def read_embedded(text: str) -> EmbeddedManifest:
    """Reads and checks an embedded manifest.

    Raises:
        Mismatch: no JSON, another format version, or a value of the wrong type.
    """
    fields = parse_json(text)
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise Mismatch(f"its format version is {version}; this rgexport reads {FORMAT_VERSION}")
    embedded = from_json(EmbeddedManifest, fields)
    check_config(embedded.config)
    return embedded
