"""The structure of GGUF files: the metadata by which llama.cpp builds its graph, and the tensors.

Types and offsets need no comparison: the plan is read from the types, and the reader of the header
refuses tensors that do not follow each other.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.gguf.artifact import GgufArtifact
from rgexport.export.gguf.naming import ARCHITECTURE, architecture, file_tensors
from rgexport.export.manifest import Manifest
from rgexport.validate.structure.elements import Element, shortened
from rgexport.validate.structure.format import Recipe, Structure, maker


class GgufStructure(Structure):
    """The keys of the architecture, and the tensors in their order."""

    def recipe(self, manifest: Manifest) -> Recipe:
        """The configuration alone decides, whatever tool chose the types."""
        return Recipe(manifest.kind, manifest.config, manifest.plan, {})

    def made_by(self, artifact: Artifact) -> set[str]:
        """The manifest's version; other tools that quantized the file leave no name."""
        return {maker(artifact.manifest.created_with)}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        """The header's keys and tensors."""
        assert isinstance(artifact, GgufArtifact)
        header = artifact.header
        prefix = f"{ARCHITECTURE}."
        keys = {key: value for key, value in header.values.items() if key.startswith(prefix)}
        return _elements(keys, {name: tensor.shape for name, tensor in header.tensors.items()})

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        """The keys and tensors of the configuration; needs no extra."""
        tensors = {tensor.name: tensor.shape for tensor in file_tensors(recipe.config)}
        return _elements(architecture(recipe.config), tensors)


def _elements(keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[Element]:
    for key, value in sorted(keys.items()):
        items = value.tolist() if isinstance(value, np.ndarray) else value
        content = items if isinstance(items, float) else shortened(repr(items))
        yield Element(f"the key {key}", (f"{key}:", content))
    for name, shape in tensors.items():
        yield Element(f"the tensor {name}", (f"{name}:", repr(shape)))
