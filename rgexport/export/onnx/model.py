"""Lowers a step program into an ONNX model over the stored weights."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from rgexport._version import __version__
from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.functions import QUANT_LINEAR_LEVEL
from rgexport.export.onnx.fusion import fused
from rgexport.export.onnx.graph import DTYPES, OPSET
from rgexport.export.onnx.interface import state_records
from rgexport.export.onnx.lowering import Lowering, lower
from rgexport.export.onnx.native import DOMAIN, VERSION
from rgexport.export.onnx.operators import MICROSOFT
from rgexport.export.onnx.profiles import LoweringProfile
from rgexport.export.program import StepProgram, Value
from rgexport.griffin.config import GriffinConfig

_IR_VERSION = 10
_EXACT = 1
"""`MatMulNBits`'s accuracy level for float32 activations."""


def build_model(
    program: StepProgram,
    tensors: dict[str, StoredTensor],
    profile: LoweringProfile,
    *,
    exact: bool,
) -> ir.Model:
    """The model for a profile; its initializers point to where `tensors` are stored."""
    level = _EXACT if exact else profile.accuracy_level
    emitter = Emitter(tensors, level, native=profile.functions)
    if profile.functions:
        program = fused(program, tensors, rounded=level == QUANT_LINEAR_LEVEL)
    graph = _build_graph(program, emitter, profile.lowerings)
    model = ir.Model(
        graph,
        ir_version=_IR_VERSION,
        producer_name="rgexport",
        producer_version=__version__,
        functions=list(emitter.functions.values()),
    )
    if not profile.functions:
        _inline(model)
    profile.require_allowed(model)
    _require_reads_before_writes(list(zip(graph.inputs[2:], graph.outputs[1:], strict=True)))
    return model


def add_description(model: ir.Model, name: str, precision: str, config: GriffinConfig) -> None:
    """Adds what tools such as Netron show of a model, and its sizes for programs that read them."""
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


def _build_graph(
    program: StepProgram, emitter: Emitter, lowerings: Mapping[str, Lowering]
) -> ir.Graph:
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
        lower(emitter, node, lowerings)
    outputs = [emitter.values[program.logits.name]]
    for record, (_, after) in states:
        outputs.append(emitter.values[after.name])
        outputs[-1].name = record.output

    return ir.Graph(
        inputs,
        outputs,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": OPSET, MICROSOFT: 1, DOMAIN: VERSION},
        name="griffin_step",
    )


def _inline(model: ir.Model) -> None:
    """Inlines our functions; the names of the graph's outputs stay."""
    names = [value.name for value in model.graph.outputs]
    InlinePass()(model)
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    model.functions.clear()
    del model.graph.opset_imports[DOMAIN]


def _input(value: Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(DTYPES[value.dtype]), shape=ir.Shape(value.shape))


def _require_reads_before_writes(states: list[tuple[ir.Value, ir.Value]]) -> None:
    """Asserts that all readers of an old state run before the node that writes the new one.

    Runtimes write a state into the buffer that it was read from. So each reader must be the writing
    node, or one whose results it needs.
    """
    for before, after in states:
        writer = after.producer()
        earlier = _ancestors(writer)
        for use in before.uses():
            assert use.node in earlier, f"{use.node.name} may read {before.name} too late"


def _ancestors(node: ir.Node | None) -> set[ir.Node]:
    """The node and all nodes whose results it needs."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found
