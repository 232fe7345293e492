"""Computes the linear recurrence `h_t = a_t · h_{t-1} + b_t`, fast on CPU and on CUDA."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rgexport.progress import detail

_CHUNK = {"cpu": 16, "cuda": 256}
"""Tokens in one parallel scan; on a CPU, longer chunks cost more than they gain."""


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes all h of `h_t = a_t · h_{t-1} + b_t` for a, b [B, T, R] and h0 [B, R], float32.

    On CUDA it is one Triton kernel, if Triton is available. It has gradients.
    """
    differentiable = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return _Scan.apply(a, b, h0) if differentiable else _scan(a, b, h0)


class _Scan(torch.autograd.Function):
    """A scan with gradients: these are the same recurrence, from the end backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h = _scan(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`δ_t = g_t + a_{t+1} · δ_{t+1}`; then db = δ, da_t = δ_t · h_{t-1}, dh0 = a_1 · δ_1."""
        a, h, h0 = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        later, grad = (x.flip(1).contiguous() for x in (following, grads[0]))
        delta = _scan(later, grad, torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0.unsqueeze(1), h[:, :-1]], 1)
        return delta * before, delta, a[:, 0] * delta[:, 0]


def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    if b.is_cuda and (kernel := _triton_scan()):
        return kernel(a, b, h0)
    return chunked_scan(a, b, h0)


@cache
def _triton_scan() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Returns the Triton kernel if it runs on this machine: Triton needs a C compiler."""
    try:
        from rgexport.griffin.triton_scan import scan

        one = torch.ones(1, 1, 1, device="cuda")
        scan(one, one, one[0])
    except Exception as error:  # the possible errors have no common base class
        detail(f"the scan runs without Triton ({type(error).__name__}: {error})")
        return None
    return scan


def chunked_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes `linear_scan` in torch operations.

    Within a chunk of tokens it is a Hillis-Steele prefix scan of log2(chunk) elementwise passes;
    chunks follow one another, so that memory stays a small multiple of the input.
    """
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
