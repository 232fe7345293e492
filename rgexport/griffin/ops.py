"""The Griffin op set: every operation of the step model, as `torch.library` ops.

`torch.export` sees each op as one node. An emitter is a table from these ops to its own nodes. The
bodies are the eager reference.

Shapes: B sequences, T tokens, W model width, R lru_width, H heads of D dims. The last argument of
every op is its *site*, the stable name that emitters carry into their own value names.

Dtypes: `linear` and `embedding` work in their weight's dtype (the activation dtype); the residual
stream, norms, convolution, gates, scan, RoPE angles, softmax and soft cap are float32.

Mathematics: arXiv 2402.19427 (Griffin), section 2, and arXiv 2404.07839 (RecurrentGemma), section
2. The order of operations is DeepMind's in recurrentgemma/torch; each op names its file there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgexport.griffin.config import RG_LRU_C
from rgexport.griffin.scan import linear_scan

_ATTENTION_QUERIES = 512
"""Queries that attention takes at once, so that its scores stay small."""

_Body = Callable[..., Any]

_OPS: dict[str, _Body] = {}
"""Name → op, which a trace shows as one node."""
_BODIES: dict[str, _Body] = {}
"""Name → the op's eager reference."""


def compute(site: str, op: str, *arguments: Any) -> Any:
    """Computes an op, which a trace shows as one node; without gradients."""
    return _OPS[op](*arguments, site)


def compute_eagerly(site: str, op: str, *arguments: Any) -> Any:
    """Computes an op by its eager reference, which has gradients."""
    inputs = []
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            # An op that reads an input twice sums both gradients at this view, before those of
            # other ops are added. So the sums have a fixed order.
            argument = argument.view_as(argument)
        inputs.append(argument)
    return _BODIES[op](*inputs, site)


def _op(name: str, fake: _Body | None = None) -> Callable[[_Body], Any]:
    """Returns a decorator that registers a function as the op `griffin::NAME`.

    `fake` returns results of the right shapes and dtypes for a trace. Without it, the function
    itself runs on fake tensors.
    """

    def register(body: _Body) -> Any:
        """Registers the function, and returns the op."""
        op = torch.library.custom_op(f"griffin::{name}", body, mutates_args=())
        op.register_fake(fake or body)
        _OPS[name] = op
        _BODIES[name] = body
        return op

    return register


@_op("embedding")
def embedding(ids: Tensor, table: Tensor, scale: float, site: str) -> Tensor:
    """Returns rows of `table` [V, W] for `ids` [B, T], times `scale`, float32 [B, T, W].

    Source: arXiv 2404.07839, section 2; `Embedder.encode` in modules.py.
    """
    return F.embedding(ids, table).float() * scale


@_op("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, site: str) -> Tensor:
    """Computes `x · rsqrt(mean(x²) + eps) · (1 + weight)` over the last axis, float32.

    Source: `RMSNorm` in layers.py.
    """
    x = x.float()
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * (1 + weight.float())


@_op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """Computes `x · weightᵀ + bias` for x [B, T, K] and weight [N, K], in the weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, bias)


@_op("gelu")
def gelu(x: Tensor, site: str) -> Tensor:
    """Computes GELU in its tanh form, in the dtype of `x`.

    Source: `gelu` in modules.py.
    """
    return F.gelu(x, approximate="tanh")


@_op("add")
def add(x: Tensor, y: Tensor, site: str) -> Tensor:
    """Adds on the residual stream, float32."""
    return x.float() + y.float()


@_op("mul")
def mul(x: Tensor, y: Tensor, site: str) -> Tensor:
    """Multiplies in the wider of both dtypes."""
    return x * y


@_op("causal_conv1d")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor,
    site: str,
) -> tuple[Tensor, Tensor]:
    """Computes a depthwise causal convolution of C taps.

    The inputs are rounded to the state's dtype first, so that a step equals a prefill.
    Source: arXiv 2402.19427, section 2.3; `Conv1D` in layers.py.

    Args:
        x: the inputs [B, T, R].
        weight: the taps of each channel, the oldest first [R, 1, C].
        bias: [R].
        state: the C - 1 inputs before `x`, the oldest first [B, C - 1, R].
        site: the op's site.

    Returns:
        The outputs, float32 [B, T, R], and the next state.
    """
    window = torch.cat([state, x.to(state.dtype)], dim=1)
    channels_first = window.float().transpose(1, 2)
    y = F.conv1d(channels_first, weight.float(), bias.float(), groups=weight.shape[0])

    state_start = window.shape[1] - state.shape[1]
    next_state = window[:, state_start:].clone()
    return y.transpose(1, 2).contiguous(), next_state


@_op("block_diagonal_linear")
def block_diagonal_linear(x: Tensor, weight: Tensor, bias: Tensor, site: str) -> Tensor:
    """Multiplies each block of channels by a matrix of its own, float32; for the RG-LRU's gates.

    x [B, T, R], weight [blocks, in, out] with blocks · in = R, bias [blocks, out] → [B, T, R].
    Source: `BlockDiagonalLinear` in layers.py.
    """
    blocks = x.float().unflatten(-1, weight.shape[:2])
    y = torch.einsum("bthi,hij->bthj", blocks, weight.float()) + bias.float()
    return y.flatten(-2)


class _FiniteGradient(torch.autograd.Function):
    """The identity on the RG-LRU's gate, with the gradient 0 where a is 1.

    There, the derivative of √(1 - a²) is infinite.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        """Returns the gate as it is."""
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Replaces NaN and infinities by 0."""
        return gradients[0].nan_to_num(0.0, 0.0, 0.0)


def _fake_rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    position_ids: Tensor,
    state: Tensor,
    site: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state)


@_op("rg_lru_scan", _fake_rg_lru_scan)
def rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    position_ids: Tensor,
    state: Tensor,
    site: str,
) -> tuple[Tensor, Tensor]:
    """Computes the RG-LRU from its gates' pre-activations.

    At position 0 the state is ignored and the input is not normalized.
    Source: arXiv 2402.19427, section 2.4, eq. 1–4; `RGLRU.forward` in layers.py.

    Args:
        x: the inputs [B, T, R].
        input_gate: the input gate before its sigmoid [B, T, R].
        recurrence_gate: the recurrence gate before its sigmoid [B, T, R].
        a_param: the parameter Λ of the decay [R].
        position_ids: the tokens' positions [B, T].
        state: the state before the first token, float32 [B, R].
        site: the op's site.

    Returns:
        The state after each token, float32 [B, T, R], and the next state.
    """
    gate = recurrence_gate
    if gate.requires_grad:
        gate = _FiniteGradient.apply(gate)
    log_a = RG_LRU_C * torch.sigmoid(gate) * F.softplus(a_param.float())

    is_first = (position_ids == 0).unsqueeze(-1)
    a = torch.where(is_first, 0.0, torch.exp(log_a))
    # As recurrentgemma computes it. expm1 would be more exact where a is close to 1, but would
    # move the logits by up to 1e-3 from the model as it was trained.
    scale = torch.where(is_first, 1.0, torch.sqrt(1 - torch.exp(2 * log_a)))

    scaled_x = x * torch.sigmoid(input_gate) * scale
    h = linear_scan(a, scaled_x, state)
    return h, h[:, -1].clone()


def rope_frequencies(dims: int, theta: float) -> Tensor:
    """Returns `dims / 2` rotation frequencies, float32, rounded as `recurrentgemma` rounds them.

    Source: `_apply_rope` in modules.py.
    """
    exponents = 2 * torch.arange(dims // 2) / dims
    return 1.0 / theta**exponents


@_op("rope")
def rope(
    x: Tensor,
    position_ids: Tensor,
    head_dim: int,
    dims: int,
    theta: float,
    site: str,
) -> Tensor:
    """Rotates the first `dims` of every head's `head_dim` dims by their positions.

    Dim i of the first half of `dims` is paired with dim i of the second half.
    x [B, T, H · D], position_ids [B, T] → the same shape and dtype as `x`.
    Source: `_apply_rope` in modules.py.
    """
    frequencies = rope_frequencies(dims, theta).to(x.device)
    angles = position_ids[..., None, None] * frequencies
    cos = angles.cos()
    sin = angles.sin()

    heads = x.float().unflatten(-1, (-1, head_dim))
    half = dims // 2
    first, second, unrotated = heads.split([half, half, head_dim - dims], dim=-1)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin

    rotated = torch.cat([rotated_first, rotated_second, unrotated], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _fake_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position_ids: Tensor,
    site: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(past_k), torch.empty_like(past_v)


@_op("local_attention", _fake_local_attention)
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position_ids: Tensor,
    site: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes multi-query attention of each query to itself and the `window` keys before it.

    Scores and softmax are float32.
    Source: arXiv 2402.19427, section 2.3; `LocalAttentionBlock.forward` in modules.py.

    Args:
        q: the queries of all heads [B, T, H · D].
        k: the keys [B, T, D].
        v: the values [B, T, D].
        past_k: the keys before them, the oldest first [B, window, D].
        past_v: the values before them, the oldest first [B, window, D].
        position_ids: the tokens' positions [B, T].
        site: the op's site.

    Returns:
        The attended values [B, T, H · D], and the last `window` keys and values.
    """
    length = q.shape[1]
    window = past_k.shape[1]
    keys = torch.cat([past_k, k], dim=1)
    values = torch.cat([past_v, v], dim=1)

    # Slot j holds position p0 + j - window; those below 0 are the zeros before the first token.
    slot_indices = torch.arange(keys.shape[1], device=q.device)
    is_filled = position_ids[:, :1] + slot_indices >= window

    attended = torch.empty_like(q)
    for start in range(0, length, _ATTENTION_QUERIES):
        stop = min(start + _ATTENTION_QUERIES, length)
        slots = slice(start, window + stop)
        is_visible = _is_in_window(stop - start, window, q.device) & is_filled[:, None, slots]
        attended[:, start:stop] = _attend(
            q[:, start:stop], keys[:, slots], values[:, slots], is_visible
        )
    return attended, keys[:, length:].clone(), values[:, length:].clone()


def _is_in_window(queries: int, window: int, device: torch.device) -> Tensor:
    """Returns bool [queries, window + queries]: whether a slot is in a query's window.

    The slots are those before the first query, then one for each query.
    """
    slots = torch.arange(window + queries, device=device)
    rows = torch.arange(queries, device=device)
    distance = slots - rows.unsqueeze(-1)
    return (distance >= 0) & (distance <= window)


def _attend(q: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor) -> Tensor:
    """Returns attention [B, t, H · D] of q [B, t, H · D] to keys and values [B, S, D].

    `is_visible` [B, t, S] tells which slots a query sees.
    """
    head_dim = keys.shape[-1]
    heads = q.unflatten(-1, (-1, head_dim)).float()
    scores = torch.einsum("bthd,bsd->bhts", heads, keys.float()) * head_dim**-0.5
    scores = scores.masked_fill(~is_visible.unsqueeze(1), float("-inf"))
    weights = scores.softmax(-1)
    attended = torch.einsum("bhts,bsd->bthd", weights.to(values.dtype), values)
    return attended.flatten(-2)


def _fake_last_tokens(x: Tensor, count: Tensor, site: str) -> Tensor:
    tokens = torch.library.get_ctx().new_dynamic_size(min=1)
    return x.new_empty((x.shape[0], tokens, x.shape[2]))


@_op("last_tokens", _fake_last_tokens)
def last_tokens(x: Tensor, count: Tensor, site: str) -> Tensor:
    """Returns the last `count` (a scalar tensor) tokens of x [B, T, W], or all if T is less."""
    start = max(0, x.shape[1] - int(count))
    return x[:, start:].clone()


@_op("soft_cap")
def soft_cap(x: Tensor, cap: float, site: str) -> Tensor:
    """Computes `cap · tanh(x / cap)` in float32; the identity for a cap of 0.

    Source: `Griffin.forward` in griffin.py.
    """
    # torch.library allows no result that shares memory with an argument, so even the identity
    # copies.
    x = x.to(torch.float32, copy=True)
    if not cap:
        return x
    return torch.tanh(x / cap) * cap
