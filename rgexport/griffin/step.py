"""The step model: T ≥ 1 tokens and the states in, logits and the states out.

Traced with fake weights it is the program that emitters lower; with real weights it is the
reference (`griffin.reference`). Parameter names are canonical tensor names (`griffin.layout`).
Mathematics: arXiv 2402.19427; numerics: DeepMind's `recurrentgemma.torch` in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig

LayerState = tuple[Tensor, Tensor]
"""The two states of one layer, see `griffin.state.layer_states`."""


class Weight(nn.Module):
    """A weight and an optional bias, under the names of the checkpoint."""

    def __init__(self, shape: tuple[int, ...], bias: tuple[int, ...] | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        empty = None if bias is None else torch.empty(bias, dtype=dtype)
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)


class Linear(Weight):
    def __init__(self, site: str, out: int, width: int, dtype: torch.dtype, bias: bool = True):
        super().__init__((out, width), (out,) if bias else None, dtype)
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.site)


class RMSNorm(Weight):
    def __init__(self, site: str, config: GriffinConfig):
        super().__init__((config.width,), None, torch.float32)
        self.site, self.eps = site, config.rms_eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.site)


class RgLru(nn.Module):
    """The Real-Gated Linear Recurrent Unit."""

    def __init__(self, site: str, config: GriffinConfig):
        super().__init__()
        heads, block = config.lru_heads, config.lru_width // config.lru_heads
        shapes: dict[str, tuple[int, ...]] = {}
        for gate in ("input_gate", "recurrent_gate"):
            shapes |= {f"{gate}_weight": (heads, block, block), f"{gate}_bias": (heads, block)}
        shapes["recurrent_param"] = (config.lru_width,)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.site = site

    def forward(self, x: Tensor, positions: Tensor, state: Tensor) -> LayerState:
        gates = []
        for gate in ("input_gate", "recurrent_gate"):
            weight, bias = (self.get_parameter(f"{gate}_{kind}") for kind in ("weight", "bias"))
            gates.append(ops.block_diagonal_linear(x, weight, bias, f"{self.site}.{gate}"))
        return ops.rg_lru_scan(x, *gates, self.recurrent_param, positions, state, self.site)


class RecurrentBlock(nn.Module):
    """Two branches; one through the convolution and the RG-LRU, one through GELU."""

    def __init__(self, site: str, config: GriffinConfig, dtype: torch.dtype):
        super().__init__()
        width, lru_width = config.width, config.lru_width
        self.linear_y = Linear(f"{site}.linear_y", lru_width, width, dtype)
        self.linear_x = Linear(f"{site}.linear_x", lru_width, width, dtype)
        conv = (lru_width, 1, config.conv_width)
        self.conv_1d = Weight(conv, (lru_width,), torch.float32)
        self.rg_lru = RgLru(f"{site}.rg_lru", config)
        self.linear_out = Linear(f"{site}.linear_out", width, lru_width, dtype)
        self.site = site

    def forward(self, x: Tensor, positions: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        hidden, conv = state
        gate = ops.gelu(self.linear_y(x), f"{self.site}.gelu")
        weight, bias = self.conv_1d.weight, self.conv_1d.bias
        u, conv = ops.causal_conv1d(self.linear_x(x), weight, bias, conv, f"{self.site}.conv_1d")
        h, hidden = self.rg_lru(u, positions, hidden)
        return self.linear_out(ops.mul(h, gate, f"{self.site}.mul")), (hidden, conv)


class AttentionBlock(nn.Module):
    def __init__(self, site: str, config: GriffinConfig, dtype: torch.dtype):
        super().__init__()
        width, heads, head_dim = config.width, config.num_heads * config.head_dim, config.head_dim
        self.q_proj = Linear(f"{site}.q_proj", heads, width, dtype, bias=False)
        self.k_proj = Linear(f"{site}.k_proj", head_dim, width, dtype, bias=False)
        self.v_proj = Linear(f"{site}.v_proj", head_dim, width, dtype, bias=False)
        self.o_proj = Linear(f"{site}.o_proj", width, heads, dtype)
        self.rotary = (head_dim, config.rope_dims, config.rope_theta)
        self.site = site

    def forward(self, x: Tensor, positions: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        q = ops.rope(self.q_proj(x), positions, *self.rotary, f"{self.site}.rope_q")
        k = ops.rope(self.k_proj(x), positions, *self.rotary, f"{self.site}.rope_k")
        attended, key, value = ops.local_attention(
            q, k, self.v_proj(x), *state, positions, f"{self.site}.attention"
        )
        return self.o_proj(attended), (key, value)


class MlpBlock(nn.Module):
    def __init__(self, site: str, config: GriffinConfig, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(f"{site}.gate_proj", config.mlp_width, config.width, dtype)
        self.up_proj = Linear(f"{site}.up_proj", config.mlp_width, config.width, dtype)
        self.down_proj = Linear(f"{site}.down_proj", config.width, config.mlp_width, dtype)
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        gate = ops.gelu(self.gate_proj(x), f"{self.site}.gelu")
        return self.down_proj(ops.mul(gate, self.up_proj(x), f"{self.site}.mul"))


class Layer(nn.Module):
    def __init__(self, config: GriffinConfig, index: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        site = f"layers.{index}"
        self.temporal_pre_norm = RMSNorm(f"{site}.temporal_pre_norm", config)
        is_recurrent = config.block_types[index] == "recurrent"
        block: Callable[..., nn.Module] = RecurrentBlock if is_recurrent else AttentionBlock
        self.temporal_block = block(f"{site}.temporal_block", config, dtype)
        self.channel_pre_norm = RMSNorm(f"{site}.channel_pre_norm", config)
        self.mlp_block = MlpBlock(f"{site}.mlp_block", config, dtype)
        self.site = site

    def forward(self, x: Tensor, positions: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        mixed, state = self.temporal_block(self.temporal_pre_norm(x), positions, state)
        x = ops.add(x, mixed, f"{self.site}.temporal_residual")
        mixed = self.mlp_block(self.channel_pre_norm(x))
        return ops.add(x, mixed, f"{self.site}.channel_residual"), state


class StepModel(nn.Module):
    """A whole Griffin model as a step; `dtype` is the activation dtype, float32 or float16."""

    def __init__(self, config: GriffinConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.embed_tokens = Weight((config.vocab_size, config.width), None, dtype)
        self.layers = nn.ModuleList(Layer(config, i, dtype) for i in range(config.num_layers))
        self.final_norm = RMSNorm("final_norm", config)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, num_logits: Tensor, states: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """One step.

        input_ids, position_ids [B, T] int64, `num_logits` last tokens that want logits, a scalar
        int64, and the states of each layer → logits [B, num_logits, V] float32 and the next states.
        """
        table, config = self.embed_tokens.weight, self.config
        x = ops.embedding(input_ids, table, config.embedding_scale, "embed_tokens")
        updated: list[LayerState] = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, position_ids, state)
            updated.append(state)
        x = self.final_norm(ops.last_tokens(x, num_logits, "last_tokens"))
        logits = ops.linear(x, table, None, "lm_head")
        return ops.soft_cap(logits, config.soft_cap, "logits"), updated
