"""A MIL program as plain data: functions, operations, values and their types."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

UNKNOWN = -1  # a dimension that is known only at run time

BITS: dict[str, int] = {
    "bool": 8,
    "float16": 16,
    "float32": 32,
    "float64": 64,
    "bfloat16": 16,
    "float8e4m3fn": 8,
    "float8e5m2": 8,
    "int4": 4,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "uint1": 1,
    "uint2": 2,
    "uint3": 3,
    "uint4": 4,
    "uint6": 6,
    "uint8": 8,
    "uint16": 16,
    "uint32": 32,
    "uint64": 64,
}
"""dtype → bits of a stored element."""

_ML_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Dtypes that numpy does not have."""


@dataclass(frozen=True)
class TensorType:
    """A dtype (a key of `BITS`, `string`, or of a container: `list`, `tuple`), and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes in a file, where elements of fewer than 8 bits are packed."""
        bits = self.size * BITS[self.dtype]
        return -(-bits // 8)

    def __str__(self) -> str:
        dimensions = ", ".join(_dimension_text(size) for size in self.shape)
        return f"{self.dtype} [{dimensions}]"


def _dimension_text(size: int) -> str:
    if size == UNKNOWN:
        return "?"
    return str(size)


@dataclass(frozen=True, eq=False)
class Immediate:
    """A constant that is stored in the program."""

    type: TensorType
    array: np.ndarray


@dataclass(frozen=True)
class FileValue:
    """A constant that is stored in a weight file.

    Attributes:
        type: the dtype and shape.
        file: the program's name for the file, such as `@model_path/weights/weight.bin`.
        offset: the offset of the constant's header; its data follow.
    """

    type: TensorType
    file: str
    offset: int


@dataclass(frozen=True)
class Name:
    """A reference to an input, a state or a computed value."""

    name: str


Constant = Immediate | FileValue
Value = Constant | Name


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation; a `const` has its value in `attributes["val"]`.

    Attributes:
        type: the type of operation, such as `matmul`.
        name: the operation's own name; may be empty.
        inputs: parameter → its values: one, or several for a variadic one such as `values`.
        outputs: names and types of the results.
        attributes: attribute → value, for all attributes but `name`.
        blocks: operations of the blocks that the operation runs, if it is control flow.
    """

    type: str
    name: str
    inputs: dict[str, tuple[Value, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    attributes: dict[str, Constant] = field(default_factory=dict)
    blocks: tuple[tuple["Operation", ...], ...] = ()

    @property
    def constants(self) -> Iterator[tuple[str, Constant]]:
        """The names and values of all inputs and attributes that are constants."""
        for name, values in self.inputs.items():
            for value in values:
                if not isinstance(value, Name):
                    yield name, value
        yield from self.attributes.items()

    @property
    def label(self) -> str:
        """A name for messages: the operation's, else its first output's, else its type."""
        if self.name:
            return self.name
        if self.outputs:
            name, _ = self.outputs[0]
            return name
        return self.type


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a program; `outputs` are names of inputs or computed values."""

    name: str
    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """Yields all operations in order; an operation comes before those in its blocks."""
        return _walk(self.operations)


def _walk(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from _walk(block)


def numpy_type(dtype: str) -> np.dtype:
    """Returns the dtype of elements in memory; `int8` or `uint8` for fewer than 8 bits."""
    if BITS[dtype] < 8:
        sign_and_kind = dtype.rstrip("0123456789")
        return np.dtype(f"{sign_and_kind}8")
    if dtype in _ML_DTYPES:
        return _ML_DTYPES[dtype]
    return np.dtype(dtype)


def unpack(packed: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Unpacks elements `[..., count]` from bytes `[..., n]` (uint8), lowest bits first."""
    bits = BITS[dtype]
    result_dtype = numpy_type(dtype)
    if bits >= 8:
        return packed.view(result_dtype)[..., :count]

    if bits == 4:
        elements = _unpack_nibbles(packed, count)
    else:
        elements = _unpack_bits(packed, bits, count)

    if result_dtype.kind == "i":
        elements = _extend_sign(elements, bits)
    return elements.astype(result_dtype, copy=False)


def _unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    low = packed & 15
    high = packed >> 4
    pairs = np.stack([low, high], -1)
    elements = pairs.reshape(*packed.shape[:-1], -1)
    return elements[..., :count]


def _unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    single_bits = np.unpackbits(packed, -1, bitorder="little")
    used_bits = single_bits[..., : count * bits]
    bits_by_element = used_bits.reshape(*packed.shape[:-1], count, bits)

    powers = 1 << np.arange(bits)
    return bits_by_element @ powers.astype(np.uint8)


def _extend_sign(elements: np.ndarray, bits: int) -> np.ndarray:
    """Returns two's complement integers of `bits` bits as int8.

    The sign bit is shifted to the top of the byte, and shifted back arithmetically.
    """
    unused_bits = 8 - bits
    at_top = elements << unused_bits
    return at_top.view(np.int8) >> unused_bits
