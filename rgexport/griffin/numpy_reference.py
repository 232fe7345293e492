"""The reference in NumPy, which needs only the core install, and its variants."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from rgexport._version import __version__
from rgexport.griffin import numpy_ops as ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import LayerByLayer, RunLayer
from rgexport.griffin.state import layer_states
from rgexport.griffin.tensor import WeightSource

Look = Callable[[str, str, tuple[Any, ...], tuple[np.ndarray, ...]], np.ndarray | None]
"""Takes a site, the name of its op (`linear`), the op's arguments and its results; returns a
replacement for the first result, in its shape [B, T, n], or None."""

_States = tuple[np.ndarray, np.ndarray]


class NumpyReference(LayerByLayer):
    """A model in float32 on the CPU. `look`, if set, sees each op and may replace its result.

    The head reads its table in slabs, and `look` sees its sites once for each slab.
    """

    look: Look | None = None

    # `numpy_ops.linear` has threads of its own.
    run_each = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.run_each)
    logits = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.logits)

    def describe(self) -> dict[str, str]:
        return {
            "implementation": f"rgexport {__version__}",
            "device": "cpu",
            "dtype": "float32",
            "numpy": np.__version__,
        }

    def _array(self, array: np.ndarray) -> np.ndarray:
        return array

    def _numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def _embedding(self, ids: np.ndarray, table: np.ndarray) -> np.ndarray:
        return self._op("embed_tokens", ops.embedding, ids, table, self.config.embedding_scale)

    def _build(self, index: int, weights: dict[str, np.ndarray]) -> RunLayer:
        return _Layer(self.config, index, weights, self._op)

    def _normalized(self, hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self._op("final_norm", ops.rms_norm, hidden, weight, self.config.rms_eps)

    def _head_logits(self, hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        logits = self._op("lm_head", ops.linear, hidden, rows, None)
        return self._op("logits", ops.soft_cap, logits, self.config.soft_cap)

    def _op(self, site: str, op: Callable[..., Any], *arguments: Any) -> Any:
        results = op(*arguments)
        if self.look is None:
            return results
        first, *rest = results if isinstance(results, tuple) else (results,)
        replacement = self.look(site, op.__name__, arguments, (first, *rest))
        if replacement is not None:
            first = np.asarray(replacement, np.float32)
        return (first, *rest) if rest else first


class _Layer:
    def __init__(
        self,
        config: GriffinConfig,
        index: int,
        weights: Mapping[str, np.ndarray],
        op: Callable[..., Any],
    ):
        self._config, self._kind = config, config.block_types[index]
        self._prefix, self._weights, self._call = f"layers.{index}.", weights, op

    def __call__(
        self, x: np.ndarray, positions: np.ndarray, state: _States
    ) -> tuple[np.ndarray, _States]:
        mix = self._recurrent if self._kind == "recurrent" else self._attention
        mixed, state = mix(self._norm("temporal_pre_norm", x), positions, state)
        x = self._op("temporal_residual", ops.add, x, mixed)
        mixed = self._mlp(self._norm("channel_pre_norm", x))
        return self._op("channel_residual", ops.add, x, mixed), state

    def _recurrent(
        self, x: np.ndarray, positions: np.ndarray, state: _States
    ) -> tuple[np.ndarray, _States]:
        hidden, conv = state
        gate = self._op("temporal_block.gelu", ops.gelu, self._linear("temporal_block.linear_y", x))
        u = self._linear("temporal_block.linear_x", x)
        weights = self._weights_of("temporal_block.conv_1d", ".weight", ".bias")
        u, conv = self._op("temporal_block.conv_1d", ops.causal_conv1d, u, *weights, conv)
        gates = []
        for site in ("temporal_block.rg_lru.input_gate", "temporal_block.rg_lru.recurrent_gate"):
            weights = self._weights_of(site, "_weight", "_bias")
            gates.append(self._op(site, ops.block_diagonal_linear, u, *weights))
        site = "temporal_block.rg_lru"
        (a_param,) = self._weights_of(site, ".recurrent_param")
        h, hidden = self._op(site, ops.rg_lru_scan, u, *gates, a_param, positions, hidden)
        mixed = self._op("temporal_block.mul", ops.mul, h, gate)
        return self._linear("temporal_block.linear_out", mixed), (hidden, conv)

    def _attention(
        self, x: np.ndarray, positions: np.ndarray, state: _States
    ) -> tuple[np.ndarray, _States]:
        config = self._config
        rotary = positions, config.head_dim, config.rope_dims, config.rope_theta
        q = self._linear("temporal_block.q_proj", x)
        q = self._op("temporal_block.rope_q", ops.rope, q, *rotary)
        k = self._linear("temporal_block.k_proj", x)
        k = self._op("temporal_block.rope_k", ops.rope, k, *rotary)
        v = self._linear("temporal_block.v_proj", x)
        attended, key, value = self._op(
            "temporal_block.attention", ops.local_attention, q, k, v, *state, positions
        )
        return self._linear("temporal_block.o_proj", attended), (key, value)

    def _mlp(self, x: np.ndarray) -> np.ndarray:
        gate = self._op("mlp_block.gelu", ops.gelu, self._linear("mlp_block.gate_proj", x))
        up = self._linear("mlp_block.up_proj", x)
        return self._linear("mlp_block.down_proj", self._op("mlp_block.mul", ops.mul, gate, up))

    def _norm(self, site: str, x: np.ndarray) -> np.ndarray:
        weights = self._weights_of(site, ".weight")
        return self._op(site, ops.rms_norm, x, *weights, self._config.rms_eps)

    def _linear(self, site: str, x: np.ndarray) -> np.ndarray:
        bias = self._weights.get(f"{site}.bias")
        return self._op(site, ops.linear, x, *self._weights_of(site, ".weight"), bias)

    def _weights_of(self, site: str, *ends: str) -> list[np.ndarray]:
        return [self._weights[site + end] for end in ends]

    def _op(self, site: str, op: Callable[..., Any], *arguments: Any) -> Any:
        return self._call(self._prefix + site, op, *arguments)


class Variants(NumpyReference):
    """A model and its variants, each with another model's weights in one part.

    The parts are the embedding (which is also the head), each layer, and the final norm. Before its
    part, a variant equals the model, so the batch grows from layer to layer. One layer of one of
    the two models is in memory at a time.
    """

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, replacements: WeightSource
    ) -> None:
        super().__init__(config, weights)
        self._replacement = NumpyReference(config, replacements)
        layers = (f"layers.{i}" for i in range(config.num_layers))
        self.parts = ("embed_tokens", *layers, "final_norm")

    def run_all(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the final norm's output [1 + parts, T, width] float32 of tokens [T].

        The first row is the model's; the variants follow in the order of `parts`.
        """
        text = tokens[None]
        hidden = np.concatenate([self.embed(text), self._replacement.embed(text)])
        for index in range(self.config.num_layers):
            variant = self._run_layer(self._replacement.layer(index), index, hidden[:1])
            hidden = np.concatenate([self._run_layer(self.layer(index), index, hidden), variant])
        return np.concatenate([self.final_norm(hidden), self._replacement.final_norm(hidden[:1])])

    def all_logits(self, hidden: np.ndarray) -> np.ndarray:
        """Returns soft-capped logits [1 + parts, t, V] float32 of some positions of `run_all`."""
        logits = self.logits(hidden)
        logits[1] = self._replacement.logits(hidden[1:2])[0]
        return logits

    def _run_layer(self, layer: RunLayer, index: int, hidden: np.ndarray) -> np.ndarray:
        """Takes the residual stream [B, T, width] through a layer, from an empty state."""
        batch, length = hidden.shape[:2]
        # There are no keys before the first token: a window as long as the text is enough.
        window = min(self.config.window, length)
        specs = layer_states(dataclasses.replace(self.config, window=window), index, "float32")
        first, second = (np.zeros((batch, *spec.shape), np.float32) for spec in specs)
        positions = np.broadcast_to(np.arange(length), (batch, length))
        after: np.ndarray = layer(hidden, positions, (first, second))[0]
        return after
