"""The ops of a layer, and the names of their tensors in every format.

Canonical tensors (`layout`), sites (`sites`), and the names in DeepMind's checkpoints (`deepmind`),
GGUF files (`export.gguf.naming`) and llama.cpp's graph (`runtimes.llama_cpp.observer`) are all
derived from this table. Hugging Face's names are the canonical ones with the prefix `model.`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from rgexport.griffin.config import BlockType, GriffinConfig

Role = Literal["embedding", "linear", "bias", "gate", "conv", "norm", "a_param"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of an op: the ends of its canonical, DeepMind's and GGUF's names, role and shape."""

    end: str
    deepmind: str
    gguf: str
    role: Role
    shape: Callable[[GriffinConfig], Shape]


@dataclass(frozen=True)
class Op:
    """One op of a layer.

    Attributes:
        site: its canonical name within the layer; its tensors' names are this and their `end`.
        tensors: those that it reads.
        deepmind: the beginning of their names in DeepMind's files, after `blocks.{i}.`; empty
            where the tensors do not map one to one.
        gguf: the beginning of their names in GGUF files, after `blk.{i}.`.
        graph: the tensor of llama.cpp's graph that holds the result (`cb` in
            kernels/llama_cpp/recurrentgemma.cpp and llama.cpp's src/llama-graph.cpp, commit
            0c1e570); `a/OP` is the first result of an operation OP after the tensor `a`, such as
            `Qcur/ROPE`. Empty where the op is computed together with the next one.
        reads: of a linear, the site within the layer whose result is its input.
    """

    site: str
    tensors: tuple[Tensor, ...] = ()
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


def _linear(rows: Size, columns: Size, bias: bool = True) -> tuple[Tensor, ...]:
    weight = Tensor(".weight", ".weight", ".weight", "linear", lambda c: (rows(c), columns(c)))
    added = Tensor(".bias", ".bias", ".bias", "bias", lambda c: (rows(c),))
    return (weight, added) if bias else (weight,)


def _block(c: GriffinConfig) -> int:
    return c.lru_width // c.lru_heads


_NORM = (Tensor(".weight", ".scale", ".weight", "norm", lambda c: (c.width,)),)
_CONV = (
    Tensor(".weight", ".w", ".weight", "conv", lambda c: (c.lru_width, 1, c.conv_width)),
    Tensor(".bias", ".b", ".bias", "bias", lambda c: (c.lru_width,)),
)
_GATE = (
    Tensor("_weight", ".w", ".weight", "gate", lambda c: (c.lru_heads, _block(c), _block(c))),
    Tensor("_bias", ".b", ".bias", "gate", lambda c: (c.lru_heads, _block(c))),
)
_DECAY = (Tensor(".recurrent_param", ".a_param", "", "a_param", lambda c: (c.lru_width,)),)
_INTO_LRU, _OUT_OF_LRU = _linear(_LRU_WIDTH, _WIDTH), _linear(_WIDTH, _LRU_WIDTH)
_Q = _linear(_queries, _WIDTH, bias=False)
_K = _V = _linear(_HEAD, _WIDTH, bias=False)
_INTO_MLP, _OUT_OF_MLP = _linear(_MLP_WIDTH, _WIDTH), _linear(_WIDTH, _MLP_WIDTH)

_MIX_IN, _MLP_IN = "temporal_pre_norm", "channel_pre_norm"
_R, _LRU, _A, _M = "recurrent_block.", "recurrent_block.rg_lru", "attention_block.", "mlp_block."
_TEMPORAL: dict[BlockType, tuple[Op, ...]] = {
    "recurrent": (
        Op("linear_y", _INTO_LRU, _R + "linear_y", "attn_gate", "linear_y", _MIX_IN),
        Op("gelu"),
        Op("linear_x", _INTO_LRU, _R + "linear_x", "ssm_in", "linear_x", _MIX_IN),
        Op("conv_1d", _CONV, _R + "conv_1d", "ssm_conv1d", "conv_output"),
        Op(
            "rg_lru.input_gate",
            _GATE,
            _LRU + ".input_gate",
            "rg_lru_input_gate",
            "rg_lru_input_gate",
        ),
        Op("rg_lru.recurrent_gate", _GATE, _LRU + ".a_gate", "rg_lru_a_gate", "rg_lru_a_gate"),
        Op("rg_lru", _DECAY, _LRU, "ssm_a", "rg_lru"),
        Op("mul", graph="recurrent_gated"),
        Op(
            "linear_out",
            _OUT_OF_LRU,
            _R + "linear_out",
            "ssm_out",
            "linear_out",
            "temporal_block.mul",
        ),
    ),
    "attention": (
        Op("q_proj", _Q, _A + "proj_q", "attn_q", "Qcur", _MIX_IN),
        Op("rope_q", graph="Qcur/ROPE"),
        Op("k_proj", _K, _A + "proj_k", "attn_k", "Kcur", _MIX_IN),
        Op("rope_k", graph="Kcur/ROPE"),
        Op("v_proj", _V, _A + "proj_v", "attn_v", "Vcur", _MIX_IN),
        Op("attention", graph="kqv_out"),
        Op(
            "o_proj",
            _linear(_WIDTH, _queries),
            _A + "proj_final",
            "attn_output",
            "kqv_out/ADD",
            "temporal_block.attention",
        ),
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
    """The ops of a layer, in the order in which a step computes them."""
    yield Op("temporal_pre_norm", _NORM, "temporal_pre_norm", "attn_norm", "attn_norm")
    yield from (_inside("temporal_block", op) for op in _TEMPORAL[kind])
    yield Op("temporal_residual", graph="residual")
    yield Op("channel_pre_norm", _NORM, "channel_pre_norm", "ffn_norm", "ffn_norm")
    yield from (_inside("mlp_block", op) for op in _MLP)
    yield Op("channel_residual", graph="l_out")


def all_ops() -> dict[str, Op]:
    """Site within a layer → op, of layers of all kinds."""
    return {op.site: op for kind in _TEMPORAL for op in layer_ops(kind)}


def _inside(block: str, op: Op) -> Op:
    return replace(op, site=f"{block}.{op.site}")
