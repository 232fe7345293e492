"""Computes linear recurrences over many tokens at once, in torch.

The RG-LRU is such a recurrence (arXiv 2402.19427, section 2.4, eq. 4); DeepMind's code computes it
token by token (`rnn_scan` in recurrentgemma/torch/layers.py).
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_TOKENS_ON_CPU = 16
"""Tokens of one parallel scan on a CPU, where a longer scan costs more than it saves."""
_CHUNK_TOKENS = 256
"""Tokens of one parallel scan on any other device."""


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Returns all states of `h_t = a_t · h_{t-1} + b_t`, with gradients for `a` and `b`.

    Args:
        a: the decay of the state at each token, float32 [B, T, R].
        b: the input at each token, float32 [B, T, R].
        h0: the state before the first token, float32 [B, R].

    Returns:
        The state after each token, float32 [B, T, R].
    """
    needs_gradient = a.requires_grad or b.requires_grad
    if torch.is_grad_enabled() and needs_gradient:
        states: Tensor = _Scan.apply(a, b, h0)
        return states
    return chunked_scan(a, b, h0)


class _Scan(torch.autograd.Function):
    """A scan with gradients: they follow the same recurrence, from the last token backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        """Computes the states, and keeps what their gradients need."""
        h = chunked_scan(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of a, b and h0 for `g`, the gradient of the states.

        `δ_t = g_t + a_{t+1} · δ_{t+1}`; then db = δ, da_t = δ_t · h_{t-1} and dh0 = a_1 · δ_1.
        """
        a, h, h0 = ctx.saved_tensors
        after_last = torch.zeros_like(a[:, :1])
        next_a = torch.cat([a[:, 1:], after_last], 1)

        # Flipped, the recurrence of δ is a scan from the last token on.
        flipped_a = next_a.flip(1).contiguous()
        flipped_gradient = gradients[0].flip(1).contiguous()
        flipped_delta = chunked_scan(flipped_a, flipped_gradient, torch.zeros_like(h0))
        delta = flipped_delta.flip(1)

        previous_h = torch.cat([h0.unsqueeze(1), h[:, :-1]], 1)
        return delta * previous_h, delta, a[:, 0] * delta[:, 0]


def chunked_scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes `linear_scan` without gradients, in chunks of tokens that follow one another.

    Within a chunk, a prefix scan starts from a zero state. The state before the chunk is added
    after its decay.
    """
    length = b.shape[1]
    chunk = _chunk_tokens(b.device)
    h = torch.empty_like(b)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        decay, local_h = _prefix_scan(a[:, start:stop], b[:, start:stop])
        h[:, start:stop] = torch.addcmul(local_h, decay, h0.unsqueeze(1))
        h0 = h[:, stop - 1]
    return h


def _chunk_tokens(device: torch.device) -> int:
    if device.type == "cpu":
        return _CHUNK_TOKENS_ON_CPU
    return _CHUNK_TOKENS


def _prefix_scan(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for each token, the product of `a` up to it and its state from a zero start.

    Hillis and Steele's scan ("Data parallel algorithms", 1986): each round joins every token's
    range with the range before it, so that ranges double, in log2(T) rounds.
    """
    shift = 1
    while shift < b.shape[1]:
        joined_b = torch.addcmul(b[:, shift:], a[:, shift:], b[:, :-shift])
        joined_a = a[:, shift:] * a[:, :-shift]
        b = torch.cat([b[:, :shift], joined_b], 1)
        a = torch.cat([a[:, :shift], joined_a], 1)
        shift *= 2
    return a, b
