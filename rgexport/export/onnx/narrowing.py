"""The graph of an artifact with a smaller attention window, over the weights that it has.

It is the graph that an export of the same checkpoint with that window would have: the window is in
the shapes of the states and in a few constants, never in weights.
"""

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import ACTIVATIONS
from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.interface import io_record, state_records, with_interface
from rgexport.export.onnx.model import build_model
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.program import Node, StepProgram
from rgexport.export.trace import trace


def narrowed(artifact: Artifact, window: int) -> tuple[Artifact, bytes]:
    """The artifact as it were with another window, and its serialized graph.

    With a window of 0 a token sees only itself, so attention needs no state.
    """
    manifest = artifact.manifest
    config = replace(manifest.config, window=window)
    program = trace(replace(config, window=max(1, window)), ACTIVATIONS[manifest.compute])
    program = with_interface(program)
    profile = PROFILES[manifest.profile]
    if window == 0:
        program = _without_past(program)
        profile = replace(profile, lowerings={**profile.lowerings, _ITSELF: _only_itself})
    model = build_model(program, manifest.tensors, profile, exact=manifest.exact)
    states, io = state_records(program), io_record(program)
    manifest = replace(manifest, config=config, states=states, io=io)
    return replace(artifact, manifest=manifest), ir.to_proto(model).SerializeToString()


_ITSELF = "only_itself"


def _without_past(program: StepProgram) -> StepProgram:
    """Attention of each token to itself alone: its weight is 1, so the result is its value."""
    ends = ".key", ".value"
    kept = {name: both for name, both in program.states.items() if not name.endswith(ends)}
    nodes = tuple(_of_itself(node) for node in program.nodes)
    return replace(program, states=kept, nodes=nodes)


def _of_itself(node: Node) -> Node:
    if node.op != "local_attention":
        return node
    query, _, value = node.tensors[:3]
    return replace(node, op=_ITSELF, inputs=(query, value), outputs=node.outputs[:1])


def _only_itself(g: Emitter, node: Node) -> Sequence[ir.Value]:
    """The value, for each head."""
    query, value = node.tensors
    heads = query.size(2) // value.size(2)
    return [g.op("Concat", *[g.value(value)] * heads, axis=-1)]
