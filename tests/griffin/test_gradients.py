"""Gradients of single ops; `tests/compress` compares those of whole models with DeepMind's."""

import pytest
import torch
from torch import Tensor

from rgexport.griffin import gradients, ops
from rgexport.griffin.scan import linear_scan
from tests.griffin.scans import LENGTHS, scan_inputs


def naive(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_scan_has_the_gradients_of_its_steps(tokens: int) -> None:
    inputs = [x.requires_grad_() for x in scan_inputs(tokens)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((linear_scan(*inputs) * weights).sum(), inputs)
    expected = torch.autograd.grad((naive(*exact) * weights.double()).sum(), exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_op_of_the_set_has_gradients() -> None:
    assert gradients and len(ops.EAGER) == 13
    for op in ops.EAGER:
        assert op._backward_fn is not None, op


@pytest.mark.parametrize("a_param", [-200.0, -18.0, 0.0, 5.0])
def test_the_gate_of_the_recurrence_has_a_finite_gradient(a_param: float) -> None:
    """Where a is 1 in float32 it is 0: its limit, as in float64 for a little less than 1."""

    def gate_gradient(dtype: torch.dtype, parameter: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x, i, r = (torch.randn(1, 5, 3, generator=generator).to(dtype) for _ in range(3))
        r.requires_grad_()
        a = torch.full((3,), parameter, dtype=dtype)
        positions = torch.arange(5)[None]
        body = ops.rg_lru_scan if dtype == torch.float32 else exact_rg_lru
        h = body(x, i, r, a, positions, torch.zeros(1, 3, dtype=dtype), "site")[0]
        return torch.autograd.grad(h.sum(), r)[0]

    found = gate_gradient(torch.float32, a_param)
    expected = gate_gradient(torch.float64, a_param)
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 1e-4 + 1e-3 * expected.abs().max()


def exact_rg_lru(
    x: Tensor, i: Tensor, r: Tensor, a_param: Tensor, positions: Tensor, state: Tensor, site: str
) -> tuple[Tensor, Tensor]:
    """The paper's equations with `expm1`, which is exact for a near 1."""
    log_a = -8 * torch.sigmoid(r) * torch.log1p(torch.exp(a_param))
    first = (positions == 0).unsqueeze(-1)
    a = torch.where(first, 0.0, torch.exp(log_a))
    scale = torch.where(first, 1.0, torch.sqrt(-torch.expm1(2 * log_a)))
    h = naive(a, x * torch.sigmoid(i) * scale, state)
    return h, h[:, -1]
