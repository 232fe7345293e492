"""The sites of a model: stable names of the ops of its step.

Emitters use them in the names of their values, so that the results of two engines can be compared
op by op.
"""

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import layer_ops

HEAD_SITES = ("last_tokens", "final_norm", "lm_head", "logits")
"""These compute only the last tokens, whose logits are requested."""


def sites(config: GriffinConfig) -> tuple[str, ...]:
    """All sites of a step of `config`, in the order in which the step model computes them."""
    kinds = enumerate(config.block_types)
    layers = (f"layers.{index}.{op.site}" for index, kind in kinds for op in layer_ops(kind))
    return ("embed_tokens", *layers, *HEAD_SITES)
