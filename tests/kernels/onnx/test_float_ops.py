"""The ops on float32 on every instruction set, against float64 and DeepMind's layers."""

import numpy as np
import pytest
import torch
from recurrentgemma.torch import layers

from tests.kernels.onnx import float_oracles as oracles
from tests.kernels.onnx.one_node import Arrays, Case

SIZES = [(1, 1), (1, 3), (5, 1), (5, 3), (1, 127), (2, 130), (1, 513)]
"""Batch, tokens."""
CHANNELS = [1, 7, 64, 250]


@pytest.fixture(params=[False, True], ids=["apart", "in_place"])
def in_place(request) -> bool:
    """Whether states come and go in one buffer."""
    return request.param


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def positions(batch: int, tokens: int, start: int = 0) -> np.ndarray:
    """Each sequence of a batch somewhere else."""
    return start + np.arange(tokens)[None] + 3 * np.arange(batch)[:, None]


def assert_close(found: Arrays, expected: Arrays, tolerance: float = 1e-5) -> None:
    for name, y in expected.items():
        assert found[name].shape == y.shape
        far = np.abs(found[name] - y).max()
        assert far <= tolerance * np.abs(y).max(), f"{name}: {far} of {np.abs(y).max()}"


def scan_case(batch, tokens, channels, at, shared, decay=(-8.0, -0.5)) -> Case:
    rng = np.random.default_rng(tokens)
    inputs = {name: normal(rng, batch, tokens, channels) for name in ("x", "input_gate", "gate")}
    inputs["decay"] = rng.uniform(*decay, channels).astype(np.float32)
    inputs["position_ids"] = at
    inputs["state"] = normal(rng, batch, channels)
    outputs = {"h": (batch, tokens, channels), "present": (batch, channels)}
    weights = frozenset({"decay"})
    return Case("RgLruScan", inputs, outputs, {}, weights, {"present": "state"} if shared else {})


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_scan(worker, batch, tokens, channels, in_place):
    case = scan_case(batch, tokens, channels, positions(batch, tokens), in_place)
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()))


def test_the_body_is_the_scan_too(stock, in_place):
    case = scan_case(3, 40, 70, positions(3, 40), in_place)
    assert_close(stock.run(case), oracles.rg_lru_scan(*case.inputs.values()))


def test_scan_forgets_where_a_position_is_zero(worker, in_place):
    at = positions(3, 40, 5)
    at[0, 0] = at[1, 17] = at[1, 18] = at[2, 39] = 0
    case = scan_case(3, 40, 70, at, in_place)
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()))


def test_scan_of_long_memories(worker):
    """Decays as trained models have them, where 1 - a² in float32 is what the model was made of."""
    case = scan_case(2, 300, 64, positions(2, 300, 9), False, decay=(-0.8, -0.008))
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()), 1e-3)


def test_scan_of_gates_far_open_and_shut(worker):
    case = scan_case(1, 64, 33, positions(1, 64), False)
    for name in ("input_gate", "gate"):
        case.inputs[name] *= 60
    case.inputs["gate"][0, :, 0] = -100
    case.inputs["gate"][0, :, 1] = 100
    found = worker.run(case)
    assert np.isfinite(found["h"]).all()
    assert_close(found, oracles.rg_lru_scan(*case.inputs.values()), 1e-4)


@pytest.mark.parametrize("tokens", [1, 37])
def test_gates_and_scan_are_deepmind_s(worker, tokens):
    torch.manual_seed(tokens)
    layer = layers.RGLRU(width=96, num_heads=4)
    rng = np.random.default_rng(tokens)
    x, state, at = normal(rng, 2, tokens, 96), normal(rng, 2, 96), positions(2, tokens)
    with torch.no_grad():
        tensors = (torch.from_numpy(a) for a in (x, at, state))
        expected = dict(zip(("h", "present"), layer(*tensors), strict=True))
        decay = -8 * torch.nn.functional.softplus(layer.a_param)
    gates = {}
    for name, gate in (("input_gate", layer.input_gate), ("gate", layer.a_gate)):
        weight, bias = (p.detach().numpy() for p in (gate.w, gate.b))
        gates[name] = worker.run(block_case(x, weight, bias))["y"]
    inputs = {"x": x, **gates, "decay": decay.numpy(), "position_ids": at, "state": state}
    outputs = {name: tuple(y.shape) for name, y in expected.items()}
    found = worker.run(Case("RgLruScan", inputs, outputs))
    assert_close(found, {name: y.numpy() for name, y in expected.items()}, 1e-4)


def conv_case(batch: int, tokens: int, channels: int, taps: int, shared: bool) -> Case:
    rng = np.random.default_rng(tokens)
    inputs = {
        "x": normal(rng, batch, tokens, channels),
        "weight": normal(rng, channels, 1, taps),
        "bias": normal(rng, channels),
        "state": normal(rng, batch, taps - 1, channels),
    }
    outputs = {"y": (batch, tokens, channels), "present": (batch, taps - 1, channels)}
    shares = {"present": "state"} if shared else {}
    return Case("CausalConv1d", inputs, outputs, {}, frozenset({"weight", "bias"}), shares)


@pytest.mark.parametrize("taps", [2, 4, 5])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("batch", "tokens"), [*SIZES, (1, 2), (2, 4)])
def test_convolution(worker, batch, tokens, channels, taps, in_place):
    case = conv_case(batch, tokens, channels, taps, in_place)
    assert_close(worker.run(case), oracles.causal_conv1d(*case.inputs.values()))


def test_convolution_is_deepmind_s(worker):
    layer = layers.Conv1D(width=96, temporal_width=4)
    case = conv_case(2, 29, 96, 4, False)
    case.inputs["state"][:] = 0
    weight, bias = layer.w.detach().numpy(), layer.b.detach().numpy()
    case.inputs["weight"] = np.ascontiguousarray(weight.T[:, None])
    case.inputs["bias"] = bias
    with torch.no_grad():
        x, at = torch.from_numpy(case.inputs["x"]), torch.arange(29)[None].expand(2, -1)
        expected, cache = layer(x, at)
    found = worker.run(case)
    assert_close(found, {"y": expected.numpy(), "present": cache.numpy()})


def block_case(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Case:
    inputs = {"x": x, "weight": weight, "bias": bias}
    return Case("BlockDiagonalLinear", inputs, {"y": x.shape}, {}, frozenset({"weight", "bias"}))


@pytest.mark.parametrize(("heads", "block"), [(1, 1), (3, 5), (4, 16), (10, 25), (2, 130)])
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_block_diagonal(worker, batch, tokens, heads, block):
    rng = np.random.default_rng(block)
    x = normal(rng, batch, tokens, heads * block)
    case = block_case(x, normal(rng, heads, block, block), normal(rng, heads, block))
    assert_close(worker.run(case), oracles.block_diagonal_linear(*case.inputs.values()))


def attention_case(batch, tokens, heads, dim, window, at, shared) -> Case:
    """Rings full of numbers, also where no position has been."""
    rng = np.random.default_rng(tokens)
    inputs = {
        "q": normal(rng, batch, tokens, heads * dim),
        "k": normal(rng, batch, tokens, dim),
        "v": normal(rng, batch, tokens, dim),
        "past_key": normal(rng, batch, window, dim),
        "past_value": normal(rng, batch, window, dim),
        "position_ids": at,
    }
    ring = (batch, window, dim)
    outputs = {"y": (batch, tokens, heads * dim), "present_key": ring, "present_value": ring}
    shares = {"present_key": "past_key", "present_value": "past_value"} if shared else {}
    return Case("LocalAttention", inputs, outputs, {"heads": heads}, frozenset(), shares)


@pytest.mark.parametrize("start", [0, 5, 16, 1000])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 3), (2, 16), (1, 40), (2, 127)])
def test_attention(worker, batch, tokens, window, start, in_place):
    at = positions(batch, tokens, start)
    for heads, dim in ((1, 8), (3, 20)):
        case = attention_case(batch, tokens, heads, dim, window, at, in_place)
        expected = oracles.local_attention(*case.inputs.values(), heads)
        assert_close(worker.run(case), expected)


def test_attention_of_large_scores(worker):
    case = attention_case(1, 9, 2, 16, 8, positions(1, 9, 30), False)
    case.inputs["q"] *= 100
    assert_close(worker.run(case), oracles.local_attention(*case.inputs.values(), 2), 1e-4)


def test_attention_of_513_tokens(worker, in_place):
    case = attention_case(1, 513, 2, 64, 100, positions(1, 513, 77), in_place)
    assert_close(worker.run(case), oracles.local_attention(*case.inputs.values(), 2))


def test_attention_at_full_width(worker):
    """As in a 2B: 10 heads of 256, and a ring of 2048 that is half full."""
    case = attention_case(1, 2, 10, 256, 2048, positions(1, 2, 1030), True)
    assert_close(worker.run(case), oracles.local_attention(*case.inputs.values(), 10))


SHAPES = [(1,), (7,), (3, 64), (5, 3, 250), (1, 127, 320), (2, 2, 5, 33), (1, 3, 7680)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_mul(worker, shape):
    rng = np.random.default_rng(1)
    inputs = {"gate": 4 * normal(rng, *shape), "up": normal(rng, *shape)}
    found = worker.run(Case("GeluMul", inputs, {"y": shape}))
    assert_close(found, oracles.gelu_mul(*inputs.values()))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(worker, shape):
    rng = np.random.default_rng(2)
    inputs = {"x": 10 * normal(rng, *shape), "weight": normal(rng, shape[-1])}
    found = worker.run(Case("RmsNorm", inputs, {"y": shape}, {"eps": 0.25}))
    assert_close(found, oracles.rms_norm(*inputs.values(), 0.25))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(worker, shape):
    rng = np.random.default_rng(2)
    inputs = {"x": normal(rng, *shape), "residual": 9 * normal(rng, *shape)}
    inputs["weight"] = normal(rng, shape[-1])
    found = worker.run(Case("AddRmsNorm", inputs, {"sum": shape, "y": shape}, {"eps": 0.25}))
    total = inputs["x"] + inputs["residual"]
    assert (found["sum"] == total).all()
    assert_close(found, oracles.rms_norm(total, inputs["weight"], 0.25))


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_cap(worker, shape):
    inputs = {"x": 50 * normal(np.random.default_rng(3), *shape)}
    found = worker.run(Case("SoftCap", inputs, {"y": shape}, {"cap": 30.0}))
    assert_close(found, oracles.soft_cap(inputs["x"], 30))


def test_numbers_far_away_stay_numbers(worker):
    x = np.float32([-3e38, -1e20, -90, -1e-30, 0, 1e-30, 90, 1e20])[None]
    small = np.float32([1, 1, 1, 1, 1, 1, 1, 1])[None] * np.float32(1e-3)
    gelu = worker.run(Case("GeluMul", {"gate": x, "up": small}, {"y": x.shape}))["y"]
    assert (gelu[0, :3] == 0).all() and np.allclose(gelu[0, 6:], x[0, 6:] * small[0, 6:])
    cap = worker.run(Case("SoftCap", {"x": x}, {"y": x.shape}, {"cap": 30.0}))["y"]
    assert (cap[0, :2] == -30).all() and cap[0, 7] == 30 and cap[0, 4] == 0


@pytest.mark.parametrize("tokens", [1, 60])
def test_threads_do_not_change_a_bit(worker, tokens):
    at = positions(1, tokens, 3000)
    x = normal(np.random.default_rng(tokens), 1, tokens, 300)
    cases = [
        attention_case(1, tokens, 4, 32, 1024, at, False),
        scan_case(1, tokens, 600, at, False),
        block_case(x, normal(np.random.default_rng(0), 10, 30, 30), x[0, 0].reshape(10, 30)),
    ]
    for case in cases:
        one, *others = (worker.run(case, threads=n) for n in (1, 2, 3))
        for name, y in one.items():
            assert all(np.array_equal(y, other[name]) for other in others), (case.op, name)
