"""The ops of a Griffin layer and the weight tensors of each: names, shapes and roles.

All names derive from the tables in this file: canonical names, sites, the names in DeepMind's
checkpoints and in GGUF files, and those in llama.cpp's graph. A site is the stable name of an op,
by which the results of two engines are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rgexport.griffin.config import BlockType, GriffinConfig

Role = Literal["embedding", "linear", "bias", "gate", "conv", "norm", "a_param"]

Dimension = (
    int
    | Literal[
        "width",
        "mlp_width",
        "lru_width",
        "lru_heads",
        "gate_block_width",
        "query_width",
        "head_dim",
        "conv_width",
    ]
)
"""The length of an axis: a constant, or the name of an attribute of `GriffinConfig`."""


@dataclass(frozen=True)
class OpTensor:
    """A weight tensor of an op.

    Attributes:
        end: the suffix of its canonical name, after the op's site.
        deepmind: the suffix of its name in DeepMind's checkpoints, after `Op.deepmind`.
        gguf: the suffix of its name in GGUF files, after `Op.gguf`.
        role: how the op uses it.
        dimensions: the lengths of its axes.
    """

    end: str
    deepmind: str
    gguf: str
    role: Role
    dimensions: tuple[Dimension, ...]

    def shape(self, config: GriffinConfig) -> tuple[int, ...]:
        """Returns the tensor's shape in a model of this configuration."""
        return tuple(_length(dimension, config) for dimension in self.dimensions)


def _length(dimension: Dimension, config: GriffinConfig) -> int:
    if isinstance(dimension, int):
        return dimension
    return int(getattr(config, dimension))


@dataclass(frozen=True)
class Op:
    """One op of a layer.

    Attributes:
        site: its name within the layer. A tensor's canonical name is the site and its `end`.
        tensors: its weight tensors.
        deepmind: the prefix of its tensors' names in DeepMind's checkpoints, after `blocks.{i}.`.
        gguf: the prefix of its tensors' names in GGUF files, after `blk.{i}.`.
        graph: the tensor of llama.cpp's graph that holds the result (`cb` in
            kernels/llama_cpp/recurrentgemma.cpp and llama.cpp's src/llama-graph.cpp, commit
            0c1e570); `a/OP` is the first result of an operation OP after the tensor `a`.
        reads: the site that computes a linear's input.
    """

    site: str
    tensors: tuple[OpTensor, ...] = ()
    deepmind: str = ""
    gguf: str = ""
    graph: str = ""
    reads: str = ""


def _linear_weight(rows: Dimension, columns: Dimension) -> OpTensor:
    return OpTensor(
        end=".weight",
        deepmind=".weight",
        gguf=".weight",
        role="linear",
        dimensions=(rows, columns),
    )


def _linear(rows: Dimension, columns: Dimension) -> tuple[OpTensor, ...]:
    """Returns the weight `[rows, columns]` and the bias `[rows]` of a linear."""
    bias = OpTensor(
        end=".bias",
        deepmind=".bias",
        gguf=".bias",
        role="bias",
        dimensions=(rows,),
    )
    return (_linear_weight(rows, columns), bias)


def _linear_without_bias(rows: Dimension, columns: Dimension) -> tuple[OpTensor, ...]:
    return (_linear_weight(rows, columns),)


_NORM = (
    OpTensor(
        end=".weight",
        deepmind=".scale",
        gguf=".weight",
        role="norm",
        dimensions=("width",),
    ),
)

_CONV = (
    OpTensor(
        end=".weight",
        deepmind=".w",
        gguf=".weight",
        role="conv",
        dimensions=("lru_width", 1, "conv_width"),
    ),
    OpTensor(
        end=".bias",
        deepmind=".b",
        gguf=".bias",
        role="bias",
        dimensions=("lru_width",),
    ),
)

_GATE = (
    OpTensor(
        end="_weight",
        deepmind=".w",
        gguf=".weight",
        role="gate",
        dimensions=("lru_heads", "gate_block_width", "gate_block_width"),
    ),
    OpTensor(
        end="_bias",
        deepmind=".b",
        gguf=".bias",
        role="gate",
        dimensions=("lru_heads", "gate_block_width"),
    ),
)

_DECAY = (
    OpTensor(
        end=".recurrent_param",
        deepmind=".a_param",
        gguf="",
        role="a_param",
        dimensions=("lru_width",),
    ),
)

_RECURRENT_BLOCK = (
    Op(
        site="linear_y",
        tensors=_linear("lru_width", "width"),
        deepmind="recurrent_block.linear_y",
        gguf="attn_gate",
        graph="linear_y",
        reads="temporal_pre_norm",
    ),
    Op(site="gelu"),
    Op(
        site="linear_x",
        tensors=_linear("lru_width", "width"),
        deepmind="recurrent_block.linear_x",
        gguf="ssm_in",
        graph="linear_x",
        reads="temporal_pre_norm",
    ),
    Op(
        site="conv_1d",
        tensors=_CONV,
        deepmind="recurrent_block.conv_1d",
        gguf="ssm_conv1d",
        graph="conv_output",
    ),
    Op(
        site="rg_lru.input_gate",
        tensors=_GATE,
        deepmind="recurrent_block.rg_lru.input_gate",
        gguf="rg_lru_input_gate",
        graph="rg_lru_input_gate",
    ),
    Op(
        site="rg_lru.recurrent_gate",
        tensors=_GATE,
        deepmind="recurrent_block.rg_lru.a_gate",
        gguf="rg_lru_a_gate",
        graph="rg_lru_a_gate",
    ),
    Op(
        site="rg_lru",
        tensors=_DECAY,
        deepmind="recurrent_block.rg_lru",
        gguf="ssm_a",
        graph="rg_lru",
    ),
    Op(site="mul", graph="recurrent_gated"),
    Op(
        site="linear_out",
        tensors=_linear("width", "lru_width"),
        deepmind="recurrent_block.linear_out",
        gguf="ssm_out",
        graph="linear_out",
        reads="temporal_block.mul",
    ),
)

_ATTENTION_BLOCK = (
    Op(
        site="q_proj",
        tensors=_linear_without_bias("query_width", "width"),
        deepmind="attention_block.proj_q",
        gguf="attn_q",
        graph="Qcur",
        reads="temporal_pre_norm",
    ),
    Op(site="rope_q", graph="Qcur/ROPE"),
    Op(
        site="k_proj",
        tensors=_linear_without_bias("head_dim", "width"),
        deepmind="attention_block.proj_k",
        gguf="attn_k",
        graph="Kcur",
        reads="temporal_pre_norm",
    ),
    Op(site="rope_k", graph="Kcur/ROPE"),
    Op(
        site="v_proj",
        tensors=_linear_without_bias("head_dim", "width"),
        deepmind="attention_block.proj_v",
        gguf="attn_v",
        graph="Vcur",
        reads="temporal_pre_norm",
    ),
    Op(site="attention", graph="kqv_out"),
    Op(
        site="o_proj",
        tensors=_linear("width", "query_width"),
        deepmind="attention_block.proj_final",
        gguf="attn_output",
        graph="kqv_out/ADD",
        reads="temporal_block.attention",
    ),
)

_TEMPORAL_BLOCKS: dict[BlockType, tuple[Op, ...]] = {
    "recurrent": _RECURRENT_BLOCK,
    "attention": _ATTENTION_BLOCK,
}
"""The ops of temporal blocks, in the order of a step; sites without `temporal_block.`."""

# `gate_proj` and `up_proj` have no DeepMind name: one tensor, `ffw_up`, holds both.
_MLP_BLOCK = (
    Op(
        site="gate_proj",
        tensors=_linear("mlp_width", "width"),
        gguf="ffn_gate",
        graph="ffn_gate",
        reads="channel_pre_norm",
    ),
    Op(site="gelu"),
    Op(
        site="up_proj",
        tensors=_linear("mlp_width", "width"),
        gguf="ffn_up",
        graph="ffn_up",
        reads="channel_pre_norm",
    ),
    Op(site="mul", graph="ffn_geglu"),
    Op(
        site="down_proj",
        tensors=_linear("width", "mlp_width"),
        deepmind="mlp_block.ffw_down",
        gguf="ffn_down",
        graph="ffn_out",
        reads="mlp_block.mul",
    ),
)
"""The ops of the gated MLP, in the order of a step; sites without `mlp_block.`."""

_TEMPORAL_NORM = Op(
    site="temporal_pre_norm",
    tensors=_NORM,
    deepmind="temporal_pre_norm",
    gguf="attn_norm",
    graph="attn_norm",
)

_CHANNEL_NORM = Op(
    site="channel_pre_norm",
    tensors=_NORM,
    deepmind="channel_pre_norm",
    gguf="ffn_norm",
    graph="ffn_norm",
)


def layer_ops(kind: BlockType) -> Iterator[Op]:
    """Yields the ops of a layer in the order in which a step computes them."""
    yield _TEMPORAL_NORM
    for op in _TEMPORAL_BLOCKS[kind]:
        yield replace(op, site=f"temporal_block.{op.site}")
    yield Op(site="temporal_residual", graph="residual")

    yield _CHANNEL_NORM
    for op in _MLP_BLOCK:
        yield replace(op, site=f"mlp_block.{op.site}")
    yield Op(site="channel_residual", graph="l_out")


def all_ops() -> dict[str, Op]:
    """Returns the ops of both kinds of layers, by their site within the layer."""
    ops: dict[str, Op] = {}
    for kind in _TEMPORAL_BLOCKS:
        for op in layer_ops(kind):
            ops[op.site] = op
    return ops
