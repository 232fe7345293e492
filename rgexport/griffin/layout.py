"""The ops of a Griffin model's step and their tensors: names, shapes and roles.

All names derive from one table: canonical ones, sites, those in DeepMind's checkpoints and GGUF
files, and in llama.cpp's graph. Canonical names and shapes are Hugging Face's without the leading
`model.`; linear weights are `[out, in]`. The head is the embedding (tied). A site is the stable
name of an op, by which the results of two engines are compared.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from operator import attrgetter
from typing import Literal

from rgexport.griffin.config import BlockType, GriffinConfig

Role = Literal["embedding", "linear", "bias", "gate", "conv", "norm", "a_param"]
Shape = tuple[int, ...]

QUANTIZABLE: frozenset[Role] = frozenset({"embedding", "linear"})
"""Roles that may be stored in fewer than 16 bits.

All others stay float32 in every format, except that the biases of linears may be float16, and the
matrices of gates bfloat16 where the checkpoint has them so.
"""

EMBEDDING = "embed_tokens.weight"
HEAD_SITES = ("last_tokens", "final_norm", "lm_head", "logits")
"""Sites that compute only the last tokens, whose logits are requested."""


@dataclass(frozen=True)
class OpTensor:
    """A tensor of an op: the ends of its canonical, DeepMind's and GGUF's names, role and shape."""

    end: str
    deepmind: str
    gguf: str
    role: Role
    shape: Callable[[GriffinConfig], Shape]


@dataclass(frozen=True)
class Op:
    """One op of a layer.

    `site` is its name within the layer; its tensors' names are this and their `end`. `deepmind`
    (after `blocks.{i}.`) and `gguf` (after `blk.{i}.`) begin their names elsewhere. `graph` is the
    tensor of llama.cpp's graph that holds the result (`cb` in kernels/llama_cpp/recurrentgemma.cpp
    and llama.cpp's src/llama-graph.cpp, commit 0c1e570); `a/OP` is the first result of an operation
    OP after the tensor `a`. `reads` is the site that is a linear's input.
    """

    site: str
    tensors: tuple[OpTensor, ...] = ()
    deepmind: str = ""
    gguf: str = ""
    graph: str = ""
    reads: str = ""


Size = Callable[[GriffinConfig], int]
_WIDTH: Size = attrgetter("width")
_MLP_WIDTH: Size = attrgetter("mlp_width")
_LRU_WIDTH: Size = attrgetter("lru_width")
_HEAD: Size = attrgetter("head_dim")


def _queries(c: GriffinConfig) -> int:
    return c.num_heads * c.head_dim


def _block(c: GriffinConfig) -> int:
    return c.lru_width // c.lru_heads


def _linear(rows: Size, columns: Size, bias: bool = True) -> tuple[OpTensor, ...]:
    weight = OpTensor(".weight", ".weight", ".weight", "linear", lambda c: (rows(c), columns(c)))
    added = OpTensor(".bias", ".bias", ".bias", "bias", lambda c: (rows(c),))
    return (weight, added) if bias else (weight,)


_NORM = (OpTensor(".weight", ".scale", ".weight", "norm", lambda c: (c.width,)),)
_CONV = (
    OpTensor(".weight", ".w", ".weight", "conv", lambda c: (c.lru_width, 1, c.conv_width)),
    OpTensor(".bias", ".b", ".bias", "bias", lambda c: (c.lru_width,)),
)
_GATE = (
    OpTensor("_weight", ".w", ".weight", "gate", lambda c: (c.lru_heads, _block(c), _block(c))),
    OpTensor("_bias", ".b", ".bias", "gate", lambda c: (c.lru_heads, _block(c))),
)
_DECAY = (OpTensor(".recurrent_param", ".a_param", "", "a_param", lambda c: (c.lru_width,)),)
_INTO_LRU, _OUT_OF_LRU = _linear(_LRU_WIDTH, _WIDTH), _linear(_WIDTH, _LRU_WIDTH)
_Q = _linear(_queries, _WIDTH, bias=False)
_K = _V = _linear(_HEAD, _WIDTH, bias=False)
_O = _linear(_WIDTH, _queries)
_INTO_MLP, _OUT_OF_MLP = _linear(_MLP_WIDTH, _WIDTH), _linear(_WIDTH, _MLP_WIDTH)

_MIX_IN, _MLP_IN, _MIXED = "temporal_pre_norm", "channel_pre_norm", "temporal_block."
_R, _LRU, _A, _M = "recurrent_block.", "recurrent_block.rg_lru", "attention_block.", "mlp_block."
_TEMPORAL: dict[BlockType, tuple[Op, ...]] = {
    "recurrent": (
        Op("linear_y", _INTO_LRU, _R + "linear_y", "attn_gate", "linear_y", _MIX_IN),
        Op("gelu"),
        Op("linear_x", _INTO_LRU, _R + "linear_x", "ssm_in", "linear_x", _MIX_IN),
        Op("conv_1d", _CONV, _R + "conv_1d", "ssm_conv1d", "conv_output"),
        Op("rg_lru.input_gate", _GATE, _LRU + ".input_gate", *["rg_lru_input_gate"] * 2),
        Op("rg_lru.recurrent_gate", _GATE, _LRU + ".a_gate", *["rg_lru_a_gate"] * 2),
        Op("rg_lru", _DECAY, _LRU, "ssm_a", "rg_lru"),
        Op("mul", graph="recurrent_gated"),
        Op("linear_out", _OUT_OF_LRU, _R + "linear_out", "ssm_out", "linear_out", _MIXED + "mul"),
    ),
    "attention": (
        Op("q_proj", _Q, _A + "proj_q", "attn_q", "Qcur", _MIX_IN),
        Op("rope_q", graph="Qcur/ROPE"),
        Op("k_proj", _K, _A + "proj_k", "attn_k", "Kcur", _MIX_IN),
        Op("rope_k", graph="Kcur/ROPE"),
        Op("v_proj", _V, _A + "proj_v", "attn_v", "Vcur", _MIX_IN),
        Op("attention", graph="kqv_out"),
        Op("o_proj", _O, _A + "proj_final", "attn_output", "kqv_out/ADD", _MIXED + "attention"),
    ),
}
"""The ops of temporal blocks, in the order of a step; sites without `temporal_block.`."""

_MLP = (
    Op("gate_proj", _INTO_MLP, "", "ffn_gate", "ffn_gate", _MLP_IN),  # DeepMind's ffw_up holds both
    Op("gelu"),
    Op("up_proj", _INTO_MLP, "", "ffn_up", "ffn_up", _MLP_IN),
    Op("mul", graph="ffn_geglu"),
    Op("down_proj", _OUT_OF_MLP, _M + "ffw_down", "ffn_down", "ffn_out", "mlp_block.mul"),
)


def layer_ops(kind: BlockType) -> Iterator[Op]:
    """Yields the ops of a layer in the order in which a step computes them."""
    yield Op("temporal_pre_norm", _NORM, "temporal_pre_norm", "attn_norm", "attn_norm")
    yield from (replace(op, site=f"temporal_block.{op.site}") for op in _TEMPORAL[kind])
    yield Op("temporal_residual", graph="residual")
    yield Op("channel_pre_norm", _NORM, "channel_pre_norm", "ffn_norm", "ffn_norm")
    yield from (replace(op, site=f"mlp_block.{op.site}") for op in _MLP)
    yield Op("channel_residual", graph="l_out")


def all_ops() -> dict[str, Op]:
    return {op.site: op for kind in _TEMPORAL for op in layer_ops(kind)}


@dataclass(frozen=True)
class TensorSpec:
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
    """Returns the site of the op that reads a tensor, such as `layers.3.mlp_block.up_proj`."""
    if name in _GLOBAL:
        return _GLOBAL[name][0]
    layers, index, local = name.split(".", 2)
    return f"{layers}.{index}.{_USERS[local][0]}"


def input_site(name: str) -> str | None:
    """Returns the site that is the input of a linear, or of the embedding as the head; or None."""
    if name == EMBEDDING:
        return "final_norm"
    layers, _, rest = name.partition(".")
    index, _, local = rest.partition(".")
    if layers != "layers" or local not in _USERS or _USERS[local][1] != "linear":
        return None
    return f"layers.{index}.{all_ops()[_USERS[local][0]].reads}"


def linear_inputs(config: GriffinConfig) -> dict[str, str]:
    sites = {name: input_site(name) for name in model_tensors(config)}
    return {name: site for name, site in sites.items() if site is not None}


def role_of(name: str) -> Role:
    return _GLOBAL[name][1] if name in _GLOBAL else _USERS[name.split(".", 2)[2]][1]


def is_linear_bias(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    weight = tensors.get(name.removesuffix("bias") + "weight")
    return name.endswith(".bias") and weight is not None and weight.role == "linear"


def layer_tensors(config: GriffinConfig, index: int) -> dict[str, TensorSpec]:
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
    tensors = {EMBEDDING: TensorSpec((config.vocab_size, config.width), "embedding")}
    for index in range(config.num_layers):
        tensors |= layer_tensors(config, index)
    return tensors | {"final_norm.weight": TensorSpec((config.width,), "norm")}


def sites(config: GriffinConfig) -> tuple[str, ...]:
    """Returns all sites of a step in the order in which the step model computes them."""
    kinds = enumerate(config.block_types)
    layers = (f"layers.{index}.{op.site}" for index, kind in kinds for op in layer_ops(kind))
    return ("embed_tokens", *layers, *HEAD_SITES)


def float32_bytes(config: GriffinConfig) -> int:
    return 4 * sum(prod(spec.shape) for spec in model_tensors(config).values())
