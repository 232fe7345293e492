"""Lowers a step program into a Core ML model of two functions, and describes it for Xcode.

Only this file uses internals of coremltools, as of version 9: `MILProtoExporter` calls
`get_milproto_value` for the value of every constant. Placeholders for weights become offsets in the
weight file there, which rgexport writes without coremltools.
"""

import json
import re
from collections.abc import Mapping
from itertools import chain

import numpy as np
from coremltools import _SPECIFICATION_VERSION_IOS_18 as IOS_18
from coremltools import target
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.mil import Builder, Function, Program, Var
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
from coremltools.proto.MIL_pb2 import Value
from coremltools.proto.Model_pb2 import Model

from rgexport._version import __version__
from rgexport.artifacts.coreml import manifest as interface
from rgexport.artifacts.coreml.mil.checks import CONFIG, DIGESTS, short_digests
from rgexport.artifacts.coreml.package import DECODE, PREFILL, PackagePlan, Segment
from rgexport.artifacts.coreml.storage import BLOB_HEADER_BYTES
from rgexport.artifacts.manifest import StoredPart, StoredTensor
from rgexport.artifacts.origin import GEMMA_TERMS, origin_of
from rgexport.export.coreml.emitter import DTYPES, CoreMLEmitter
from rgexport.export.coreml.lowering import lower
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import hidden_values, segment_nodes
from rgexport.export.program import StepProgram
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig

_STATE = re.compile(r"(?:layers_(?P<layer>\d+)_)?(?P<kind>.+?)(?P<half>_hi|_lo)?")


def build_model(
    program: StepProgram,
    config: GriffinConfig,
    tensors: Mapping[str, StoredTensor],
    form: interface.Form,
    plan: PackagePlan,
) -> Model:
    Builder.name_count.clear()  # so that names do not depend on earlier exports in this process
    functions = Program()
    stored_parts: dict[str, StoredPart] = {}
    for segment in plan.segments:
        for name, tokens in ((DECODE, 1), (PREFILL, form.prefill_length)):
            function = _function(program, config, tensors, form, segment, tokens, stored_parts)
            functions.add_function(segment.function(name), function)
    functions.default_function_name = plan.segments[0].function(DECODE)
    return _to_model(functions, stored_parts)


def _function(
    program: StepProgram,
    config: GriffinConfig,
    tensors: Mapping[str, StoredTensor],
    form: interface.Form,
    segment: Segment,
    tokens: int,
    stored_parts: dict[str, StoredPart],
) -> Function:
    inputs = {
        value.name: Placeholder(
            [tokens if size == "tokens" else size for size in value.shape],
            dtype=DTYPES[value.dtype],
            name=value.name,
        )
        for value in interface.io_record(config, form, segment).inputs
    } | {
        name: StateTensorPlaceholder(shape, dtype=DTYPES["float16"], name=name)
        for name, shape in interface.stored_states(config, form, segment).items()
    }
    before, after = hidden_values(segment, program)
    with Function(inputs, opset_version=target.iOS18) as function:
        states = segment.of_layers(program.states)
        count = tokens if form.all_logits else 1
        emitter = CoreMLEmitter(
            tensors, states, function.inputs, activation=form.activation, num_logits=count
        )
        values = {value.name: value for value in (program.input_ids, program.position_ids)}
        if before:
            values[interface.HIDDEN] = before
        for name in function.inputs.keys() & values.keys():
            emitter.values[values[name].name] = function.inputs[name]
        for node in segment_nodes(segment, program):
            lower(emitter, node)
        result = emitter.values[(after or program.logits).name]
        if after:  # under a name of its own; the site keeps its own
            result = emitter.op("mul", interface.HIDDEN_OUTPUT, x=result, y=np.float32(1))
        function.set_outputs([result, *emitter.finish()])
    stored_parts |= emitter.parts
    return function


def add_metadata(
    model: Model,
    checkpoint: Checkpoint,
    options: CoreMLOptions,
    plan: PackagePlan,
    blobs: Mapping[str, str],
) -> None:
    config, form, origin = checkpoint.config, options.form, origin_of(checkpoint)
    metadata = model.description.metadata
    owner = origin.hub_id.split("/")[0].capitalize() if origin.hub_id else "Unknown"
    metadata.author = f"{owner} (exported by rgexport)"
    gemma = f"Gemma Terms of Use, {GEMMA_TERMS}"
    licence = origin.licence or "That of the checkpoint it was made from"
    metadata.license = gemma if origin.released else licence
    metadata.versionString = __version__
    metadata.shortDescription = (
        f"{checkpoint.name}, a RecurrentGemma (Griffin) language model, {options.precision_word} "
        f"weights. {_contents(plan, form)}"
    )
    metadata.userDefined.update(
        {
            "rgexport.version": __version__,
            "rgexport.precision": options.precision_word,
            "rgexport.compute": options.compute_word,
            CONFIG: json.dumps(config.to_dict()),
            DIGESTS: json.dumps(short_digests(plan.tensors(blobs))),
        }
    )
    sizes = {"window": config.window, "before": config.conv_width - 1}
    logits = "each token" if form.all_logits else "the last token"
    for function in model.description.functions:
        for feature in chain(function.input, function.output, function.state):
            match = _STATE.fullmatch(feature.name)
            assert match, feature.name
            text = _HELP[match["kind"]].format(layer=match["layer"], logits=logits, **sizes)
            feature.shortDescription = text + _HALVES[match["half"]]


def _contents(plan: PackagePlan, form: interface.Form) -> str:
    *segments, last = plan.segments
    if segments:
        return (
            "It has both ends of the model: embed_decode and head_decode for 1 token, "
            f"embed_prefill and head_prefill for {form.prefill_length}."
        )
    part = "" if last.begins else f"It has the layers {last.layers[0]} to {last.layers[-1]}. "
    return (
        f"{part}Its functions, decode for 1 token and prefill for {form.prefill_length}, share "
        "weights and states. A new conversation begins with a new state."
    )


_HELP = {
    "input_ids": "Token ids, as the tokenizer beside the package has them.",
    "position_ids": "Positions of these tokens, counted from 0 where the conversation begins.",
    "logits": "Scores of the next token, after the soft cap, for {logits}.",
    "hidden_state": "What the package before has made of these tokens.",
    "hidden_state_out": "What this package has made of these tokens: hidden_state of the next one.",
    "recurrent_state": "Hidden states of the RG-LRUs, a row per recurrent layer: zeros at first, "
    "then recurrent_state_out of the call before.",
    "recurrent_state_out": "Hidden states of the RG-LRUs: recurrent_state of the next call.",
    "conv1d": "Layer {layer}: the last {before} inputs of its convolution, oldest first",
    "key": "Layer {layer}: the last {window} keys, rotated, oldest first, zeros in front",
    "value": "Layer {layer}: the last {window} values, oldest first, zeros in front",
}
_HALVES = {None: "", "_hi": " (in float16)", "_lo": " (what float16 left over, times 2048)"}


class _Exporter(MILProtoExporter):
    def __init__(self, program: Program, parts: Mapping[str, StoredPart]):
        super().__init__(program, weights_dir="", specification_version=IOS_18)
        self._parts = parts

    def get_milproto_value(self, var: Var) -> Value:
        part = self._parts.get(var.name)
        if part is None:
            return helper.create_immediate_value(var)
        return helper.create_file_value_tensor(
            file_name="@model_path/weights/weight.bin",
            offset=part.offset - BLOB_HEADER_BYTES,  # Core ML expects the offset of the header
            dim=var.shape,
            data_type=helper.types_to_proto_primitive(var.dtype),
        )


def _to_model(program: Program, parts: Mapping[str, StoredPart]) -> Model:
    """Converts a program without passes, as deduplication would merge placeholders."""
    program.export_as_multifunction = True
    exporter = CoreMLProtoExporter(
        program,
        _Exporter(program, parts).export(),
        predicted_feature_name=None,
        predicted_probabilities_name=None,
        classifier_config=None,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=IOS_18,
    )
    return exporter.export(IOS_18)
