"""Lowers a step program into an ONNX model over the stored weights."""

from pathlib import Path

import onnx_ir as ir

from rgexport import __version__
from rgexport.export.manifest import IoRecord, StateRecord, ValueRecord
from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.functions import DOMAIN, functions
from rgexport.export.onnx.graph import DTYPES, MICROSOFT, OPSET
from rgexport.export.onnx.lowering import lower
from rgexport.export.onnx.storage import Storage
from rgexport.export.program import StepProgram, Value

MODEL_FILE = "model.onnx"

_IR_VERSION = 10
_ACCURACY_LEVEL = {True: 1, False: 4}
"""`MatMulNBits`'s accuracy level for an exact model (float32 activations) and the default."""

_STATE_NAMES = {
    "rg_lru": "recurrent_state",
    "conv1d": "conv_state",
    "key": "key",
    "value": "value",
}
"""Canonical state → its name in Hugging Face's and onnxruntime-genai's hybrid models."""


def state_records(program: StepProgram) -> tuple[StateRecord, ...]:
    """The states of a program with the names that carry them in and out of the graph."""
    records = []
    for name, (value, _) in program.states.items():
        _, layer, kind = name.split(".")
        suffix = f"{layer}.{_STATE_NAMES[kind]}"
        shape = tuple(int(size) for size in value.shape[1:])
        records.append(
            StateRecord(name, shape, value.dtype, f"past_key_values.{suffix}", f"present.{suffix}")
        )
    return tuple(records)


def io_record(program: StepProgram) -> IoRecord:
    """All inputs and outputs of the graph."""

    def record(value: Value, name: str) -> ValueRecord:
        return ValueRecord(name, value.dtype, value.shape)

    states = list(zip(state_records(program), program.states.values(), strict=True))
    plain = (program.input_ids, program.position_ids, program.num_logits)
    return IoRecord(
        (*(record(v, v.name) for v in plain), *(record(v, s.input) for s, (v, _) in states)),
        (record(program.logits, "logits"), *(record(v, s.output) for s, (_, v) in states)),
    )


def build_model(program: StepProgram, storage: Storage, *, exact: bool) -> ir.Model:
    """The model; its initializers point into the data file that `storage` lays out."""
    emitter = Emitter(storage.tensors, _ACCURACY_LEVEL[exact])
    states = list(zip(state_records(program), program.states.values(), strict=True))

    count = emitter.initializer(ir.tensor(1, dtype=ir.DataType.INT64, name=program.num_logits.name))
    emitter.values[program.num_logits.name] = count
    inputs = []
    for value in (program.input_ids, program.position_ids):
        emitter.values[value.name] = _input(value, value.name)
        inputs.append(emitter.values[value.name])
    for record, (before, _) in states:
        emitter.values[before.name] = _input(before, record.input)
        inputs.append(emitter.values[before.name])

    for node in program.nodes:
        lower(emitter, node)
    outputs = [emitter.values[program.logits.name]]
    for record, (_, after) in states:
        outputs.append(emitter.values[after.name])
        outputs[-1].name = record.output
    _require_single_readers(inputs[2:])

    graph = ir.Graph(
        [*inputs, count],
        outputs,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": OPSET, MICROSOFT: 1, DOMAIN: 1},
        name="griffin_step",
    )
    return ir.Model(
        graph,
        ir_version=_IR_VERSION,
        producer_name="rgexport",
        producer_version=__version__,
        functions=functions(),
    )


def save_model(model: ir.Model, folder: Path) -> None:
    """Writes the graph; the weights are in the data file."""
    ir.save(model, folder / MODEL_FILE)


def _input(value: Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(DTYPES[value.dtype]), shape=ir.Shape(value.shape))


def _require_single_readers(states: list[ir.Value]) -> None:
    """Runtimes write a state into the buffer that it was read from: only its reader may follow."""
    for state in states:
        assert len(state.uses()) == 1, f"{state.name} is read {len(state.uses())} times"
