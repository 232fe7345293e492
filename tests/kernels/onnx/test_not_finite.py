"""NaN and infinities: the kernels return what the bodies of the functions return.

In products with rounded activations they follow float arithmetic; the body returns numbers for NaN.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from rgexport.export.onnx.emitter import function_of
from rgexport.export.onnx.lowering import attention, capped, convolved, gelu_mul, norm
from tests.kernels.onnx.one_node import Arrays, Case, Worker, model, run_model
from tests.kernels.onnx.quant_matrix import activations, random_matrix
from tests.kernels.onnx.test_float_ops import attention_case, conv_case, positions, scan_case

BAD = [np.nan, -np.nan, np.inf, -np.inf]
BODIES = {"LocalAttention": attention, "CausalConv1d": convolved, "RmsNorm": norm}
BODIES |= {"SoftCap": capped, "GeluMul": gelu_mul}


def body_of(case: Case) -> Arrays:
    """The result of the body of an op's function, made for the shapes of the case."""
    if case.op == "RgLruScan":  # its body fits every model
        return run_model(model(case), case, native=False)[0]
    types = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.int64): ir.DataType.INT64}
    arrays = case.inputs.values()
    values = [ir.Value(type=ir.TensorType(types[x.dtype])) for x in arrays]
    tensors = [SimpleNamespace(size=x.shape.__getitem__, dtype=str(x.dtype)) for x in arrays]
    results = [SimpleNamespace(dtype="float32")] * len(case.outputs)
    node = SimpleNamespace(tensors=tensors, outputs=results, attributes=case.attributes)
    body = function_of(case.op, node, values, BODIES[case.op], case.attributes)
    return run_model(model(case, body), case, native=False)[0]


def assert_like_body(worker: Worker, case: Case) -> None:
    """Also NaN and infinities are where the body has them."""
    results = worker.run(case)
    for name, y in body_of(case).items():
        np.testing.assert_allclose(results[name], y, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tokens", [1, 3, 4, 40])
@pytest.mark.parametrize(
    ("bits", "block", "digits"),
    [(4, 32, 1), (4, 128, 1), (8, 16, 1), (8, 64, 1), (8, 16, 2), (8, 64, 2)],
)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_activation_makes_its_row_nan(worker, bad, bits, block, digits, tokens):
    x = activations(1, tokens, 203)
    others = np.arange(tokens) != tokens // 2
    for asymmetric in (False, True):
        w = random_matrix(203, 37, bits, block, asymmetric=asymmetric, bias=True, digits=digits)
        good = worker.run(w.case(x))["y"]
        for column in (0, 77, 202):
            poisoned = x.copy()
            poisoned[0, tokens // 2, column] = bad
            y = worker.run(w.case(poisoned))["y"]
            assert np.isnan(y[0, tokens // 2]).all()
            assert np.array_equal(y[0, others], good[0, others])


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-36])
def test_numbers_without_an_inverse_are_small(worker, size):
    """127 divided by them is infinite, which would give wrong codes."""
    for tokens, digits in ((1, 1), (1, 2), (9, 1), (9, 2)):
        x = np.full((1, tokens, 64), size, np.float32)
        y = worker.run(random_matrix(64, 40, 8, 32, digits=digits).case(x))["y"]
        assert np.abs(y).max() <= 64 * 2**8 * size


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 40), (12, 0), (12, 40), (40, 25)])
@pytest.mark.parametrize("name", ["q", "k", "v", "past_key", "past_value"])
def test_attention(worker, name, tokens, start, bad):
    """Masked keys count too: minus infinity is added to their scores, and 0 · NaN is NaN."""
    never_read = start == 0 and name.startswith("past")
    if never_read or (name == "past_key" and np.isinf(bad)):
        return  # a kernel may skip an infinite key of an earlier step whose weight is 0
    case = attention_case(2, tokens, 3, 8, 16, start)
    for at in (0, case.inputs[name].shape[1] - 1):
        poisoned = case.inputs[name].copy()
        poisoned[1, at, 3] = bad
        assert_like_body(worker, replace(case, inputs=case.inputs | {name: poisoned}))


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_attention_where_all_scores_are_far_below_those_of_masked_keys(worker, tokens):
    case = attention_case(1, tokens, 3, 1, 10, 11)
    for q, k in ((-np.inf, 1), (-3e38, 2), (-3e38, 3e38)):
        case.inputs["q"][0, 0, 0] = q
        case.inputs["k"][:] = case.inputs["past_key"][:] = k
        assert_like_body(worker, case)


def poisoned() -> list[tuple[Case, str]]:
    """Cases of the other ops, and the input that gets a bad number."""
    at = positions(2, 9, 5)
    at[0, 0] = at[1, 4] = 0  # there the state is multiplied by 0
    x, row = np.ones((2, 5), np.float32), np.arange(5, dtype=np.float32)
    norm = Case("RmsNorm", {"x": x, "weight": row}, {"y": x.shape}, {"eps": 1e-6})
    gelu = Case("GeluMul", {"gate": x, "up": x.copy()}, {"y": x.shape})
    soft_cap = Case("SoftCap", {"x": x}, {"y": x.shape}, {"cap": 30.0})
    cases = scan_case(2, 9, 3, 5, at), conv_case(2, 9, 7, 4), norm, gelu, soft_cap
    return [(case, n) for case in cases for n in case.inputs if n != "position_ids"]


@pytest.mark.parametrize("bad", [*BAD, 1e30, -1e20, 1e-30, 1e-40, 90, -90])
@pytest.mark.parametrize(("case", "name"), poisoned(), ids=lambda x: getattr(x, "op", x))
def test_other_ops(worker, case, name, bad):
    array = case.inputs[name].copy()
    array.flat[3] = bad
    assert_like_body(worker, replace(case, inputs=case.inputs | {name: array}))
