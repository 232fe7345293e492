"""Identity items of the files beside a model, against those that this version writes."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rgexport._version import __version__
from rgexport.artifacts.artifact import Artifact, files_of
from rgexport.artifacts.format import FolderFormat, folder_format
from rgexport.artifacts.manifest import CARD
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, find_tokenizer_files
from rgexport.kernels.onnx.library import LIBRARY
from rgexport.validate.identity import IdentityItem, compared, first_names, not_compared
from rgexport.validate.text_items import MOST_CHARACTERS, completed_copy, file_text

_TextPair = tuple[str | None, str | None]
"""The texts of an artifact's file and of the expected file; None where a file is missing."""


def written_files(artifact: Artifact) -> Iterator[IdentityItem]:
    """Compares the files beside a model with those that this version writes for its manifest.

    Copies of the checkpoint's files are left out. Files that rgexport does not write are one item.
    """
    folder_form = folder_format(artifact.manifest.kind)
    assert folder_form is not None, "artifacts of other formats are no folders"
    names = files_of(artifact.path)
    pairs = _rewrite(artifact, folder_form, names)

    version = artifact.manifest.created_with.get("rgexport", "of an unknown version")
    for name, (text, expected) in pairs.items():
        item = compared(name, text, expected, "rgexport writes")
        if item.outcome == "differs" and version != __version__:
            item = not_compared(name, item.artifact, f"written by rgexport {version[:40]}")
        # Unchanged tokenizer files are compared with the original's elsewhere.
        if item.outcome != "same" or name not in TOKENIZER_FILES:
            yield item

    foreign = _foreign_files(artifact, folder_form, names, set(pairs))
    if foreign:
        yield not_compared("foreign files", first_names(foreign), "rgexport does not write them")


def _rewrite(
    artifact: Artifact, folder_form: FolderFormat, names: set[str]
) -> dict[str, _TextPair]:
    """Writes the program's files again; returns the name of each → its two texts."""
    folder = artifact.path
    manifest = artifact.manifest
    pairs = {}
    with completed_copy(find_tokenizer_files(folder), manifest.name) as (copy, ids):
        folder_form.write_program_files(copy, manifest, ids, names)
        for name in sorted(files_of(copy)):
            pairs[name] = _file_pair(folder / name, copy / name)
    return pairs


def _foreign_files(
    artifact: Artifact, folder_form: FolderFormat, names: set[str], written: set[str]
) -> list[str]:
    """Returns the names of files that neither belong to the model nor are written by rgexport."""
    model_entries = set(folder_form.entries)
    for tensor in artifact.manifest.tensors.values():
        for part in tensor.parts.values():
            model_entries.add(_top_entry(part.file))

    known = {CARD, *TOKENIZER_FILES, *written}
    if LIBRARY.name in names and file_text(artifact.path / LIBRARY.name) == file_text(LIBRARY):
        known.add(LIBRARY.name)

    return sorted(name for name in names - known if _top_entry(name) not in model_entries)


def _top_entry(file: str) -> str:
    return file.partition("/")[0]


def _file_pair(path: Path, expected: Path) -> _TextPair:
    """Returns the texts of two files; of two JSON objects only the fields that differ, if short."""
    pair = (file_text(path), file_text(expected))
    if pair[0] == pair[1] or path.suffix != ".json" or None in pair:
        return pair
    with suppress(ValueError, RecursionError, OSError):
        texts = _differing_fields(path, expected)
        if max(map(len, texts)) <= MOST_CHARACTERS:
            return texts
    return pair


def _differing_fields(path: Path, expected: Path) -> tuple[str, str]:
    """Returns the fields of two JSON files whose values differ, as text."""
    fields = _fields(parse_json(read_regular(path)))
    expected_fields = _fields(parse_json(read_regular(expected)))
    all_names = fields | expected_fields
    names = [name for name in all_names if fields.get(name) != expected_fields.get(name)]
    return _fields_text(fields, names), _fields_text(expected_fields, names)


def _fields_text(fields: dict[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {fields.get(name)}" for name in names)


def _fields(value: Any, name: str = "") -> dict[str, str]:
    """Returns the leaves of nested JSON objects: path with dots → value as JSON."""
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    fields: dict[str, str] = {}
    for key, item in value.items():
        path = f"{name}.{key}".lstrip(".")
        fields |= _fields(item, path)
    return fields
