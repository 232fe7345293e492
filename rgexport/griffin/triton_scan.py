"""The linear recurrence as a Triton kernel, for GPUs. Needs the package `triton`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _CHANNELS = 64, 32  # the size of a tile; with 2,560 channels, 80 are computed in parallel


def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Computes all h of `h_t = a_t · h_{t-1} + b_t` for a, b [B, T, R] and h0 [B, R], float32."""
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h = torch.empty_like(b)
    batch, tokens, channels = b.shape
    grid = batch, triton.cdiv(channels, _CHANNELS)
    with torch.cuda.device_of(b):
        _scan[grid](a, b, h0, h, tokens, channels, TOKENS=_TOKENS, CHANNELS=_CHANNELS)
    return h


@triton.jit
def _then(a, b, next_a, next_b):  # type: ignore[no-untyped-def]  # Triton has types of its own
    """Composes `h → a · h + b` with the next step of the same form."""
    return a * next_a, b * next_a + next_b


@triton.jit
def _scan(a, b, h0, h, tokens, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHANNELS channels of one sequence, in tiles of TOKENS; after the end, a is 1 and b is 0."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_range = channel < channels
    row = tl.arange(0, TOKENS)
    carried = tl.load(h0 + sequence * channels + channel, mask=in_range, other=0.0)
    for start in range(0, tokens, TOKENS):
        time = start + row
        mask = (time < tokens)[:, None] & in_range[None, :]
        offsets = (sequence * tokens + time)[:, None] * channels + channel[None, :]
        tile_a = tl.load(a + offsets, mask=mask, other=1.0)
        tile_b = tl.load(b + offsets, mask=mask, other=0.0)
        decay, local = tl.associative_scan((tile_a, tile_b), 0, _then)
        states = local + decay * carried[None, :]
        tl.store(h + offsets, states, mask=mask)
        carried = tl.sum(tl.where((row == TOKENS - 1)[:, None], states, 0.0), axis=0)
