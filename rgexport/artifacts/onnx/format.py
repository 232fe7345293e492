"""The format of ONNX artifacts: storage, interface of the graph, card, files for other programs.

onnxruntime-genai and transformers.js run a folder as it is. They take keys and values as
[batch_size, heads, window, head_dim]; the first one asks for logits of one token, the second one
for the name `batch_size`. `genai_config.json` has no recurrent states, as versions before 0.16
refuse them. A fixed axis of keys and values makes a cache that is updated in place.
"""

import reprlib
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rgexport.artifacts.artifact import Artifact, differences
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.format import CardText, FolderFormat, render
from rgexport.artifacts.manifest import (
    ACTIVATIONS,
    COLUMNS,
    IoRecord,
    Manifest,
    StateRecord,
    ValueRecord,
)
from rgexport.artifacts.onnx.model_file import (
    MODEL_FILE,
    NUM_LOGITS,
    native_ops,
    read_graph,
    read_model,
    weight_files,
)
from rgexport.artifacts.onnx.program_files import write_genai_config, write_web_files
from rgexport.artifacts.storage import part_shapes_by_group
from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import state_specs
from rgexport.quantize.plan import MIXED, PRECISIONS
from rgexport.quantize.schemes import registry as schemes

STATES: dict[str, tuple[str, Literal["canonical", "ring"]]] = {
    "rg_lru": ("recurrent_state", "canonical"),
    "conv1d": ("conv_state", "canonical"),
    "key": ("key", "ring"),
    "value": ("value", "ring"),
}
"""Canonical state → its name in hybrid models of Hugging Face and genai, and its layout."""


def graph_interface(
    config: GriffinConfig, activation: str, *, earlier: bool = False
) -> tuple[tuple[StateRecord, ...], IoRecord]:
    """Returns states, inputs and outputs; in an `earlier` layout `num_logits` is an input."""
    batch, logits, head = ("batch", NUM_LOGITS, ()) if earlier else ("batch_size", 1, (1,))
    inputs = [
        ValueRecord(name, "int64", (batch, "tokens")) for name in ("input_ids", "position_ids")
    ]
    if earlier:
        inputs.append(ValueRecord(NUM_LOGITS, "int64", ()))
    outputs = [ValueRecord("logits", "float32", (batch, logits, config.vocab_size))]
    states = []
    for spec in state_specs(config, activation):
        _, layout = STATES[spec.name.rpartition(".")[2]]
        if layout == "ring" and config.window == 0:
            continue
        shape = (*(head if layout == "ring" else ()), *spec.shape)
        state = StateRecord(spec.name, shape, spec.dtype, layout, *feature_names(spec.name))
        states.append(state)
        inputs.append(ValueRecord(state.input, state.dtype, (batch, *shape)))
        outputs.append(ValueRecord(state.output, state.dtype, (batch, *shape)))
    return tuple(states), IoRecord(tuple(inputs), tuple(outputs))


def feature_names(state: str) -> tuple[str, str]:
    _, layer, kind = state.split(".")
    name, _ = STATES[kind]
    return f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"


class OnnxArtifact(Artifact):
    def complaints(self, verify: bool) -> list[str]:
        """Lists damage; the graph comes last, as a hash says more of an altered one."""
        return super().complaints(verify) or list(self._wrong_graph())

    def _wrong_graph(self) -> Iterator[str]:
        graph, io = read_model(read_graph(self.file(MODEL_FILE))), self.manifest.io
        for kind, values, expected in (
            ("input", graph.inputs, io.inputs),
            ("output", graph.outputs, io.outputs),
        ):
            complaints = differences(f"{MODEL_FILE}: {kind}", _types(values), _types(expected))
            yield from islice(complaints, 1)

    def facts(self) -> dict[str, Any]:
        ops = native_ops(self.file(MODEL_FILE))
        kernels = {"runs": ops.kernels, "reason": ops.reason}
        return {
            "profile": self.manifest.profile,
            "kernels": kernels | {"native": list(ops.native), "ops": ops.ops},
        }


def _types(values: Iterable[ValueRecord]) -> dict[str, str]:
    return {value.name: f"{value.dtype} {reprlib.repr(value.shape)}" for value in values}


def _group_part_shapes(shape: tuple[int, ...], scheme: schemes.Uniform) -> schemes.PartShapes:
    shapes = scheme.part_shapes(shape)
    if scheme != schemes.INT8_ROWS:
        return shapes
    rows, columns = shape
    return {COLUMNS: ("uint8", (columns, rows)), "scales": shapes["scales"]}


def is_storable(scheme: schemes.Scheme) -> bool:
    return all(uniform.has_onnx_op for uniform in scheme.uniform)


class OnnxFormat(FolderFormat):
    artifact = OnnxArtifact
    entries = (MODEL_FILE,)
    precisions = PRECISIONS
    planned_precisions = MIXED, "int2", "int3", "int5", "int6"
    alignment = 4096
    graph_bytes = 24_000
    keeps_bfloat16_gates = True

    def part_shapes(self, shape: tuple[int, ...], scheme: schemes.Scheme) -> schemes.PartShapes:
        """Returns the parts of a tensor; INT8_ROWS by columns, as `MatMulInteger` needs it."""
        if scheme != schemes.INT8_ROWS and not is_storable(scheme):
            raise RequestError(f"{scheme.label} is a way to store weights that ONNX does not have")
        return part_shapes_by_group(shape, scheme, _group_part_shapes)

    def candidate(self, scheme: schemes.Uniform, shape: tuple[int, ...]) -> schemes.Uniform | None:
        if scheme.scale_dtype is not None and scheme.level_bits != 8:
            return None  # worse than `TwoLevel`, whose scales take half the bytes
        return super().candidate(scheme, shape)

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        earlier = any(value.name == NUM_LOGITS for value in manifest.io.inputs)
        return graph_interface(manifest.config, ACTIVATIONS[manifest.compute], earlier=earlier)

    def write_program_files(
        self, folder: Path, manifest: Manifest, ids: ControlIds, files: Collection[str]
    ) -> None:
        write_genai_config(folder, manifest.config, ids, files)
        write_web_files(folder, manifest, ids)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        files, profile = weight_files(manifest), manifest.profile
        text = render("onnx.md.j2", manifest=manifest, verb=verb, data_files=files)
        engine = "ONNX Runtime" if profile == "cpu" else f"onnxruntime-web ({profile})"
        return CardText(engine, "softmax", text)


FORMAT = OnnxFormat()
