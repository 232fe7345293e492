"""The format of ONNX artifacts: storage, interface of the graph, card, files for other programs.

onnxruntime-genai and transformers.js run a folder as it is. They take keys and values as
[batch_size, heads, window, head_dim]; the first one asks for logits of one token, the second one
for the name `batch_size`. `genai_config.json` has no recurrent states, as versions before 0.16
refuse them. A fixed axis of keys and values makes a cache that is updated in place.
"""

import json
import reprlib
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rgexport import npm
from rgexport._version import __version__
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact, differences
from rgexport.export.format import CardText, FolderFormat, render
from rgexport.export.manifest import (
    ACTIVATIONS,
    COLUMNS,
    IoRecord,
    Manifest,
    StateRecord,
    ValueRecord,
    identity_of,
)
from rgexport.export.onnx.model_file import (
    MODEL_FILE,
    NUM_LOGITS,
    native_ops,
    read_graph,
    read_model,
    weight_files,
)
from rgexport.export.program import StepProgram, Value
from rgexport.export.storage import part_shapes_by_group
from rgexport.files.typed_json import to_json
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.control_tokens import chat_template
from rgexport.griffin.state import state_specs
from rgexport.kernels.onnx import library
from rgexport.quantize.plan import MIXED, PRECISIONS
from rgexport.quantize.schemes import registry as schemes

if TYPE_CHECKING:
    from rgexport.export.tokenizer import ControlIds

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"


def write_genai_config(
    folder: Path, config: GriffinConfig, ids: "ControlIds", files: Iterable[str]
) -> None:
    """Writes `genai_config.json`; it names our kernels if they are among the artifact's `files`."""
    # 0 is ONNX Runtime's own choice; genai's is half of it on machines with two processors.
    options: dict[str, Any] = {"provider_options": [], "intra_op_num_threads": 0}
    for name in sorted(files, reverse=True):
        if Path(name).stem == library.LIBRARY.stem:  # made for any system
            options["custom_ops_library"] = name
    decoder = {
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": config.num_layers,
        "session_options": options,
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        **ids.fields(),
        "context_length": 1 << 20,  # a state of fixed size has no limit of its own
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # Version 0.14 demands the last one.
    search = {"do_sample": False, "max_length": 8192, "past_present_share_buffer": True}
    _write_json(folder / GENAI_CONFIG, {"model": model, "search": search})


def require_kernels() -> Path:
    path = library.library()
    if path is None:
        raise RequestError(
            f"--genai-native copies the native kernels, but {library.kernels().reason}; "
            "or leave it out, and onnxruntime-genai runs its own"
        )
    return path


def write_web_files(folder: Path, manifest: Manifest, ids: "ControlIds") -> None:
    template, _ = chat_template(folder)
    config = manifest.config
    fields = {
        "model_type": "recurrent_gemma",
        "architectures": ["RecurrentGemmaForCausalLM"],
        **ids.fields(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "block_types": list(config.block_types),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "attention_window_size": config.window,
        "rgexport": {
            "version": __version__,
            "identity": asdict(identity_of(manifest, template)),
            "states": [to_json(record) for record in manifest.states],
            "data_files": weight_files(manifest),
        },
    }
    _write_json(folder / CONFIG, fields)
    for name in ("recurrent_gemma.mjs", "state_file.mjs"):
        shutil.copyfile(Path(npm.__file__).with_name(name), folder / name)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", "utf-8")


_STATES: dict[str, tuple[str, Literal["canonical", "ring"]]] = {
    "rg_lru": ("recurrent_state", "canonical"),
    "conv1d": ("conv_state", "canonical"),
    "key": ("key", "ring"),
    "value": ("value", "ring"),
}
"""Canonical state → its name in hybrid models of Hugging Face and genai, and its layout."""


def with_interface(program: StepProgram) -> StepProgram:
    rings = [
        value
        for name, values in program.states.items()
        if _STATES[name.rpartition(".")[2]][1] == "ring"
        for value in values
    ]
    batch, _, vocabulary = program.logits.shape
    shaped = {v.name: replace(v, shape=(v.shape[0], 1, *v.shape[1:])) for v in rings}
    shaped[program.logits.name] = replace(program.logits, shape=(batch, 1, vocabulary))

    def resized(value: Value) -> Value:
        return shaped.get(value.name, value)

    nodes = []
    for node in program.nodes:
        inputs = tuple(value and resized(value) for value in node.inputs)
        nodes.append(replace(node, inputs=inputs, outputs=tuple(map(resized, node.outputs))))
    states = {name: (resized(a), resized(b)) for name, (a, b) in program.states.items()}
    return replace(program, states=states, nodes=tuple(nodes), logits=resized(program.logits))


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
        _, layout = _STATES[spec.name.rpartition(".")[2]]
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
    name, _ = _STATES[kind]
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
    return all(
        one.block in schemes.BLOCKS and one.bits in (4, 8)
        if isinstance(one, schemes.Affine)
        else isinstance(one, schemes.Float | schemes.TwoLevel)
        for one in scheme.uniform
    )


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
        is_worse = isinstance(scheme, schemes.Affine) and scheme.bits < 8  # than `TwoLevel`
        return None if is_worse else super().candidate(scheme, shape)

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        earlier = any(value.name == NUM_LOGITS for value in manifest.io.inputs)
        return graph_interface(manifest.config, ACTIVATIONS[manifest.compute], earlier=earlier)

    def write_program_files(
        self, folder: Path, manifest: Manifest, ids: "ControlIds", files: Collection[str]
    ) -> None:
        write_genai_config(folder, manifest.config, ids, files)
        write_web_files(folder, manifest, ids)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        files, profile = weight_files(manifest), manifest.profile
        text = render("onnx.md.j2", manifest=manifest, verb=verb, data_files=files)
        engine = "ONNX Runtime" if profile == "cpu" else f"onnxruntime-web ({profile})"
        return CardText(engine, "softmax", text)


FORMAT = OnnxFormat()
