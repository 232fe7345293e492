"""The structure of ONNX artifacts: nodes, functions, initializers, and where weights are stored."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import ACTIVATIONS, Manifest
from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.onnx.model_file import NUM_LOGITS, parse_model, read_graph
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.validate.structure.elements import Element, Rules, elements, stored_elements
from rgexport.validate.structure.format import Recipe, Structure, maker, traced

_FLOAT32 = 1
"""Its number in onnx.proto."""


class OnnxStructure(Structure):
    """A graph, its functions, and the places of its weights."""

    def recipe(self, manifest: Manifest) -> Recipe:
        """Profile, activations, and whether they are never rounded to int8."""
        options = {name: getattr(manifest, name) for name in ("profile", "compute", "exact")}
        return Recipe(manifest.kind, manifest.config, manifest.plan, options)

    def made_by(self, artifact: Artifact) -> set[str]:
        """The manifest's and the graph's producer."""
        model = parse_model(read_graph(artifact.file(MODEL_FILE)))
        producer = model.producer_name + b" " + model.producer_version
        return {maker(artifact.manifest.created_with), producer.decode(errors="replace")}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        """The places in the manifest, and the graph."""
        yield from stored_elements(artifact.manifest.tensors)
        yield from _graph(read_graph(artifact.file(MODEL_FILE)))

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        """Traces the model and lowers it for the profile."""
        import onnx_ir as ir

        from rgexport.export.onnx.interface import with_interface
        from rgexport.export.onnx.model import build_model
        from rgexport.export.onnx.profiles import PROFILES
        from rgexport.export.onnx.storage import Storage

        config, options = recipe.config, recipe.options
        profile = PROFILES[options["profile"]]
        shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
        tensors = Storage(recipe.plan, shapes, profile.files).tensors
        program = with_interface(traced(config, ACTIVATIONS[options["compute"]]))
        model = build_model(program, tensors, profile, exact=options["exact"])
        yield from stored_elements(tensors)
        yield from _graph(ir.to_proto(model).SerializeToString())

    def defaults(self, config: GriffinConfig, gates: Collection[str]) -> Iterator[Recipe]:
        """All precisions of all profiles."""
        from rgexport.export.onnx.options import OnnxOptions
        from rgexport.export.onnx.profiles import PROFILES

        for profile in PROFILES.values():
            for word in profile.precisions:
                asked = OnnxOptions(profile=profile.name, precision=word)
                plan = asked.resolve_plan(config, gates)
                exact = profile.is_exact(plan, asked.exact)
                options = {"profile": profile.name, "compute": asked.compute_word, "exact": exact}
                yield Recipe("onnx", config, plan, options)


def _graph(data: bytes) -> Iterator[Element]:
    model = parse_model(data)
    values = (*model.graph.input, *model.graph.output)
    return elements(model, _RULES, [NUM_LOGITS.encode(), *(value.name for value in values)])


def _name(_: str, message: Any) -> str:
    names = (message.name, *getattr(message, "output", ()), b"without a name")
    return next(filter(None, names)).decode(errors="replace")


def _initializer(_: str, tensor: Any) -> str:
    return f"the initializer {_name('', tensor)}"


def _unpack_floats(message: Any) -> None:
    """Float32 values of a tensor as numbers, of which the last bits may differ."""
    is_tensor = message.DESCRIPTOR.name == "Tensor" and message.data_type == _FLOAT32
    if is_tensor and len(message.raw_data) % 4 == 0:
        message.float_data.extend(np.frombuffer(message.raw_data, "<f4").tolist())
        message.ClearField("raw_data")


_RULES = Rules(
    ignored=frozenset(
        (
            "doc_string metadata_props value_info denotation producer_name producer_version "
            "model_version model.domain graph.name g.name node.name t.name tensors.name"
        ).split()
    ),
    names=frozenset(
        (
            "node.input node.output function.input function.output initializer.name input.name "
            "output.name"
        ).split()
    ),
    elements={
        "model.function": _name,
        "function.node": _name,
        "graph.node": _name,
        "graph.initializer": _initializer,
        "graph.input": lambda _, value: f"the input {_name('', value)}",
        "graph.output": lambda _, value: f"the output {_name('', value)}",
    },
    simplify=_unpack_floats,
)
