"""The recurrence in float64, one token after another, and inputs for it."""

import torch
from torch import Tensor

LENGTHS = 1, 15, 16, 17, 64, 65, 100, 513


def scan_inputs(tokens: int, channels: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Gives a [2, T, R] from 1e-5 to 0.8 below one, b [2, T, R] and h0 [2, R], float32."""
    generator = torch.Generator().manual_seed(tokens)
    a = 1 - 10 ** torch.empty(2, tokens, channels).uniform_(-5, -0.1, generator=generator)
    b = torch.randn(2, tokens, channels, generator=generator)
    return a, b, torch.randn(2, channels, generator=generator)


def scan_error(found: Tensor, a: Tensor, b: Tensor, h: Tensor) -> float:
    """The largest error, as a share of the largest state."""
    expected, carried = [], h.double()
    for t in range(a.shape[1]):
        carried = a[:, t].double() * carried + b[:, t].double()
        expected.append(carried)
    exact = torch.stack(expected, 1)
    return float((found.double() - exact).abs().max() / exact.abs().max())
