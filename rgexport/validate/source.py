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
from rgexport.validate.identity import IdentityItem, compared, merge_items, not_compared
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.text_items import (
    Items,
    TextIdentity,
    completed_copy,
    file_text,
    text_identity,
)
from rgexport.validate.weights.tensor_pairs import check_shapes


@dataclass(frozen=True)
class OriginalModel:
    """A checkpoint to compare with, and how it relates to the artifact.

    Attributes:
        checkpoint: The original. Its configuration has the artifact's values for fields that its
            files do not state, and for those that the export was asked to change.
        stated: The configuration that its files state.
        same_files: Whether the artifact was made from these very weight files.
        config_differences: The fields that differ nevertheless, as `field: artifact → original`.
    """

    checkpoint: Checkpoint
    stated: GriffinConfig
    same_files: bool
    config_differences: tuple[str, ...]


def find_original(
    manifest: Manifest, model: str | None, adapter: Path | None = None
) -> OriginalModel | None:
    """Opens `model`; else the demo or a released model in the hub's cache, by the source's name.

    A model that is found by its name is returned only if its files are the artifact's source; one
    that was named may be any model of the same shapes.

    Raises:
        RequestError: The model cannot be opened, is damaged, or has other shapes.
    """
    if model is None and adapter is not None:
        raise RequestError("--adapter is for the model that -m names; give both")
    if model:
        checkpoint: Checkpoint | None = open_checkpoint(model, adapter=adapter)
    else:
        checkpoint = _open_by_name(manifest.source.name)
    if checkpoint is None:
        return None
    same_files = _same_files(manifest, checkpoint.weight_files)
    if model is None and not same_files:
        return None
    if checkpoint.problems:
        raise RequestError(f"{checkpoint.path} is damaged: {summarize(checkpoint.problems)}")
    check_shapes(checkpoint.weights, manifest.tensors)

    stated = checkpoint.config
    config = _adopt_fields(manifest, stated, checkpoint.layout)
    differences = config_differences(manifest.config, config)
    return OriginalModel(replace(checkpoint, config=config), stated, same_files, differences)


def _adopt_fields(manifest: Manifest, stated: GriffinConfig, layout: str) -> GriffinConfig:
    """Returns the stated configuration with the artifact's values where they may differ."""
    adopted = set(unstated_fields(layout))
    if is_asked_for("window", manifest, stated.window):
        adopted.add("window")
    values = {name: getattr(manifest.config, name) for name in adopted}
    return replace(stated, **values)


def is_asked_for(name: str, manifest: Manifest, stated: Any) -> bool:
    """Whether the export was asked for a smaller window, or a soft cap for DeepMind's files."""
    value = getattr(manifest.config, name)
    option = getattr(manifest.asked_for, name, None)
    if value != option:
        return False
    if name == "window":
        return bool(value < stated)
    return manifest.source.layout == "deepmind"


def unstated_fields(layout: str) -> tuple[str, ...]:
    """Returns the fields of a configuration that files of a layout do not have."""
    if layout == "deepmind":
        return ("window", "soft_cap")
    return ()


def _open_by_name(name: str) -> Checkpoint | None:
    """Opens the demo or a released model of this name, None if it is not on this machine."""
    try:
        if name == DEMO:
            return open_checkpoint(size=DEMO)
        for size in SIZES.values():
            if size.hub_id.rpartition("/")[2] == name:
                folder = cached_model(size.hub_id)
                return open_checkpoint(folder) if folder else None
    except RequestError:
        return None
    return None


def _same_files(manifest: Manifest, files: Mapping[str, Path]) -> bool:
    """Compares names and sizes first, since hashing takes long."""
    expected = manifest.source.files
    sizes = {name: path.stat().st_size for name, path in files.items()}
    expected_sizes = {name: record.size for name, record in expected.items()}
    if sizes != expected_sizes:
        return False
    hashes = hash_new_files(files.values())
    return all(hashes[path] == expected[name].sha256 for name, path in files.items())


def config_differences(config: GriffinConfig, expected: GriffinConfig) -> tuple[str, ...]:
    """Returns the fields that differ, as `field: value → expected value`."""
    differences = []
    for name, value in vars(config).items():
        expected_value = getattr(expected, name)
        if value != expected_value:
            differences.append(f"{name}: {value} → {expected_value}")
    return tuple(differences)


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
    manifest = artifact.manifest
    expected = expected_of(manifest.kind)
    text = expected.text_items(artifact, tokenizer)
    source_hashes = {name: record.sha256 for name, record in manifest.source.files.items()}
    artifact_items = {**_config_items(manifest.config), **_adapter_item(source_hashes), **text}

    items = list(expected.written_items(artifact))
    if original is not None:
        items += _compare(manifest, artifact_items, _original_identity(artifact, text, original))
    if reference is not None:
        items += _compare(manifest, artifact_items, _file_identity(artifact, text, reference))
    # These remain only for names that nothing was compared with.
    for name, value in artifact_items.items():
        items.append(not_compared(name, value, "no original is known"))

    return merge_items(item for item in items if not _is_missing_adapter(item))


def _is_missing_adapter(item: IdentityItem) -> bool:
    """Whether neither side has an adapter, which is not worth a mention."""
    return item.name == "adapter" and item.artifact is None and item.expected is None


def _original_identity(artifact: Artifact, text: Items, original: OriginalModel) -> _ModelIdentity:
    checkpoint = original.checkpoint
    identity = text_identity(checkpoint)
    config = _config_items(original.stated)
    for name in unstated_fields(checkpoint.layout):
        del config[name]

    weight_files = checkpoint.weight_files
    paths = {name: weight_files[name] for name in (WEIGHTS, CONFIG) if name in weight_files}
    hashes = hash_new_files(paths.values())
    adapter = _adapter_item({name: hashes[path] for name, path in paths.items()})

    items = {**config, **adapter, **_expected_text(artifact, text, identity)}
    return _ModelIdentity("the original", original.stated, items, identity)


def _file_identity(artifact: Artifact, text: Items, reference: ReferenceFile) -> _ModelIdentity:
    header = reference.header
    hashes = {name: record.sha256 for name, record in header.files.items()}
    items = {**_config_items(header.config), **_adapter_item(hashes)}
    if header.identity is not None:
        items |= _expected_text(artifact, text, header.identity)
    return _ModelIdentity("the reference file", header.config, items, header.identity)


def _compare(
    manifest: Manifest, artifact_items: Items, model: _ModelIdentity
) -> Iterator[IdentityItem]:
    for name, value in artifact_items.items():
        if name in model.items:
            yield _compare_item(manifest, name, value, model)
        else:
            yield not_compared(name, value, f"{model.title} does not record it")


def _compare_item(
    manifest: Manifest, name: str, value: str | None, model: _ModelIdentity
) -> IdentityItem:
    expected = model.items[name]
    if name == "adapter":
        asked_for = expected is None
    else:
        stated = getattr(model.config, name, None)
        asked_for = stated is not None and is_asked_for(name, manifest, stated)
    item = compared(name, value, expected, f"{model.title} has", asked_for)

    # Another version of rgexport may convert a tokenizer's file differently.
    version = manifest.created_with.get("rgexport")
    text = model.text
    converted = text is not None and name in text.made and version != text.version
    if item.outcome == "differs" and converted:
        return not_compared(name, value, "written by another version of rgexport")
    return item


def _config_items(config: GriffinConfig) -> dict[str, str | None]:
    items: dict[str, str | None] = {}
    for name, value in vars(config).items():
        if isinstance(value, tuple):
            items[name] = " ".join(value)
        else:
            items[name] = str(value)
    return items


def _adapter_item(hashes: Mapping[str, str]) -> dict[str, str | None]:
    """Returns the item of an adapter's files by the hashes of all weight files."""
    prefixes = [hashes[name][:16] for name in (WEIGHTS, CONFIG) if name in hashes]
    if not prefixes:
        return {"adapter": None}
    return {"adapter": f"sha256 {', '.join(prefixes)}"}


def _expected_text(artifact: Artifact, text: Items, identity: TextIdentity) -> Items:
    """Returns the text items that an artifact of a model should have.

    DeepMind's and Hugging Face's releases of a model have one `tokenizer.model`. Settings are those
    of the layout that the artifact was made from: DeepMind's has none.
    """
    path = artifact.file("tokenizer.model")
    if artifact.manifest.source.layout == identity.layout or path.name not in text:
        return identity.items

    tokenizer_files = []
    if path.is_file():
        tokenizer_files.append(path)
    with completed_copy(tokenizer_files, artifact.manifest.name) as (folder, _):
        completed = {}
        for name in TOKENIZER_FILES:
            if name != path.name:
                completed[name] = file_text(folder / name)
    return {**identity.items, **completed}
