"""Which kernels compute the ops of our own domain in a model file, and why native ones do not.

Such an op is a function of the file, with a body of standard ops, which is what runs where nothing
else is known. The engine needs no `onnx`, so the few fields are read here from protobuf's wire.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rgexport.kernels.onnx import library as build

DOMAIN = "ai.rgexport"
STOCK = "stock"
"""Says of a session that it runs the engine's own kernels."""

_GRAPH, _NODE, _OP_TYPE, _NODE_DOMAIN = 7, 1, 4, 7
"""Numbers of the fields in onnx.proto: of ModelProto, GraphProto and, twice, NodeProto."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_FIXED = {_FIXED_64: 8, _FIXED_32: 4}


@dataclass(frozen=True)
class NativeOps:
    """What there is for a model file on this machine."""

    ops: dict[str, int]
    """Op of our domain → how many nodes of the graph are of it."""
    native: tuple[str, ...]
    """Those of them that native kernels compute here; the bodies of the others run."""
    library: Path | None
    """What to register with the engine, if any is native."""
    kernels: str
    """`native` and the instruction set, or `stock`."""
    reason: str
    """Why it is `stock`; empty otherwise."""


def native_ops(model: Path | bytes) -> NativeOps:
    """Looks at a model file, or a serialized model, and at the library of kernels.

    Raises:
        RequestError: the environment asks for an instruction set that does not exist.
    """
    ops = own_ops(model if isinstance(model, bytes) else model.read_bytes())
    found, path = build.kernels(), build.library()
    native = tuple(name for name in ops if name in found.ops)
    if native and path:
        return NativeOps(ops, native, path, f"native {found.instruction_set}", "")
    reason = found.reason or f"the file has no op of {', '.join(sorted(found.ops))}"
    return NativeOps(ops, (), None, STOCK, reason)


def own_ops(model: bytes) -> dict[str, int]:
    """Counts the graph's nodes of our domain; of a damaged file, those before the damage."""
    counts: Counter[str] = Counter()
    domain = DOMAIN.encode()
    try:
        for node in _messages(memoryview(model), _GRAPH, _NODE):
            fields = dict(_fields(node))
            if fields.get(_NODE_DOMAIN) == domain:
                counts[bytes(fields[_OP_TYPE]).decode()] += 1
    except (IndexError, KeyError, ValueError):
        pass  # the engine will say what is wrong
    return dict(sorted(counts.items()))


def _messages(data: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    if not path:
        yield data
        return
    for number, value in _fields(data):
        if number == path[0]:
            yield from _messages(value, *path[1:])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the fields of a message; numbers are left out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
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
