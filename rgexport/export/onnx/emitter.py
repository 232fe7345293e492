"""Builds a graph from a step program; equal nodes are made once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from rgexport.artifacts.manifest import StoredPart, StoredTensor
from rgexport.artifacts.onnx.model_file import DOMAIN
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import with_groups

OPSET = 23  # the first one with RMSNormalization and RotaryEmbedding as single nodes

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}

END = np.iinfo(np.int64).max

Attribute = int | float | str | Sequence[int]


class GraphBuilder:
    """Collects nodes, named after the site that is lowered; equal ones are made once."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._made: dict[tuple[object, ...], list[ir.Value]] = {}
        self._names: dict[str, int] = {}
        self._site = ""

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        self._site, before = name, self._site
        yield
        self._site = before

    def op(
        self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        return self.ops(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Attribute,
    ) -> list[ir.Value]:
        frozen = tuple(sorted((name, str(value)) for name, value in attributes.items()))
        key = (domain, op, tuple(id(value) for value in inputs), frozen, outputs)
        if key not in self._made:
            name = self._unique(f"{self._site}/{op}")
            node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
            for index, value in enumerate(node.outputs):
                value.name = name if index == 0 else f"{name}.{index}"
            self.nodes.append(node)
            self._made[key] = list(node.outputs)
        return self._made[key]

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        if value.dtype == DTYPES[dtype]:
            return value
        return self.typed(self.op("Cast", value, to=int(DTYPES[dtype])), dtype)

    def typed(self, value: ir.Value, dtype: str) -> ir.Value:
        """Declares the dtype of an intermediate value, so that a later cast can be left out."""
        value.dtype = DTYPES[dtype]
        return value

    def constant(self, value: object, dtype: str = "int64") -> ir.Value:
        array = np.asarray(value, dtype)
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = [self._new_constant(array)]
        return self._made[key][0]

    def _new_constant(self, array: np.ndarray) -> ir.Value:
        return self.initializer(ir.tensor(array, name=f"constant/{len(self.initializers)}"))

    def slice(self, x: ir.Value, start: int | ir.Value, stop: int, axis: int) -> ir.Value:
        first = self.constant([start]) if isinstance(start, int) else start
        return self.op("Slice", x, first, self.constant([stop]), self.constant([axis]))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        assert tensor.name and tensor.name not in self.initializers, tensor.name
        self.initializers[tensor.name] = value
        return value

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}.{count}" if count else name


Body = Callable[..., Sequence[ir.Value]]


class OnnxEmitter(GraphBuilder):
    def __init__(self, stored: dict[str, StoredTensor], *, native: bool, rounded: bool):
        """`native`: our ops are functions; `rounded`: products round activations to int8."""
        super().__init__()
        self.native, self.rounded = native, rounded
        self.functions: dict[str, ir.Function] = {}
        self.values: dict[str, ir.Value] = {}
        self._stored = with_groups(stored)

    def value(self, declared: Value) -> ir.Value:
        if declared.name not in self.values:
            part = self.stored(declared).parts["data"]
            self.values[declared.name] = self.external(part, declared.name)
        return self.values[declared.name]

    def inputs(self, node: Node) -> list[ir.Value]:
        return [self.value(declared) for declared in node.tensors]

    def declare(self, declared: Value, value: ir.Value) -> None:
        value.name = declared.name
        value.dtype = DTYPES[declared.dtype]
        value.shape = ir.Shape(declared.shape)
        self.values[declared.name] = value

    def stored(self, weight: Value) -> StoredTensor:
        return self._stored[weight.name]

    def part(self, weight: Value, part: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Returns a part of a quantized weight, perhaps reshaped."""
        stored = self.stored(weight).parts[part]
        view = "" if shape is None else f".{'x'.join(map(str, shape))}"
        name = f"{weight.name}.{part}{view}"
        if name not in self.values:
            self.values[name] = self.external(stored, name, shape)
        return self.values[name]

    def external(
        self, part: StoredPart, name: str, shape: tuple[int, ...] | None = None
    ) -> ir.Value:
        dtype, dims = DTYPES[part.dtype], ir.Shape(shape or part.shape)
        stored = part.file, part.offset, part.nbytes
        return self.initializer(ir.ExternalTensor(*stored, dtype, shape=dims, name=name))

    def call(
        self, function: ir.Function, *inputs: ir.Value | None, **attributes: Attribute
    ) -> list[ir.Value]:
        self.functions[function.name] = function
        outputs = len(function.outputs)
        return self.ops(function.name, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def native_op(
        self, name: str, node: Node, body: Body, **attributes: int | float
    ) -> Sequence[ir.Value]:
        """Adds an op with a native kernel as a function; for other dtypes, the nodes of `body`."""
        inputs = self.inputs(node)
        dtypes = {value.dtype for value in inputs} | {DTYPES[v.dtype] for v in node.outputs}
        if not self.native or DTYPES["float16"] in dtypes:
            return body(self, node, *inputs)
        if name not in self.functions:
            self.functions[name] = function_of(name, node, inputs, body, attributes)
        return self.call(self.functions[name], *inputs, **attributes)


class _FunctionBuilder(GraphBuilder):
    def _new_constant(self, array: np.ndarray) -> ir.Value:
        name = self._unique("Constant")
        node = ir.node("Constant", (), {"value": ir.tensor(array, name=name)}, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def function_of(
    name: str, node: Node, inputs: Sequence[ir.Value], body: Body, attributes: Mapping[str, object]
) -> ir.Function:
    """Makes a function from the nodes of `body`; attributes are for native kernels alone."""
    builder = _FunctionBuilder()
    formals = [ir.Value(name=f"input.{i}", type=value.type) for i, value in enumerate(inputs)]
    results = body(builder, node, *formals)
    graph = ir.Graph(formals, results, nodes=builder.nodes, opset_imports={"": OPSET})
    types = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
    declared = [ir.Attr(key, types[type(value)], None) for key, value in attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)
