"""The weight tensors and the sites of a whole model, by canonical name.

Canonical names and shapes are Hugging Face's without the leading `model.`; linear weights are
`[out, in]`. The head is the embedding (tied).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_ops import Op, Role, all_ops, layer_ops

QUANTIZABLE: frozenset[Role] = frozenset({"embedding", "linear"})
"""Roles that may be stored in fewer than 16 bits.

All others stay float32 in every format, except that the biases of linears may be float16, and the
matrices of gates bfloat16 where the checkpoint has them so.
"""

EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "final_norm.weight"

HEAD_SITES = ("last_tokens", "final_norm", "lm_head", "logits")
"""Sites that compute only the last tokens, whose logits are requested."""


@dataclass(frozen=True)
class TensorSpec:
    """The shape and the role of a weight tensor."""

    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class _Reader:
    """The site that reads a tensor, within its layer or global, and the tensor's role."""

    site: str
    role: Role


def _layer_readers() -> dict[str, _Reader]:
    """Returns tensor name within a layer → its reader, for all tensors of all kinds of layers."""
    readers: dict[str, _Reader] = {}
    for op in all_ops().values():
        for tensor in op.tensors:
            readers[f"{op.site}{tensor.end}"] = _Reader(op.site, tensor.role)
    return readers


_LAYER_READERS = _layer_readers()

_GLOBAL_READERS = {
    EMBEDDING: _Reader("embed_tokens", "embedding"),
    FINAL_NORM: _Reader("final_norm", "norm"),
}

_FILE_ORDER: tuple[Role, ...] = ("norm", "linear", "conv", "a_param", "gate")
"""The order of a block's tensors in files, by the role of their op's first tensor."""


def site_of(name: str) -> str:
    """Returns the site of the op that reads a tensor, such as `layers.3.mlp_block.up_proj`."""
    if name in _GLOBAL_READERS:
        return _GLOBAL_READERS[name].site
    layers, index, local_name = name.split(".", 2)
    return f"{layers}.{index}.{_LAYER_READERS[local_name].site}"


def input_site(name: str) -> str | None:
    """Returns the site that is the input of a linear, or of the embedding as the head; or None."""
    if name == EMBEDDING:
        return "final_norm"

    layers, _, rest = name.partition(".")
    index, _, local_name = rest.partition(".")
    reader = _LAYER_READERS.get(local_name)
    if layers != "layers" or reader is None or reader.role != "linear":
        return None

    op = all_ops()[reader.site]
    return f"layers.{index}.{op.reads}"


def linear_inputs(config: GriffinConfig) -> dict[str, str]:
    """Returns the input site of each linear's weight and of the embedding, by tensor name."""
    inputs: dict[str, str] = {}
    for name in model_tensors(config):
        site = input_site(name)
        if site is not None:
            inputs[name] = site
    return inputs


def role_of(name: str) -> Role:
    """Returns the role of a tensor."""
    if name in _GLOBAL_READERS:
        return _GLOBAL_READERS[name].role
    _, _, local_name = name.split(".", 2)
    return _LAYER_READERS[local_name].role


def is_linear_bias(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Returns whether a tensor is the bias of a linear; the convolution has a bias, too."""
    if not name.endswith(".bias"):
        return False
    weight = tensors.get(name.removesuffix("bias") + "weight")
    return weight is not None and weight.role == "linear"


def layer_tensors(config: GriffinConfig, index: int) -> dict[str, TensorSpec]:
    """Returns the tensors of layer `index` by name, in the order in which files hold them."""
    blocks: dict[str, list[Op]] = {}
    for op in layer_ops(config.block_types[index]):
        if op.tensors:
            block, _, _ = op.site.partition(".")
            blocks.setdefault(block, []).append(op)

    tensors: dict[str, TensorSpec] = {}
    for ops in blocks.values():
        for op in sorted(ops, key=_file_order):
            for tensor in op.tensors:
                name = f"layers.{index}.{op.site}{tensor.end}"
                tensors[name] = TensorSpec(tensor.shape(config), tensor.role)
    return tensors


def _file_order(op: Op) -> int:
    return _FILE_ORDER.index(op.tensors[0].role)


def model_tensors(config: GriffinConfig) -> dict[str, TensorSpec]:
    """Returns all tensors of a model by name, in the order in which files hold them."""
    tensors = {EMBEDDING: TensorSpec((config.vocab_size, config.width), "embedding")}
    for index in range(config.num_layers):
        tensors |= layer_tensors(config, index)
    tensors[FINAL_NORM] = TensorSpec((config.width,), "norm")
    return tensors


def sites(config: GriffinConfig) -> tuple[str, ...]:
    """Returns all sites of a step in the order in which the step model computes them."""
    names = ["embed_tokens"]
    for index, kind in enumerate(config.block_types):
        names += [f"layers.{index}.{op.site}" for op in layer_ops(kind)]
    names += HEAD_SITES
    return tuple(names)


def float32_bytes(config: GriffinConfig) -> int:
    """Returns the bytes that all weights take in float32."""
    return 4 * sum(prod(spec.shape) for spec in model_tensors(config).values())
