"""Step sizes of stored weights, from the original weights or from those of an artifact."""

import numpy as np

from rgexport.quantize.schemes.registry import Uniform
from rgexport.quantize.schemes.steps import NEGLIGIBLE, Measure, StepSizes


def step_sizes(name: str, w: np.ndarray, scheme: Uniform, measure: Measure = "weight") -> StepSizes:
    """Returns the steps of the tensor `name` from its original weights.

    `w` is [rows, columns] float32, in whole groups of `rows_together`. One step of a block or row
    is twice the root mean square of rounding to nearest there: rounding is off by half a step.
    """
    if name.endswith("norm.weight"):  # stored with 1 added
        return StepSizes(np.spacing(np.abs(w + np.float32(1))))
    if name.endswith("recurrent_param"):
        return StepSizes(decay_steps(w))
    return scheme.step_sizes(w, measure)


def shown_steps(name: str, dequantized: np.ndarray, scheme: Uniform) -> StepSizes:
    """Returns the steps that an artifact's weights [rows, columns] show, without the original's."""
    if scheme.is_quantized:
        return scheme.stored_steps(dequantized)
    return step_sizes(name, dequantized, scheme)


def decay_steps(w: np.ndarray) -> np.ndarray:
    """Returns the steps of the RG-LRU's Λ: GGUF files store -8 softplus(Λ) instead.

    Rounding moves Λ by softplus/sigmoid times as much as the stored number.
    """
    wide = w.astype(np.float64)
    softplus = np.logaddexp(0, wide)
    moved = softplus * (1 + np.exp(-wide)) * 2.0**-23
    return np.maximum(moved + np.spacing(np.abs(w)), NEGLIGIBLE).astype(np.float32)
