"""The original that an artifact was made from, where it can be found."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.manifest import Manifest
from rgexport.files.hashing import hash_new_files
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint, summarize
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.hub import cached_model
from rgexport.griffin.sizes import DEMO, SIZES
from rgexport.validate.weights.tensor_errors import check_shapes


@dataclass(frozen=True)
class OriginalModel:
    """A checkpoint to compare with, and how it relates to the artifact.

    The checkpoint's configuration has the artifact's values for fields that its files do not state,
    and that the export was asked to change; `stated` is that of its files. `same_files` tells
    whether the artifact was made from its weight files.
    """

    checkpoint: Checkpoint
    stated: GriffinConfig
    same_files: bool
    config_differences: tuple[str, ...]


def find_original(
    manifest: Manifest, model: str | None, adapter: Path | None = None
) -> OriginalModel | None:
    """Opens `model`; else the demo or a released model in the hub's cache, by the source's name.

    A `model` that the user names may be any of the same shape. One that is found by its name must
    be the very same files.

    Raises:
        RequestError: `model` or its `adapter` cannot be opened, is damaged, or has other shapes.
    """
    if model is None and adapter is not None:
        raise RequestError("--adapter is for the model that -m names; give both")
    if model is None:
        checkpoint = _open_by_name(manifest.source.name)
    else:
        checkpoint = open_checkpoint(model, adapter=adapter)
    if checkpoint is None:
        return None
    same_files = _same_files(manifest, checkpoint.weight_files)
    if model is None and not same_files:
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
    """Whether the export was asked for the artifact's value of a field of the configuration.

    A window can only become smaller than the `stated` one, and a soft cap is an option for
    DeepMind's files alone.
    """
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
