"""Ways to damage a package, each with what the complaint must name."""

import os
import struct
from dataclasses import dataclass

from tests.export.mil.package_edits import (
    GATE,
    MODEL,
    OTHER_UP,
    UP,
    WEIGHTS,
    Spoil,
    append_blob,
    drop_write,
    edit,
    exchange_bytes,
    first_operation_last,
    flip_bit,
    forget_prefill,
    forget_state,
    in_both,
    in_header,
    move_blob,
    narrow_state,
    rename_argument,
    retype,
    set_dimension,
    set_dtype,
    set_type,
    state_dtype,
    swap_blobs,
    swap_reads,
    swap_uses,
    swap_writes,
    tell,
    truncate,
    truncate_to,
    twice,
    undescribed_output,
    weights,
    write_twice,
    wrong_help_shape,
)


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
