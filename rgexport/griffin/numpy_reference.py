"""The reference in NumPy, which needs only the core install, and its variants.

The ops are those of `griffin.ops`, all in float32; arguments and shapes are the same.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from rgexport._version import __version__
from rgexport.griffin.config import RG_LRU_C, GriffinConfig
from rgexport.griffin.layer import Layer
from rgexport.griffin.layer_by_layer import LayerByLayer
from rgexport.griffin.tensor import WeightSource
from rgexport.parallelism import parallel_jobs, usable_threads

_ROWS = 256  # queries that attention takes at once, so that its scores stay small
_SHARED = 1 << 28  # multiplications of a product that threads share: some milliseconds
_GELU = np.float32(math.sqrt(2 / math.pi))
_threads = functools.cache(lambda: ThreadPoolExecutor(usable_threads(None)))


def embedding(ids: np.ndarray, table: np.ndarray, scale: float) -> np.ndarray:
    """Returns rows of the table, float32, times the scale."""
    return table[ids] * np.float32(scale)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    mean = np.square(x).mean(-1, keepdims=True)
    return x / np.sqrt(mean + np.float32(eps)) * (1 + weight)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Computes `x · weightᵀ + bias`; the head's weight is the embedding's table."""
    y = _product(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1)


def _product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`x · weightᵀ` [n, N]; threads share a large one, as BLAS's own wait for one another."""
    jobs = parallel_jobs() if x.size * len(weight) >= _SHARED else 1
    if jobs == 1:
        return np.asarray(x @ weight.T)
    y = np.empty((len(x), len(weight)), np.float32)

    def fill(start: int, stop: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # a thread has its own
            np.matmul(x, weight[start:stop].T, out=y[:, start:stop])

    edges = np.linspace(0, len(weight), jobs + 1).astype(int).tolist()
    list(_threads().map(fill, edges[:-1], edges[1:]))
    return y


def gelu(x: np.ndarray) -> np.ndarray:
    """Computes GELU in its tanh form, in the dtype of `x`."""
    y = x * x
    y *= np.float32(0.044715)
    y += 1
    y *= x
    y *= _GELU
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= np.float32(0.5)
    return y


def causal_conv1d(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Convolves x [B, T, R] with weight [R, 1, C], after state [B, C - 1, R]; in float32."""
    window = np.concatenate([state, x], 1)
    y = np.broadcast_to(bias, x.shape).copy()
    for tap in range(weight.shape[-1]):
        y += window[:, tap : tap + x.shape[1]] * weight[:, 0, tap]
    return y, window[:, x.shape[1] :].copy()


def block_diagonal_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Multiplies blocks of x [B, T, R] by weight [H, R/H, R/H] (not transposed)."""
    blocks = x.reshape(-1, *weight.shape[:2]).swapaxes(0, 1)
    y = np.matmul(blocks, weight) + bias[:, None]
    return y.swapaxes(0, 1).reshape(x.shape)


def rg_lru_scan(
    x: np.ndarray,
    input_gate: np.ndarray,
    recurrence_gate: np.ndarray,
    a_param: np.ndarray,
    position_ids: np.ndarray,
    state: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the RG-LRU (arXiv 2402.19427, eq. 1–4) from its gates' pre-activations."""
    softplus = np.log1p(_exp(a_param), dtype=np.float64).astype(np.float32)
    log_a = np.float32(RG_LRU_C) * _sigmoid(recurrence_gate) * softplus
    first = (position_ids == 0)[..., None]
    a = np.where(first, np.float32(0), _exp(log_a))
    scale = np.where(first, np.float32(1), np.sqrt(1 - _exp(2 * log_a)))
    h = x * _sigmoid(input_gate) * scale
    for t in range(h.shape[1]):
        h[:, t] += a[:, t] * (h[:, t - 1] if t else state)
    return h, h[:, -1].copy()


def rope(
    x: np.ndarray, position_ids: np.ndarray, head_dim: int, dims: int, theta: float
) -> np.ndarray:
    """Rotates the first `dims` of every head's `head_dim` dims, halves paired, in [B, T, H · D]."""
    half = dims // 2
    exponents = np.arange(half, dtype=np.float32) * 2 / np.float32(dims)
    frequencies = 1 / np.float32(theta) ** exponents
    angles = position_ids[..., None, None].astype(np.float32) * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    heads = x.reshape(*x.shape[:-1], -1, head_dim)
    first, second = heads[..., :half], heads[..., half:dims]
    rotated = heads.copy()
    rotated[..., :half] = first * cos - second * sin
    rotated[..., half:dims] = second * cos + first * sin
    return rotated.reshape(x.shape)


def local_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    past_k: np.ndarray,
    past_v: np.ndarray,
    position_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attends to itself and the window; see `ops.local_attention`. Returns output, keys, values."""
    (batch, length), (window, head_dim) = q.shape[:2], past_k.shape[1:]
    keys, values = np.concatenate([past_k, k], 1), np.concatenate([past_v, v], 1)
    # Slot j holds position p0 + j - window; those below 0 are the zeros before the first token.
    filled = position_ids[:, :1] + np.arange(window + length) >= window
    out = np.empty_like(q)
    for start in range(0, length, _ROWS):
        rows = min(_ROWS, length - start)
        slots = slice(start, start + window + rows)
        query = q[:, start : start + rows].reshape(batch, -1, head_dim)  # rows, then heads
        scores = query @ keys[:, slots].swapaxes(1, 2) * np.float32(head_dim**-0.5)
        distance = np.arange(window + rows) - np.arange(rows)[:, None]
        seen = (distance >= 0) & (distance <= window) & filled[:, None, slots]
        by_row = scores.reshape(batch, rows, -1, window + rows)
        np.copyto(by_row, -np.inf, where=~seen[:, :, None])
        attended = _softmax(scores) @ values[:, slots]
        out[:, start : start + rows] = attended.reshape(batch, rows, -1)
    return out, keys[:, length:].copy(), values[:, length:].copy()


def soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    return np.tanh(x / np.float32(cap)) * np.float32(cap) if cap else x


# NumPy's own functions of float32 err by up to three units in the last place, torch's by one, and
# near 1 the root √(1 - a²) makes much of that: these are computed in float64 and rounded.


def _exp(x: np.ndarray) -> np.ndarray:
    return np.exp(x, dtype=np.float64).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 1 / inf is the limit
        return 1 / (1 + _exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    x -= x.max(-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(-1, keepdims=True)
    return x


_NAMED = embedding, rms_norm, linear, gelu, causal_conv1d, block_diagonal_linear, rg_lru_scan
_OPS: dict[str, Callable[..., Any]] = {
    **{op.__name__: op for op in (*_NAMED, rope, local_attention, soft_cap)},
    **{"add": np.add, "mul": np.multiply},
}

Look = Callable[[str, str, tuple[Any, ...], tuple[np.ndarray, ...]], np.ndarray | None]
"""Takes a site, the name of its op (`linear`), the op's arguments and its results; returns a
replacement for the first result, in its shape [B, T, n], or None."""


class NumpyReference(LayerByLayer):
    """A model in float32 on the CPU. `look`, if set, sees each op, and each slab of the head."""

    look: Look | None = None

    # `linear` has threads of its own.
    run_each = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.run_each)
    logits = threadpool_limits.wrap(limits=1, user_api="blas")(LayerByLayer.logits)

    def describe(self) -> dict[str, str]:
        return {
            "implementation": f"rgexport {__version__}",
            "device": "cpu",
            "dtype": "float32",
            "numpy": np.__version__,
        }

    def _compute(self, site: str, op: str, *arguments: Any) -> Any:
        results = _OPS[op](*arguments)
        if self.look is None:
            return results
        first, *rest = results if isinstance(results, tuple) else (results,)
        replacement = self.look(site, op, arguments, (first, *rest))
        if replacement is not None:
            first = np.asarray(replacement, np.float32)
        return (first, *rest) if rest else first


class Variants(NumpyReference):
    """A model and its variants, each with another model's weights in one part.

    The parts are the embedding (which is also the head), each layer, and the final norm. Before its
    part, a variant equals the model, so the batch grows from layer to layer.
    """

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, replacements: WeightSource
    ) -> None:
        super().__init__(config, weights)
        self._replacement = NumpyReference(config, replacements)
        layers = (f"layers.{i}" for i in range(config.num_layers))
        self.parts = ("embed_tokens", *layers, "final_norm")

    def run_all(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the final norm's output [1 + parts, T, width] of tokens, first the model's."""
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

    def _run_layer(self, layer: Layer, index: int, hidden: np.ndarray) -> np.ndarray:
        after: np.ndarray = layer(hidden, *self.beginning(index, *hidden.shape[:2]))[0]
        return after
