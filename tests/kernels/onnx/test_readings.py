"""The ways to read weights: all give the same bits."""

import numpy as np
import pytest

from tests.kernels.onnx.one_node import Arrays, Case, model, open_model
from tests.kernels.onnx.quant_matrix import random_matrix
from tests.kernels.onnx.test_float_ops import positions, scan_case

LARGE: dict[str, Case] = {
    "QuantLinear": random_matrix(2048, 1100, 4, 128).case(
        np.random.default_rng(1).standard_normal((1, 1, 2048), np.float32)
    ),
    "RgLruScan": scan_case(1, 1, 4, 256, positions(1, 1, 7)),
}
"""Ops with enough weights for the ways to be compared."""


def different_results(serialized: bytes, fed: Arrays, runs: int) -> int:
    """How many different results a session gives in `runs` runs."""
    session = open_model(serialized)
    results = (session.run(None, fed) for _ in range(runs))
    return len({b"".join(array.tobytes() for array in result) for result in results})


@pytest.mark.parametrize("op", LARGE)
def test_no_way_changes_a_bit(worker, op):
    """While they take turns, and when one is chosen."""
    case = LARGE[op]
    fed = {name: x for name, x in case.given.items() if name not in case.weights}
    assert worker.submit(different_results, model(case), fed, 300) == 1
