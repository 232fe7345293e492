"""The references against DeepMind's implementation, torch's recurrence, and gradients of ops."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from rgexport.griffin import ops
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.reference import Reference
from rgexport.griffin.scan import linear_scan
from rgexport.griffin.state import POSITION
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config, random_weights, weight_source

LENGTHS = 1, 15, 16, 17, 64, 65, 100, 513
TOKENS = np.arange(11)[None]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_reference_equals_deepmind(name):
    config = ODD_CONFIGS[name]
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 4 * config.window + 5))
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for make, most in ((Reference, 1e-5), (NumpyReference, 2e-5)):
        reference = make(config, weight_source(weights))
        hidden, _ = reference.run(tokens)
        assert np.abs(reference.logits(hidden) - expected).max() <= most * np.abs(expected).max()


@pytest.mark.parametrize("make", [Reference, NumpyReference])
@pytest.mark.parametrize("name", ["wide_lru", "irregular"])
def test_reference_continues_from_a_state(name, make):
    config = ODD_CONFIGS[name]
    reference = make(config, weight_source(random_weights(config)))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 3 * config.window))
    cut = config.window + 7
    whole, after_whole = reference.run(tokens)
    _, before = reference.run(tokens[:, :cut])
    rest, after_rest = reference.run(tokens[:, cut:], before)
    np.testing.assert_allclose(rest, whole[:, cut:], rtol=0, atol=1e-5 * abs(whole).max())
    assert after_rest[POSITION].tolist() == [tokens.shape[1]] * 2
    for state, array in after_whole.items():
        np.testing.assert_allclose(after_rest[state], array, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_cuda_equals_cpu():
    config = ODD_CONFIGS["wide_lru"]
    source = weight_source(random_weights(config))
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (2, 600))
    logits = {}
    for device in ("cpu", "cuda"):
        reference = Reference(config, source, device=device)
        logits[device] = reference.logits(reference.run(tokens)[0])
    assert np.abs(logits["cuda"] - logits["cpu"]).max() <= 1e-4 * np.abs(logits["cpu"]).max()


def test_a_replaced_result_is_what_later_ops_take():
    """Other results of the op are kept, here the state of the convolution."""
    gate, conv = "layers.0.temporal_block.rg_lru.input_gate", "layers.0.temporal_block.conv_1d"
    closed = np.full((1, 11, 48), -np.inf, np.float32)
    gates = []

    def look(site, op, arguments, results):
        if site == "layers.0.temporal_block.rg_lru":
            gates.append(arguments[1])
        return closed if site == gate else 0 * results[0] if site == conv else None

    config = make_config("ra", width=48, heads=4, vocab_size=60, window=8)
    reference = NumpyReference(config, weight_source(random_weights(config)))
    expected = reference.run(TOKENS)[1]
    reference.look = look
    _, state = reference.run(TOKENS)
    assert np.array_equal(gates, [closed])
    assert not state["layers.0.rg_lru"].any() and expected["layers.0.rg_lru"].any()
    assert np.array_equal(state["layers.0.conv1d"], expected["layers.0.conv1d"])


def scan_inputs(tokens: int, channels: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Gives a [2, T, R] from 1e-5 to 0.8 below one, b [2, T, R] and h0 [2, R], float32."""
    generator = torch.Generator().manual_seed(tokens)
    a = 1 - 10 ** torch.empty(2, tokens, channels).uniform_(-5, -0.1, generator=generator)
    b = torch.randn(2, tokens, channels, generator=generator)
    return a, b, torch.randn(2, channels, generator=generator)


def naive(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def assert_exact(result: Tensor, *inputs: Tensor) -> None:
    """The result is that of a loop in float64, up to a share of the largest state."""
    exact = naive(*(tensor.double() for tensor in inputs))
    error = (result.double() - exact).abs().max() / exact.abs().max()
    assert error <= 1e-6 * exact.shape[1] ** 0.5


@needs_cuda
@pytest.mark.parametrize("tokens", LENGTHS)
def test_cuda_scans_equal_a_loop(tokens):
    inputs = scan_inputs(tokens, channels=45)
    assert_exact(linear_scan(*(tensor.cuda() for tensor in inputs)).cpu(), *inputs)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_scan_has_the_states_and_gradients_of_its_steps(tokens):
    inputs = [x.requires_grad_() for x in scan_inputs(tokens)]
    result = linear_scan(*inputs)
    assert_exact(result, *inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((result * weights).sum(), inputs)
    expected = torch.autograd.grad((naive(*exact) * weights.double()).sum(), exact)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("a_param", [-200.0, -18.0, 0.0, 5.0])
def test_the_gate_of_the_recurrence_has_a_finite_gradient(a_param):
    """Where a is 1 in float32 it is 0: its limit, as in float64 for a little less than 1."""

    def gate_gradient(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x, i, r = (torch.randn(1, 5, 3, generator=generator).to(dtype) for _ in range(3))
        r.requires_grad_()
        a = torch.full((3,), a_param, dtype=dtype)
        positions = torch.arange(5)[None]
        ours = partial(ops.compute_eagerly, "site", "rg_lru_scan")
        body = ours if dtype == torch.float32 else exact_rg_lru
        h = body(x, i, r, a, positions, torch.zeros(1, 3, dtype=dtype))[0]
        return torch.autograd.grad(h.sum(), r)[0]

    gradient, expected = gate_gradient(torch.float32), gate_gradient(torch.float64)
    assert gradient.isfinite().all()
    assert (gradient - expected).abs().max() <= 1e-4 + 1e-3 * expected.abs().max()


def exact_rg_lru(x, i, r, a_param, positions, state):
    """The paper's equations with `expm1`, which is exact for a near 1."""
    log_a = -8 * torch.sigmoid(r) * torch.log1p(torch.exp(a_param))
    first = (positions == 0).unsqueeze(-1)
    a = torch.where(first, 0.0, torch.exp(log_a))
    scale = torch.where(first, 1.0, torch.sqrt(-torch.expm1(2 * log_a)))
    h = naive(a, x * torch.sigmoid(i) * scale, state)
    return h, h[:, -1]
