"""The reference in NumPy: it needs no more than the core install."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from rgexport._version import __version__
from rgexport.griffin import numpy_ops as ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import LayerByLayer, RunLayer
from rgexport.griffin.tensor import WeightSource

Look = Callable[[str, str, tuple[Any, ...], tuple[np.ndarray, ...]], np.ndarray | None]
"""Takes a site, its op (`linear`, see `griffin.ops`), the op's arguments and its results; returns
what replaces the first result, in its shape [B, T, n], or None."""

_States = tuple[np.ndarray, np.ndarray]


class NumpyReference(LayerByLayer):
    """A model in float32 on the CPU, whose ops can be observed and replaced one by one."""

    def __init__(
        self,
        config: GriffinConfig,
        weights: WeightSource,
        *,
        keep: bool = False,
    ):
        """With `keep`, all weights stay in memory in float32 once they are read."""
        super().__init__(config, weights, keep=keep)
        self.look: Look | None = None
        """Called after each op; the following ops take what it returns.

        The head reads its table in slabs, and its sites are seen once for each.
        """

    # `numpy_ops.linear` has threads of its own.
    run_each = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.run_each)
    logits = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.logits)

    def describe(self) -> dict[str, str]:
        """Returns `implementation`, `device`, `dtype` and `numpy`."""
        here = {"device": "cpu", "dtype": "float32", "numpy": np.__version__}
        return {"implementation": f"rgexport {__version__}", **here}

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
        """Calls an op, and lets `look` replace its first result."""
        results = op(*arguments)
        if self.look is None:
            return results
        first, *rest = results if isinstance(results, tuple) else (results,)
        other = self.look(site, op.__name__, arguments, (first, *rest))
        if other is not None:
            first = np.asarray(other, np.float32)
        return (first, *rest) if rest else first


class _Layer:
    """One residual block: temporal mixing, then the MLP."""

    def __init__(
        self,
        config: GriffinConfig,
        index: int,
        weights: Mapping[str, np.ndarray],
        op: Callable[..., Any],
    ):
        """`op` calls an op at a site, with the op's arguments."""
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
        weights = self._take("temporal_block.conv_1d", ".weight", ".bias")
        u, conv = self._op("temporal_block.conv_1d", ops.causal_conv1d, u, *weights, conv)
        gates = []
        for site in ("temporal_block.rg_lru.input_gate", "temporal_block.rg_lru.recurrent_gate"):
            weights = self._take(site, "_weight", "_bias")
            gates.append(self._op(site, ops.block_diagonal_linear, u, *weights))
        site = "temporal_block.rg_lru"
        (a_param,) = self._take(site, ".recurrent_param")
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
        weights = self._take(site, ".weight")
        return self._op(site, ops.rms_norm, x, *weights, self._config.rms_eps)

    def _linear(self, site: str, x: np.ndarray) -> np.ndarray:
        bias = self._weights.get(f"{site}.bias")
        return self._op(site, ops.linear, x, *self._take(site, ".weight"), bias)

    def _take(self, site: str, *ends: str) -> list[np.ndarray]:
        return [self._weights[site + end] for end in ends]

    def _op(self, site: str, op: Callable[..., Any], *arguments: Any) -> Any:
        return self._call(self._prefix + site, op, *arguments)
