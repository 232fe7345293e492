"""Identifies the model of a saved state; exports of one model have the same identity."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from rgexport.export.manifest import Manifest
from rgexport.files.hashing import FileRecord
from rgexport.griffin.config import GriffinConfig


@dataclass(frozen=True)
class Identity:
    """The facts that must be equal to continue a state; engine and precision may differ."""

    name: str
    """The model's name, only for messages."""
    weights: str
    """A hash of the original checkpoint's files."""
    window: int
    """Tokens that local attention sees."""
    template: str
    """A hash of the chat template; only conversations depend on it."""


def identity_of(manifest: Manifest, template: str) -> Identity:
    """Returns an artifact's identity; `template` is the text of its chat template."""
    return identity_of_files(manifest.name, manifest.source.files, manifest.config, template)


def artifact_hash(manifest: Manifest) -> str:
    """Hashes an artifact's manifest; the result differs between two precisions."""
    return _hash(json.dumps(manifest.to_dict(), sort_keys=True))


def identity_of_files(
    name: str, files: Mapping[str, FileRecord], config: GriffinConfig, template: str
) -> Identity:
    """Returns the identity of a checkpoint with these weight files."""
    hashes = sorted(record.sha256 for record in files.values())
    weights = _hash("\n".join([*hashes, repr(config.soft_cap)]))
    return Identity(name, weights, config.window, _hash(template))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
