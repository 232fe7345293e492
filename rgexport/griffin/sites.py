"""The sites of a model: the stable name of every op of its step, without torch.

Emitters carry them into the names of their values, so what one engine computes at a site can be
held against what another computes there.
"""

from collections.abc import Iterator

from rgexport.griffin.config import GriffinConfig

_TEMPORAL = {
    "recurrent": (
        *("linear_y", "gelu", "linear_x", "conv_1d", "rg_lru.input_gate"),
        *("rg_lru.recurrent_gate", "rg_lru", "mul", "linear_out"),
    ),
    "attention": ("q_proj", "rope_q", "k_proj", "rope_k", "v_proj", "attention", "o_proj"),
}
_MLP = ("gate_proj", "gelu", "up_proj", "mul", "down_proj")
HEAD_SITES = ("last_tokens", "final_norm", "lm_head", "logits")
"""Of those last tokens alone whose logits are wanted."""


def sites(config: GriffinConfig) -> tuple[str, ...]:
    """All sites of a step of `config`, in the order in which the step model computes them."""
    layers = (site for i in range(config.num_layers) for site in _layer_sites(config, i))
    return ("embed_tokens", *layers, *HEAD_SITES)


def _layer_sites(config: GriffinConfig, index: int) -> Iterator[str]:
    layer = f"layers.{index}"
    yield f"{layer}.temporal_pre_norm"
    for name in _TEMPORAL[config.block_types[index]]:
        yield f"{layer}.temporal_block.{name}"
    yield f"{layer}.temporal_residual"
    yield f"{layer}.channel_pre_norm"
    for name in _MLP:
        yield f"{layer}.mlp_block.{name}"
    yield f"{layer}.channel_residual"
