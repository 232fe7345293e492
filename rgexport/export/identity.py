"""What a saved state is of: the same model may have been exported many times."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from rgexport.export.manifest import Manifest
from rgexport.files.hashing import FileRecord
from rgexport.griffin.config import GriffinConfig


@dataclass(frozen=True)
class Identity:
    """What must be equal for a state to be continued; the engine and the bits may differ.

    Attributes:
        name: the model's name, for messages alone.
        weights: a hash of the original checkpoint's files.
        window: tokens that local attention sees.
        template: a hash of the chat template; it matters to conversations alone.
    """

    name: str
    weights: str
    window: int
    template: str


def identity_of(manifest: Manifest, template: str) -> Identity:
    """What states of an artifact are of; `template` is the text of its chat template."""
    return identity_of_files(manifest.name, manifest.source.files, manifest.config, template)


def artifact_hash(manifest: Manifest) -> str:
    """Returns a hash of all that an artifact consists of; it differs between two precisions."""
    return _hash(json.dumps(manifest.to_dict(), sort_keys=True))


def identity_of_files(
    name: str, files: Mapping[str, FileRecord], config: GriffinConfig, template: str
) -> Identity:
    """What states of a checkpoint with such weight files are of."""
    hashes = sorted(record.sha256 for record in files.values())
    weights = _hash("\n".join([*hashes, repr(config.soft_cap)]))
    return Identity(name, weights, config.window, _hash(template))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
