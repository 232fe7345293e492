"""Edits of a package and of its files, with coremltools' own messages."""

import struct
from collections.abc import Callable
from pathlib import Path

from coremltools.proto.MIL_pb2 import Block, Operation
from coremltools.proto.Model_pb2 import Model

DATA = Path("Data/com.apple.CoreML")
MODEL, WEIGHTS = DATA / "model.mlmodel", DATA / "weights/weight.bin"
UP = "layers_0_mlp_block_up_proj_weight"
OTHER_UP = "layers_1_mlp_block_up_proj_weight"

Edit = Callable[[Model], object]
Spoil = Callable[[Path], object]  # damages the package in a folder


def edit(change: Edit) -> Spoil:
    def rewrite(package: Path) -> None:
        model = Model.FromString((package / MODEL).read_bytes())
        change(model)
        (package / MODEL).write_bytes(model.SerializeToString(deterministic=True))

    return rewrite


def block(model: Model, function: str) -> Block:
    program = model.mlProgram.functions[function]
    return program.block_specializations[program.opset]


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


def drop_write(model: Model) -> None:
    write = find(model, "decode", "write_state", "layers_1_key_write")
    block(model, "decode").operations.remove(write)


def swap_writes(model: Model) -> None:
    writes = [find(model, "decode", "write_state", f"layers_1_{kind}") for kind in ("key", "value")]
    key, value = (write.inputs["data"].arguments[0] for write in writes)
    key.name, value.name = value.name, key.name


BLOCKWISE = "constexpr_blockwise_shift_scale"


def blob(operation: Operation, parameter: str = "data"):
    if parameter == "val":
        return operation.attributes["val"].blobFileValue
    return operation.inputs[parameter].arguments[0].value.blobFileValue


def swap_blobs(part: str = "data", kind: str = BLOCKWISE) -> Edit:
    """Exchanges the places of two weights of the same shape."""

    def change(model: Model, function: str) -> None:
        a, b = (blob(find(model, function, kind, name), part) for name in (UP, OTHER_UP))
        a.offset, b.offset = b.offset, a.offset

    return in_both(change)


def use_another_weight(model: Model, function: str) -> None:
    """A linear takes the weight of another one instead of its own."""
    gate, up = (find(model, function, "linear", f"layers_0_mlp_block_{n}") for n in ("gate", "up"))
    gate.inputs["weight"].arguments[0].name = up.inputs["weight"].arguments[0].name


def forget_state(model: Model) -> None:
    inputs = model.mlProgram.functions["prefill"].inputs
    inputs.remove(next(value for value in inputs if value.name == "layers_1_key"))


def exchange_bytes(package: Path) -> None:
    """The contents of two weights change places, and nothing else."""
    model = Model.FromString((package / MODEL).read_bytes())
    data = bytearray((package / WEIGHTS).read_bytes())
    a, b = (blob(find(model, "decode", BLOCKWISE, name)).offset + 64 for name in (UP, OTHER_UP))
    (size,) = struct.unpack_from("<Q", data, a - 56)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    (package / WEIGHTS).write_bytes(data)
