"""Writes the folder `model.mlpackage`, with the layout of Core ML's own tools."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model

PACKAGE = "model.mlpackage"
_AUTHOR = "com.apple.CoreML"
MODEL_FILE = f"{PACKAGE}/Data/{_AUTHOR}/model.mlmodel"
WEIGHT_FILE = f"{PACKAGE}/Data/{_AUTHOR}/weights/weight.bin"
MANIFEST_FILE = f"{PACKAGE}/Manifest.json"

_ITEMS = {
    "model.mlmodel": "CoreML Model Specification",
    "weights": "CoreML Model Weights",
}
"""Item of the package → its description, as coremltools writes it."""


def write_package(folder: Path, model: "Model") -> None:
    """Writes the package in `folder`, except for the file of weights.

    The same model gives the same bytes: the identifiers of the items are made from its hash.
    """
    data = model.SerializeToString(deterministic=True)
    path = folder / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    manifest = _manifest(hashlib.sha256(data).hexdigest())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _manifest(digest: str) -> dict[str, object]:
    identifiers = {name: str(uuid.uuid5(uuid.NAMESPACE_OID, digest + name)) for name in _ITEMS}
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[name]: {
                "author": _AUTHOR,
                "description": description,
                "name": name,
                "path": f"{_AUTHOR}/{name}",
            }
            for name, description in _ITEMS.items()
        },
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
