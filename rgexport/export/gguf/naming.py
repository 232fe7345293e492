"""The tensors of a Griffin model in a GGUF file: names, shapes, and what is done to their values.

Names follow llama.cpp's for other hybrids. Beside what `transforms` computes once, the gates'
blocks are transposed, because ggml multiplies by rows.
"""

import re
from dataclasses import dataclass

import numpy as np

from rgexport.export.transforms import DECAY, NORM, PLAIN, Shape, Transform
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, model_tensors

ARCHITECTURE = "recurrentgemma"


def _transposed(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks.swapaxes(1, 2))


_GATE = Transform(_transposed, _transposed)
_CONV = Transform(shape=lambda shape: (shape[0], shape[2]))
_GATE_BIAS = Transform(shape=lambda shape: (shape[0] * shape[1],))

_GLOBAL: dict[str, tuple[str, Transform]] = {
    EMBEDDING: ("token_embd.weight", PLAIN),
    "final_norm.weight": ("output_norm.weight", NORM),
}
_LAYER: dict[str, tuple[str, Transform]] = {
    "temporal_pre_norm.weight": ("attn_norm.weight", NORM),
    "channel_pre_norm.weight": ("ffn_norm.weight", NORM),
    "mlp_block.gate_proj.weight": ("ffn_gate.weight", PLAIN),
    "mlp_block.gate_proj.bias": ("ffn_gate.bias", PLAIN),
    "mlp_block.up_proj.weight": ("ffn_up.weight", PLAIN),
    "mlp_block.up_proj.bias": ("ffn_up.bias", PLAIN),
    "mlp_block.down_proj.weight": ("ffn_down.weight", PLAIN),
    "mlp_block.down_proj.bias": ("ffn_down.bias", PLAIN),
    "temporal_block.q_proj.weight": ("attn_q.weight", PLAIN),
    "temporal_block.k_proj.weight": ("attn_k.weight", PLAIN),
    "temporal_block.v_proj.weight": ("attn_v.weight", PLAIN),
    "temporal_block.o_proj.weight": ("attn_output.weight", PLAIN),
    "temporal_block.o_proj.bias": ("attn_output.bias", PLAIN),
    "temporal_block.linear_x.weight": ("ssm_in.weight", PLAIN),
    "temporal_block.linear_x.bias": ("ssm_in.bias", PLAIN),
    "temporal_block.linear_y.weight": ("attn_gate.weight", PLAIN),
    "temporal_block.linear_y.bias": ("attn_gate.bias", PLAIN),
    "temporal_block.linear_out.weight": ("ssm_out.weight", PLAIN),
    "temporal_block.linear_out.bias": ("ssm_out.bias", PLAIN),
    "temporal_block.conv_1d.weight": ("ssm_conv1d.weight", _CONV),
    "temporal_block.conv_1d.bias": ("ssm_conv1d.bias", PLAIN),
    "temporal_block.rg_lru.recurrent_param": ("ssm_a", DECAY),
    "temporal_block.rg_lru.input_gate_weight": ("rg_lru_input_gate.weight", _GATE),
    "temporal_block.rg_lru.input_gate_bias": ("rg_lru_input_gate.bias", _GATE_BIAS),
    "temporal_block.rg_lru.recurrent_gate_weight": ("rg_lru_a_gate.weight", _GATE),
    "temporal_block.rg_lru.recurrent_gate_bias": ("rg_lru_a_gate.bias", _GATE_BIAS),
}
"""Canonical name within a layer → name within `blk.i.`, and the transform."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file; shapes as numpy has them (ggml's `ne` is the reverse)."""

    canonical: str
    name: str
    canonical_shape: Shape
    shape: Shape
    quantizable: bool
    transform: Transform


def file_tensors(config: GriffinConfig) -> list[FileTensor]:
    """All tensors in the file's order, which is llama.cpp's: globals, then by layer and name."""
    tensors = []
    for canonical, spec in model_tensors(config).items():
        name, transform = _name(canonical)
        shape = _without_leading_ones(transform.shape(spec.shape))
        # ggml knows no matrix of one row: what it takes for a vector is never quantized.
        quantizable = spec.role in QUANTIZABLE and len(shape) > 1
        tensors.append(FileTensor(canonical, name, spec.shape, shape, quantizable, transform))
    return sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))


def _name(canonical: str) -> tuple[str, Transform]:
    if canonical in _GLOBAL:
        return _GLOBAL[canonical]
    _, index, local = canonical.split(".", 2)
    name, transform = _LAYER[local]
    return f"blk.{index}.{name}", transform


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _without_leading_ones(shape: Shape) -> Shape:
    """Its outermost dimensions of 1 are none to ggml."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
