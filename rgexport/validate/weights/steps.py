"""The steps that errors of stored weights are measured in."""

from collections.abc import Callable

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.steps import NEGLIGIBLE, StepSizes
from rgexport.validate.weights.expectations import Expectation


def step_sizes(
    name: str, w: np.ndarray, stored: StoredTensor, expected: Expectation | None = None
) -> StepSizes:
    """Returns the steps of the original weights `w` [rows, columns].

    Args:
        name: of the tensor.
        w: its rows, in whole groups of `rows_together`.
        stored: how they are stored.
        expected: what is measured where that is more than single weights.
    """
    for end, steps in TRANSFORMED.items():
        if name.endswith(end):
            return StepSizes(steps(w))
    return stored.uniform.step_sizes(w, expected.measure if expected else "weight")


def shown_steps(name: str, dequantized: np.ndarray, stored: StoredTensor) -> StepSizes:
    """Returns the steps of an artifact's weights [rows, columns], from these alone."""
    if stored.uniform.is_quantized:
        return stored.uniform.stored_steps(dequantized)
    return step_sizes(name, dequantized, stored)


def norm_steps(w: np.ndarray) -> np.ndarray:
    """Norms are stored with 1 added."""
    return np.spacing(np.abs(w + np.float32(1)))


def decay_steps(w: np.ndarray) -> np.ndarray:
    """Λ is stored as -8 softplus(Λ), whose rounding moves Λ by softplus/sigmoid times as much."""
    wide = w.astype(np.float64)
    softplus = np.logaddexp(0, wide)
    moved = softplus * (1 + np.exp(-wide)) * 2.0**-23
    return np.maximum(moved + np.spacing(np.abs(w)), NEGLIGIBLE).astype(np.float32)


TRANSFORMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "norm.weight": norm_steps,
    "recurrent_param": decay_steps,
}
"""End of a tensor's name → its steps in a GGUF file, where it is stored as something else."""
