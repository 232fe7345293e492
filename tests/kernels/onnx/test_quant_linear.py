"""QuantLinear on every instruction set, against float64 and against ONNX Runtime's own kernel."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tests.kernels.onnx.one_node import Case, Worker, run_model
from tests.kernels.onnx.quant_matrix import QuantMatrix, product, random_matrix, rounded

FORMATS = [(bits, block) for bits in (4, 8) for block in (16, 32, 64, 128, 256)]
FORMS = [(*form, digits) for form in FORMATS for digits in range(1, form[0] // 4 + 1)]
"""Bits, block, digits."""
SHAPES = {
    "one_token": (1, 1, 320, 96),
    "odd_everything": (1, 3, 203, 37),
    "one_output": (1, 3, 330, 1),
    "one_output_many_tokens": (1, 20, 330, 1),
    "less_than_a_block": (2, 2, 12, 5),
    "one_column": (1, 9, 1, 3),
    "batch": (5, 3, 264, 33),
    "tokens_127": (1, 127, 264, 70),
    "tokens_513": (1, 513, 72, 35),
}
"""Batch, tokens, K, N."""


MOST_SEVERAL = 16
"""Up to so many rows, each gives the bits that it gives alone."""


def activations(batch: int, tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    """Rows whose codes are certain: nothing that is rounded lies next to a half."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-126, 127, (batch, tokens, columns)) + rng.uniform(
        -0.45, 0.45, (batch, tokens, columns)
    )
    codes[..., ::16] = 127  # the first of every block: the scale is what follows
    sizes = 2.0 ** rng.integers(-6, 3, (batch, tokens, 1))
    return (codes * sizes).astype(np.float32)


def in_bfloat16(worker: Worker, w: QuantMatrix, tokens: int) -> bool:
    """Whether both factors are rounded once more: by AMX, for many rows and small blocks."""
    return worker.instruction_set == "amx" and w.block < 64 and tokens > MOST_SEVERAL


def assert_product(worker: Worker, x: np.ndarray, w: QuantMatrix) -> np.ndarray:
    """Runs the op; it is within a share of the sum of sizes, which is what rounding may lose."""
    found = worker.run(w.case(x))["y"]
    tokens = x.size // w.columns
    tolerance = 2**-8 if in_bfloat16(worker, w, tokens) else 1e-5
    x_hat = rounded(x, w.block, w.digits)
    room = np.abs(x_hat) @ w.sizes.T + (0 if w.bias is None else np.abs(w.bias))
    wrong = np.abs(found - product(x_hat, w)) / np.maximum(room, 1e-30)
    assert wrong.max() < tolerance, (
        f"{wrong.max()} at {np.unravel_index(wrong.argmax(), wrong.shape)}"
    )
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_is_the_product_of_rounded_activations(worker, shape, bits, block):
    batch, tokens, columns, rows = SHAPES[shape]
    x = activations(batch, tokens, columns)
    for asymmetric in (False, True):
        for bias in (False, True):
            w = random_matrix(columns, rows, bits, block, asymmetric=asymmetric, bias=bias)
            assert_product(worker, x, w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_two_digits(worker, shape, block):
    """Also of any numbers: off by no more than half a unit of the second digit."""
    batch, tokens, columns, rows = SHAPES[shape]
    any_x = np.random.default_rng(4).standard_normal((batch, tokens, columns), np.float32)
    for asymmetric in (False, True):
        w = random_matrix(columns, rows, 8, block, asymmetric=asymmetric, bias=True, digits=2)
        assert_product(worker, activations(batch, tokens, columns), w)
        found = worker.run(w.case(any_x))["y"]
        if not in_bfloat16(worker, w, batch * tokens):
            padded = np.pad(np.abs(any_x), ((0, 0), (0, 0), (0, -columns % block)))
            most = padded.reshape(batch, tokens, -1, block).max(-1)
            unit = np.repeat(most, block, 2)[..., :columns] / 127 / 254
            room = unit / 2 @ np.abs(w.dequantized).T + 1e-5 * (np.abs(any_x) @ w.sizes.T + 1)
            assert (np.abs(found - product(any_x, w)) < room).all()


def test_two_digits_beside_one(worker):
    """Much nearer to the exact product: by the 254 to which AMX's small blocks do not come."""
    for tokens in (1, 30):
        x = np.random.default_rng(5).standard_normal((1, tokens, 1000), np.float32)
        w = random_matrix(1000, 200, 8, 32)
        both = (worker.run(v.case(x))["y"] for v in (w, replace(w, digits=2)))
        one, two = (np.sqrt(np.mean((y - product(x, w)) ** 2)) for y in both)
        assert two < one / (3 if in_bfloat16(worker, w, tokens) else 200)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "block", "digits"), FORMS)
def test_several_rows_are_each_alone(worker, bits, block, digits, asymmetric):
    """Not a bit is another, with any number of rows."""
    most = MOST_SEVERAL
    columns = 4500  # more than what quant_several.h takes of a row at once
    x = np.random.default_rng(6).standard_normal((1, most, columns), np.float32)
    w = random_matrix(columns, 41, bits, block, asymmetric=asymmetric, bias=True)
    w = replace(w, digits=digits)
    alone = np.concatenate([worker.run(w.case(x[:, t : t + 1]))["y"] for t in range(most)], 1)
    for rows in range(2, most + 1):
        assert np.array_equal(worker.run(w.case(x[:, :rows]))["y"], alone[:, :rows]), rows


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_any_number_of_dimensions(worker, rank, tokens):
    x = activations(1, tokens, 64)[0]
    x = x[0] if rank == 1 else x.reshape(*[1] * (rank - 2), tokens, 64)
    w = random_matrix(64, 7, 8, 32)
    assert_product(worker, x, w)


@pytest.mark.parametrize("bits", [4, 8])
def test_halves_go_to_even(worker, bits):
    x = np.arange(-126.5, 127, 1, np.float32)
    x = np.pad(x, (1, 1), constant_values=127)[None, None]  # scales of 1
    w = random_matrix(256, 9, bits, 256)
    assert_product(worker, x, w)
    assert_product(worker, np.repeat(x, 30, 1), w)


@pytest.mark.parametrize("tokens", [1, 30])
def test_blocks_of_zeros(worker, tokens):
    x = activations(1, tokens, 256)
    x[..., 32:96] = 0
    x[:, 0] = 0
    w = random_matrix(256, 20, 4, 32, asymmetric=True)
    y = assert_product(worker, x, w)
    assert (y[:, 0] == 0).all()


def test_numbers_of_all_sizes(worker):
    x = activations(1, 5, 128) * np.float32([1e-30, 1e-6, 1, 1e6, 1e30])[:, None]
    w = random_matrix(128, 20, 8, 64)
    assert_product(worker, x, w)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_as_near_as_the_stock_kernel(worker, stock, tokens, bits, block):
    """Both round activations; against exact ones, ours is at most 1.5 times as far."""
    x = np.random.default_rng(5).standard_normal((1, tokens, 1000), np.float32)
    for asymmetric in (False, True):
        w = random_matrix(1000, 200, bits, block, asymmetric=asymmetric, bias=True, junk=False)
        exact = product(x, w)
        theirs = stock.submit(run_model, *stock_kernel(w.case(x)), native=False)[0]["y"]
        ours = worker.run(w.case(x))["y"]
        distance, allowed = (np.sqrt(np.mean((y - exact) ** 2)) for y in (ours, theirs))
        assert distance < 1.5 * allowed


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_the_body_is_the_stock_kernel(stock, bits, block, bias, asymmetric):
    """It has one digit, takes scales in float16, and of several matrices it is several kernels."""
    x = activations(1, 3, 300)
    matrices = [
        random_matrix(300, n, bits, block, asymmetric=asymmetric, bias=bias, seed=n).in_half
        for n in (40, 9, 3)
    ]
    kernels = [stock_kernel(w.in_single.case(x)) for w in matrices]
    bare = [stock.submit(run_model, *kernel, native=False)[0]["y"] for kernel in kernels]
    for digits in range(1, bits // 4 + 1):
        assert np.array_equal(stock.run(replace(matrices[0], digits=digits).case(x))["y"], bare[0])
    for count in (2, 3):
        found = stock.run(together(x, matrices[:count]))
        assert all(np.array_equal(found[f"y{i}"], bare[i]) for i in range(count))


@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 700), st.integers(1, 80)),
    form=st.sampled_from(FORMATS),
    asymmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_float16_scales_of_any_shape(worker, shape, form, asymmetric, seed):
    tokens, columns, rows = shape
    x = activations(1, tokens, columns, seed)
    w = random_matrix(columns, rows, *form, asymmetric=asymmetric, seed=seed).in_half
    assert np.array_equal(worker.run(w.case(x))["y"], assert_product(worker, x, w.in_single))


@pytest.mark.parametrize("blocks", [1, 64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_float16(worker, tokens, blocks):
    """All 65,536, of which infinities and NaN are alone in their rows."""
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, blocks)
    if blocks > 1:
        scales = np.where(np.isfinite(scales), scales, np.float16(1))
    w = random_matrix(16 * blocks, len(scales), 8, 16)
    w = replace(w, scales=scales, levels=np.maximum(w.levels, 129))
    x = np.abs(activations(1, tokens, 16 * blocks))
    found, expected = (worker.run(v.case(x))["y"] for v in (w, w.in_single))
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.isfinite(found).all() == (blocks > 1)


def stock_kernel(case: Case) -> tuple:
    """What runs the same product by MatMulNBits at accuracy level 4."""
    x, data, scales, zeros, bias = case.inputs
    given = case.given
    names = [x, data, scales, zeros if zeros in given else "", "", bias if bias in given else ""]
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", accuracy_level=4, **case.attributes
    )
    info, from_array = helper.make_tensor_value_info, numpy_helper.from_array
    fed, made = info("x", 1, ["B", "T", "K"]), info("y", 1, ["B", "T", "N"])
    stored = [from_array(a, n) for n, a in given.items() if n in case.weights]
    graph = helper.make_graph([node], "stock", [fed], [made], stored)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    whole = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return whole.SerializeToString(), {"x": given["x"]}, {}, case.outputs


def together(x: np.ndarray, matrices: list[QuantMatrix]) -> Case:
    """QuantLinear2 or QuantLinear3: each kind of input for all matrices, then the next kind."""
    cases = [w.case(x) for w in matrices]
    kinds = [kind for kind in cases[0].inputs if kind != "x"]
    each = {f"{kind}{i}": case.inputs[kind] for kind in kinds for i, case in enumerate(cases)}
    sizes = {f"N{i + 1 if i else ''}": case.attributes["N"] for i, case in enumerate(cases)}
    return Case(
        f"QuantLinear{len(cases)}",
        {"x": x} | each,
        {f"y{i}": case.outputs["y"] for i, case in enumerate(cases)},
        cases[0].attributes | sizes,
        frozenset(each),
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 65])
@pytest.mark.parametrize(("bits", "block", "digits"), FORMS)
@pytest.mark.parametrize("rows", [(70, 33), (1, 150), (37, 1, 3), (2, 2, 200), (150, 20, 20)])
def test_several_matrices_are_each_alone(worker, rows, bits, block, digits, tokens, half):
    """Some with zero points, some with a bias: not a bit is another."""
    x = activations(1, tokens, 203)
    matrices = [
        random_matrix(203, n, bits, block, asymmetric=i != 1, bias=i != 0, digits=digits)
        for i, n in enumerate(rows)
    ]
    matrices = [w.in_half if half else w for w in matrices]
    found = worker.run(together(x, matrices))
    for i, w in enumerate(matrices):
        assert np.array_equal(found[f"y{i}"], assert_product(worker, x, w.in_single)), i


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_threads_do_not_change_a_bit(worker, bits, tokens):
    x = activations(1, tokens, 500)
    case = together(x, [random_matrix(500, n, bits, 64, seed=n) for n in (900, 7, 300)])
    one, *others = (worker.run(case, threads=n) for n in (1, 2, 3))
    assert all(np.array_equal(one[y], other[y]) for other in others for y in one)


WRONG = {
    "columns": ({"K": 65}, {}, "K"),
    "no_columns": ({"K": 0}, {}, "K"),
    "rows": ({"N": 8}, {}, "N rows"),
    "bits": ({"bits": 2}, {}, "bits"),
    "block": ({"block_size": 24}, {}, "block_size"),
    "digits": ({"digits": 3}, {}, "digits"),
    "digits_of_4_bits": ({"digits": 2}, {}, "8 bits"),
    "data": ({}, {"data": np.zeros((7, 2, 15), np.uint8)}, "data"),
    "scales": ({}, {"scales": np.ones((7, 1), np.float32)}, "scales"),
    "scales_in_half": ({}, {"scales": np.ones((7, 1), np.float16)}, "scales"),
    "type_of_scales": ({}, {"scales": np.ones((7, 2), np.float64)}, "another type"),
    "zero_points": ({}, {"zero_points": np.zeros((7, 2), np.uint8)}, "zero_points"),
    "bias": ({}, {"bias": np.zeros(6, np.float32)}, "bias"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_are_refused(worker, wrong):
    attributes, inputs, word = WRONG[wrong]
    case = random_matrix(64, 7, 4, 32, asymmetric=True, bias=True).case(activations(1, 2, 64))
    case = replace(case, inputs=case.inputs | inputs, attributes=case.attributes | attributes)
    with pytest.raises(Exception, match=f"QuantLinear: .*{word}"):
        worker.run(case)
