"""Builds an ONNX graph; equal nodes are made once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

OPSET = 23
"""The first one with RMSNormalization and RotaryEmbedding as single nodes."""

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
}

END = np.iinfo(np.int64).max
"""The stop of a slice to the end."""

Attribute = int | float | str | Sequence[int]


class GraphBuilder:
    """Collects nodes and initializers.

    Nodes are named after the site that is being lowered. A node with the op, inputs and attributes
    of an earlier one is that one: lowerings may ask for a mask, a cast or a cosine repeatedly.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._made: dict[tuple[object, ...], list[ir.Value]] = {}
        self._names: dict[str, int] = {}
        self._site = ""

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        """Names the nodes made inside after the site `name`."""
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
        """Returns `value` in `dtype`; the same value where it has it."""
        if value.dtype == DTYPES[dtype]:
            return value
        return self.typed(self.op("Cast", value, to=int(DTYPES[dtype])), dtype)

    def typed(self, value: ir.Value, dtype: str) -> ir.Value:
        """Declares the dtype of an intermediate value, so that a later cast can be left out."""
        value.dtype = DTYPES[dtype]
        return value

    def constant(self, value: object, dtype: str = "int64") -> ir.Value:
        """Returns a small constant inside the file: a number, or a list of them."""
        array = np.asarray(value, dtype)
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self._made:
            name = f"constant/{len(self.initializers)}"
            self._made[key] = [self.initializer(ir.tensor(array, name=name))]
        return self._made[key][0]

    def slice(self, x: ir.Value, start: int | ir.Value, stop: int, axis: int) -> ir.Value:
        """Returns x[start:stop] along `axis`; `start` may be a value of one element."""
        first = self.constant([start]) if isinstance(start, int) else start
        return self.op("Slice", x, first, self.constant([stop]), self.constant([axis]))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Adds a tensor of the file, under its own name."""
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
