"""The sites of a model: the stable name of every op of its step, without torch.

Emitters carry them into the names of their values, so what one engine computes at a site can be
held against what another computes there.
"""

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import layer_ops

HEAD_SITES = ("last_tokens", "final_norm", "lm_head", "logits")
"""Of those last tokens alone whose logits are wanted."""


def sites(config: GriffinConfig) -> tuple[str, ...]:
    """All sites of a step of `config`, in the order in which the step model computes them."""
    kinds = enumerate(config.block_types)
    layers = (f"layers.{index}.{op.site}" for index, kind in kinds for op in layer_ops(kind))
    return ("embed_tokens", *layers, *HEAD_SITES)
