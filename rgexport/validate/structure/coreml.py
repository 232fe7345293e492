"""The structure of Core ML artifacts: the program of each package, and where weights are stored."""

import logging
from collections.abc import Iterator
from typing import Any

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import KIND, CoreMLManifest
from rgexport.export.coreml.package import model_file
from rgexport.export.coreml.segments import PackagePlan, packages
from rgexport.export.coreml.states import Form
from rgexport.export.coreml.storage import Storage
from rgexport.export.manifest import Manifest
from rgexport.export.mil.messages import messages
from rgexport.export.mil.package import MAX_MODEL_BYTES
from rgexport.files.paths import read_regular
from rgexport.griffin.layout import model_tensors
from rgexport.validate.structure.elements import Element, Rules, elements, stored_elements
from rgexport.validate.structure.format import Recipe, Structure, maker, traced


class CoreMLStructure(Structure):
    """The programs of one package or several, and the places of their weights.

    It has no fingerprints: what reads a package, coremltools, comes with the extra that makes one.
    """

    extra = "coreml"

    def recipe(self, manifest: Manifest) -> Recipe:
        """The functions' form, and how the layers are split."""
        assert isinstance(manifest, CoreMLManifest)
        options = {**vars(manifest.form), "split": [*manifest.coreml.split]}
        return Recipe(KIND, manifest.config, manifest.plan, options)

    def made_by(self, artifact: Artifact) -> set[str]:
        """The manifest's and each package's version."""
        metadata = (_message(artifact, plan).description.metadata for plan in _plans(artifact))
        versions = {one.userDefined.get("rgexport.version", "of no version") for one in metadata}
        return {maker(artifact.manifest.created_with), *(f"rgexport {word}" for word in versions)}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        """The places in the manifest, and the model of each package."""
        yield from stored_elements(artifact.manifest.tensors)
        for plan in _plans(artifact):
            yield from _package(plan, _message(artifact, plan))

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        """Traces the model and builds each package again."""
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        from rgexport.export.coreml.model import build_model

        options = dict(recipe.options)
        plans = packages(recipe.config.num_layers, options.pop("split"))
        form = Form(**options)
        shapes = {name: spec.shape for name, spec in model_tensors(recipe.config).items()}
        tensors = Storage(recipe.plan, shapes, plans).tensors
        program = traced(recipe.config, form.activation)
        yield from stored_elements(tensors)
        for plan in plans:
            model = build_model(program, recipe.config, tensors, form, plan)
            yield from _package(plan, _parsed(model.SerializeToString()))


def _plans(artifact: Artifact) -> tuple[PackagePlan, ...]:
    assert isinstance(artifact.manifest, CoreMLManifest)
    return artifact.manifest.packages


def _message(artifact: Artifact, plan: PackagePlan) -> Any:
    return _parsed(read_regular(artifact.file(model_file(plan.name)), MAX_MODEL_BYTES))


def _parsed(model: bytes) -> Any:
    return messages("Model").Model.FromString(model)


def _package(plan: PackagePlan, model: Any) -> Iterator[Element]:
    """The elements of a package's model; inputs, outputs and states keep their names."""
    functions = model.mlProgram.functions.values()
    inputs = [value.name for function in functions for value in function.inputs]
    blocks = (block for f in functions for block in f.block_specializations.values())
    outputs = [name for block in blocks for name in block.outputs]
    yield Element(plan.name, (repr(plan.name),))
    yield from elements(model, _RULES, inputs + outputs)


def _operation(_: str, message: Any) -> str:
    names = message.attributes["name"].immediateValue.tensor.strings.values
    return f"{message.type} {next(iter(names), 'without a name')}"


_RULES = Rules(
    ignored=frozenset(
        (
            "docString shortDescription description.metadata operations.attributes.name "
            "mlProgram.attributes.buildInfo"
        ).split()
    ),
    names=frozenset(
        "arguments.name outputs.name inputs.name block_specializations.outputs "
        "blocks.outputs".split()
    ),
    elements={
        "mlProgram.functions": lambda name, _: name,
        "block_specializations.operations": _operation,
    },
)
