"""Ways to damage a package, each with what the complaint must name.

The packages are edited with coremltools' own messages, as any tool would.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Damage:
    """What is done to a package, and what must be said of it.

    `named`: a pattern that a complaint must match; `bare` and `adapted`: the same for the package
    without its manifest, and with one that was made to fit, where it is another.
    """

    spoil: Spoil
    named: str
    bare: str = ""
    adapted: str = ""


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


def description(model: Model, function: str = "decode"):
    return next(f for f in model.description.functions if f.name == function)


def wrong_help_shape(model: Model) -> None:
    feature = description(model).input[0]
    feature.type.multiArrayType.shape[1] = 7


def undescribed_output(model: Model) -> None:
    del description(model).output[0]


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


OUTSIDE = r"tensors\.\S+ lies outside of .*weight.bin"
DAMAGES: dict[str, Damage] = {
    "dropped state write": Damage(
        edit(drop_write("layers_1_key", "decode")),
        "decode: state layers_1_key is never written: 4 write_state for 5 states",
    ),
    "dropped state write in prefill": Damage(
        edit(drop_write("layers_0_conv1d", "prefill")),
        "prefill: state layers_0_conv1d is never written",
    ),
    "dropped state write in both": Damage(
        edit(drop_write("recurrent_state_lo", "decode", "prefill")),
        "decode: state recurrent_state_lo is never written.*prefill: state recurrent_state_lo",
    ),
    "swapped state writes": Damage(
        edit(lambda model: swap_writes(model, "decode")),
        "decode: write_state layers_1_key\\S*: it writes the state layers_1_key with what does not",
    ),
    "swapped state reads": Damage(
        edit(in_both(swap_reads)),
        "decode: write_state layers_1_value\\S*: it writes the state layers_1_value with what",
    ),
    "write to another state": Damage(
        edit(retype(rename_argument("input", "layers_1_value"), "write_state", "layers_1_key")),
        "decode: state layers_1_key is never written",
    ),
    "state that is no float16": Damage(
        edit(in_both(state_dtype)), "decode: state layers_1_key is float32; Core ML takes float16"
    ),
    "state of an odd width": Damage(
        edit(in_both(narrow_state)), r"layers_1_key is float16 \[1, 1, 8, 20\]; expected .* of 32"
    ),
    "state of one function alone": Damage(
        edit(forget_state), "prefill: state layers_1_key is missing; in decode it is float16"
    ),
    "swapped blobs": Damage(
        edit(swap_blobs("decode", "prefill")),
        rf"decode: \S+ {UP}, data: it is layers.1.mlp_block.up_proj.weight.data; expected layers.0",
        f"{UP}.data was altered",
    ),
    "swapped blobs in one function": Damage(
        edit(swap_blobs("prefill")),
        rf"prefill: \S+ {UP}, data: it is layers.1.mlp_block.up_proj.weight.data; expected",
        f"prefill: {UP} has its blobs at",
    ),
    "swapped scales": Damage(
        edit(swap_blobs("decode", "prefill", part="scale")),
        rf"{UP}, scale: it is layers.1.mlp_block.up_proj.weight.scales",
        f"{UP}.scales was altered",
    ),
    "swapped blobs of one layer": Damage(
        edit(swap_blobs("decode", "prefill", second=GATE)),
        rf"{UP}, data: it is layers.0.mlp_block.gate_proj.weight.data",
        f"{UP}.data was altered",
    ),
    "swapped contents": Damage(
        exchange_bytes,
        r"layers.0.mlp_block.up_proj.weight.data was altered.*layers.1.mlp_block.up_proj.\S+ was",
        f"{UP}.data was altered.*{OTHER_UP}.data was altered",
    ),
    "a flipped bit": Damage(
        flip_bit,
        "layers.0.mlp_block.up_proj.weight.scales was altered",
        f"{UP}.scales was altered",
    ),
    "swapped uses": Damage(
        edit(swap_uses("decode", "prefill")),
        f"decode: linear layers_0_mlp_block_gate_proj: it takes {UP}, which belongs to "
        "layers.0.mlp_block.up_proj",
    ),
    "truncated weights": Damage(
        truncate(100),
        r"final_norm_weight: the blob at \d+ ends at \d+, beyond the \d+ bytes",
        adapted="tensors.final_norm.weight.parts.data lies outside of .*weight.bin",
    ),
    "weights truncated by a half": Damage(
        truncate_to(40_000),
        r"\w+: the blob at \d+ ends at \d+, beyond the 40000 bytes",
        adapted=OUTSIDE,
    ),
    "empty weights": Damage(
        truncate_to(0), "weight.bin is truncated: it has 0 bytes", adapted=OUTSIDE
    ),
    "no weights": Damage(lambda package: (package / WEIGHTS).unlink(), r"weight.bin is missing"),
    "weights that are something else": Damage(
        weights(lambda data: data.__setitem__(slice(0, 64), b"weights " * 8)),
        "weight.bin is damaged: a weight file of version",
    ),
    "no sentinel": Damage(in_header(0, b"\0\0\0\0"), f"{UP}, data: there is no blob at offset"),
    "blob of another dtype": Damage(
        in_header(4, struct.pack("<I", 11)), f"{UP}, data: .* holds uint4; expected int4"
    ),
    "blob of another size": Damage(
        in_header(8, struct.pack("<Q", 1 << 40)), f"{UP}, data: .* has 1099511627776 bytes"
    ),
    "blob that begins elsewhere": Damage(
        in_header(16, struct.pack("<Q", 640)), f"{UP}, data: the data .* begin at 640"
    ),
    "offset outside": Damage(
        edit(move_blob(lambda offset: 1 << 50)), f"{UP}, data: .*should lie at {1 << 50}"
    ),
    "offset beside": Damage(
        edit(move_blob(lambda offset: offset + 2)), f"{UP}, data: .*no multiple of 64"
    ),
    "a blob that nothing uses": Damage(
        append_blob, r"weight.bin has a blob of 64 bytes at \d+ that nothing uses"
    ),
    "a blob that was written twice": Damage(
        write_twice,
        rf"prefill: \S+ {UP}, data: it is what lies at \d+",
        f"prefill: {UP} has its blobs at",
    ),
    "wrong shape": Damage(
        edit(retype(set_dimension(2, 63), "gelu", "layers_0_mlp_block")),
        r"decode: gelu layers_0_mlp_block\S+: it declares .* \[1, 1, 63\]; computed .*\[1, 1, 96\]",
    ),
    "wrong dtype": Damage(
        edit(retype(set_dtype(11), "linear", "layers_0_mlp_block_up_proj")),
        r"decode: linear layers_0_mlp_block_up_proj: it declares .*float32 .*; computed .*float16",
    ),
    "wrong weight shape": Damage(
        edit(retype(set_dimension(0, 95), "constexpr_blockwise_shift_scale", UP)),
        rf"decode: \S+ {UP}: it declares .*\[95, 64\]; computed .*\[96, 64\]",
    ),
    "custom layer": Damage(
        edit(retype(set_type("custom_layer"), "gelu", "layers_0_mlp_block")),
        "decode: custom_layer layers_0_mlp_block.*: Core ML has no operation 'custom_layer'",
    ),
    "foreign operation": Damage(
        edit(retype(set_type("elu"), "gelu", "layers_0_mlp_block")),
        "decode: elu layers_0_mlp_block.*: rgexport makes no such operation",
    ),
    "undefined value": Damage(
        edit(retype(rename_argument("x", "nowhere"), "gelu", "layers_0_mlp_block")),
        "decode: gelu layers_0_mlp_block.*: it takes nowhere, which nothing before it gives",
    ),
    "value before it is given": Damage(
        edit(first_operation_last), "prefill: cast .*: it takes embed_tokens_gather, which nothing"
    ),
    "value given twice": Damage(edit(twice), "decode: gelu .* which was given before"),
    "input described otherwise": Damage(
        edit(wrong_help_shape), r"decode: input input_ids is described as int32 \[1, 7\]; it is"
    ),
    "output not described": Damage(edit(undescribed_output), "output logits is not described"),
    "no prefill": Damage(edit(forget_prefill), "prefill: the description has this function"),
    "no configuration": Damage(
        tell("rgexport.config", "{"),
        "metadata are damaged: rgexport.config is not the configuration of the manifest",
        "metadata are damaged: rgexport.config is no configuration",
    ),
    "configuration without end": Damage(
        tell("rgexport.config", "[" * 100_000),
        "metadata are damaged: rgexport.config is not the configuration of the manifest",
        "metadata are damaged: rgexport.config is no configuration",
    ),
    "hashes without end": Damage(
        tell("rgexport.weights", "[" * 100_000), "metadata are damaged: it is not JSON"
    ),
    "no hashes": Damage(
        edit(lambda model: model.description.metadata.userDefined.pop("rgexport.weights")),
        "metadata are damaged: there is no rgexport.weights",
    ),
    "half a model": Damage(
        lambda package: os.truncate(package / MODEL, (package / MODEL).stat().st_size // 2),
        "model.mlmodel is damaged",
    ),
    "no model": Damage(lambda package: (package / MODEL).unlink(), "model.mlmodel is missing"),
}
