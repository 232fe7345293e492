"""Writes a GGUF of Gemma 2B's shape, all Q4_0, with random weights.

    python -m bench.gemma_shape FILE

It stands for the transformer that people would run instead: stock llama.cpp loads it, and what a
token costs depends on shapes and types, not on the weights. Blocks are drawn as they are stored,
a slab at a time, so that it takes neither a checkpoint nor memory.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

ARCHITECTURE = "gemma"
CONTEXT_LENGTH = 1 << 17
"""More than Gemma was trained for: it is the deep end that is of interest."""
SLAB_BYTES = 32 << 20
Q4_0, F32 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.F32
BLOCK, BLOCK_BYTES = GGML_QUANT_SIZES[Q4_0]


@dataclass(frozen=True)
class Shape:
    """A Gemma; the defaults are the 2B's."""

    layers: int = 18
    width: int = 2048
    mlp_width: int = 16384
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 256000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor; matrices are [outputs, inputs], the head is tied."""
        yield "token_embd.weight", (self.vocab_size, self.width)
        yield "output_norm.weight", (self.width,)
        for layer in range(self.layers):
            for name, shape in self._layer().items():
                yield f"blk.{layer}.{name}.weight", shape

    def _layer(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_norm": (self.width,),
            "attn_q": (queries, self.width),
            "attn_k": (keys, self.width),
            "attn_v": (keys, self.width),
            "attn_output": (self.width, queries),
            "ffn_norm": (self.width,),
            "ffn_gate": (self.mlp_width, self.width),
            "ffn_up": (self.mlp_width, self.width),
            "ffn_down": (self.width, self.mlp_width),
        }


def write_gemma(target: Path, shape: Shape = Shape(), seed: int = 0) -> None:
    """Writes the file; matrices are Q4_0, norms ones in float32."""
    partial = target.with_name(f".{target.name}.partial")
    writer = GGUFWriter(partial, ARCHITECTURE)
    _add_metadata(writer, shape)
    tensors = list(shape.tensors())
    for name, size in tensors:
        kind, nbytes = (Q4_0, q4_0_bytes(size)) if len(size) == 2 else (F32, 4 * size[0])
        writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout or ()
    writer.write_padding(file, file.tell())
    generator = np.random.default_rng(seed)
    for _, size in tensors:
        began = file.tell()
        for slab in random_q4_0(size, generator) if len(size) == 2 else [np.ones(size, np.float32)]:
            file.write(slab.data)
        writer.write_padding(file, file.tell() - began)
    writer.close()
    os.replace(partial, target)


def q4_0_bytes(size: tuple[int, ...]) -> int:
    """Bytes of a matrix [outputs, inputs] in Q4_0."""
    return math.prod(size) // BLOCK * BLOCK_BYTES


def random_q4_0(size: tuple[int, ...], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Slabs of blocks [n, 18] uint8: a float16 scale, then 32 numbers from -8 to 7 in 4 bits.

    The scale gives outputs about as large as inputs.
    """
    left, most = q4_0_bytes(size) // BLOCK_BYTES, SLAB_BYTES // BLOCK_BYTES
    scale = 1 / math.sqrt(size[1]) / 4.6  # the standard deviation of -8 … 7
    while left:
        count = min(left, most)
        blocks = generator.integers(0, 256, (count, BLOCK_BYTES), np.uint8)
        scales = generator.uniform(0.5 * scale, 1.5 * scale, (count, 1)).astype("<f2")
        blocks[:, :2] = scales.view(np.uint8)
        yield blocks
        left -= count


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name("a Gemma 2B's shape with random weights")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_tokenizer_model("none")  # llama-bench feeds ids


if __name__ == "__main__":
    write_gemma(Path(sys.argv[1]))
