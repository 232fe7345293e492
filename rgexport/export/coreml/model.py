"""Lowers a step program into a Core ML model of two functions over the stored weights."""

from collections.abc import Mapping

from coremltools import target
from coremltools.converters.mil.mil import Function, Program
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
from coremltools.proto.Model_pb2 import Model

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.coreml.exporter_proto import forget_names, to_model
from rgexport.export.coreml.graph import DTYPES
from rgexport.export.coreml.lowering import lower
from rgexport.export.coreml.state_io import StateIo
from rgexport.export.coreml.states import DECODE, PREFILL, Form, io_record, stored_states
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.export.program import StepProgram
from rgexport.griffin.config import GriffinConfig


def build_model(
    program: StepProgram, config: GriffinConfig, tensors: Mapping[str, StoredTensor], form: Form
) -> Model:
    """The model; its weights are places in the file that `tensors` describes."""
    forget_names()
    functions = Program()
    parts: dict[str, StoredPart] = {}
    for name, tokens in ((DECODE, 1), (PREFILL, form.prefill_length)):
        functions.add_function(name, _function(program, config, tensors, form, tokens, parts))
    functions.default_function_name = DECODE
    return to_model(functions, parts)


def _function(
    program: StepProgram,
    config: GriffinConfig,
    tensors: Mapping[str, StoredTensor],
    form: Form,
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
        for value in io_record(config, form).inputs
    } | {
        name: StateTensorPlaceholder(shape, dtype=DTYPES["float16"], name=name)
        for name, shape in stored_states(config, form).items()
    }
    with Function(inputs, opset_version=target.iOS18) as function:
        states = StateIo(program, function.inputs)
        count = tokens if form.all_logits else 1
        emitter = Emitter(tensors, states, activation=form.activation, num_logits=count)
        for value in (program.input_ids, program.position_ids):
            emitter.values[value.name] = function.inputs[value.name]
        for node in program.nodes:
            lower(emitter, node)
        logits = emitter.values[program.logits.name]
        function.set_outputs([logits, *states.finish(emitter)])
    parts |= emitter.parts
    return function
