"""The ops on float32 on every instruction set, against float64, token by token."""

from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.onnx.one_node import Arrays, Case

SIZES = [(1, 1), (1, 3), (5, 1), (2, 4), (5, 3), (1, 24), (3, 64), (1, 127), (2, 130), (1, 513)]
"""Batch, tokens."""
STATES = {
    "RgLruScan": {"present": "state"},
    "CausalConv1d": {"present": "state"},
    "LocalAttention": {"present_key": "past_key", "present_value": "past_value"},
}
each_place = pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in_place"])
"""Whether states come and go in one buffer."""


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def positions(batch: int, tokens: int, start: int = 0) -> np.ndarray:
    """Each sequence of a batch somewhere else."""
    return start + np.arange(tokens)[None] + 3 * np.arange(batch)[:, None]


def shared(case: Case, in_place: bool = True) -> Case:
    return replace(case, in_place=STATES[case.op] if in_place else {})


def assert_close(results: Arrays, expected: Arrays, tolerance: float = 1e-5) -> None:
    for name, y in expected.items():
        assert results[name].shape == y.shape
        far = np.abs(results[name] - y).max()
        assert far <= tolerance * np.abs(y).max(), f"{name}: {far} of {np.abs(y).max()}"


def assert_same(results: Arrays, expected: Arrays) -> None:
    for name, y in expected.items():
        assert np.array_equal(results[name], y), name


def expected_scan(
    x, input_weight, input_bias, recurrence_weight, recurrence_bias, decay, position_ids, state
) -> Arrays:
    """The RG-LRU of arXiv 2402.19427, eq. 1–4; decay = -8 softplus(a)."""
    input_gate = _block_diagonal_linear(x, input_weight, input_bias)
    recurrence_gate = _block_diagonal_linear(x, recurrence_weight, recurrence_bias)
    log_a = decay.astype(np.float64) * _sigmoid(recurrence_gate)
    first = (position_ids == 0)[..., None]
    a = np.where(first, 0, np.exp(log_a))
    scale = np.where(first, 1, np.sqrt(-np.expm1(2 * log_a)))
    b = x * _sigmoid(input_gate) * scale
    h, steps = state.astype(np.float64), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + b[:, t]
        steps.append(h)
    gates = {"input_gate": input_gate, "recurrence_gate": recurrence_gate}
    return {"h": np.stack(steps, 1), "present": h} | gates


def _block_diagonal_linear(x, weight, bias) -> np.ndarray:
    """One matrix [in, out] per block of channels."""
    heads, block = bias.shape
    blocks = x.astype(np.float64).reshape(*x.shape[:2], heads, block)
    y = np.stack([blocks[:, :, h] @ weight[h] + bias[h] for h in range(heads)], 2)
    return y.reshape(x.shape)


def expected_attention(q, k, v, past_key, past_value, position_ids, heads) -> Arrays:
    """Every query sees its own key and those of the `window` positions before.

    The ring has the key of position p in slot p modulo window; other slots are undefined.
    """
    (batch, tokens, dim), window = k.shape, past_key.shape[2]
    y = np.zeros((batch, tokens, heads * dim))
    present = {"present_key": past_key.copy(), "present_value": past_value.copy()}
    for row in range(batch):
        start = int(position_ids[row, 0])
        keys, values = {}, {}
        for p in range(max(0, start - window), start):
            keys[p], values[p] = past_key[row, 0, p % window], past_value[row, 0, p % window]
        for t in range(tokens):
            p = start + t
            keys[p], values[p] = k[row, t], v[row, t]
            seen = range(max(0, p - window), p + 1)
            key_rows = np.array([keys[s] for s in seen], np.float64)
            value_rows = np.array([values[s] for s in seen], np.float64)
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = key_rows @ q[row, t, part].astype(np.float64) / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                y[row, t, part] = weights @ value_rows / weights.sum()
        for p in range(start + max(0, tokens - window), start + tokens):
            present["present_key"][row, 0, p % window] = keys[p]
            present["present_value"][row, 0, p % window] = values[p]
    return {"y": y, **present}


def expected_norm(x, weight, eps) -> Arrays:
    """Over the last axis; a weight of 0 keeps the size."""
    x = x.astype(np.float64)
    return {"y": x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + weight)}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def scan_case(batch, tokens, heads, block, at, decay=(-8.0, -0.5)) -> Case:
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
    return Case("RgLruScan", inputs, outputs, {}, weights)


@each_place
@pytest.mark.parametrize(("heads", "block"), [(1, 1), (3, 5), (4, 16), (10, 25), (2, 130)])
@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_scan(worker, batch, tokens, heads, block, in_place):
    """In bfloat16, gates give the bits of the same numbers in float32."""
    case = shared(scan_case(batch, tokens, heads, block, positions(batch, tokens)), in_place)
    assert_close(worker.run(case), expected_scan(*case.inputs.values()))
    gates = ("input_weight", "recurrence_weight")
    short = {name: case.inputs[name].astype(ml_dtypes.bfloat16) for name in gates}
    wide = {name: array.astype(np.float32) for name, array in short.items()}
    results = [worker.run(replace(case, inputs=case.inputs | both)) for both in (short, wide)]
    assert_same(*results)


@each_place
def test_scans_of_new_texts_of_long_memories_and_of_saturated_gates(worker, in_place):
    at = positions(3, 70, 5)
    at[0, 0] = at[1, 17] = at[1, 18] = at[1, 58] = at[2, 69] = 0  # the state is forgotten
    case = shared(scan_case(3, 70, 5, 14, at), in_place)
    assert_close(worker.run(case), expected_scan(*case.inputs.values()))
    # Decays as trained models have them, where 1 - a² in float32 is what the model was made of.
    case = scan_case(2, 300, 4, 16, positions(2, 300, 9), decay=(-0.8, -0.008))
    assert_close(worker.run(case), expected_scan(*case.inputs.values()), 1e-3)
    case = scan_case(1, 64, 3, 11, positions(1, 64))
    for name in ("input_weight", "recurrence_weight"):
        case.inputs[name] *= 60
    case.inputs["recurrence_bias"][0, :2] = -100, 100
    assert_close(worker.run(case), expected_scan(*case.inputs.values()), 1e-4)


def conv_case(batch: int, tokens: int, channels: int, taps: int) -> Case:
    rng = np.random.default_rng(tokens)
    inputs = {
        "x": normal(rng, batch, tokens, channels),
        "weight": normal(rng, channels, 1, taps),
        "bias": normal(rng, channels),
        "state": normal(rng, batch, taps - 1, channels),
    }
    outputs = {"y": (batch, tokens, channels), "present": (batch, taps - 1, channels)}
    return Case("CausalConv1d", inputs, outputs, {}, frozenset({"weight", "bias"}))


@each_place
@pytest.mark.parametrize("taps", [2, 4, 5])
@pytest.mark.parametrize("channels", [1, 7, 64, 250, 600])
@pytest.mark.parametrize(("batch", "tokens"), [*SIZES, (1, 2)])
def test_convolution(worker, batch, tokens, channels, taps, in_place):
    case = shared(conv_case(batch, tokens, channels, taps), in_place)
    x, weight, bias, state = case.inputs.values()
    window = np.concatenate([state, x], 1).astype(np.float64)
    y = np.zeros(x.shape) + bias
    for t, tap in product(range(tokens), range(taps)):  # the last tap meets the current token
        y[:, t] += window[:, t + tap] * weight[:, 0, tap]
    assert_close(worker.run(case), {"y": y, "present": window[:, tokens:]})


def attention_case(batch, tokens, heads, dim, window, start) -> Case:
    """Rings full of numbers, also where no position has been."""
    ring = (batch, 1, window, dim)
    rng = np.random.default_rng(tokens)
    shapes = {"q": (batch, tokens, heads * dim), **dict.fromkeys("kv", (batch, tokens, dim))}
    shapes |= {"past_key": ring, "past_value": ring}
    inputs = {name: normal(rng, *shape) for name, shape in shapes.items()}
    inputs["position_ids"] = positions(batch, tokens, start)
    outputs = {"y": (batch, tokens, heads * dim), "present_key": ring, "present_value": ring}
    return Case("LocalAttention", inputs, outputs, {"heads": heads})


@each_place
@pytest.mark.parametrize("start", [0, 5, 16, 1000])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 3), (2, 16), (1, 40), (2, 127)])
def test_attention(worker, batch, tokens, window, start, in_place):
    for heads, dim in ((1, 8), (3, 20)):
        case = shared(attention_case(batch, tokens, heads, dim, window, start), in_place)
        expected = expected_attention(*case.inputs.values(), heads)
        assert_close(worker.run(case), expected)


@pytest.mark.parametrize("sizes", [(1, 513, 2, 64, 100, 77), (1, 2, 10, 256, 2048, 1030)], ids=str)
def test_attention_of_large_sizes_and_scores(worker, sizes):
    """The last one is as in a 2B."""
    case = shared(attention_case(*sizes))
    assert_close(worker.run(case), expected_attention(*case.inputs.values(), sizes[2]))
    case.inputs["q"] *= 100
    assert_close(worker.run(case), expected_attention(*case.inputs.values(), sizes[2]), 1e-4)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3, 250), (1, 127, 320), (2, 5, 33), (3, 7680)])
def test_pointwise(worker, shape):
    rng, eps = np.random.default_rng(1), {"eps": 0.25}
    x, other, weight = normal(rng, *shape), normal(rng, *shape), normal(rng, shape[-1])
    results = worker.run(Case("GeluMul", {"gate": 4 * x, "up": other}, {"y": shape}))
    gate = 4 * x.astype(np.float64)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    assert_close(results, {"y": gelu * other})
    results = worker.run(Case("SoftCap", {"x": 50 * x}, {"y": shape}, {"cap": 30.0}))
    assert_close(results, {"y": 30 * np.tanh(50 * x.astype(np.float64) / 30)})
    results = worker.run(Case("RmsNorm", {"x": 10 * x, "weight": weight}, {"y": shape}, eps))
    assert_close(results, expected_norm(10 * x, weight, 0.25))
    inputs, total = {"x": other, "residual": 9 * x, "weight": weight}, other + 9 * x
    results = worker.run(Case("AddRmsNorm", inputs, {"sum": shape, "y": shape}, eps))
    assert_close(results, expected_norm(total, weight, 0.25))
    assert np.array_equal(results["sum"], total)


@pytest.mark.parametrize("tokens", [1, 60])
def test_threads_do_not_change_a_bit(worker, tokens):
    scan = scan_case(1, tokens, 10, 30, positions(1, tokens, 3000))
    for case in (attention_case(1, tokens, 4, 32, 1024, 3000), scan):
        for threads in (2, 3):
            assert_same(worker.run(case, threads=threads), worker.run(case, threads=1))


def one_by_one(worker, case: Case) -> Arrays:
    """The outputs of a case whose tokens come in steps of their own, results put together."""
    states = STATES[case.op]
    by_token = {"x", "q", "k", "v", "position_ids"} & set(case.inputs)
    shapes = {n: s if n in states else (s[0], 1, *s[2:]) for n, s in case.outputs.items()}
    inputs, steps = dict(case.inputs), []
    for i in range(case.inputs["position_ids"].shape[1]):
        inputs |= {name: np.ascontiguousarray(case.inputs[name][:, [i]]) for name in by_token}
        steps.append(worker.run(replace(case, inputs=inputs, outputs=shapes)))
        inputs |= {state: steps[-1][name] for name, state in states.items()}
    whole = {name: np.concatenate([step[name] for step in steps], 1) for name in shapes}
    return whole | {name: steps[-1][name] for name in states}


SHORT_STEPS = {
    "from_the_first": attention_case(1, 7, 3, 20, 33, 0),
    "before_the_window_is_full": attention_case(2, 16, 2, 16, 100, 79),
    "where_the_ring_begins_anew": attention_case(2, 9, 3, 20, 50, 494),
    "longer_than_the_window": attention_case(1, 11, 2, 8, 3, 5),
    "many_parts": attention_case(1, 16, 10, 32, 2048, 2300),
    "more_parts_than_tasks": attention_case(1, 5, 1, 8, 5000, 4999),
    "scan": scan_case(1, 16, 2, 130, positions(1, 16)),
    "scan_of_odd_size": scan_case(5, 3, 3, 5, positions(5, 3)),
}


@pytest.mark.parametrize("name", SHORT_STEPS)
def test_a_short_step_is_that_of_single_tokens(worker, name):
    assert_same(worker.run(SHORT_STEPS[name]), one_by_one(worker, SHORT_STEPS[name]))
