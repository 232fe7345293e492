"""A MIL program as plain data: functions, their operations, and what those are given."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

UNKNOWN = -1
"""A dimension that is known only at run time."""

BITS: dict[str, int] = {
    **{"bool": 8, "float16": 16, "float32": 32, "float64": 64, "bfloat16": 16},
    **{"int4": 4, "int8": 8, "int16": 16, "int32": 32, "int64": 64},
    **{"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "uint8": 8},
    **{"uint16": 16, "uint32": 32, "uint64": 64, "float8e4m3fn": 8, "float8e5m2": 8},
}
"""Bits of an element where it is stored."""


@dataclass(frozen=True)
class TensorType:
    """A dtype by its name and a shape; `()` is a scalar.

    The dtype is a key of `BITS`, `string`, or `list`, `tuple` or `dictionary` for a value that is
    no tensor and has no shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes where it is stored, elements of fewer than 8 bits packed.

        Raises:
            KeyError: it is no tensor of numbers.
        """
        return -(-self.size * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        """For people: `float16 [1, 1, 4]`."""
        return f"{self.dtype} [{', '.join('?' if n == UNKNOWN else str(n) for n in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Immediate:
    """A value that stands in the program; 4-bit integers are unpacked to `int8` or `uint8`."""

    type: TensorType
    array: np.ndarray


@dataclass(frozen=True)
class FileValue:
    """A value that lies in a weight file, as one blob.

    `offset` is that of the blob's header; `file` is as the program writes it, such as
    `@model_path/weights/weight.bin`.
    """

    type: TensorType
    file: str
    offset: int


@dataclass(frozen=True)
class Name:
    """The value that an operation, an input or a state of that name gives."""

    name: str


Value = Immediate | FileValue | Name
Constant = Immediate | FileValue


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation; a `const` has its value in `attributes["val"]`."""

    type: str
    name: str
    inputs: dict[str, tuple[Value, ...]]
    """Parameter → its values: one, or as many as a variadic one such as `values` is given."""
    outputs: tuple[tuple[str, TensorType], ...]
    attributes: dict[str, Constant] = field(default_factory=dict)
    """All but `name`."""
    blocks: tuple[tuple["Operation", ...], ...] = ()
    """The operations of nested blocks, of a loop or a condition."""

    @property
    def constants(self) -> Iterator[tuple[str, Constant]]:
        """(parameter, value) of everything that is given by value."""
        for name, values in self.inputs.items():
            yield from ((name, value) for value in values if not isinstance(value, Name))
        yield from self.attributes.items()

    @property
    def label(self) -> str:
        """What to call it in a message: its name, or what it gives, or its type."""
        return self.name or (self.outputs[0][0] if self.outputs else self.type)


@dataclass(frozen=True, eq=False)
class Function:
    """A function; `outputs` are names of values."""

    name: str
    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """All operations; those of nested blocks follow the one that holds them."""
        return _walk(self.operations)


def _walk(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from _walk(block)
