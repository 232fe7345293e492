"""Compares an artifact's configuration, adapter and text side with the original's, item by item."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.files.hashing import FileRecord, hash_new_files
from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.identity.items import IdentityItem, compared, not_compared, one_each
from rgexport.validate.identity.text import (
    Items,
    TextIdentity,
    completed_copy,
    file_words,
    text_identity,
)
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.source import Original, is_asked_for, unstated_fields


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What an artifact's identity is compared with.

    Attributes:
        title: `the original` or `the reference file`.
        config: what it computes.
        unstated: fields of the configuration that it does not state.
        adapter: the adapter that is merged into it, in words.
        text: its text side; None where it was not recorded.
    """

    title: str
    config: GriffinConfig
    unstated: Collection[str]
    adapter: str | None
    text: TextIdentity | None


def compare_identity(
    artifact: Artifact,
    tokenizer: Tokenizer | None,
    original: Original | None,
    reference: ReferenceFile | None,
) -> tuple[IdentityItem, ...]:
    """All items of an artifact, each with the worst outcome of its comparisons.

    Args:
        artifact: the artifact.
        tokenizer: the artifact's; None where it takes token ids only.
        original: the checkpoint to compare with, if it is known.
        reference: the reference file to compare with, if there is one.

    Raises:
        RequestError: a tokenizer, settings or a chat template cannot be read.
    """
    form, manifest = expected_of(artifact.manifest.kind), artifact.manifest
    text = form.text_items(artifact, tokenizer)
    items = list(form.written_items(artifact))
    for model in _models(original, reference):
        items += _config_items(manifest, model)
        items += _adapter_items(manifest, model)
        items += _text_items(artifact, text, model)
    ours = {**{name: _shown(value) for name, value in vars(manifest.config).items()}, **text}
    items += [not_compared(name, value, "no original is known") for name, value in ours.items()]
    return one_each(items)


def _models(original: Original | None, reference: ReferenceFile | None) -> Iterator[_Model]:
    if original is not None:
        checkpoint = original.checkpoint
        yield _Model(
            title="the original",
            config=original.stated,
            unstated=unstated_fields(checkpoint.layout),
            adapter=_adapter_words(_adapter_files(checkpoint.weight_files)),
            text=text_identity(checkpoint),
        )
    if reference is not None:
        header = reference.header
        yield _Model(
            title="the reference file",
            config=header.config,
            unstated=(),
            adapter=_adapter_words(header.files),
            text=header.identity,
        )


def _config_items(manifest: Manifest, model: _Model) -> Iterator[IdentityItem]:
    for field in dataclasses.fields(manifest.config):
        name = field.name
        ours, theirs = getattr(manifest.config, name), getattr(model.config, name)
        if name in model.unstated:
            yield not_compared(name, _shown(ours), f"{model.title} does not state it")
        else:
            asked = is_asked_for(name, manifest, theirs)
            yield compared(name, _shown(ours), _shown(theirs), f"{model.title} has", asked)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _adapter_items(manifest: Manifest, model: _Model) -> Iterator[IdentityItem]:
    """Nothing where neither has an adapter."""
    ours = _adapter_words(manifest.source.files)
    if ours or model.adapter:
        yield compared("adapter", ours, model.adapter, f"{model.title} has", not model.adapter)


def _adapter_files(files: Mapping[str, Any]) -> dict[str, FileRecord]:
    paths = {name: files[name] for name in (WEIGHTS, CONFIG) if name in files}
    hashes = hash_new_files(paths.values())
    return {name: FileRecord(hashes[path], path.stat().st_size) for name, path in paths.items()}


def _adapter_words(files: Mapping[str, FileRecord]) -> str | None:
    hashes = [files[name].sha256[:16] for name in (WEIGHTS, CONFIG) if name in files]
    return f"sha256 {', '.join(hashes)}" if hashes else None


def _text_items(artifact: Artifact, text: Items, model: _Model) -> Iterator[IdentityItem]:
    identity, version = model.text, artifact.manifest.created_with.get("rgexport")
    expected = {} if identity is None else _expected_text(artifact, text, identity)
    for name, value in text.items():
        if identity is None or name not in expected:
            yield not_compared(name, value, f"{model.title} does not record it")
            continue
        item = compared(name, value, expected[name], f"{model.title} has")
        made_otherwise = name in identity.made and version != identity.version
        if item.outcome == "differs" and made_otherwise:
            item = not_compared(name, value, "written by another version of rgexport")
        yield item


def _expected_text(artifact: Artifact, text: Items, identity: TextIdentity) -> Items:
    """The items that an artifact of a model should have.

    DeepMind's and Hugging Face's releases of a model have one `tokenizer.model`. Settings are those
    of the layout that the artifact was made from: DeepMind's has none.
    """
    path = artifact.file("tokenizer.model")
    if artifact.manifest.source.layout == identity.layout or path.name not in text:
        return identity.items
    with completed_copy([path] if path.is_file() else [], artifact.manifest.name) as (folder, _):
        files = {name: file_words(folder / name) for name in TOKENIZER_FILES if name != path.name}
    return {**identity.items, **files}
