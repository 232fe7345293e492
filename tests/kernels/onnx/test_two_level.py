"""TwoLevelLinear is, to the last bit, QuantLinear with what its planes and scales stand for."""

import numpy as np
import pytest

from rgexport.quantize.schemes.registry import TwoLevel
from tests.kernels.onnx.one_node import Case, model, run_model
from tests.kernels.onnx.quant_matrix import QuantMatrix, activations

SCHEMES = [TwoLevel(bits, block) for bits in range(2, 7) for block in (16, 32, 64, 128)]
SHAPES = [(1, 1536, 35), (1, 330, 70), (1, 72, 1), (3, 203, 37), (5, 2000, 33), (70, 264, 300)]


def cases(scheme: TwoLevel, tokens: int, columns: int, rows: int) -> tuple[Case, Case]:
    random = np.random.default_rng(3)
    weights = random.standard_normal((rows, columns)).astype(np.float32)
    parts, width = scheme.encode("w", weights), scheme.unpacked_bits
    bias, blocks = random.standard_normal(rows, np.float32), scheme.num_blocks(columns)
    scales = parts["scales"] * np.repeat(parts["units"].astype(np.float32), 16, 1)[:, :blocks]
    zeros = np.full(scales.shape, 2 ** (width - 1), np.uint8)
    weights = scheme.decode(parts, blocks * scheme.block)
    levels = np.rint(weights / np.repeat(scales, scheme.block, 1)) + 2 ** (width - 1)
    x, levels = activations(1, tokens, columns), levels.astype(np.uint8)
    w = QuantMatrix(columns, width, scheme.block, levels, scales, zeros, False, bias)
    inputs = {"x": x, **{n: parts[n] for n in ("planes", "scales", "units")}, "bias": bias}
    sizes, outputs = {"K": columns, "N": rows, "block_size": scheme.block}, {"y": (1, tokens, rows)}
    constant = frozenset(inputs) - {"x"}
    return Case(f"TwoLevelLinear{scheme.bits}", inputs, outputs, sizes, constant), w.case(x)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_is_the_product_with_unpacked_weights(worker, scheme):
    for shape in SHAPES:  # tokens, K, N
        packed, unpacked = cases(scheme, *shape)
        expected = worker.run(unpacked)["y"]
        assert np.array_equal(worker.run(packed)["y"], expected), shape
        results, _ = run_model(model(packed), packed, native=False)
        assert np.abs(results["y"] - expected).max() < 0.02 * np.abs(expected).max(), "the body"
