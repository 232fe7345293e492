"""QuantLinear on every instruction set, against float64 and against ONNX Runtime's own kernel."""

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.onnx.quant_matrix import activations, product, random_matrix, rounded, together

FORMATS = [(bits, block) for bits in (4, 8) for block in (16, 32, 64, 128, 256)]
FORMS = [(*form, digits) for form in FORMATS for digits in range(1, form[0] // 4 + 1)]
"""Bits, block, digits."""
SHAPES = [(1, 1, 320, 96), (1, 3, 203, 37), (1, 3, 330, 1), (1, 20, 330, 1), (2, 2, 12, 5)]
SHAPES += [(1, 9, 1, 3), (5, 3, 264, 33), (1, 127, 264, 70), (1, 513, 72, 35)]
"""Batch, tokens, K, N: odd, one output, one column, less than a block."""
MOST_SEVERAL = 16  # up to so many rows, each gives the bits that it gives alone


def assert_product(worker, x, w):
    """Runs the op; it is within a share of the sum of sizes, which is what rounding may lose."""
    y = worker.run(w.case(x))["y"]
    # For many rows and small blocks, AMX rounds both factors once more: to bfloat16.
    rounds_more = worker.instruction_set == "amx" and w.block < 64
    tolerance = 2**-8 if rounds_more and x.size // w.columns > MOST_SEVERAL else 1e-5
    x_hat = rounded(x, w.block, w.digits)
    room = np.abs(x_hat) @ w.sizes.T + (0 if w.bias is None else np.abs(w.bias))
    wrong = np.abs(y - product(x_hat, w)) / np.maximum(room, 1e-30)
    assert wrong.max() < tolerance, np.unravel_index(wrong.argmax(), wrong.shape)
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "block", "digits"), FORMS)
def test_is_the_product_of_rounded_activations(worker, shape, bits, block, digits):
    batch, tokens, columns, rows = shape
    x = activations(batch, tokens, columns)
    for asymmetric in (False, True):
        for bias in (False, True):
            options = {"asymmetric": asymmetric, "bias": bias, "digits": digits}
            assert_product(worker, x, random_matrix(columns, rows, bits, block, **options))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "block", "digits"), FORMS)
def test_several_rows_are_each_alone(worker, bits, block, digits, asymmetric):
    columns = 4500  # more than what quant_several.h takes of a row at once
    x = np.random.default_rng(6).standard_normal((1, MOST_SEVERAL, columns), np.float32)
    options = {"asymmetric": asymmetric, "bias": True, "digits": digits}
    w = random_matrix(columns, 41, bits, block, **options)
    rows = [worker.run(w.case(x[:, t : t + 1]))["y"] for t in range(MOST_SEVERAL)]
    alone = np.concatenate(rows, 1)
    for count in range(2, MOST_SEVERAL + 1):
        assert np.array_equal(worker.run(w.case(x[:, :count]))["y"], alone[:, :count]), count


HALVES = np.pad(np.arange(-126.5, 127, 1, np.float32), (1, 1), constant_values=127)
"""They go to even; the scale is 1."""
ZEROS = activations(1, 30, 256)
ZEROS[..., 32:96] = ZEROS[:, 0] = 0
SIZES = activations(1, 5, 256) * np.float32([1e-30, 1e-6, 1, 1e6, 1e30])[:, None]
UNUSUAL = {"halves": np.tile(HALVES, (1, 30, 1)), "zeros": ZEROS, "sizes": SIZES}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("bits", [4, 8])
def test_unusual_activations(worker, name, bits):
    x, block = UNUSUAL[name], 256 if name == "halves" else 32
    w = random_matrix(256, 20, bits, block, asymmetric=name == "zeros")
    for activation in (x, x[:, :1], x[None], x[0, 0]):
        y = assert_product(worker, activation, w)
    assert y.any() == (name != "zeros")


@pytest.mark.parametrize("tokens", [1, 5])
def test_every_float16(worker, tokens):
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    scales = np.where(np.isfinite(scales), scales, np.float16(1))
    w = replace(random_matrix(1024, len(scales), 8, 16), scales=scales)
    x = activations(1, tokens, 1024)
    half, single = (worker.run(v.case(x))["y"] for v in (w, w.with_scales_in(np.float32)))
    assert np.array_equal(half, single) and np.isfinite(half).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("tokens", [1, 3, 4, 65])
@pytest.mark.parametrize(("bits", "block", "digits"), FORMS)
@pytest.mark.parametrize("rows", [(70, 33), (1, 150), (37, 1, 3), (900, 7, 300)])
def test_several_matrices_are_each_alone(worker, rows, bits, block, digits, tokens, dtype):
    """Some with zero points, some with a bias: not a bit is another, with any number of threads."""
    x = activations(1, tokens, 203)
    matrices = [
        random_matrix(203, n, bits, block, asymmetric=i != 1, bias=i != 0, digits=digits)
        for i, n in enumerate(rows)
    ]
    matrices = [w.with_scales_in(dtype) for w in matrices]
    results, other = (worker.run(together(x, matrices), threads=n) for n in (1, 3))
    assert all(np.array_equal(results[name], other[name]) for name in results)
    for i, w in enumerate(matrices):
        expected = assert_product(worker, x, w.with_scales_in(np.float32))
        assert np.array_equal(results[f"y{i}"], expected), i
