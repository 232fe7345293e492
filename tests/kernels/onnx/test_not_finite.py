"""NaN and infinities: the kernels return what the bodies of the functions return.

For products with rounded activations, the body's kernel (MatMulNBits at accuracy level 4) returns
NaN for a row with an infinity, but numbers for a row with NaN: there ours follow float arithmetic.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from rgexport.export.onnx.attention_ops import _ring_attention
from rgexport.export.onnx.functions import function_of
from rgexport.export.onnx.graph import OPSET
from rgexport.export.onnx.native import DOMAIN, VERSION
from rgexport.export.onnx.pointwise_ops import _norm, _soft_cap
from rgexport.export.onnx.recurrent_ops import _shifted_products
from tests.kernels.onnx.one_node import Arrays, Case, run_model
from tests.kernels.onnx.quant_matrix import random_matrix
from tests.kernels.onnx.test_float_ops import attention_case, conv_case, positions, scan_case
from tests.kernels.onnx.test_quant_linear import activations, together

BAD = [np.nan, -np.nan, np.inf, -np.inf]


def class_of(y: np.ndarray) -> np.ndarray:
    """0 for finite numbers, ±1 for infinities, 2 for NaN."""
    return np.where(np.isnan(y), 2.0, np.where(np.isinf(y), np.sign(y), 0.0))


def _gelu_mul(g, node, gate, up):
    return [g.op("Mul", g.op("Gelu", gate, approximate="tanh"), up)]


BODIES = {
    "LocalAttention": _ring_attention,
    "CausalConv1d": _shifted_products,
    "RmsNorm": _norm,
    "SoftCap": _soft_cap,
    "GeluMul": _gelu_mul,
}


def body_of(case: Case) -> Arrays:
    """The result of the body of an op's function, made for the shapes of the case."""
    arrays = list(case.given.values())
    names = [f"input.{i}" for i in range(len(arrays))]
    numbers = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.int64): ir.DataType.INT64}
    values = [
        ir.Value(name=n, type=ir.TensorType(numbers[x.dtype]))
        for n, x in zip(names, arrays, strict=True)
    ]
    tensors = [SimpleNamespace(size=x.shape.__getitem__, dtype=str(x.dtype)) for x in arrays]
    results = [SimpleNamespace(dtype="float32")] * len(case.outputs)
    node = SimpleNamespace(tensors=tensors, outputs=results, attributes=case.attributes)
    made = function_of(case.op, node, values, BODIES[case.op], case.attributes)
    call = helper.make_node(case.op, names, list(case.outputs), domain=DOMAIN, **case.attributes)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [call],
        "body",
        [
            info(n, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
            for n, x in zip(names, arrays, strict=True)
        ],
        [info(n, 1, list(shape)) for n, shape in case.outputs.items()],
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", OPSET), (DOMAIN, VERSION))]
    functions = [ir.serde.serialize_function(made)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    fed = dict(zip(names, arrays, strict=True))
    return run_model(model.SerializeToString(), fed, {}, case.outputs, native=False)[0]


def assert_like_body(found: Arrays, expected: Arrays) -> None:
    for name, y in expected.items():
        assert np.array_equal(class_of(found[name]), class_of(y)), name
        there = np.isfinite(y)
        assert np.allclose(found[name][there], y[there], 1e-4, 1e-5), name


@pytest.mark.parametrize("tokens", [1, 3, 4, 40])
@pytest.mark.parametrize(
    ("bits", "block", "digits"),
    [(4, 32, 1), (4, 128, 1), (8, 16, 1), (8, 64, 1), (8, 16, 2), (8, 64, 2)],
)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_activation_makes_its_row_nan(worker, bad, bits, block, digits, tokens):
    x = activations(1, tokens, 203)
    for asymmetric in (False, True):
        w = random_matrix(203, 37, bits, block, asymmetric=asymmetric, bias=True, digits=digits)
        good = worker.run(w.case(x))["y"]
        for column in (0, 77, 202):
            poisoned = x.copy()
            poisoned[0, tokens // 2, column] = bad
            found = worker.run(w.case(poisoned))["y"]
            assert np.isnan(found[0, tokens // 2]).all()
            others = np.arange(tokens) != tokens // 2
            assert np.array_equal(found[0, others], good[0, others])


@pytest.mark.parametrize("tokens", [1, 9])
def test_every_matrix_of_several_sees_it(worker, tokens):
    x = activations(1, tokens, 128)
    x[0, 0, 100] = np.nan
    found = worker.run(together(x, [random_matrix(128, n, 4, 32) for n in (5, 40, 7)]))
    assert all(np.isnan(y[0, 0]).all() and np.isfinite(y[0, 1:]).all() for y in found.values())


@pytest.mark.parametrize("tokens", [1, 9])
def test_numbers_without_an_inverse_are_small(worker, tokens):
    """127 divided by them is infinite, which would give wrong codes."""
    for size in (1e-45, 1e-40, 1e-38, 1e-36):
        x = np.full((1, tokens, 64), size, np.float32)
        for digits in (1, 2):
            found = worker.run(random_matrix(64, 40, 8, 32, digits=digits).case(x))["y"]
            assert np.abs(found).max() <= 64 * 2**8 * size


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 40), (12, 0), (12, 40), (40, 25)])
@pytest.mark.parametrize("name", ["q", "k", "v", "past_key", "past_value"])
def test_attention(worker, name, tokens, start, bad):
    """Masked keys count too: minus infinity is added to their scores, and 0 · NaN is NaN."""
    case = attention_case(2, tokens, 3, 8, 16, positions(2, tokens, start), False)
    for at in (0, case.inputs[name].shape[1] - 1):
        if start == 0 and name.startswith("past"):
            continue  # nothing was written there, and a kernel does not read it
        poisoned = case.inputs[name].copy()
        poisoned[1, at, 3] = bad
        changed = replace(case, inputs=case.inputs | {name: poisoned})
        if not (name == "past_key" and np.isinf(bad)):  # see test_attention_to_infinite_keys
            assert_like_body(worker.run(changed), body_of(changed))


def test_attention_to_infinite_keys(worker):
    """A kernel may skip an infinite key of an earlier step whose weight is 0."""
    case = attention_case(1, 3, 1, 4, 8, positions(1, 3, 30), False)
    case.inputs["past_key"][0, 0, 2] = np.inf
    found, body = worker.run(case), body_of(case)
    wrong = class_of(found["y"]) != class_of(body["y"])
    assert not wrong.any() or np.isfinite(found["y"][wrong]).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["x", "input_weight", "recurrence_bias", "decay", "state"])
def test_scan(worker, stock, name, bad):
    at = positions(2, 9, 5)
    at[0, 0] = at[1, 4] = 0  # there the state is multiplied by 0
    case = scan_case(2, 9, 3, 5, at)
    case.inputs[name].flat[2] = bad
    assert_like_body(worker.run(case), stock.run(case))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "state"])
def test_convolution(worker, name, bad):
    case = conv_case(2, 9, 7, 4, False)
    case.inputs[name].flat[3] = bad
    assert_like_body(worker.run(case), body_of(case))


def test_numbers_apart(worker):
    x = np.float32([*BAD, 3e38, -3e38, 1e-40, 1e20, -1e20, 90, -90, 1e-30, 0, 1])[None]
    cases = [
        Case("GeluMul", {"gate": x, "up": np.ones_like(x)}, {"y": x.shape}),
        Case("GeluMul", {"gate": np.ones_like(x), "up": x}, {"y": x.shape}),
        Case("SoftCap", {"x": x}, {"y": x.shape}, {"cap": 30.0}),
    ]
    for case in cases:
        assert_like_body(worker.run(case), body_of(case))


@pytest.mark.parametrize("bad", [*BAD, 1e30, 1e-30])
def test_norm(worker, bad):
    x = np.float32([[1, 2, 3, 4, 5], [1, bad, 3, 4, 5]])
    weight = np.float32([0, 1, 2, 3, 4])
    case = Case("RmsNorm", {"x": x, "weight": weight}, {"y": x.shape}, {"eps": 1e-6})
    assert_like_body(worker.run(case), body_of(case))
    weight[1] = bad
    assert_like_body(worker.run(case), body_of(case))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3), (0, 0)])
def test_no_token_leaves_the_states(worker, batch, tokens):
    at = positions(batch, tokens)
    scan = scan_case(batch, tokens, 3, 5, at)
    assert np.array_equal(worker.run(scan)["present"], scan.inputs["state"])
    convolution = conv_case(batch, tokens, 7, 4, False)
    found = worker.run(convolution)
    assert np.array_equal(found["present"], body_of(convolution)["present"])
    attention = attention_case(batch, tokens, 2, 4, 5, at, False)
    found = worker.run(attention)
    assert all(
        np.array_equal(found[f"present_{n}"], attention.inputs[f"past_{n}"])
        for n in ("key", "value")
    )
    linear = random_matrix(64, 7, 4, 32).case(np.zeros((batch, tokens, 64), np.float32))
    assert worker.run(linear)["y"].shape == (batch, tokens, 7)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_attention_where_every_score_is_minus_infinity(worker, tokens):
    """All scores of a query are minus infinity, those of masked keys too."""
    case = attention_case(1, tokens, 3, 1, 10, positions(1, tokens, 11), False)
    for name in ("k", "past_key"):
        case.inputs[name][:] = np.abs(case.inputs[name]) + 1
    case.inputs["q"][0, 0, 0] = -np.inf
    assert_like_body(worker.run(case), body_of(case))
    case.inputs["q"][0, 0, 0] = -3e38
    case.inputs["k"][:] = case.inputs["past_key"][:] = 3e38
    assert_like_body(worker.run(case), body_of(case))


def test_scores_below_any_that_a_mask_has(worker):
    """Scores of visible keys may be lower than those of a mask."""
    case = attention_case(1, 5, 1, 4, 8, positions(1, 5, 30), False)
    case.inputs["q"][:] = 1e18
    for name in ("k", "past_key"):
        case.inputs[name][:] = -np.abs(case.inputs[name]) * np.float32(1e18)
    assert_like_body(worker.run(case), body_of(case))
