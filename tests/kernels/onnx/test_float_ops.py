"""The ops on float32 on every instruction set, against float64 and DeepMind's layers."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from recurrentgemma.torch import layers

from tests.kernels.onnx import float_oracles as oracles
from tests.kernels.onnx.one_node import Arrays, Case

SIZES = [(1, 1), (1, 3), (5, 1), (5, 3), (1, 127), (2, 130), (1, 513)]
"""Batch, tokens."""
CHANNELS = [1, 7, 64, 250, 600]


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


def scan_case(batch, tokens, heads, block, at, shared=False, decay=(-8.0, -0.5)) -> Case:
    """Gates as far open as those of trained models."""
    rng = np.random.default_rng(tokens)
    inputs = {"x": normal(rng, batch, tokens, heads * block)}
    for gate in ("input", "recurrence"):
        inputs[f"{gate}_weight"] = normal(rng, heads, block, block) / np.float32(block**0.5)
        inputs[f"{gate}_bias"] = normal(rng, heads, block)
    weights = frozenset(inputs) - {"x"} | {"decay"}
    inputs["decay"] = rng.uniform(*decay, heads * block).astype(np.float32)
    inputs |= {"position_ids": at, "state": normal(rng, batch, heads * block)}
    row = (batch, tokens, heads * block)
    outputs = {"h": row, "present": (batch, heads * block)}
    outputs |= {"input_gate": row, "recurrence_gate": row}
    return Case("RgLruScan", inputs, outputs, {}, weights, {"present": "state"} if shared else {})


@pytest.mark.parametrize(("heads", "block"), [(1, 1), (3, 5), (4, 16), (10, 25), (2, 130)])
@pytest.mark.parametrize(("batch", "tokens"), [*SIZES, (3, 64), (5, 40)])
def test_scan(worker, batch, tokens, heads, block, in_place):
    case = scan_case(batch, tokens, heads, block, positions(batch, tokens), in_place)
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()))


@pytest.mark.parametrize(("heads", "block"), [(1, 1), (3, 5), (4, 16), (2, 130)])
@pytest.mark.parametrize(("batch", "tokens"), [*SIZES, (2, 4), (1, 24), (3, 64)])
def test_gates_in_bfloat16_give_the_bits_of_float32(worker, batch, tokens, heads, block):
    case = scan_case(batch, tokens, heads, block, positions(batch, tokens))
    short, wide = in_bfloat16(case)
    expected = worker.run(wide)
    for name, found in worker.run(short).items():
        np.testing.assert_array_equal(found, expected[name])


def in_bfloat16(case: Case) -> tuple[Case, Case]:
    """The case with gates of bfloat16, and with the same numbers in float32."""
    gates = ("input_weight", "recurrence_weight")
    short = {name: case.inputs[name].astype(ml_dtypes.bfloat16) for name in gates}
    wide = {name: array.astype(np.float32) for name, array in short.items()}
    return tuple(replace(case, inputs=case.inputs | matrices) for matrices in (short, wide))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_body_is_the_scan_too(stock, in_place, bfloat16):
    case = scan_case(3, 40, 5, 14, positions(3, 40), in_place)
    case, wide = in_bfloat16(case) if bfloat16 else (case, case)
    assert_close(stock.run(case), oracles.rg_lru_scan(*wide.inputs.values()))


def test_scan_forgets_where_a_position_is_zero(worker, in_place):
    at = positions(3, 70, 5)
    at[0, 0] = at[1, 17] = at[1, 18] = at[1, 58] = at[2, 69] = 0
    case = scan_case(3, 70, 5, 14, at, in_place)
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()))


def test_scan_of_long_memories(worker):
    """Decays as trained models have them, where 1 - a² in float32 is what the model was made of."""
    case = scan_case(2, 300, 4, 16, positions(2, 300, 9), decay=(-0.8, -0.008))
    assert_close(worker.run(case), oracles.rg_lru_scan(*case.inputs.values()), 1e-3)


def test_scan_of_gates_far_open_and_shut(worker):
    case = scan_case(1, 64, 3, 11, positions(1, 64))
    for name in ("input", "recurrence"):
        case.inputs[f"{name}_weight"] *= 60
    case.inputs["recurrence_bias"][0, :2] = -100, 100
    found = worker.run(case)
    assert np.isfinite(found["h"]).all()
    assert_close(found, oracles.rg_lru_scan(*case.inputs.values()), 1e-4)


@pytest.mark.parametrize("tokens", [1, 37])
def test_scan_is_deepmind_s(worker, tokens):
    torch.manual_seed(tokens)
    layer = layers.RGLRU(width=96, num_heads=4)
    case = scan_case(2, tokens, 4, 24, positions(2, tokens))
    with torch.no_grad():
        tensors = (torch.from_numpy(case.inputs[n]) for n in ("x", "position_ids", "state"))
        expected = dict(zip(("h", "present"), layer(*tensors), strict=True))
        decay = -8 * torch.nn.functional.softplus(layer.a_param)
    case.inputs["decay"] = decay.numpy()
    for name, gate in (("input", layer.input_gate), ("recurrence", layer.a_gate)):
        case.inputs[f"{name}_weight"] = gate.w.detach().numpy()
        case.inputs[f"{name}_bias"] = gate.b.detach().numpy()
    assert_close(worker.run(case), {name: y.numpy() for name, y in expected.items()}, 1e-4)


WRONG_SCANS = {
    "weights": ({"recurrence_weight": np.zeros((2, 12, 12), np.float32)}, "weights"),
    "width": ({"x": np.zeros((1, 2, 20), np.float32)}, "x have heads x block channels"),
    "biases": ({"input_bias": np.zeros((4, 5), np.float32)}, "biases"),
    "decay": ({"decay": np.zeros(23, np.float32)}, "decay"),
    "positions": ({"position_ids": np.zeros((1, 3), np.int64)}, "position_ids"),
    "state": ({"state": np.zeros((2, 24), np.float32)}, "state"),
}


@pytest.mark.parametrize("wrong", WRONG_SCANS)
def test_wrong_shapes_of_a_scan_are_refused(worker, wrong):
    inputs, word = WRONG_SCANS[wrong]
    case = scan_case(1, 2, 4, 6, positions(1, 2))
    with pytest.raises(Exception, match=f"RgLruScan: .*{word}"):
        worker.run(replace(case, inputs=case.inputs | inputs))


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


def attention_case(batch, tokens, heads, dim, window, at, shared, rank=4) -> Case:
    """Rings full of numbers, also where no position has been."""
    ring = (batch, 1, window, dim) if rank == 4 else (batch, window, dim)
    rng = np.random.default_rng(tokens)
    inputs = {
        "q": normal(rng, batch, tokens, heads * dim),
        "k": normal(rng, batch, tokens, dim),
        "v": normal(rng, batch, tokens, dim),
        "past_key": normal(rng, *ring),
        "past_value": normal(rng, *ring),
        "position_ids": at,
    }
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


def test_attention_over_rings_of_earlier_files(worker, in_place):
    """They have no axis for the one head."""
    case = attention_case(2, 5, 3, 20, 16, positions(2, 5, 30), in_place, rank=3)
    fed = dict(case.inputs)
    for name in ("past_key", "past_value"):
        fed[name] = fed[name][:, None]
    expected = oracles.local_attention(*fed.values(), 3)
    for name in ("present_key", "present_value"):
        expected[name] = expected[name][:, 0]
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


@pytest.mark.parametrize("tokens", [1, 60])
def test_threads_do_not_change_a_bit(worker, tokens):
    at = positions(1, tokens, 3000)
    cases = [
        attention_case(1, tokens, 4, 32, 1024, at, False),
        scan_case(1, tokens, 10, 30, at),
    ]
    for case in cases:
        one, *others = (worker.run(case, threads=n) for n in (1, 2, 3))
        for name, y in one.items():
            assert all(np.array_equal(y, other[name]) for other in others), (case.op, name)


def one_by_one(worker, case: Case, states: dict[str, str]) -> Arrays:
    """The outputs of a case whose tokens come in steps of their own, results put together."""
    by_token = [name for name in case.inputs if name in {"x", "q", "k", "v", "position_ids"}]
    tokens = case.inputs[by_token[0]].shape[1]
    inputs, found = dict(case.inputs), []
    for i in range(tokens):
        inputs |= {name: np.ascontiguousarray(case.inputs[name][:, [i]]) for name in by_token}
        outputs = {
            name: shape if name in states else (shape[0], 1, *shape[2:])
            for name, shape in case.outputs.items()
        }
        found.append(worker.run(replace(case, inputs=inputs, outputs=outputs)))
        inputs |= {state: found[-1][name] for name, state in states.items()}
    return {
        name: found[-1][name] if name in states else np.concatenate([y[name] for y in found], 1)
        for name in case.outputs
    }


RING = {"present_key": "past_key", "present_value": "past_value"}
SHORT_STEPS = {
    "from_the_first": attention_case(1, 7, 3, 20, 33, positions(1, 7), False),
    "before_the_window_is_full": attention_case(2, 16, 2, 16, 100, positions(2, 16, 79), False),
    "where_the_ring_begins_anew": attention_case(2, 9, 3, 20, 50, positions(2, 9, 494), False),
    "longer_than_the_window": attention_case(1, 11, 2, 8, 3, positions(1, 11, 5), False),
    "many_parts": attention_case(1, 16, 10, 32, 2048, positions(1, 16, 2300), False),
    "more_parts_than_tasks": attention_case(1, 5, 1, 8, 5000, positions(1, 5, 4999), False),
}


@pytest.mark.parametrize("name", SHORT_STEPS)
def test_attention_of_a_short_step_is_that_of_single_tokens(worker, name):
    """To the last bit."""
    case = SHORT_STEPS[name]
    found, expected = worker.run(case), one_by_one(worker, case, RING)
    for output, y in expected.items():
        assert np.array_equal(found[output], y), output


@pytest.mark.parametrize(("heads", "block"), [(3, 5), (2, 130)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (5, 3)])
def test_the_scan_of_a_short_step_is_that_of_single_tokens(worker, batch, tokens, heads, block):
    """To the last bit."""
    case = scan_case(batch, tokens, heads, block, positions(batch, tokens))
    found, expected = worker.run(case), one_by_one(worker, case, {"present": "state"})
    for output, y in expected.items():
        assert np.array_equal(found[output], y), output
