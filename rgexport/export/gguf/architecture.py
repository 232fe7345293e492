"""The metadata of a GGUF file by which llama.cpp builds the graph."""

from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.griffin.config import GriffinConfig

CONTEXT_LENGTH = 1 << 20
"""A state of fixed size has no limit; llama.cpp's converter uses this number for Mamba."""


def architecture(c: GriffinConfig) -> dict[str, int | float | list[int]]:
    """Returns the pairs in the file's order: integers, floats, and a list with a number a layer."""
    sizes = {
        "vocab_size": c.vocab_size,
        "context_length": CONTEXT_LENGTH,
        "embedding_length": c.width,
        "feed_forward_length": c.mlp_width,
        "block_count": c.num_layers,
        "attention.head_count": c.num_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.sliding_window": c.window + 1,  # llama.cpp counts the token itself
        "rope.dimension_count": c.rope_dims,
        "ssm.conv_kernel": c.conv_width,
        "ssm.inner_size": c.lru_width,
        "ssm.state_size": 1,
        "ssm.group_count": 0,
        "ssm.time_step_rank": c.lru_heads,
    }
    factors = {
        "attention.layer_norm_rms_epsilon": c.rms_eps,
        "rope.freq_base": c.rope_theta,
        "final_logit_softcapping": c.soft_cap,
        "embedding_scale": c.embedding_scale,
    }
    key_heads = [int(kind == "attention") for kind in c.block_types]
    pairs: dict[str, int | float | list[int]]
    pairs = {**sizes, **factors, "attention.head_count_kv": key_heads}
    return {f"{ARCHITECTURE}.{key}": value for key, value in pairs.items()}
