"""Traces the step model, with fake weights, into a step program."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from rgexport.export.program import Dim, Node, StepProgram, Value
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import LayerState
from rgexport.griffin.state import layer_states, state_specs
from rgexport.griffin.step import StepModel

_DYNAMIC: dict[int, str] = {2: "batch_size", 3: "tokens"}


def trace(config: GriffinConfig, activation: str = "float32") -> StepProgram:
    """Traces a model in "float32" or "float16", without memory for weights: 3 s for a 2B."""
    dtype = getattr(torch, activation)
    with FakeTensorMode():
        model = StepModel(config, dtype)
        batch, tokens = _DYNAMIC
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        states: list[LayerState] = []
        for index in range(config.num_layers):
            first, second = (
                torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype))
                for spec in layer_states(config, index, activation)
            )
            states.append((first, second))
        axes = {0: ExportDim("batch"), 1: ExportDim("tokens")}
        per_layer = ({0: axes[0]}, {0: axes[0]})
        exported = torch.export.export(
            model,
            (ids, ids.clone(), torch.tensor(1), states),
            dynamic_shapes=(axes, axes, None, [per_layer] * config.num_layers),
            strict=False,
        )
    return _Reader(exported).program(config, activation)


class _Reader:
    def __init__(self, exported: ExportedProgram):
        self._exported = exported
        self._values: dict[torch.fx.Node, Value] = {}

    def program(self, config: GriffinConfig, activation: str) -> StepProgram:
        graph, signature = self._exported.graph, self._exported.graph_signature
        placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        inputs: list[Value] = []
        for spec in signature.input_specs:
            value = self._declare(placeholders[spec.arg.name], spec.target or spec.arg.name)
            if spec.kind == InputKind.USER_INPUT:
                inputs.append(value)
        nodes = tuple(self._nodes(graph))
        (results,) = next(n for n in graph.nodes if n.op == "output").args
        logits, *updated = [self._values[node] for node in results]
        names = [spec.name for spec in state_specs(config, activation)]
        states = dict(zip(names, zip(inputs[3:], updated, strict=True), strict=True))
        return StepProgram(inputs[0], inputs[1], inputs[2], states, nodes, logits)

    def _nodes(self, graph: torch.fx.Graph) -> "list[Node]":
        nodes = []
        for node in graph.nodes:
            namespace = getattr(node.target, "namespace", None)
            if node.op != "call_function" or namespace != "griffin":
                continue
            names = (argument.name for argument in node.target._schema.arguments)
            arguments = dict(zip(names, node.args, strict=True))
            site = arguments.pop("site")
            inputs, attributes = [], {}
            for name, argument in arguments.items():
                if argument is None or isinstance(argument, torch.fx.Node):
                    inputs.append(None if argument is None else self._values[argument])
                else:
                    attributes[name] = argument
            outputs = self._declare_outputs(node, site)
            op = node.target._schema.name.removeprefix("griffin::")
            nodes.append(Node(op, site, tuple(inputs), attributes, outputs))
        return nodes

    def _declare_outputs(self, node: torch.fx.Node, site: str) -> tuple[Value, ...]:
        if not isinstance(node.meta["val"], tuple):
            return (self._declare(node, site),)
        items: dict[Any, torch.fx.Node] = {user.args[1]: user for user in node.users}
        return tuple(
            self._declare(items[i], site if i == 0 else f"{site}.{i}") for i in sorted(items)
        )

    def _declare(self, node: torch.fx.Node, name: str) -> Value:
        fake: Any = node.meta["val"]
        shape = tuple(map(_dim, fake.shape))
        value = Value(name, shape, str(fake.dtype).removeprefix("torch."))
        self._values[node] = value
        return value


def _dim(size: Any) -> Dim:
    if isinstance(size, int):
        return size
    return _DYNAMIC[size.node.hint] if size.node.has_hint() else "num_logits"
