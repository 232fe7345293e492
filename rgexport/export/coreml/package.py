"""Names and writes the files of a package, in the layout of Core ML's own tools."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model

PACKAGE = "model.mlpackage"
_AUTHOR = "com.apple.CoreML"


def model_file(package: str = PACKAGE) -> str:
    """Returns the path of the model file below the artifact's folder."""
    return f"{package}/Data/{_AUTHOR}/model.mlmodel"


def weight_file(package: str = PACKAGE) -> str:
    return f"{package}/Data/{_AUTHOR}/weights/weight.bin"


def manifest_file(package: str = PACKAGE) -> str:
    return f"{package}/Manifest.json"


_ITEMS = {
    "model.mlmodel": "CoreML Model Specification",
    "weights": "CoreML Model Weights",
}
"""Item of the package → its description, as coremltools writes it."""


def write_package(folder: Path, model: "Model", name: str = PACKAGE) -> None:
    """Writes the package `name` in `folder`, except for the file of weights.

    The same model gives the same bytes: the identifiers of the items are made from its hash.
    """
    data = model.SerializeToString(deterministic=True)
    path = folder / model_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    identifiers = {item: str(uuid.uuid5(uuid.NAMESPACE_OID, digest + item)) for item in _ITEMS}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[item]: {
                "author": _AUTHOR,
                "description": description,
                "name": item,
                "path": f"{_AUTHOR}/{item}",
            }
            for item, description in _ITEMS.items()
        },
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (folder / manifest_file(name)).write_text(text, "utf-8")
