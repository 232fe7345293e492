"""Reads an ONNX model file's nodes and external tensors from protobuf's wire.

The engine needs no package `onnx`, and of a file these few fields are all that a runtime asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

_GRAPH, _OPSET = 7, 8
"""Of ModelProto, in onnx.proto; below of OperatorSetIdProto, GraphProto, NodeProto, TensorProto and
its entries."""
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_NODE, _INITIALIZER = 1, 5
_INPUT, _OP_TYPE, _DOMAIN = 1, 4, 7
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_KEY, _VALUE = 1, 2
_ELSEWHERE = 1
"""`data_location` of a tensor that lies in another file."""

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_MOST_SIZE = (1 << 62) - 1
"""Of an axis."""
_MOST_BITS = 63
_MOST_KIND = (1 << 31) - 1
"""Of a number, but for its last seven."""
_FIXED = {_FIXED_64: 8, _FIXED_32: 4}

Field = int | memoryview


@dataclass(frozen=True)
class ModelNode:
    """One node of the graph."""

    op: str
    domain: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose bytes lie in a file beside the model."""

    name: str
    data_type: int
    """As onnx.proto numbers them: 1 float32, 2 uint8."""
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class ModelFile:
    """What was read; of a damaged file, what stands before the damage."""

    nodes: list[ModelNode]
    tensors: list[ExternalTensor]
    versions: dict[str, int]
    """Domain → the version of its ops that the file is made of."""


def read_model(model: bytes) -> ModelFile:
    """The nodes and external tensors of a serialized model; subgraphs are left out."""
    found = ModelFile([], [], {})
    try:
        for number, part in _fields(memoryview(model)):
            if number == _OPSET:
                found.versions.update([_version(_bytes(part))])
            for kind, content in _fields(_bytes(part)) if number == _GRAPH else ():
                if kind == _NODE:
                    found.nodes.append(_node(_bytes(content)))
                elif kind == _INITIALIZER:
                    found.tensors.extend(_external(_bytes(content)))
    except (IndexError, KeyError, TypeError, ValueError):
        pass  # the engine will say what is wrong
    return found


def _version(data: memoryview) -> tuple[str, int]:
    fields = dict(_fields(data))
    version = fields[_OPSET_VERSION]
    if not isinstance(version, int):
        raise TypeError
    return _text(fields.get(_OPSET_DOMAIN, memoryview(b""))), version


def _node(data: memoryview) -> ModelNode:
    fields = list(_fields(data))
    texts = {number: _text(value) for number, value in fields if number in (_OP_TYPE, _DOMAIN)}
    inputs = tuple(_text(value) for number, value in fields if number == _INPUT)
    return ModelNode(texts[_OP_TYPE], texts.get(_DOMAIN, ""), inputs)


def _external(data: memoryview) -> Iterator[ExternalTensor]:
    fields = list(_fields(data))
    last = dict(fields)
    location = last.get(_LOCATION)  # an enumeration: 32 bits of it count
    if not isinstance(location, int) or location & 0xFFFFFFFF != _ELSEWHERE:
        return
    entries = (dict(_fields(_bytes(value))) for number, value in fields if number == _EXTERNAL)
    places = {_text(entry[_KEY]): _text(entry[_VALUE]) for entry in entries}
    shape = [size for number, value in fields if number == _DIMS for size in _numbers(value)]
    kind, offset = last[_DATA_TYPE], int(places.get("offset", "0"))
    if any(size > _MOST_SIZE for size in shape) or not isinstance(kind, int) or kind > _MOST_KIND:
        raise ValueError  # numbers below zero look like this
    if _lies_inside(places["location"]) and offset >= 0:
        yield ExternalTensor(_text(last[_NAME]), kind, tuple(shape), places["location"], offset)


def _lies_inside(location: str) -> bool:
    """Whether a file lies in the model's folder; the engine refuses a model of other files."""
    path = PurePosixPath(location)
    plain = location.isprintable() and not set(location) & set("\\:") and path.parts
    return bool(plain) and not path.is_absolute() and ".." not in path.parts


def _numbers(value: Field) -> Iterator[int]:
    """A repeated number, alone or packed."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number


def _text(value: Field) -> str:
    return bytes(_bytes(value)).decode()


def _bytes(value: Field) -> memoryview:
    if isinstance(value, int):
        raise TypeError
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, Field]]:
    """Number and content of the fields of a message; floats are left out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise IndexError
            yield number, data[at : at + size]
            at += size
        else:
            at += _FIXED[kind]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > _MOST_BITS:  # it would take for ever to collect them
            raise ValueError
