"""A package by itself, without an artifact's manifest: what can be known to be wrong with it."""

import hashlib
import json
from collections.abc import Iterator

from rgexport.export.manifest_reader import check_config
from rgexport.export.mil.conventions import Shapes, check_conventions, check_shared
from rgexport.export.mil.own_metadata import CONFIG, altered_blobs, read_digests
from rgexport.export.mil.package import Package
from rgexport.export.mil.structure import ALIGNMENT, check_package
from rgexport.export.typed_json import parse, read
from rgexport.export.verified import is_marked_sound, mark_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors


def is_ours(package: Package) -> bool:
    """Whether its metadata say that rgexport made it."""
    return CONFIG in package.description.user_defined


def check_bare(package: Package, *, verify: bool = False) -> list[str]:
    """Complaints about anyone's package, and more about one of ours.

    The weights of one of ours are compared with the hashes in its metadata: where the files were
    not seen before in this state, or with `verify`.
    """
    ours = is_ours(package)
    wrong = check_package(package, alignment=ALIGNMENT if ours else None)
    if ours:
        wrong += _check_ours(package)
    if ours and not wrong:
        wrong += _check_weights(package, verify)
    return wrong


def _check_ours(package: Package) -> Iterator[str]:
    try:
        shapes = _shapes(package)
    except ValueError as error:
        yield f"its metadata are damaged: {CONFIG} is no configuration ({error})"
        return
    yield from check_conventions(package, shapes)
    yield from check_shared(package, shapes)


def _shapes(package: Package) -> Shapes:
    text = package.description.user_defined[CONFIG]
    config = read(GriffinConfig, parse(text))
    check_config(config)
    return {name: spec.shape for name, spec in model_tensors(config).items()}


def _check_weights(package: Package, anew: bool) -> Iterator[str]:
    try:
        digests = read_digests(package)
    except ValueError as error:
        yield f"its metadata are damaged: {error}"
        return
    content_hash = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    paths = [file.path for file in package.blob_files.values()]
    if not anew and all(is_marked_sound(path, content_hash) for path in paths):
        return
    wrong = altered_blobs(package, digests)
    yield from (f"{name} was altered (its hash differs)" for name in wrong)
    if not wrong:
        for path in paths:
            mark_sound(path, content_hash)
