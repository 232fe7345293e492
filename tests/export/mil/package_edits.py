"""Edits of a package and of its files.

The packages are edited with coremltools' own messages, as any tool would.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from coremltools.proto.MIL_pb2 import Block, Operation
from coremltools.proto.Model_pb2 import Model

DATA = Path("Data/com.apple.CoreML")
MODEL, WEIGHTS = DATA / "model.mlmodel", DATA / "weights/weight.bin"
UP = "layers_0_mlp_block_up_proj_weight"
GATE = "layers_0_mlp_block_gate_proj_weight"
OTHER_UP = "layers_1_mlp_block_up_proj_weight"

Edit = Callable[[Model], object]
Spoil = Callable[[Path], object]
"""Damages the package in a folder."""


def edit(change: Edit) -> Spoil:
    def rewrite(package: Path) -> None:
        model = Model.FromString((package / MODEL).read_bytes())
        change(model)
        (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))

    return rewrite


def tell(key: str, text: str) -> Spoil:
    return edit(lambda model: model.description.metadata.userDefined.update({key: text}))


def block(model: Model, function: str) -> Block:
    found = model.mlProgram.functions[function]
    return found.block_specializations[found.opset]


def name_of(operation: Operation) -> str:
    return operation.attributes["name"].immediateValue.tensor.strings.values[0]


def find(model: Model, function: str, kind: str, name: str = "") -> Operation:
    return next(
        operation
        for operation in block(model, function).operations
        if operation.type == kind and name_of(operation).startswith(name)
    )


def in_both(change: Callable[[Model, str], object]) -> Edit:
    def each(model: Model) -> None:
        for function in ("decode", "prefill"):
            change(model, function)

    return each


def drop_write(state: str, *functions: str) -> Edit:
    def change(model: Model) -> None:
        for function in functions:
            operations = block(model, function).operations
            operations.remove(find(model, function, "write_state", f"{state}_write"))

    return change


def swap_writes(model: Model, function: str) -> None:
    writes = [find(model, function, "write_state", f"layers_1_{kind}") for kind in ("key", "value")]
    key, value = (write.inputs["data"].arguments[0] for write in writes)
    key.name, value.name = value.name, key.name


def swap_reads(model: Model, function: str) -> None:
    reads = [find(model, function, "read_state", f"layers_1_{kind}") for kind in ("key", "value")]
    key, value = (read.inputs["input"].arguments[0] for read in reads)
    key.name, value.name = value.name, key.name


BLOCKWISE = "constexpr_blockwise_shift_scale"


def blob(operation: Operation, parameter: str = "data"):
    if parameter == "val":
        return operation.attributes["val"].blobFileValue
    return operation.inputs[parameter].arguments[0].value.blobFileValue


def weight(model: Model, function: str, name: str, kind: str = BLOCKWISE) -> Operation:
    return find(model, function, kind, name)


def swap_blobs(
    *functions: str, second: str = OTHER_UP, part: str = "data", kind: str = BLOCKWISE
) -> Edit:
    """Exchanges the places of two weights of the same shape, the one of `UP` and another."""

    def change(model: Model) -> None:
        for function in functions:
            a, b = (blob(weight(model, function, name, kind), part) for name in (UP, second))
            a.offset, b.offset = b.offset, a.offset

    return change


def swap_uses(*functions: str) -> Edit:
    """Two linears take each other's weight."""

    def change(model: Model) -> None:
        for function in functions:
            sites = ("layers_0_mlp_block_gate_proj", "layers_0_mlp_block_up_proj")
            a, b = (
                find(model, function, "linear", site).inputs["weight"].arguments[0]
                for site in sites
            )
            a.name, b.name = b.name, a.name

    return change


def move_blob(offset: Callable[[int], int]) -> Edit:
    def change(model: Model, function: str) -> None:
        place = blob(weight(model, function, UP))
        place.offset = offset(place.offset)

    return in_both(change)


def retype(change: Callable[[Operation], object], kind: str, name: str) -> Edit:
    return lambda model: change(find(model, "decode", kind, name))


def set_dimension(axis: int, size: int) -> Callable[[Operation], None]:
    def change(operation: Operation) -> None:
        kind = operation.outputs[0].type.tensorType
        kind.dimensions[axis].constant.size = size

    return change


def set_dtype(dtype: int) -> Callable[[Operation], None]:
    def change(operation: Operation) -> None:
        operation.outputs[0].type.tensorType.dataType = dtype

    return change


def set_type(kind: str) -> Callable[[Operation], None]:
    return lambda operation: setattr(operation, "type", kind)


def rename_argument(parameter: str, name: str) -> Callable[[Operation], None]:
    def change(operation: Operation) -> None:
        operation.inputs[parameter].arguments[0].name = name

    return change


def first_operation_last(model: Model) -> None:
    operations = block(model, "prefill").operations
    first = next(o for o in operations if o.type == "gather")
    moved = Operation()
    moved.CopyFrom(first)
    operations.remove(first)
    operations.append(moved)


def twice(model: Model) -> None:
    operations = block(model, "decode").operations
    gelu = next(operation for operation in operations if operation.type == "gelu")
    copy = operations.add()
    copy.CopyFrom(gelu)


def states_of(model: Model, function: str) -> Iterator:
    for value in model.mlProgram.functions[function].inputs:
        if value.type.WhichOneof("type") == "stateType":
            yield value


def state_dtype(model: Model, function: str) -> None:
    state = next(s for s in states_of(model, function) if s.name == "layers_1_key")
    state.type.stateType.wrappedType.tensorType.dataType = 11


def narrow_state(model: Model, function: str) -> None:
    state = next(s for s in states_of(model, function) if s.name == "layers_1_key")
    state.type.stateType.wrappedType.tensorType.dimensions[3].constant.size = 20


def forget_state(model: Model) -> None:
    inputs = model.mlProgram.functions["prefill"].inputs
    inputs.remove(next(s for s in states_of(model, "prefill") if s.name == "layers_1_key"))


def forget_prefill(model: Model) -> None:
    del model.mlProgram.functions["prefill"]


def weights(change: Callable[[bytearray], object]) -> Spoil:
    def rewrite(package: Path) -> None:
        data = bytearray((package / WEIGHTS).read_bytes())
        change(data)
        (package / WEIGHTS).write_bytes(data)

    return rewrite


def places(package: Path, *names: str, part: str = "data") -> list[tuple[int, int]]:
    """Where the data of weights begin and end."""
    model = Model.FromString((package / MODEL).read_bytes())
    data = (package / WEIGHTS).read_bytes()
    found = []
    for name in names:
        offset = blob(weight(model, "decode", name), part).offset
        size = struct.unpack_from("<Q", data, offset + 8)[0]
        found.append((offset + 64, offset + 64 + size))
    return found


def exchange_bytes(package: Path) -> None:
    """The contents of two weights change places, and nothing else."""
    (a, b), (c, d) = places(package, UP, OTHER_UP)

    def change(data: bytearray) -> None:
        data[a:b], data[c:d] = data[c:d], data[a:b]

    weights(change)(package)


def flip_bit(package: Path) -> None:
    ((start, _),) = places(package, UP, part="scale")
    weights(lambda data: data.__setitem__(start + 3, data[start + 3] ^ 0x40))(package)


def in_header(position: int, value: bytes) -> Spoil:
    """Overwrites bytes of the header of a weight's blob."""

    def spoil(package: Path) -> None:
        ((start, _),) = places(package, UP)
        at = start - 64 + position
        weights(lambda data: data.__setitem__(slice(at, at + len(value)), value))(package)

    return spoil


def truncate(count: int) -> Spoil:
    def spoil(package: Path) -> None:
        path = package / WEIGHTS
        os.truncate(path, path.stat().st_size - count)

    return spoil


def truncate_to(size: int) -> Spoil:
    return lambda package: os.truncate(package / WEIGHTS, size)


def append_blob(package: Path) -> None:
    def change(data: bytearray) -> None:
        data.extend(b"\0" * (-len(data) % 64))
        header = struct.pack("<IIQQQ32x", 0xDEADBEEF, 3, 64, len(data) + 64, 0)
        data.extend(header + b"\1" * 64)

    weights(change)(package)


def write_twice(package: Path) -> None:
    """A weight is stored a second time, and one function takes it from there."""
    ((start, stop),) = places(package, UP)
    data = bytearray((package / WEIGHTS).read_bytes())
    data.extend(b"\0" * (-len(data) % 64))
    place = len(data)
    data.extend(data[start - 64 : start - 48] + struct.pack("<QQ32x", place + 64, 0))
    data.extend(data[start:stop])
    data[:4] = struct.pack("<I", struct.unpack_from("<I", data)[0] + 1)
    (package / WEIGHTS).write_bytes(data)
    edit(lambda model: setattr(blob(weight(model, "prefill", UP)), "offset", place))(package)


def content_hash(package: Path) -> None:
    """Makes all hashes and sizes of the artifact's manifest fit what is there."""
    path = package.parent / "rgexport.json"
    manifest = json.loads(path.read_text())
    for name, record in manifest["files"].items():
        data = (package.parent / name).read_bytes()
        record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))
