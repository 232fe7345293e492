"""The original that an artifact was made from, and whether the artifact is of it, item by item."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_new_files
from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint, summarize
from rgexport.griffin.config import DEMO, SIZES, GriffinConfig
from rgexport.griffin.hub import cached_model
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.identity import (
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
from rgexport.validate.weights.tensor_errors import check_shapes


@dataclass(frozen=True)
class OriginalModel:
    """A checkpoint to compare with, and how it relates to the artifact.

    The checkpoint's configuration has the artifact's values for fields that its files do not state,
    and that the export was asked to change; `stated` is that of its files.
    """

    checkpoint: Checkpoint
    stated: GriffinConfig
    same_files: bool
    config_differences: tuple[str, ...]


def find_original(
    manifest: Manifest, model: str | None, adapter: Path | None = None
) -> OriginalModel | None:
    """Opens `model`; else the demo or a released model in the hub's cache, by the source's name.

    One that is found by its name must be the very same files, another one of the same shape. Raises
    RequestError if it cannot be opened, is damaged, or has other shapes.
    """
    if model is None and adapter is not None:
        raise RequestError("--adapter is for the model that -m names; give both")
    name = manifest.source.name
    checkpoint = open_checkpoint(model, adapter=adapter) if model else _open_by_name(name)
    same_files = checkpoint is not None and _same_files(manifest, checkpoint.weight_files)
    if checkpoint is None or (model is None and not same_files):
        return None
    if checkpoint.problems:
        raise RequestError(f"{checkpoint.path} is damaged: {summarize(checkpoint.problems)}")
    check_shapes(checkpoint.weights, manifest.tensors)
    stated = checkpoint.config
    adopted = set(unstated_fields(checkpoint.layout))
    if is_asked_for("window", manifest, stated.window):
        adopted.add("window")
    config = replace(stated, **{name: getattr(manifest.config, name) for name in adopted})
    differences = config_differences(manifest.config, config)
    return OriginalModel(replace(checkpoint, config=config), stated, same_files, differences)


def is_asked_for(name: str, manifest: Manifest, stated: Any) -> bool:
    """Whether the export was asked for a smaller window, or a soft cap for DeepMind's files."""
    value, option = getattr(manifest.config, name), getattr(manifest.asked_for, name, None)
    allowed = value < stated if name == "window" else manifest.source.layout == "deepmind"
    return value == option and allowed


def unstated_fields(layout: str) -> tuple[str, ...]:
    return ("window", "soft_cap") if layout == "deepmind" else ()


def _open_by_name(name: str) -> Checkpoint | None:
    ids = {size.hub_id.rpartition("/")[2]: size.hub_id for size in SIZES.values()}
    try:
        if name == DEMO:
            return open_checkpoint(size=DEMO)
        folder = cached_model(ids[name]) if name in ids else None
        return open_checkpoint(folder) if folder else None
    except RequestError:
        return None


def _same_files(manifest: Manifest, files: Mapping[str, Path]) -> bool:
    """Compares names and sizes first, since hashing takes long."""
    expected = manifest.source.files
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sizes != {name: record.size for name, record in expected.items()}:
        return False
    hashes = hash_new_files(files.values())
    return all(hashes[path] == expected[name].sha256 for name, path in files.items())


def config_differences(ours: GriffinConfig, theirs: GriffinConfig) -> tuple[str, ...]:
    """The fields that differ, as `field: ours → theirs`."""
    pairs = {name: (value, getattr(theirs, name)) for name, value in vars(ours).items()}
    return tuple(f"{name}: {a} → {b}" for name, (a, b) in pairs.items() if a != b)


@dataclass(frozen=True)
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
    """Compares all items with the original and a reference file; the worst outcome counts."""
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
    artifact: Artifact, text: Items, original: OriginalModel | None, reference: ReferenceFile | None
) -> Iterator[_ModelIdentity]:
    if original is not None:
        checkpoint, side = original.checkpoint, text_identity(original.checkpoint)
        config = _config_items(original.stated)
        for name in unstated_fields(checkpoint.layout):
            del config[name]
        files = {n: p for n, p in checkpoint.weight_files.items() if n in (WEIGHTS, CONFIG)}
        hashes = hash_new_files(files.values())
        adapter = _adapter_item({name: hashes[path] for name, path in files.items()})
        items = {**config, **adapter, **_expected_text(artifact, text, side)}
        yield _ModelIdentity("the original", original.stated, items, side)
    if reference is not None:
        header = reference.header
        adapter = _adapter_item({name: one.sha256 for name, one in header.files.items()})
        items = {**_config_items(header.config), **adapter}
        if header.identity is not None:
            items |= _expected_text(artifact, text, header.identity)
        yield _ModelIdentity("the reference file", header.config, items, header.identity)


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
    return {n: " ".join(v) if isinstance(v, tuple) else str(v) for n, v in vars(config).items()}


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
