"""The tensors of a Griffin model: canonical names, shapes and roles.

Canonical names and shapes are Hugging Face's without the leading `model.`; linear weights are
`[out, in]`. The head is the embedding (tied), so there is no `lm_head`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rgexport.griffin.config import GriffinConfig

Role = Literal["embedding", "linear", "bias", "gate", "conv", "norm", "a_param"]

QUANTIZABLE: frozenset[Role] = frozenset({"embedding", "linear"})
"""Roles that may be stored in fewer than 16 bits.

All others stay float32 in every format, but for the biases of linears, which may be float16.
"""

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under one name."""

    shape: tuple[int, ...]
    role: Role


def _mlp(c: GriffinConfig) -> dict[str, TensorSpec]:
    return {
        "mlp_block.gate_proj.weight": TensorSpec((c.mlp_width, c.width), "linear"),
        "mlp_block.gate_proj.bias": TensorSpec((c.mlp_width,), "bias"),
        "mlp_block.up_proj.weight": TensorSpec((c.mlp_width, c.width), "linear"),
        "mlp_block.up_proj.bias": TensorSpec((c.mlp_width,), "bias"),
        "mlp_block.down_proj.weight": TensorSpec((c.width, c.mlp_width), "linear"),
        "mlp_block.down_proj.bias": TensorSpec((c.width,), "bias"),
    }


def _recurrent(c: GriffinConfig) -> dict[str, TensorSpec]:
    block = c.lru_width // c.lru_heads
    return {
        "temporal_block.linear_y.weight": TensorSpec((c.lru_width, c.width), "linear"),
        "temporal_block.linear_y.bias": TensorSpec((c.lru_width,), "bias"),
        "temporal_block.linear_x.weight": TensorSpec((c.lru_width, c.width), "linear"),
        "temporal_block.linear_x.bias": TensorSpec((c.lru_width,), "bias"),
        "temporal_block.linear_out.weight": TensorSpec((c.width, c.lru_width), "linear"),
        "temporal_block.linear_out.bias": TensorSpec((c.width,), "bias"),
        "temporal_block.conv_1d.weight": TensorSpec((c.lru_width, 1, c.conv_width), "conv"),
        "temporal_block.conv_1d.bias": TensorSpec((c.lru_width,), "bias"),
        "temporal_block.rg_lru.recurrent_param": TensorSpec((c.lru_width,), "a_param"),
        "temporal_block.rg_lru.input_gate_weight": TensorSpec((c.lru_heads, block, block), "gate"),
        "temporal_block.rg_lru.input_gate_bias": TensorSpec((c.lru_heads, block), "gate"),
        "temporal_block.rg_lru.recurrent_gate_weight": TensorSpec(
            (c.lru_heads, block, block), "gate"
        ),
        "temporal_block.rg_lru.recurrent_gate_bias": TensorSpec((c.lru_heads, block), "gate"),
    }


def _attention(c: GriffinConfig) -> dict[str, TensorSpec]:
    heads = c.num_heads * c.head_dim
    return {
        "temporal_block.q_proj.weight": TensorSpec((heads, c.width), "linear"),
        "temporal_block.k_proj.weight": TensorSpec((c.head_dim, c.width), "linear"),
        "temporal_block.v_proj.weight": TensorSpec((c.head_dim, c.width), "linear"),
        "temporal_block.o_proj.weight": TensorSpec((c.width, heads), "linear"),
        "temporal_block.o_proj.bias": TensorSpec((c.width,), "bias"),
    }


_TEMPORAL: dict[str, Callable[[GriffinConfig], dict[str, TensorSpec]]] = {
    "recurrent": _recurrent,
    "attention": _attention,
}


def layer_tensors(config: GriffinConfig, index: int) -> dict[str, TensorSpec]:
    """The tensors of layer `index`, in the order in which a step reads them."""
    norm = TensorSpec((config.width,), "norm")
    names = (
        {"temporal_pre_norm.weight": norm}
        | _TEMPORAL[config.block_types[index]](config)
        | {"channel_pre_norm.weight": norm}
        | _mlp(config)
    )
    return {f"layers.{index}.{name}": spec for name, spec in names.items()}


def model_tensors(config: GriffinConfig) -> dict[str, TensorSpec]:
    """All tensors of the model."""
    tensors = {EMBEDDING: TensorSpec((config.vocab_size, config.width), "embedding")}
    for index in range(config.num_layers):
        tensors |= layer_tensors(config, index)
    return tensors | {"final_norm.weight": TensorSpec((config.width,), "norm")}
