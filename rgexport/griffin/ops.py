"""The Griffin op set: every operation of the step model, as `torch.library` ops.

`torch.export` sees each as one node; an emitter is a table from these ops to its own nodes. The
bodies are the eager reference. Shapes: B sequences, T tokens, W model width, R lru_width, H heads
of D dims. The last argument of every op is its *site*, the stable name that emitters carry into
their own value names.

Dtypes: `linear` and `embedding` work in their weight's dtype (the activation dtype); the residual
stream, norms, convolution, gates, scan, RoPE angles, softmax and soft cap are float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgexport.griffin.config import RG_LRU_C

_CHUNK = {"cpu": 16, "cuda": 256}  # tokens of a parallel scan; on a CPU, longer ones cost more


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes all h of `h_t = a_t · h_{t-1} + b_t` for a, b [B, T, R] and h0 [B, R], float32.

    It has gradients.
    """
    differentiable = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return _Scan.apply(a, b, h0) if differentiable else chunked_scan(a, b, h0)


class _Scan(torch.autograd.Function):
    """A scan with gradients: these are the same recurrence, from the end backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h = chunked_scan(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`δ_t = g_t + a_{t+1} · δ_{t+1}`; then db = δ, da_t = δ_t · h_{t-1}, dh0 = a_1 · δ_1."""
        a, h, h0 = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        later, grad = (x.flip(1).contiguous() for x in (following, grads[0]))
        delta = chunked_scan(later, grad, torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0.unsqueeze(1), h[:, :-1]], 1)
        return delta * before, delta, a[:, 0] * delta[:, 0]


def chunked_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes `linear_scan` by Hillis-Steele prefix scans of chunks, which follow one another."""
    h = torch.empty_like(b)
    chunk = _CHUNK.get(b.device.type, 256)
    for start in range(0, b.shape[1], chunk):
        tokens = slice(start, start + chunk)
        decay, local = _prefix_scan(a[:, tokens], b[:, tokens])
        h[:, tokens] = torch.addcmul(local, decay, h0.unsqueeze(1))
        h0 = h[:, min(start + chunk, b.shape[1]) - 1]
    return h


def _prefix_scan(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for each token, the product of `a` up to it and the state from a zero start."""
    shift = 1
    while shift < b.shape[1]:
        b = torch.cat([b[:, :shift], torch.addcmul(b[:, shift:], a[:, shift:], b[:, :-shift])], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return a, b


_ATTENTION_ROWS = 512  # queries that attention takes at once, so that its scores stay small
_OPS: dict[str, Callable[..., Any]] = {}
_EAGER: dict[str, Callable[..., Any]] = {}


def compute(site: str, op: str, *arguments: Any) -> Any:
    """Computes an op, which a trace shows as one node."""
    return _OPS[op](*arguments, site)


def compute_eagerly(site: str, op: str, *arguments: Any) -> Any:
    """Computes an op by its eager reference, which has gradients.

    Those of an input are summed for each op first, so that sums have a fixed order.
    """
    inputs = (x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments)
    return _EAGER[op](*inputs, site)


def _op(name: str, fake: Callable[..., Any] | None = None):  # type: ignore[no-untyped-def]  # as torch's
    """Defines an op; `fake` gives its results for a trace, where the reference cannot."""

    def define(body: Callable[..., Any]):  # type: ignore[no-untyped-def]
        op = torch.library.custom_op(f"griffin::{name}", body, mutates_args=())
        op.register_fake(fake or body)
        _OPS[name], _EAGER[name] = op, body
        return op

    return define


@_op("embedding")
def embedding(ids: Tensor, table: Tensor, scale: float, site: str) -> Tensor:
    """Returns rows of `table` [V, W] for `ids` [B, T], times `scale`, float32 [B, T, W]."""
    return F.embedding(ids, table).float() * scale


@_op("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, site: str) -> Tensor:
    """Computes `x · rsqrt(mean(x²) + eps) · (1 + weight)` over the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())


@_op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """Computes `x · weightᵀ + bias` for x [B, T, K] and weight [N, K], in the weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, bias)


@_op("gelu")
def gelu(x: Tensor, site: str) -> Tensor:
    """Computes GELU in its tanh form, in the dtype of `x`."""
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
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, site: str
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of `x` in the state's dtype, so a step equals a prefill.

    x [B, T, R], weight [R, 1, C], bias [R], state [B, C - 1, R] → y [B, T, R] float32, next state.
    """
    window = torch.cat([state, x.to(state.dtype)], dim=1)
    channels_first = window.float().transpose(1, 2)
    y = F.conv1d(channels_first, weight.float(), bias.float(), groups=weight.shape[0])
    return y.transpose(1, 2).contiguous(), window[:, window.shape[1] - state.shape[1] :].clone()


@_op("block_diagonal_linear")
def block_diagonal_linear(x: Tensor, weight: Tensor, bias: Tensor, site: str) -> Tensor:
    blocks = x.float().unflatten(-1, weight.shape[:2])
    y = torch.einsum("bthi,hij->bthj", blocks, weight.float()) + bias.float()
    return y.flatten(-2)


class _FiniteGradient(torch.autograd.Function):
    """Returns the RG-LRU's gate, with the gradient 0 where a is 1: √(1 - a²) has none there."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].nan_to_num(0.0, 0.0, 0.0)


@_op("rg_lru_scan", lambda x, i, r, a, p, h, _: (torch.empty_like(x), torch.empty_like(h)))
def rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    a_param: Tensor,
    position_ids: Tensor,
    state: Tensor,
    site: str,
) -> tuple[Tensor, Tensor]:
    """The RG-LRU (arXiv 2402.19427, eq. 1–4), from its gates' pre-activations on.

    x, input_gate, recurrence_gate [B, T, R], a_param [R], position_ids [B, T], state [B, R] → h [B,
    T, R] and the next state, float32. At position 0 the state is ignored and the input is not
    normalized.
    """
    gate = (
        _FiniteGradient.apply(recurrence_gate) if recurrence_gate.requires_grad else recurrence_gate
    )
    log_a = RG_LRU_C * torch.sigmoid(gate) * F.softplus(a_param.float())
    first = (position_ids == 0).unsqueeze(-1)
    a = torch.where(first, 0.0, torch.exp(log_a))
    # As recurrentgemma computes it. expm1 would be more exact where a is close to 1, but would
    # move the logits by up to 1e-3 from the model as it was trained.
    scale = torch.where(first, 1.0, torch.sqrt(1 - torch.exp(2 * log_a)))
    h = linear_scan(a, x * torch.sigmoid(input_gate) * scale, state)
    return h, h[:, -1].clone()


def rope_frequencies(dims: int, theta: float) -> Tensor:
    """Returns `dims / 2` rotation frequencies, float32, rounded as `recurrentgemma` rounds them."""
    return 1.0 / theta ** (2 * torch.arange(dims // 2) / dims)


@_op("rope")
def rope(
    x: Tensor, position_ids: Tensor, head_dim: int, dims: int, theta: float, site: str
) -> Tensor:
    """Rotates the first `dims` of every head's `head_dim` dims, halves paired.

    x [B, T, H · D], position_ids [B, T] → the same shape and dtype as `x`.
    """
    angles = position_ids[..., None, None] * rope_frequencies(dims, theta).to(x.device)
    cos, sin = angles.cos(), angles.sin()
    heads = x.float().unflatten(-1, (-1, head_dim))
    first, second, rest = heads.split([dims // 2, dims // 2, head_dim - dims], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(rotated, dim=-1).flatten(-2).to(x.dtype)


@_op("local_attention", lambda q, k, v, *past: tuple(map(torch.empty_like, (q, *past[:2]))))
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, position_ids: Tensor, site: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-query attention of each query to itself and the `window` keys before it.

    q [B, T, H · D], k and v [B, T, D], past_k and past_v [B, window, D] → [B, T, H · D] and the
    last `window` keys and values. Scores and softmax are float32.
    """
    window, head_dim = past_k.shape[1:]
    keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
    # Slot j holds position p0 + j - window; those below 0 are the zeros before the first token.
    filled = position_ids[:, :1] + torch.arange(keys.shape[1], device=q.device) >= window
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], _ATTENTION_ROWS):
        rows = min(_ATTENTION_ROWS, q.shape[1] - start)
        slots = slice(start, start + window + rows)
        query = q[:, start : start + rows].unflatten(-1, (-1, head_dim)).float()
        scores = torch.einsum("bthd,bsd->bhts", query, keys[:, slots].float()) * head_dim**-0.5
        slot, row = (torch.arange(n, device=q.device) for n in (window + rows, rows))
        distance = slot - row.unsqueeze(-1)
        seen = (distance >= 0) & (distance <= window) & filled[:, None, slots]
        weights = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
        attended = torch.einsum("bhts,bsd->bthd", weights.to(v.dtype), values[:, slots])
        out[:, start : start + rows] = attended.flatten(-2)
    gone = q.shape[1]
    return out, keys[:, gone:].clone(), values[:, gone:].clone()


def _some_tokens(x: Tensor, *others: object) -> Tensor:
    tokens = torch.library.get_ctx().new_dynamic_size(min=1)
    return x.new_empty((x.shape[0], tokens, x.shape[2]))


@_op("last_tokens", _some_tokens)
def last_tokens(x: Tensor, count: Tensor, site: str) -> Tensor:
    """Returns the last `count` (a scalar tensor) tokens of x [B, T, W], or all if T is less."""
    return x[:, max(0, x.shape[1] - int(count)) :].clone()


@_op("soft_cap")
def soft_cap(x: Tensor, cap: float, site: str) -> Tensor:
    """Computes `cap · tanh(x / cap)` in float32; the identity for a cap of 0."""
    x = x.to(torch.float32, copy=True)
    return torch.tanh(x / cap) * cap if cap else x
