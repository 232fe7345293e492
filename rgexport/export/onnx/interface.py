"""Derives the inputs and outputs of a graph, as onnxruntime-genai and transformers.js take them.

Both allocate keys and values as [batch_size, heads, window, head_dim], and read shapes from the
graph: the first one asks for logits of one token, the second one for the name `batch_size`.
"""

from dataclasses import replace
from typing import Literal

from rgexport.export.manifest import ACTIVATIONS, IoRecord, Manifest, StateRecord, ValueRecord
from rgexport.export.onnx.model_file import NUM_LOGITS
from rgexport.export.program import Node, StepProgram, Value
from rgexport.griffin.state import state_specs

_STATES: dict[str, tuple[str, Literal["canonical", "ring"]]] = {
    "rg_lru": ("recurrent_state", "canonical"),
    "conv1d": ("conv_state", "canonical"),
    "key": ("key", "ring"),
    "value": ("value", "ring"),
}
"""Canonical state → its name in the hybrid models of Hugging Face and onnxruntime-genai, and its
layout in the graph."""


def with_interface(program: StepProgram) -> StepProgram:
    """Adds an axis for the one head of keys and values; logits become those of one token."""
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

    def resized_node(node: Node) -> Node:
        inputs = tuple(value and resized(value) for value in node.inputs)
        return replace(node, inputs=inputs, outputs=tuple(map(resized, node.outputs)))

    return replace(
        program,
        states={name: (resized(a), resized(b)) for name, (a, b) in program.states.items()},
        nodes=tuple(map(resized_node, program.nodes)),
        logits=resized(program.logits),
    )


def state_records(program: StepProgram) -> tuple[StateRecord, ...]:
    return tuple(
        _state_record(name, tuple(map(value.size, range(1, len(value.shape)))), value.dtype)
        for name, (value, _) in program.states.items()
    )


def io_record(program: StepProgram) -> IoRecord:
    """All inputs and outputs of the graph."""

    def record(value: Value, name: str) -> ValueRecord:
        return ValueRecord(name, value.dtype, value.shape)

    states = list(zip(state_records(program), program.states.values(), strict=True))
    plain = (program.input_ids, program.position_ids)
    return IoRecord(
        (*(record(v, v.name) for v in plain), *(record(v, s.input) for s, (v, _) in states)),
        (record(program.logits, "logits"), *(record(v, s.output) for s, (_, v) in states)),
    )


def expected_interface(manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
    """Derives the states, inputs and outputs of a graph from the sizes in its manifest.

    In graphs of an earlier release `num_logits` is an input, and rings have no axis for the head.
    """
    config = manifest.config
    earlier = any(value.name == NUM_LOGITS for value in manifest.io.inputs)
    batch, logits, head = ("batch", NUM_LOGITS, ()) if earlier else ("batch_size", 1, (1,))
    states = []
    for spec in state_specs(config, ACTIVATIONS[manifest.compute]):
        is_ring = _STATES[spec.name.rpartition(".")[2]][1] == "ring"
        states.append(
            _state_record(spec.name, (*(head if is_ring else ()), *spec.shape), spec.dtype)
        )
    inputs = [
        ValueRecord(name, "int64", (batch, "tokens")) for name in ("input_ids", "position_ids")
    ]
    if earlier:
        inputs.append(ValueRecord(NUM_LOGITS, "int64", ()))
    outputs = [ValueRecord("logits", "float32", (batch, logits, config.vocab_size))]
    for state in states:
        inputs.append(ValueRecord(state.input, state.dtype, (batch, *state.shape)))
        outputs.append(ValueRecord(state.output, state.dtype, (batch, *state.shape)))
    return tuple(states), IoRecord(tuple(inputs), tuple(outputs))


def _state_record(name: str, shape: tuple[int, ...], dtype: str) -> StateRecord:
    _, layer, kind = name.split(".")
    graph_name, layout = _STATES[kind]
    names = f"past_key_values.{layer}.{graph_name}", f"present.{layer}.{graph_name}"
    return StateRecord(name, shape, dtype, layout, *names)
