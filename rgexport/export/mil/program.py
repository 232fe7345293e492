"""Holds a MIL program as plain data: functions, operations, values, and their dtypes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import ml_dtypes
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

_STORED: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class TensorType:
    """A dtype by its name and a shape; `()` is a scalar.

    The dtype is a key of `BITS`, `string`, or, for a value that is no tensor and has no shape,
    `list`, `tuple` or `dictionary`.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes where it is stored, elements of fewer than 8 bits packed."""
        return -(-self.size * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        """Formats it as `float16 [1, 1, 4]`."""
        return f"{self.dtype} [{', '.join('?' if n == UNKNOWN else str(n) for n in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Immediate:
    """A value in the program itself; integers of fewer than 8 bits are unpacked."""

    type: TensorType
    array: np.ndarray


@dataclass(frozen=True)
class FileValue:
    """A value in a weight file, as one blob."""

    type: TensorType
    file: str
    """The program's name for the file, such as `@model_path/weights/weight.bin`."""
    offset: int
    """Where the blob's header begins."""


@dataclass(frozen=True)
class Name:
    """The output of an operation, the input or the state with that name."""

    name: str


Value = Immediate | FileValue | Name
Constant = Immediate | FileValue


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation; a `const` has its value in `attributes["val"]`."""

    type: str
    name: str
    inputs: dict[str, tuple[Value, ...]]
    """Parameter → its values: one, or several for a variadic parameter such as `values`."""
    outputs: tuple[tuple[str, TensorType], ...]
    attributes: dict[str, Constant] = field(default_factory=dict)
    """All but `name`."""
    blocks: tuple[tuple["Operation", ...], ...] = ()
    """The operations of nested blocks, such as the body of a loop."""

    @property
    def constants(self) -> Iterator[tuple[str, Constant]]:
        """Yields (parameter, value) of all inputs and attributes that are constants."""
        for name, values in self.inputs.items():
            yield from ((name, value) for value in values if not isinstance(value, Name))
        yield from self.attributes.items()

    @property
    def label(self) -> str:
        """The name in messages: the operation's, else its first output's, else its type."""
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
        """Yields all operations; nested ones follow the operation that holds their block."""
        return _walk(self.operations)


def _walk(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from _walk(block)


def numpy_type(dtype: str) -> np.dtype:
    """Returns the dtype of elements in memory; `int8` or `uint8` for fewer than 8 bits."""
    if BITS[dtype] < 8:
        return np.dtype(dtype.rstrip("0123456789") + "8")
    return _STORED.get(dtype) or np.dtype(dtype)


def unpack(packed: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Unpacks elements `[..., count]` from bytes `[..., n]` (uint8), lowest bits first."""
    bits, held = BITS[dtype], numpy_type(dtype)
    if bits >= 8:
        return packed.view(held)[..., :count]
    if bits == 4:
        pairs = np.stack([packed & 15, packed >> 4], -1)
        elements = pairs.reshape(*packed.shape[:-1], -1)[..., :count]
    else:
        single = np.unpackbits(packed, -1, bitorder="little")[..., : count * bits]
        weights = (1 << np.arange(bits)).astype(np.uint8)
        elements = single.reshape(*packed.shape[:-1], count, bits) @ weights
    if held.kind == "i":
        elements = ((elements << (8 - bits)).view(np.int8)) >> (8 - bits)
    return elements.astype(held, copy=False)
