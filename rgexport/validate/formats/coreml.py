"""Limits of Core ML packages, and their structure: each package's program, and stored weights."""

import logging
from collections.abc import Iterator
from math import prod
from typing import Any

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.coreml.manifest import KIND, CoreMLManifest, Form
from rgexport.artifacts.coreml.mil.messages import messages
from rgexport.artifacts.coreml.mil.package import MAX_MODEL_BYTES
from rgexport.artifacts.coreml.package import PackagePlan, model_file, packages
from rgexport.artifacts.manifest import Manifest
from rgexport.export.coreml.storage import CoreMLStorage
from rgexport.files.paths import read_regular
from rgexport.griffin.layout import model_tensors
from rgexport.validate.checks import Tolerance
from rgexport.validate.formats.expected import TOKENS, Expected, Recipe, Schedule, traced
from rgexport.validate.structure.elements import Element, Rules, elements, stored_elements

_FLOAT16 = Tolerance(
    logits=6e-2,
    rms=3e-2,
    states=6e-2,
    reason="activations are rounded to 11 bits between the operations, scores of attention too",
)
"""Limits of packages that compute in float16.

Beyond what `DEQUANTIZED` says, a score of 30 moves a weight of the softmax by up to 30 · 2⁻¹¹ =
1.5 %. Measured on random models of odd shapes, of the largest logit: 0.1 % to 1.9 %.
"""


class CoreMLExpected(Expected):
    """Two functions of fixed lengths in one package or several; activations are never int8."""

    extra = "coreml"

    def tolerance(self, manifest: Manifest) -> Tolerance:
        return _FLOAT16 if manifest.compute == "fp16" else super().tolerance(manifest)

    def attends_in_half(self, manifest: Manifest) -> bool:
        return manifest.compute == "fp16"

    def schedule(self, manifest: Manifest) -> Schedule:
        """A whole chunk, which may give only the logits of its last token, and then steps."""
        assert isinstance(manifest, CoreMLManifest)
        length = manifest.coreml.prefill_length
        parameters = sum(prod(stored.shape) for stored in manifest.tensors.values())
        rows = min(length, TOKENS) if manifest.coreml.all_logits else 1
        # The interpreter takes half a second a token at 100M, and 12 s at 2B.
        return Schedule(length, rows, TOKENS - 1 if parameters <= 100_000_000 else 2)

    def recipe(self, manifest: Manifest) -> Recipe:
        assert isinstance(manifest, CoreMLManifest)
        options = {**vars(manifest.form), "split": [*manifest.coreml.split]}
        return Recipe(KIND, manifest.config, manifest.plan, options)

    def writers(self, artifact: Artifact) -> set[str]:
        metadata = (_message(artifact, plan).description.metadata for plan in _plans(artifact))
        versions = {one.userDefined.get("rgexport.version", "of no version") for one in metadata}
        return super().writers(artifact) | {f"rgexport {version}" for version in versions}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        yield from stored_elements(artifact.manifest.tensors)
        for plan in _plans(artifact):
            yield from _package(plan, _message(artifact, plan))

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        from rgexport.export.coreml.model import build_model

        options = dict(recipe.options)
        plans = packages(recipe.config.num_layers, options.pop("split"))
        form = Form(**options)
        shapes = {name: spec.shape for name, spec in model_tensors(recipe.config).items()}
        tensors = CoreMLStorage(recipe.plan, shapes, plans).tensors
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
        "docString shortDescription description.metadata operations.attributes.name "
        "mlProgram.attributes.buildInfo".split()
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
FORMAT = CoreMLExpected()
