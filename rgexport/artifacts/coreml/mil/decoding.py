"""Decodes a MIL program from its protobuf messages."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from rgexport.artifacts.coreml.mil.messages import messages
from rgexport.artifacts.coreml.mil.program import (
    BITS,
    UNKNOWN,
    Constant,
    FileValue,
    Function,
    Immediate,
    Name,
    Operation,
    TensorType,
    Value,
    numpy_type,
    unpack,
)

_MAX_RANK = 16
"""More than any runtime can hold (Core ML's own limit is rank 5)."""

_MAX_DIMENSION = 2**31 - 1
"""The largest dimension that a runtime can hold."""

_CONTAINERS = {
    "listType": "list",
    "tupleType": "tuple",
    "dictionaryType": "dictionary",
}
"""Field of a type's message → dtype of a container."""

_FIELDS = {
    "floats": "f4",
    "ints": "i4",
    "bools": "?",
    "longInts": "i8",
    "doubles": "f8",
}
"""Field of a tensor's message → numpy dtype of its repeated values."""


class Damaged(Exception):
    """A program that contradicts itself."""


def decode_functions(program: Any) -> dict[str, Function]:
    """Returns the functions of a `Program` message; raises Damaged if it contradicts itself."""
    functions = {}
    for name, message in sorted(program.functions.items()):
        functions[name] = _function(name, message)
    return functions


def _function(name: str, message: Any) -> Function:
    blocks = dict(sorted(message.block_specializations.items()))
    if message.opset not in blocks:
        raise Damaged(f"function {name} has nothing for its opset {message.opset!r}")

    inputs: dict[str, TensorType] = {}
    states: dict[str, TensorType] = {}
    for value in message.inputs:
        if value.name in inputs or value.name in states:
            raise Damaged(f"function {name} has the input {value.name} twice")
        where = f"{name}: {value.name}"
        if value.type.WhichOneof("type") == "stateType":
            states[value.name] = _type(where, value.type.stateType.wrappedType)
        else:
            inputs[value.name] = _type(where, value.type)

    block = blocks[message.opset]
    outputs = tuple(block.outputs)
    return Function(name, inputs, states, outputs, _operations(name, block))


def _operations(where: str, block: Any) -> tuple[Operation, ...]:
    return tuple(_operation(where, message) for message in block.operations)


def _operation(where: str, message: Any) -> Operation:
    """Returns an operation; `where` names its function in messages."""
    attributes = dict(sorted(message.attributes.items()))
    name = _text(attributes.pop("name", None))
    output_names = ",".join(output.name for output in message.outputs)
    label = f"{where}: {message.type} {name or output_names}"
    return Operation(
        type=message.type,
        name=name,
        inputs=_inputs(label, message),
        outputs=tuple(_outputs(label, message)),
        attributes=_attributes(label, attributes),
        blocks=tuple(_operations(where, block) for block in message.blocks),
    )


def _text(attribute: Any) -> str:
    """Returns the text of an attribute; empty if it is None or holds no text."""
    if attribute is None:
        return ""
    texts = attribute.immediateValue.tensor.strings.values
    if not texts:
        return ""
    return str(texts[0])


def _inputs(label: str, message: Any) -> dict[str, tuple[Value, ...]]:
    inputs = {}
    for parameter, argument in sorted(message.inputs.items()):
        where = f"{label}, {parameter}"
        values = [_binding(where, binding) for binding in argument.arguments]
        inputs[parameter] = tuple(values)
    return inputs


def _outputs(label: str, message: Any) -> Iterator[tuple[str, TensorType]]:
    for output in message.outputs:
        kind = _type(f"{label}, {output.name}", output.type)
        yield output.name, kind


def _attributes(label: str, messages_by_name: dict[str, Any]) -> dict[str, Constant]:
    attributes = {}
    for name, message in messages_by_name.items():
        attributes[name] = _constant(f"{label}, {name}", message)
    return attributes


def _binding(where: str, message: Any) -> Value:
    if message.WhichOneof("binding") == "value":
        return _constant(where, message.value)
    return Name(message.name)


def _constant(where: str, message: Any) -> Constant:
    kind = _type(where, message.type)
    choice = message.WhichOneof("value")
    if choice is None:
        raise Damaged(f"{where} has no value")
    if choice == "blobFileValue":
        if kind.dtype not in BITS or UNKNOWN in kind.shape:
            raise Damaged(f"{where} is a {kind} in a weight file")
        blob = message.blobFileValue
        return FileValue(kind, blob.fileName, blob.offset)

    array = _array(where, kind, message.immediateValue)
    return Immediate(kind, array)


def _array(where: str, kind: TensorType, message: Any) -> np.ndarray:
    """Returns an immediate value as a read-only array of the type's shape."""
    if message.WhichOneof("value") != "tensor":
        return np.zeros(0)  # a list or a dictionary, of a classifier

    elements = _elements(where, kind, message.tensor)
    if UNKNOWN in kind.shape or elements.size != kind.size:
        raise Damaged(f"{where} is {kind}, and has {elements.size} elements")

    array = elements.reshape(kind.shape)
    array.flags.writeable = False
    return array


def _elements(where: str, kind: TensorType, tensor: Any) -> np.ndarray:
    """Returns the elements of a tensor's message in one dimension."""
    field = tensor.WhichOneof("value")
    values: Any = ()
    if field:
        values = getattr(tensor, field).values

    if kind.dtype not in BITS:
        return np.array(list(values), object)

    if field == "bytes":
        if UNKNOWN in kind.shape or kind.nbytes != len(values):
            raise Damaged(f"{where} is {kind}, and has {len(values)} bytes")
        packed = np.frombuffer(values, np.uint8)
        return unpack(packed, kind.dtype, kind.size)

    dtype = numpy_type(kind.dtype)
    if field in _FIELDS:
        stored = np.array(values, _FIELDS[field])
        return stored.astype(dtype)
    return np.zeros(0, dtype)


def _type(where: str, message: Any) -> TensorType:
    choice = message.WhichOneof("type")
    if choice in _CONTAINERS:
        return TensorType(_CONTAINERS[choice], ())
    if choice != "tensorType":
        raise Damaged(f"{where} has no type")

    tensor = message.tensorType
    dtype = _data_types().get(tensor.dataType)
    if dtype is None:
        raise Damaged(f"{where} has the unknown dtype {tensor.dataType}")

    if tensor.rank != len(tensor.dimensions):
        raise Damaged(f"{where} has rank {tensor.rank} and {len(tensor.dimensions)} dimensions")
    shape = tuple(_size(dimension) for dimension in tensor.dimensions)
    if len(shape) > _MAX_RANK or any(size > _MAX_DIMENSION for size in shape):
        raise Damaged(f"{where} cannot have the shape {list(shape)}")
    return TensorType(dtype, shape)


def _size(dimension: Any) -> int:
    if dimension.WhichOneof("dimension") == "constant":
        return int(dimension.constant.size)
    return UNKNOWN


@cache
def _data_types() -> dict[int, str]:
    """Returns the number of each dtype in messages → its name, for those known here."""
    known = {*BITS, "string"}
    dtypes = {}
    for message_name, number in messages("MIL").DataType.items():
        dtype = message_name.lower()
        if dtype in known:
            dtypes[number] = dtype
    return dtypes
