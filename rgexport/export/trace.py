"""Traces the step model, with fake weights, into a step program, which emitters lower."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from rgexport.export.program import Dim, Node, StepProgram, Value
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import Layer, LayerState
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, is_linear_bias, model_tensors
from rgexport.griffin.ops import compute
from rgexport.griffin.state import layer_states, state_specs


class StepModel(nn.Module):
    """A whole Griffin model as a step; its parameters have canonical names.

    `dtype` is the activation dtype, float32 or float16.
    """

    def __init__(self, config: GriffinConfig, dtype: torch.dtype):
        super().__init__()
        self.config = config
        tensors = model_tensors(config)
        for name, spec in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            in_activation_dtype = spec.role in QUANTIZABLE or is_linear_bias(name, tensors)
            weight = torch.empty(spec.shape, dtype=dtype if in_activation_dtype else torch.float32)
            module.register_parameter(last, nn.Parameter(weight, requires_grad=False))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, num_logits: Tensor, states: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """One step.

        input_ids, position_ids [B, T] int64, `num_logits` last tokens that want logits, a scalar
        int64, and the states of each layer → logits [B, num_logits, V] float32 and the next states.
        """
        config, weights = self.config, dict(self.named_parameters())
        table = weights[EMBEDDING]
        x = compute("embed_tokens", "embedding", input_ids, table, config.embedding_scale)
        updated: list[LayerState] = []
        for index, state in enumerate(states):
            x, state = Layer(config, index, weights, compute)(x, position_ids, state)
            updated.append(state)
        x = compute("last_tokens", "last_tokens", x, num_logits)
        x = compute("final_norm", "rms_norm", x, weights["final_norm.weight"], config.rms_eps)
        logits = compute("lm_head", "linear", x, table, None)
        return compute("logits", "soft_cap", logits, config.soft_cap), updated


_DYNAMIC: dict[int, str] = {2: "batch_size", 3: "tokens"}


def trace(config: GriffinConfig, activation: str = "float32") -> StepProgram:
    """Traces a model in "float32" or "float16", without memory for weights: 3 s for a 2B."""
    with FakeTensorMode():
        model = StepModel(config, getattr(torch, activation))
        batch, tokens = _DYNAMIC
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        states = [
            tuple(
                torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype))
                for spec in layer_states(config, index, activation)
            )
            for index in range(config.num_layers)
        ]
        axes = {0: ExportDim("batch"), 1: ExportDim("tokens")}
        per_layer = ({0: axes[0]}, {0: axes[0]})
        exported = torch.export.export(
            model,
            (ids, ids.clone(), torch.tensor(1), states),
            dynamic_shapes=(axes, axes, None, [per_layer] * config.num_layers),
            strict=False,
        )
    return _program(exported, config, activation)


Values = dict[torch.fx.Node, Value]


def _program(exported: ExportedProgram, config: GriffinConfig, activation: str) -> StepProgram:
    graph, values = exported.graph, Values()
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    inputs: list[Value] = []
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        value = values[node] = _value(node, spec.target or spec.arg.name)
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(value)
    nodes = tuple(_node(n, values) for n in graph.nodes if _is_griffin(n))
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    logits, *updated = [values[node] for node in results]
    names = [spec.name for spec in state_specs(config, activation)]
    states = dict(zip(names, zip(inputs[3:], updated, strict=True), strict=True))
    return StepProgram(inputs[0], inputs[1], inputs[2], states, nodes, logits)


def _is_griffin(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "griffin"


def _node(node: Any, values: Values) -> Node:
    """Reads a call of a Griffin op, and adds its results to `values`."""
    names = (argument.name for argument in node.target._schema.arguments)
    arguments = dict(zip(names, node.args, strict=True))
    site = arguments.pop("site")
    inputs, attributes = [], {}
    for name, argument in arguments.items():
        if argument is None or isinstance(argument, torch.fx.Node):
            inputs.append(None if argument is None else values[argument])
        else:
            attributes[name] = argument
    is_single = not isinstance(node.meta["val"], tuple)
    results = {0: node} if is_single else {user.args[1]: user for user in node.users}
    outputs = []
    for index, result in sorted(results.items()):
        values[result] = _value(result, f"{site}.{index}" if index else site)
        outputs.append(values[result])
    op = node.target._schema.name.removeprefix("griffin::")
    return Node(op, site, tuple(inputs), attributes, tuple(outputs))


def _value(node: torch.fx.Node, name: str) -> Value:
    fake: Any = node.meta["val"]
    return Value(name, tuple(map(_dim, fake.shape)), str(fake.dtype).removeprefix("torch."))


def _dim(size: Any) -> Dim:
    if isinstance(size, int):
        return size
    return _DYNAMIC[size.node.hint] if size.node.has_hint() else "num_logits"
