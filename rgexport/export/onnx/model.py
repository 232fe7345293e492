"""Lowers a step program into an ONNX model over the stored weights."""

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from rgexport._version import __version__
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import ACTIVATIONS, StoredTensor
from rgexport.artifacts.onnx.format import feature_names, graph_interface
from rgexport.artifacts.onnx.model_file import DOMAIN, VERSION
from rgexport.artifacts.onnx.trust import MICROSOFT
from rgexport.export.onnx.emitter import DTYPES, OPSET, OnnxEmitter
from rgexport.export.onnx.functions import fused
from rgexport.export.onnx.interface import with_interface
from rgexport.export.onnx.lowering import lower
from rgexport.export.onnx.profiles import PROFILES, LoweringProfile
from rgexport.export.program import Node, StepProgram
from rgexport.export.trace import trace
from rgexport.griffin.config import GriffinConfig

_IR_VERSION = 10


def build_model(
    program: StepProgram, tensors: dict[str, StoredTensor], profile: LoweringProfile, *, exact: bool
) -> ir.Model:
    rounded = profile.functions and not exact
    emitter = OnnxEmitter(tensors, native=profile.functions, rounded=rounded)
    if profile.functions:
        program = fused(program, tensors, rounded=rounded)
    graph = _build_graph(program, emitter, profile)
    model = ir.Model(
        graph,
        ir_version=_IR_VERSION,
        producer_name="rgexport",
        producer_version=__version__,
        functions=list(emitter.functions.values()),
    )
    if not profile.functions:
        _inline(model)
    for before, after in zip(graph.inputs[2:], graph.outputs[1:], strict=True):
        _require_reads_before_write(before, after)
    return model


def add_description(model: ir.Model, name: str, precision: str, config: GriffinConfig) -> None:
    model.doc_string = (
        f"One step of {name}, a Griffin model (arXiv 2402.19427), in {precision}: token ids, their "
        "positions and the states in; logits of the last token and the new states out. Keys and "
        "values are rings: position p is in slot p modulo the window. States begin as zeros."
    )
    facts = {
        "name": name,
        "precision": precision,
        "exporter": f"rgexport {__version__}",
        "num_layers": config.num_layers,
        "block_types": ",".join(config.block_types),
        "window": config.window,
        "vocab_size": config.vocab_size,
    }
    model.metadata_props.update({f"rgexport.{key}": str(value) for key, value in facts.items()})


def _build_graph(program: StepProgram, emitter: OnnxEmitter, profile: LoweringProfile) -> ir.Graph:
    count = emitter.initializer(ir.tensor(1, dtype=ir.DataType.INT64, name=program.num_logits.name))
    emitter.values[program.num_logits.name] = count
    inputs = [(value, value.name) for value in (program.input_ids, program.position_ids)]
    inputs += [(before, feature_names(state)[0]) for state, (before, _) in program.states.items()]
    for value, name in inputs:
        kind, shape = ir.TensorType(DTYPES[value.dtype]), ir.Shape(value.shape)
        emitter.values[value.name] = ir.Value(name=name, type=kind, shape=shape)
    for node in program.nodes:
        lower(emitter, node, profile.lowerings)
    outputs = [emitter.values[program.logits.name]]
    for state, (_, after) in program.states.items():
        outputs.append(emitter.values[after.name])
        outputs[-1].name = feature_names(state)[1]
    return ir.Graph(
        [emitter.values[value.name] for value, _ in inputs],
        outputs,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": OPSET, MICROSOFT: 1, DOMAIN: VERSION},
        name="griffin_step",
    )


def _inline(model: ir.Model) -> None:
    names = [value.name for value in model.graph.outputs]
    InlinePass()(model)
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    model.functions.clear()
    del model.graph.opset_imports[DOMAIN]


def _require_reads_before_write(before: ir.Value, after: ir.Value) -> None:
    """Asserts that readers of an old state run before it is written, maybe in the same buffer."""
    earlier: set[ir.Node] = set()
    queue = [after.producer()]
    while queue:
        node = queue.pop()
        if node is not None and node not in earlier:
            earlier.add(node)
            queue += [value.producer() for value in node.inputs if value is not None]
    for use in before.uses():
        assert use.node in earlier, f"{use.node.name} may read {before.name} too late"


def narrowed(artifact: Artifact, window: int) -> tuple[Artifact, bytes]:
    """Returns an artifact with another attention window (0: a token sees itself), and its graph."""
    manifest = artifact.manifest
    config = replace(manifest.config, window=window)
    activation = ACTIVATIONS[manifest.compute]
    program = with_interface(trace(replace(config, window=max(1, window)), activation))
    profile = PROFILES[manifest.profile]
    if window == 0:
        ends = ".key", ".value"
        remaining = {name: pair for name, pair in program.states.items() if not name.endswith(ends)}
        program = replace(program, states=remaining, nodes=tuple(map(_without_past, program.nodes)))
        lowerings = {**profile.lowerings, _ITSELF: _attend_to_itself}
        profile = replace(profile, lowerings=lowerings)
    model = build_model(program, manifest.tensors, profile, exact=manifest.exact)
    states, io = graph_interface(config, activation)
    manifest = replace(manifest, config=config, states=states, io=io)
    return replace(artifact, manifest=manifest), ir.to_proto(model).SerializeToString()


_ITSELF = "attend_to_itself"


def _without_past(node: Node) -> Node:
    if node.op != "local_attention":
        return node
    query, _, value = node.tensors[:3]
    return replace(node, op=_ITSELF, inputs=(query, value), outputs=node.outputs[:1])


def _attend_to_itself(g: OnnxEmitter, node: Node) -> Sequence[ir.Value]:
    query, value = node.tensors
    heads = query.size(2) // value.size(2)
    return [g.op("Concat", *[g.value(value)] * heads, axis=-1)]
