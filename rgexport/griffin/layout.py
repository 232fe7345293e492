"""The tensors of a Griffin model: canonical names, shapes and roles.

Canonical names and shapes are Hugging Face's without the leading `model.`; linear weights are
`[out, in]`. The head is the embedding (tied), so there is no `lm_head`.
"""

from dataclasses import dataclass
from math import prod

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import Op, Role, all_ops, layer_ops

QUANTIZABLE: frozenset[Role] = frozenset({"embedding", "linear"})
"""Roles that may be stored in fewer than 16 bits.

All others stay float32 in every format, except that the biases of linears may be float16, and the
matrices of gates bfloat16 where the checkpoint has them so.
"""

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under one name."""

    shape: tuple[int, ...]
    role: Role


_STORED = "norm", "linear", "conv", "a_param", "gate"
"""The order of a block's tensors in files, by the role of their op's weight."""


_USERS: dict[str, tuple[str, Role]] = {
    f"{op.site}{tensor.end}": (op.site, tensor.role)
    for op in all_ops().values()
    for tensor in op.tensors
}
"""Name of a tensor within a layer → the site that uses it, and its role."""
_GLOBAL: dict[str, tuple[str, Role]] = {
    EMBEDDING: ("embed_tokens", "embedding"),
    "final_norm.weight": ("final_norm", "norm"),
}


def site_of(name: str) -> str:
    """The op that uses a tensor, such as `layers.3.mlp_block.up_proj`."""
    if name in _GLOBAL:
        return _GLOBAL[name][0]
    layers, index, local = name.split(".", 2)
    return f"{layers}.{index}.{_USERS[local][0]}"


def input_site(name: str) -> str | None:
    """The op whose result a matrix multiplies; None if the tensor is no matrix of that kind.

    Linears that share an input have one site. That of the embedding is its input as the head.
    """
    if name == EMBEDDING:
        return "final_norm"
    layers, _, rest = name.partition(".")
    index, _, local = rest.partition(".")
    if layers != "layers" or local not in _USERS or _USERS[local][1] != "linear":
        return None
    return f"layers.{index}.{all_ops()[_USERS[local][0]].reads}"


def linear_inputs(config: GriffinConfig) -> dict[str, str]:
    """Every linear's weight, and the embedding as the head, with the site of its inputs."""
    sites = {name: input_site(name) for name in model_tensors(config)}
    return {name: site for name, site in sites.items() if site is not None}


def role_of(name: str) -> Role:
    """The role of a tensor by its canonical name."""
    return _GLOBAL[name][1] if name in _GLOBAL else _USERS[name.split(".", 2)[2]][1]


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


def float32_bytes(config: GriffinConfig) -> int:
    """Returns the size of all weights in float32."""
    return 4 * sum(prod(spec.shape) for spec in model_tensors(config).values())
