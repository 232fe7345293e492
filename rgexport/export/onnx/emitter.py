"""What a lowering works with: the graph so far, the values of the program, the stored weights."""

import numpy as np
import onnx_ir as ir

from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.graph import DTYPES, GraphBuilder
from rgexport.export.onnx.storage import initializer
from rgexport.export.program import Node, Value

END = np.iinfo(np.int64).max
"""The end of a slice that goes to the end."""


class Emitter(GraphBuilder):
    """A graph being built from a step program and the stored weights."""

    def __init__(self, stored: dict[str, StoredTensor], accuracy_level: int):
        """`accuracy_level` is `MatMulNBits`'s: 1 float32 activations, 4 int8 ones."""
        super().__init__()
        self.accuracy_level = accuracy_level
        self.values: dict[str, ir.Value] = {}
        self._stored = stored

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
        """Where a weight lies."""
        return self._stored[weight.name]

    def part(
        self, weight: Value, part: str, shape: tuple[int, ...] | None = None
    ) -> ir.Value | None:
        """One part of a quantized weight, seen in `shape`; None where it has no such part.

        The same bytes may be seen in several shapes: each is an initializer of its own.
        """
        parts = self.stored(weight).parts
        if part not in parts:
            return None
        view = "" if shape is None else f".{'x'.join(map(str, shape))}"
        name = f"{weight.name}.{part}{view}"
        if name not in self.values:
            self.values[name] = self.initializer(initializer(parts[part], name, shape))
        return self.values[name]

    def slice(self, x: ir.Value, start: int | ir.Value, stop: int, axis: int) -> ir.Value:
        """x[start:stop] along `axis`; `start` may be a value of one element."""
        first = self.constant([start]) if isinstance(start, int) else start
        return self.op("Slice", x, first, self.constant([stop]), self.constant([axis]))
