"""Small files as llama.cpp's programs read them, written by gguf-py."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from rgexport.quantize.ggml_mix import GgmlTensor

W, M, L, D, V = 256, 512, 256, 64, 8


def tensors_of(
    layers: str, width: int = W, mlp: int = M, lru: int = L, heads: int = 4, head: int = D
) -> list[GgmlTensor]:
    """What a file with layers such as `rra` holds, in its order."""
    shapes = {"token_embd.weight": (V, width), "output_norm.weight": (width,)}
    for index, layer in enumerate(layers):
        shapes |= {
            f"blk.{index}.{name}": shape
            for name, shape in _layer(layer, width, mlp, lru, heads * head, head).items()
        }
    names = sorted(shapes, key=lambda name: (_layer_of(name), name))
    return [GgmlTensor(name, shapes[name], _quantizable(name)) for name in names]


def _layer(layer: str, w: int, m: int, lru: int, q: int, kv: int) -> dict[str, tuple[int, ...]]:
    mlp = {
        **{"attn_norm.weight": (w,), "ffn_norm.weight": (w,)},
        **{"ffn_gate.weight": (m, w), "ffn_gate.bias": (m,)},
        **{"ffn_up.weight": (m, w), "ffn_up.bias": (m,)},
        **{"ffn_down.weight": (w, m), "ffn_down.bias": (w,)},
    }
    if layer == "a":
        return mlp | {
            **{"attn_q.weight": (q, w), "attn_k.weight": (kv, w), "attn_v.weight": (kv, w)},
            **{"attn_output.weight": (w, q), "attn_output.bias": (w,)},
        }
    gate = (2, lru // 2, lru // 2)
    return mlp | {
        **{"attn_gate.weight": (lru, w), "attn_gate.bias": (lru,)},
        **{"ssm_in.weight": (lru, w), "ssm_in.bias": (lru,)},
        **{"ssm_out.weight": (w, lru), "ssm_out.bias": (w,), "ssm_a": (lru,)},
        **{"ssm_conv1d.weight": (lru, 4), "ssm_conv1d.bias": (lru,)},
        **{"rg_lru_input_gate.weight": gate, "rg_lru_input_gate.bias": (lru,)},
        **{"rg_lru_a_gate.weight": gate, "rg_lru_a_gate.bias": (lru,)},
    }


def _layer_of(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _quantizable(name: str) -> bool:
    fixed = ("_norm.", "conv1d", "rg_lru")
    return name.endswith(".weight") and not any(part in name for part in fixed)


def write_f32(
    path: Path, arrays: Mapping[str, np.ndarray], layers: str, sizes: tuple[int, ...]
) -> None:
    """A file that llama-quantize reads: the metadata that the architecture takes, and tensors."""
    width, mlp, lru, heads, head = sizes
    arch = "recurrentgemma"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(mlp)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(V)
    writer.add_head_count(heads)
    writer.add_head_count_kv([int(layer == "a") for layer in layers])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(17)
    writer.add_rope_dimension_count(head // 2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_float32(f"{arch}.final_logit_softcapping", 30.0)
    writer.add_float32(f"{arch}.embedding_scale", 1.0)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(lru)
    writer.add_ssm_state_size(1)
    writer.add_ssm_group_count(0)
    writer.add_ssm_time_step_rank(2)
    write_tensors(writer, arrays)


def write_imatrix(path: Path, importances: Mapping[str, np.ndarray], count: int = 4) -> None:
    """As llama-imatrix does after `count` tokens: name → mean squares [columns]."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in importances.items():
        writer.add_tensor(f"{name}.in_sum2", (values * np.float32(count))[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    write_tensors(writer, {})


def legacy_imatrix(entries: Mapping[str, tuple[int, np.ndarray]], end: bytes = b"") -> bytes:
    """The older format: name → number of calls, and values summed over them."""
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", calls, len(values)) + values.astype("<f4").tobytes()
    return content + end


def write_tensors(writer: gguf.GGUFWriter, arrays: Mapping[str, np.ndarray]) -> None:
    """Completes a file."""
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
