"""The state that lowerings share: the graph, the values of the program, the stored weights."""

from collections.abc import Sequence

import onnx_ir as ir

from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.functions import DOMAIN, Body, function_of
from rgexport.export.onnx.graph import DTYPES, Attribute, GraphBuilder
from rgexport.export.onnx.storage import initializer
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import with_groups


class Emitter(GraphBuilder):
    """A graph being built from a step program and the stored weights."""

    def __init__(
        self, stored: dict[str, StoredTensor], accuracy_level: int, *, native: bool = False
    ):
        """`accuracy_level` is that of `MatMulNBits`: 1 float32 activations, 4 int8 ones.

        With `native`, ops that have native kernels become functions.
        """
        super().__init__()
        self.accuracy_level = accuracy_level
        self.native = native
        self.functions: dict[str, ir.Function] = {}
        self.values: dict[str, ir.Value] = {}
        self._stored = with_groups(stored)

    def value(self, declared: Value) -> ir.Value:
        """An activation, a state, or a weight that is stored as floats."""
        if declared.name not in self.values:
            part = self.stored(declared).parts["data"]
            self.values[declared.name] = self.initializer(initializer(part, declared.name))
        return self.values[declared.name]

    def inputs(self, node: Node) -> list[ir.Value]:
        """All inputs of an op, none of which is optional."""
        return [self.value(declared) for declared in node.tensors]

    def declare(self, declared: Value, value: ir.Value) -> None:
        """Gives a value the name, dtype and shape that it has in the program."""
        value.name = declared.name
        value.dtype = DTYPES[declared.dtype]
        value.shape = ir.Shape(declared.shape)
        self.values[declared.name] = value

    def stored(self, weight: Value) -> StoredTensor:
        """How and where a weight, or a row group of one, is stored."""
        return self._stored[weight.name]

    def part(
        self, weight: Value, part: str, shape: tuple[int, ...] | None = None
    ) -> ir.Value | None:
        """One part of a quantized weight in a shape; None where it has no such part.

        The same bytes may be asked for in several shapes: each is an initializer of its own.
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
        """A node of our own domain, whose function is added to the file."""
        self.functions[function.name] = function
        outputs = len(function.outputs)
        return self.ops(function.name, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def native_op(
        self, name: str, node: Node, body: Body, **attributes: int | float
    ) -> Sequence[ir.Value]:
        """An op that has a native kernel, as a function whose body is what `body` adds to a graph.

        Native kernels take float32. For other dtypes, and where functions are not wanted, the nodes
        of the body are added in place.
        """
        inputs = self.inputs(node)
        dtypes = {value.dtype for value in inputs} | {DTYPES[v.dtype] for v in node.outputs}
        if not self.native or DTYPES["float16"] in dtypes:
            return body(self, node, *inputs)
        if name not in self.functions:
            self.functions[name] = function_of(name, node, inputs, body, attributes)
        return self.call(self.functions[name], *inputs, **attributes)
