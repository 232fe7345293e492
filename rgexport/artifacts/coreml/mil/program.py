"""Holds a MIL program as plain data, and decodes it from protobuf messages.

Importing `coremltools` takes seconds and 300 MB; its messages are loaded from its folder without.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from rgexport.errors import NotInstalled

UNKNOWN = -1  # a dimension that is known only at run time

BITS: dict[str, int] = {
    **{"bool": 8, "float16": 16, "float32": 32, "float64": 64, "bfloat16": 16},
    **{"int4": 4, "int8": 8, "int16": 16, "int32": 32, "int64": 64},
    **{"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "uint8": 8},
    **{"uint16": 16, "uint32": 32, "uint64": 64, "float8e4m3fn": 8, "float8e5m2": 8},
}

_STORED: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class TensorType:
    """A dtype (a key of `BITS`, `string`, or of a container: `list`, `tuple`), and a shape."""

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
        return f"{self.dtype} [{', '.join('?' if n == UNKNOWN else str(n) for n in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Immediate:
    type: TensorType
    array: np.ndarray


@dataclass(frozen=True)
class FileValue:
    type: TensorType
    file: str  # the program's name for the file, such as `@model_path/weights/weight.bin`
    offset: int


@dataclass(frozen=True)
class Name:
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
    attributes: dict[str, Constant] = field(default_factory=dict)  # all but `name`
    blocks: tuple[tuple["Operation", ...], ...] = ()

    @property
    def constants(self) -> Iterator[tuple[str, Constant]]:
        for name, values in self.inputs.items():
            yield from ((name, value) for value in values if not isinstance(value, Name))
        yield from self.attributes.items()

    @property
    def label(self) -> str:
        return self.name or (self.outputs[0][0] if self.outputs else self.type)


@dataclass(frozen=True, eq=False)
class Function:
    name: str
    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
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


MAX_RANK, MAX_DIMENSION = 16, 2**31 - 1
"""Above what any runtime can hold (Core ML's own limit is rank 5)."""
_MESSAGES = "_rgexport_coreml_messages"
_CONTAINERS = {"listType": "list", "tupleType": "tuple", "dictionaryType": "dictionary"}
_FIELDS = {"floats": "f4", "ints": "i4", "bools": "?", "longInts": "i8", "doubles": "f8"}


class Damaged(Exception):
    """A program that contradicts itself."""


def messages(name: str) -> ModuleType:
    """Loads the module `NAME_pb2` of coremltools, such as `Model`; raises NotInstalled."""
    return import_module(f"{_message_package()}.{name}_pb2")


@cache
def _message_package() -> str:
    try:
        spec = find_spec("coremltools")
    except ValueError:  # an entry of sys.modules that is None
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalled(
            "reading a Core ML package needs coremltools: pip install 'rgexport[coreml]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "proto"
    spec = spec_from_file_location(
        _MESSAGES, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    sys.modules[_MESSAGES] = module_from_spec(spec)
    return _MESSAGES


def decode_functions(program: Any) -> dict[str, Function]:
    """Decodes the functions of a `Program` message; raises Damaged if it contradicts itself."""
    return {name: _function(name, message) for name, message in sorted(program.functions.items())}


def _function(name: str, message: Any) -> Function:
    blocks = dict(sorted(message.block_specializations.items()))
    if message.opset not in blocks:
        raise Damaged(f"function {name} has nothing for its opset {message.opset!r}")
    inputs: dict[str, TensorType] = {}
    states: dict[str, TensorType] = {}
    for value in message.inputs:
        stateful = value.type.WhichOneof("type") == "stateType"
        kind = value.type.stateType.wrappedType if stateful else value.type
        if value.name in inputs or value.name in states:
            raise Damaged(f"function {name} has the input {value.name} twice")
        (states if stateful else inputs)[value.name] = _type(f"{name}: {value.name}", kind)
    block = blocks[message.opset]
    return Function(name, inputs, states, tuple(block.outputs), _operations(name, block))


def _operations(where: str, block: Any) -> tuple[Operation, ...]:
    return tuple(_operation(where, message) for message in block.operations)


def _operation(where: str, message: Any) -> Operation:
    attributes = dict(sorted(message.attributes.items()))
    named = attributes.pop("name", None)
    strings = named.immediateValue.tensor.strings.values if named is not None else ()
    name = strings[0] if strings else ""
    label = f"{where}: {message.type} {name or ','.join(v.name for v in message.outputs)}"
    return Operation(
        type=message.type,
        name=name,
        inputs={
            parameter: tuple(_binding(f"{label}, {parameter}", b) for b in argument.arguments)
            for parameter, argument in sorted(message.inputs.items())
        },
        outputs=tuple((v.name, _type(f"{label}, {v.name}", v.type)) for v in message.outputs),
        attributes={key: _constant(f"{label}, {key}", value) for key, value in attributes.items()},
        blocks=tuple(_operations(where, block) for block in message.blocks),
    )


def _binding(where: str, message: Any) -> Value:
    is_value = message.WhichOneof("binding") == "value"
    return _constant(where, message.value) if is_value else Name(message.name)


def _constant(where: str, message: Any) -> Constant:
    kind = _type(where, message.type)
    choice = message.WhichOneof("value")
    if choice == "blobFileValue":
        if kind.dtype not in BITS or UNKNOWN in kind.shape:
            raise Damaged(f"{where} is a {kind} in a weight file")
        return FileValue(kind, message.blobFileValue.fileName, message.blobFileValue.offset)
    if choice is None:
        raise Damaged(f"{where} has no value")
    return Immediate(kind, _array(where, kind, message.immediateValue))


def _array(where: str, kind: TensorType, message: Any) -> np.ndarray:
    if message.WhichOneof("value") != "tensor":
        return np.zeros(0)  # a list or a dictionary, of a classifier
    field = message.tensor.WhichOneof("value")
    values: Any = getattr(message.tensor, field).values if field else ()
    if kind.dtype not in BITS:
        elements = np.array(list(values), object)
    elif field == "bytes":
        if UNKNOWN in kind.shape or kind.nbytes != len(values):
            raise Damaged(f"{where} is {kind}, and has {len(values)} bytes")
        elements = unpack(np.frombuffer(values, np.uint8), kind.dtype, kind.size)
    elif field in _FIELDS:
        elements = np.array(values, _FIELDS[field]).astype(numpy_type(kind.dtype))
    else:
        elements = np.zeros(0, numpy_type(kind.dtype))
    if UNKNOWN in kind.shape or elements.size != kind.size:
        raise Damaged(f"{where} is {kind}, and has {elements.size} elements")
    array = elements.reshape(kind.shape)
    array.flags.writeable = False
    return array


def _type(where: str, message: Any) -> TensorType:
    choice = message.WhichOneof("type")
    if choice != "tensorType":
        if choice not in _CONTAINERS:
            raise Damaged(f"{where} has no type")
        return TensorType(_CONTAINERS[choice], ())
    tensor = message.tensorType
    dtype = _data_types().get(tensor.dataType)
    if dtype is None:
        raise Damaged(f"{where} has the unknown dtype {tensor.dataType}")
    if tensor.rank != len(tensor.dimensions):
        raise Damaged(f"{where} has rank {tensor.rank} and {len(tensor.dimensions)} dimensions")
    shape = tuple(
        n.constant.size if n.WhichOneof("dimension") == "constant" else UNKNOWN
        for n in tensor.dimensions
    )
    if len(shape) > MAX_RANK or any(n > MAX_DIMENSION for n in shape):
        raise Damaged(f"{where} cannot have the shape {list(shape)}")
    return TensorType(dtype, shape)


@cache
def _data_types() -> dict[int, str]:
    names = {number: name.lower() for name, number in messages("MIL").DataType.items()}
    return {number: name for number, name in names.items() if name in {*BITS, "string"}}
