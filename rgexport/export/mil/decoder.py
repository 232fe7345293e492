"""Decodes protobuf messages into `program`'s dataclasses; sizes are checked before they are used.

Importing `coremltools` takes seconds and 300 MB, since it loads its converters, and torch if that
is installed. Its messages, generated from Apple's schema, need neither: they are loaded by
themselves from its folder. `tests/export/mil/test_package.py` fails if a release moves them.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled
from rgexport.export.mil.program import (
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

MAX_RANK, MAX_DIMENSION = 16, 2**31 - 1
"""Above what any runtime can hold (Core ML's own limit is rank 5)."""
_MESSAGES = "_rgexport_coreml_messages"
"""The name under which coremltools' package of messages is loaded."""
_CONTAINERS = {"listType": "list", "tupleType": "tuple", "dictionaryType": "dictionary"}
_FIELDS = {"floats": "f4", "ints": "i4", "bools": "?", "longInts": "i8", "doubles": "f8"}
"""Field of a `TensorValue` → numpy dtype of its values."""


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


def functions(program: Any) -> dict[str, Function]:
    """Decodes the functions of a `Program` message; raises Damaged if it contradicts itself."""
    return {name: _function(name, message) for name, message in _sorted(program.functions)}


def _sorted(entries: Any) -> list[tuple[str, Any]]:
    """Sorts the entries of a protobuf map, which has no order."""
    return sorted(entries.items(), key=lambda entry: entry[0])


def _function(name: str, message: Any) -> Function:
    blocks = dict(_sorted(message.block_specializations))
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
    attributes = dict(_sorted(message.attributes))
    name = _text(attributes.pop("name", None))
    label = f"{where}: {message.type} {name or ','.join(v.name for v in message.outputs)}"
    return Operation(
        type=message.type,
        name=name,
        inputs={
            parameter: tuple(_binding(f"{label}, {parameter}", b) for b in argument.arguments)
            for parameter, argument in _sorted(message.inputs)
        },
        outputs=tuple((v.name, _type(f"{label}, {v.name}", v.type)) for v in message.outputs),
        attributes={key: _constant(f"{label}, {key}", value) for key, value in attributes.items()},
        blocks=tuple(_operations(where, block) for block in message.blocks),
    )


def _text(value: Any) -> str:
    """Returns the string of a `name` attribute, "" if there is none."""
    strings = value.immediateValue.tensor.strings.values if value is not None else ()
    return strings[0] if strings else ""


def _binding(where: str, message: Any) -> Value:
    if message.WhichOneof("binding") == "value":
        return _constant(where, message.value)
    return Name(message.name)


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
    """Returns the number of a dtype in MIL.proto → its name."""
    names = {number: name.lower() for name, number in messages("MIL").DataType.items()}
    return {number: name for number, name in names.items() if name in {*BITS, "string"}}
