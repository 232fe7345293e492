"""The ops of a layer in the order of a step, in torch or NumPy.

Mathematics: arXiv 2402.19427; numerics: DeepMind's `recurrentgemma.torch` in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rgexport.griffin.config import GriffinConfig

Array = Any
"""A NumPy array, or a tensor of torch."""
LayerState = tuple[Array, Array]
"""The two states of one layer, see `griffin.state.layer_states`."""
Compute = Callable[..., Any]
"""Takes a site, the name of its op in `griffin.ops`, and the op's arguments before the site."""


@dataclass(frozen=True)
class Layer:
    """Layer `index` of a model; `weights` are by canonical name."""

    config: GriffinConfig
    index: int
    weights: Mapping[str, Array]
    compute: Compute

    def __call__(self, x: Array, positions: Array, state: LayerState) -> tuple[Array, LayerState]:
        """Takes the residual stream [B, T, width], positions [B, T] and the layer's two states."""
        is_recurrent = self.config.block_types[self.index] == "recurrent"
        mix = self._recurrent if is_recurrent else self._attention
        mixed, state = mix(self._norm("temporal_pre_norm", x), positions, state)
        x = self._op("temporal_residual", "add", x, mixed)
        mixed = self._mlp(self._norm("channel_pre_norm", x))
        return self._op("channel_residual", "add", x, mixed), state

    def _recurrent(self, x: Array, positions: Array, state: LayerState) -> tuple[Array, LayerState]:
        """Two branches; one through the convolution and the RG-LRU, one through GELU."""
        hidden, conv = state
        gate = self._op("temporal_block.gelu", "gelu", self._linear("temporal_block.linear_y", x))
        u = self._linear("temporal_block.linear_x", x)
        site = "temporal_block.conv_1d"
        weights = self._weights(site, ".weight", ".bias")
        u, conv = self._op(site, "causal_conv1d", u, *weights, conv)
        gates = []
        for site in ("temporal_block.rg_lru.input_gate", "temporal_block.rg_lru.recurrent_gate"):
            weights = self._weights(site, "_weight", "_bias")
            gates.append(self._op(site, "block_diagonal_linear", u, *weights))
        site = "temporal_block.rg_lru"
        (a_param,) = self._weights(site, ".recurrent_param")
        h, hidden = self._op(site, "rg_lru_scan", u, *gates, a_param, positions, hidden)
        mixed = self._op("temporal_block.mul", "mul", h, gate)
        return self._linear("temporal_block.linear_out", mixed), (hidden, conv)

    def _attention(self, x: Array, positions: Array, state: LayerState) -> tuple[Array, LayerState]:
        config = self.config
        rotary = positions, config.head_dim, config.rope_dims, config.rope_theta
        q = self._linear("temporal_block.q_proj", x)
        q = self._op("temporal_block.rope_q", "rope", q, *rotary)
        k = self._linear("temporal_block.k_proj", x)
        k = self._op("temporal_block.rope_k", "rope", k, *rotary)
        v = self._linear("temporal_block.v_proj", x)
        attended, key, value = self._op(
            "temporal_block.attention", "local_attention", q, k, v, *state, positions
        )
        return self._linear("temporal_block.o_proj", attended), (key, value)

    def _mlp(self, x: Array) -> Array:
        gate = self._op("mlp_block.gelu", "gelu", self._linear("mlp_block.gate_proj", x))
        gated = self._op("mlp_block.mul", "mul", gate, self._linear("mlp_block.up_proj", x))
        return self._linear("mlp_block.down_proj", gated)

    def _norm(self, site: str, x: Array) -> Array:
        return self._op(site, "rms_norm", x, *self._weights(site, ".weight"), self.config.rms_eps)

    def _linear(self, site: str, x: Array) -> Array:
        bias = self.weights.get(f"layers.{self.index}.{site}.bias")
        return self._op(site, "linear", x, *self._weights(site, ".weight"), bias)

    def _weights(self, site: str, *ends: str) -> list[Array]:
        return [self.weights[f"layers.{self.index}.{site}{end}"] for end in ends]

    def _op(self, site: str, op: str, *arguments: Any) -> Any:
        return self.compute(f"layers.{self.index}.{site}", op, *arguments)
