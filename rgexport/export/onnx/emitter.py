"""Builds a graph from a step program: its values, its stored weights, its functions."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.graph import DTYPES, OPSET, Attribute, GraphBuilder
from rgexport.export.onnx.native import DOMAIN
from rgexport.export.onnx.storage import initializer
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import with_groups

Body = Callable[..., Sequence[ir.Value]]
"""Takes a graph builder, a node of the program and its inputs' values; returns the results."""


class OnnxEmitter(GraphBuilder):
    """The graph that is being built, with the values of the program and the stored weights."""

    def __init__(
        self, stored: dict[str, StoredTensor], accuracy_level: int, *, native: bool = False
    ):
        """`accuracy_level` is an attribute of `MatMulNBits`: 1 means float32 activations, 4 int8.

        With `native`, ops that have native kernels become functions.
        """
        super().__init__()
        self.accuracy_level = accuracy_level
        self.native = native
        self.functions: dict[str, ir.Function] = {}
        self.values: dict[str, ir.Value] = {}
        self._stored = with_groups(stored)

    def value(self, declared: Value) -> ir.Value:
        """Returns an activation, a state, or a weight that is stored as floats."""
        if declared.name not in self.values:
            part = self.stored(declared).parts["data"]
            self.values[declared.name] = self.initializer(initializer(part, declared.name))
        return self.values[declared.name]

    def inputs(self, node: Node) -> list[ir.Value]:
        return [self.value(declared) for declared in node.tensors]

    def declare(self, declared: Value, value: ir.Value) -> None:
        """Sets the name, dtype and shape of a value to those in the program."""
        value.name = declared.name
        value.dtype = DTYPES[declared.dtype]
        value.shape = ir.Shape(declared.shape)
        self.values[declared.name] = value

    def stored(self, weight: Value) -> StoredTensor:
        """Returns how a weight, or a row group of one, is stored."""
        return self._stored[weight.name]

    def part(
        self, weight: Value, part: str, shape: tuple[int, ...] | None = None
    ) -> ir.Value | None:
        """Returns a part of a quantized weight, perhaps reshaped; None if it has no such part.

        Each shape of the same bytes is an initializer of its own.
        """
        parts = self.stored(weight).parts
        if part not in parts:
            return None
        view = "" if shape is None else f".{'x'.join(map(str, shape))}"
        name = f"{weight.name}.{part}{view}"
        if name not in self.values:
            self.values[name] = self.initializer(initializer(parts[part], name, shape))
        return self.values[name]

    def call(
        self, function: ir.Function, *inputs: ir.Value | None, **attributes: Attribute
    ) -> list[ir.Value]:
        """Adds a node of our own domain, and its function to the file."""
        self.functions[function.name] = function
        outputs = len(function.outputs)
        return self.ops(function.name, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def native_op(
        self, name: str, node: Node, body: Body, **attributes: int | float
    ) -> Sequence[ir.Value]:
        """Adds an op with a native kernel, as a function with the nodes that `body` builds.

        Native kernels take float32. For other dtypes, and without `native`, the body's nodes are
        added to the graph itself.
        """
        inputs = self.inputs(node)
        dtypes = {value.dtype for value in inputs} | {DTYPES[v.dtype] for v in node.outputs}
        if not self.native or DTYPES["float16"] in dtypes:
            return body(self, node, *inputs)
        if name not in self.functions:
            self.functions[name] = function_of(name, node, inputs, body, attributes)
        return self.call(self.functions[name], *inputs, **attributes)


class _FunctionBuilder(GraphBuilder):
    """Builds the body of a function, which has no initializers: its constants are nodes."""

    def constant(self, value: object, dtype: str = "int64") -> ir.Value:
        array = np.asarray(value, dtype)
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self._made:
            name = self._unique("Constant")
            node = ir.node("Constant", (), {"value": ir.tensor(array, name=name)}, name=name)
            node.outputs[0].name = name
            self.nodes.append(node)
            self._made[key] = list(node.outputs)
        return self._made[key][0]


def function_of(
    name: str, node: Node, inputs: Sequence[ir.Value], body: Body, attributes: Mapping[str, object]
) -> ir.Function:
    """Makes a function of our domain from the nodes that `body` builds for `node`.

    All layers of a model have the sizes of that node. The attributes tell native kernels what the
    inputs do not show; the body does not use them.
    """
    builder = _FunctionBuilder()
    formals = [ir.Value(name=f"input.{i}", type=value.type) for i, value in enumerate(inputs)]
    results = body(builder, node, *formals)
    graph = ir.Graph(formals, results, nodes=builder.nodes, opset_imports={"": OPSET})
    types = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
    declared = [ir.Attr(key, types[type(value)], None) for key, value in attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)
