"""Compares an artifact's configuration, adapter and text side with the original's, item by item."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.files.hashing import hash_new_files
from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.identity.items import (
    IdentityItem,
    Items,
    TextIdentity,
    compared,
    completed_copy,
    file_text,
    merge_items,
    not_compared,
    text_identity,
)
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.source import OriginalModel, is_asked_for, unstated_fields


@dataclass(frozen=True, kw_only=True)
class _ModelIdentity:
    """The original or a reference file's model; `text` is None where it was not recorded."""

    title: str
    config: GriffinConfig
    items: Items
    text: TextIdentity | None


def compare_identity(
    artifact: Artifact,
    tokenizer: Tokenizer | None,
    original: OriginalModel | None,
    reference: ReferenceFile | None,
) -> tuple[IdentityItem, ...]:
    """Compares all items of an artifact with those of the original and of a reference file.

    Each item has the worst outcome of its comparisons. `tokenizer` is the artifact's.

    Raises:
        RequestError: a tokenizer, settings or a chat template cannot be read.
    """
    expected, manifest = expected_of(artifact.manifest.kind), artifact.manifest
    text = expected.text_items(artifact, tokenizer)
    adapter = _adapter_item({name: one.sha256 for name, one in manifest.source.files.items()})
    ours = {**_config_items(manifest.config), **adapter, **text}
    items = list(expected.written_items(artifact))
    for model in _models(artifact, text, original, reference):
        items += _compare(manifest, ours, model)
    items += [not_compared(name, value, "no original is known") for name, value in ours.items()]
    none = ("adapter", None, None)
    return merge_items(i for i in items if (i.name, i.artifact, i.expected) != none)


def _models(
    artifact: Artifact,
    text: Items,
    original: OriginalModel | None,
    reference: ReferenceFile | None,
) -> Iterator[_ModelIdentity]:
    if original is not None:
        checkpoint, side = original.checkpoint, text_identity(original.checkpoint)
        config = _config_items(original.stated)
        for name in unstated_fields(checkpoint.layout):
            del config[name]
        adapter = _adapter_item(_adapter_hashes(checkpoint.weight_files))
        items = {**config, **adapter, **_expected_text(artifact, text, side)}
        yield _ModelIdentity(title="the original", config=original.stated, items=items, text=side)
    if reference is not None:
        header = reference.header
        adapter = _adapter_item({name: one.sha256 for name, one in header.files.items()})
        items = {**_config_items(header.config), **adapter}
        if header.identity is not None:
            items |= _expected_text(artifact, text, header.identity)
        yield _ModelIdentity(
            title="the reference file", config=header.config, items=items, text=header.identity
        )


def _compare(manifest: Manifest, ours: Items, model: _ModelIdentity) -> Iterator[IdentityItem]:
    for name, value in ours.items():
        if name not in model.items:
            yield not_compared(name, value, f"{model.title} does not record it")
            continue
        theirs = model.items[name]
        if name == "adapter":
            asked_for = theirs is None
        else:
            stated = getattr(model.config, name, None)
            asked_for = stated is not None and is_asked_for(name, manifest, stated)
        item = compared(name, value, theirs, f"{model.title} has", asked_for)
        text, version = model.text, manifest.created_with.get("rgexport")
        converted = text is not None and name in text.made and version != text.version
        if item.outcome == "differs" and converted:
            item = not_compared(name, value, "written by another version of rgexport")
        yield item


def _config_items(config: GriffinConfig) -> dict[str, str | None]:
    values = vars(config).items()
    return {n: " ".join(v) if isinstance(v, tuple) else str(v) for n, v in values}


def _adapter_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    paths = {name: files[name] for name in (WEIGHTS, CONFIG) if name in files}
    hashes = hash_new_files(paths.values())
    return {name: hashes[path] for name, path in paths.items()}


def _adapter_item(hashes: Mapping[str, str]) -> dict[str, str | None]:
    first = [hashes[name][:16] for name in (WEIGHTS, CONFIG) if name in hashes]
    return {"adapter": f"sha256 {', '.join(first)}" if first else None}


def _expected_text(artifact: Artifact, text: Items, identity: TextIdentity) -> Items:
    """The items that an artifact of a model should have.

    DeepMind's and Hugging Face's releases of a model have one `tokenizer.model`. Settings are those
    of the layout that the artifact was made from: DeepMind's has none.
    """
    path = artifact.file("tokenizer.model")
    if artifact.manifest.source.layout == identity.layout or path.name not in text:
        return identity.items
    with completed_copy([path] if path.is_file() else [], artifact.manifest.name) as (folder, _):
        files = {name: file_text(folder / name) for name in TOKENIZER_FILES if name != path.name}
    return {**identity.items, **files}
