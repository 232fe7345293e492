"""Limits of ONNX artifacts, and their structure: nodes, functions, initializers, stored weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import ACTIVATIONS, Manifest
from rgexport.artifacts.onnx.messages import parse_model
from rgexport.artifacts.onnx.model_file import MODEL_FILE, NUM_LOGITS, read_graph
from rgexport.export.tokenizer import tokens_by_frequency
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.plan import bfloat16_gates
from rgexport.validate.formats.expected import Expected, Recipe, traced
from rgexport.validate.structure.elements import Element, Rules, elements, stored_elements

_FLOAT32 = 1  # its number in onnx.proto


class OnnxExpected(Expected):
    """Products with quantized weights round activations to int8, except with `--exact`.

    Some do so in two digits, but only native kernels: limits are those of one, which bodies have.
    """

    has_exact = True

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        rounds = any(scheme.rounds_activations for scheme in manifest.plan[tensor].uniform)
        return "int8" if rounds and not manifest.exact else "float32"

    def recipe(self, manifest: Manifest) -> Recipe:
        options = {name: getattr(manifest, name) for name in ("profile", "compute", "exact")}
        return Recipe(manifest.kind, manifest.config, manifest.plan, options)

    def writers(self, artifact: Artifact) -> set[str]:
        model = parse_model(read_graph(artifact.file(MODEL_FILE)))
        producer = model.producer_name + b" " + model.producer_version
        return super().writers(artifact) | {producer.decode(errors="replace")}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        yield from stored_elements(artifact.manifest.tensors)
        yield from _graph(read_graph(artifact.file(MODEL_FILE)))

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        import onnx_ir as ir

        from rgexport.export.onnx.exporter import lay_out
        from rgexport.export.onnx.interface import with_interface
        from rgexport.export.onnx.model import build_model
        from rgexport.export.onnx.profiles import PROFILES

        config, options = recipe.config, recipe.options
        profile = PROFILES[options["profile"]]
        shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
        tensors, _ = lay_out(recipe.plan, shapes, profile.files)
        program = with_interface(traced(config, ACTIVATIONS[options["compute"]]))
        model = build_model(program, tensors, profile, exact=options["exact"])
        yield from stored_elements(tensors)
        yield from _graph(ir.to_proto(model).SerializeToString())

    def default_recipes(self, checkpoint: Checkpoint) -> Iterator[Recipe]:
        from rgexport.export.onnx.profiles import PROFILES, OnnxOptions

        config, ids = checkpoint.config, tokens_by_frequency(checkpoint)
        gates = bfloat16_gates(config, checkpoint.weights)
        for profile in PROFILES.values():
            for precision in profile.precisions:
                options = OnnxOptions(profile=profile.name, precision=precision)
                plan = options.resolve_plan(config, gates, ids)
                exact = profile.is_exact(plan, options.exact)
                changes = {"profile": profile.name, "compute": options.compute_word, "exact": exact}
                yield Recipe("onnx", config, plan, changes)


def _graph(data: bytes) -> Iterator[Element]:
    model = parse_model(data)
    values = (*model.graph.input, *model.graph.output)
    return elements(model, _RULES, [NUM_LOGITS.encode(), *(value.name for value in values)])


def _name(_: str, message: Any) -> str:
    names = (message.name, *getattr(message, "output", ()), b"without a name")
    return next(filter(None, names)).decode(errors="replace")


def _unpack_floats(message: Any) -> None:
    """Makes float32 values numbers, so that their last bits may differ."""
    is_tensor = message.DESCRIPTOR.name == "Tensor" and message.data_type == _FLOAT32
    if is_tensor and len(message.raw_data) % 4 == 0:
        message.float_data.extend(np.frombuffer(message.raw_data, "<f4").tolist())
        message.ClearField("raw_data")


_RULES = Rules(
    ignored=frozenset(
        "doc_string metadata_props value_info denotation producer_name producer_version "
        "model_version model.domain graph.name g.name node.name t.name tensors.name".split()
    ),
    names=frozenset(
        "node.input node.output function.input function.output initializer.name input.name "
        "output.name".split()
    ),
    elements={
        "model.function": _name,
        "function.node": _name,
        "graph.node": _name,
        "graph.initializer": lambda _, tensor: f"the initializer {_name('', tensor)}",
        "graph.input": lambda _, value: f"the input {_name('', value)}",
        "graph.output": lambda _, value: f"the output {_name('', value)}",
    },
    simplify=_unpack_floats,
)
FORMAT = OnnxExpected()
