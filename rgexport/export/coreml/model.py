"""Lowers a step program into a Core ML model of two functions over the stored weights."""

from collections.abc import Mapping

import numpy as np
from coremltools import target
from coremltools.converters.mil.mil import Function, Program
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
from coremltools.proto.Model_pb2 import Model

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.coreml.exporter_proto import forget_names, to_model
from rgexport.export.coreml.graph import DTYPES
from rgexport.export.coreml.lowering import lower
from rgexport.export.coreml.segments import DECODE, PREFILL, PackagePlan, Segment
from rgexport.export.coreml.state_io import StateIo
from rgexport.export.coreml.states import HIDDEN, HIDDEN_OUTPUT, Form, io_record, stored_states
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.export.program import StepProgram
from rgexport.griffin.config import GriffinConfig


def build_model(
    program: StepProgram,
    config: GriffinConfig,
    tensors: Mapping[str, StoredTensor],
    form: Form,
    plan: PackagePlan,
) -> Model:
    """The model of one package; its weights are places in the file that `tensors` describes."""
    forget_names()
    functions = Program()
    parts: dict[str, StoredPart] = {}
    for segment in plan.segments:
        for name, tokens in ((DECODE, 1), (PREFILL, form.prefill_length)):
            made = _function(program, config, tensors, form, segment, tokens, parts)
            functions.add_function(segment.function(name), made)
    functions.default_function_name = plan.segments[0].function(DECODE)
    return to_model(functions, parts)


def _function(
    program: StepProgram,
    config: GriffinConfig,
    tensors: Mapping[str, StoredTensor],
    form: Form,
    segment: Segment,
    tokens: int,
    parts: dict[str, StoredPart],
) -> Function:
    """The function for `tokens` tokens; adds its placeholders of weights to `parts`."""
    inputs = {
        value.name: Placeholder(
            [tokens if size == "tokens" else size for size in value.shape],
            dtype=DTYPES[value.dtype],
            name=value.name,
        )
        for value in io_record(config, form, segment).inputs
    } | {
        name: StateTensorPlaceholder(shape, dtype=DTYPES["float16"], name=name)
        for name, shape in stored_states(config, form, segment).items()
    }
    before, after = segment.hidden(program)
    with Function(inputs, opset_version=target.iOS18) as function:
        states = StateIo(segment.of_layers(program.states), function.inputs)
        count = tokens if form.all_logits else 1
        emitter = Emitter(tensors, states, activation=form.activation, num_logits=count)
        given = {value.name: value for value in (program.input_ids, program.position_ids)}
        if before:
            given[HIDDEN] = before
        for name in function.inputs.keys() & given.keys():
            emitter.values[given[name].name] = function.inputs[name]
        for node in segment.nodes(program)[0]:
            lower(emitter, node)
        result = emitter.values[(after or program.logits).name]
        if after:  # under a name of its own; the site keeps its own
            result = emitter.op("mul", HIDDEN_OUTPUT, x=result, y=np.float32(1))
        function.set_outputs([result, *states.finish(emitter)])
    parts |= emitter.parts
    return function
