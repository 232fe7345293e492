"""Derives the inputs and outputs of a graph, as onnxruntime-genai and transformers.js take them.

Both allocate keys and values as [batch_size, heads, window, head_dim], and read shapes from the
graph: the first one asks for logits of one token, the second one for the name `batch_size`.
"""

from dataclasses import replace
from typing import Literal

from rgexport.export.manifest import IoRecord, StateRecord, ValueRecord
from rgexport.export.onnx.model_file import NUM_LOGITS
from rgexport.export.program import Node, StepProgram, Value
from rgexport.griffin.config import GriffinConfig
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
    """Adds an axis for the one head of keys and values; outputs the logits of one token."""
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


def graph_interface(
    config: GriffinConfig, activation: str, *, earlier: bool = False
) -> tuple[tuple[StateRecord, ...], IoRecord]:
    """Returns the states, inputs and outputs of a graph; with a window of 0 it has no rings.

    In graphs of an `earlier` release `num_logits` is an input, and rings have no axis for the head.
    """
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
    """Returns the graph's input and output of a canonical state."""
    _, layer, kind = state.split(".")
    name, _ = _STATES[kind]
    return f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"
