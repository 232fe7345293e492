"""Gives a step program the shapes of the inputs and outputs that other programs expect."""

from dataclasses import replace

from rgexport.artifacts.onnx.format import STATES
from rgexport.export.program import StepProgram, Value


def with_interface(program: StepProgram) -> StepProgram:
    rings = [
        value
        for name, values in program.states.items()
        if STATES[name.rpartition(".")[2]][1] == "ring"
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
