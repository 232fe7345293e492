"""The tensors of a Griffin model: canonical names, shapes and roles.

Canonical names and shapes are Hugging Face's without the leading `model.`; linear weights are
`[out, in]`. The head is the embedding (tied), so there is no `lm_head`.
"""

from dataclasses import dataclass

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import Op, Role, layer_ops

QUANTIZABLE: frozenset[Role] = frozenset({"embedding", "linear"})
"""Roles that may be stored in fewer than 16 bits.

All others stay float32 in every format, except that the biases of linears may be float16.
"""

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under one name."""

    shape: tuple[int, ...]
    role: Role


_STORED = "norm", "linear", "conv", "a_param", "gate"
"""The order of a block's tensors in files, by the role of their op's weight."""


def layer_tensors(config: GriffinConfig, index: int) -> dict[str, TensorSpec]:
    """The tensors of layer `index`, in the order in which files have them."""
    blocks: dict[str, list[Op]] = {}
    for op in layer_ops(config.block_types[index]):
        if op.tensors:
            blocks.setdefault(op.site.partition(".")[0], []).append(op)
    return {
        f"layers.{index}.{op.site}{tensor.end}": TensorSpec(tensor.shape(config), tensor.role)
        for ops in blocks.values()
        for op in sorted(ops, key=lambda op: _STORED.index(op.tensors[0].role))
        for tensor in op.tensors
    }


def model_tensors(config: GriffinConfig) -> dict[str, TensorSpec]:
    """All tensors of the model."""
    tensors = {EMBEDDING: TensorSpec((config.vocab_size, config.width), "embedding")}
    for index in range(config.num_layers):
        tensors |= layer_tensors(config, index)
    return tensors | {"final_norm.weight": TensorSpec((config.width,), "norm")}
