"""The distance between neighbouring values of ggml's tensor types, from the weights alone.

Scales and minimums are float16 there. Their rounding moves every value of a block, so it is part of
the step.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.quantize.steps import NEGLIGIBLE, StepSizes

_HALF = 2.0**-11
"""Largest relative error of rounding to float16, and `_LEAST` the largest absolute one."""
_LEAST = 2.0**-25
_LEAST_SCALE = np.float32(1 / 32)
"""Of the largest scale in a group: half the distance of scales that have 4 bits (q2_k)."""


@dataclass(frozen=True)
class BlockSteps:
    """How a type divides a row into steps.

    Attributes:
        size: weights that share a step.
        below: steps from 0 to the outermost level on the side of the largest magnitude where
            levels lie around 0; else steps from the least weight (or 0) to the largest.
        asymmetric: whether levels begin at the least weight.
        clips: whether the other side has one level less.
        grouped: weights whose steps are multiples of one number, so that small steps are not
            exact: the largest step of the group counts for all of it. These types choose their
            steps for the least squared error. 0 for the other types.
        scales: the largest of those multiples, which multiplies the rounding of the number.
    """

    size: int
    below: int
    asymmetric: bool = False
    clips: bool = False
    grouped: int = 0
    scales: int = 1


BLOCKS = {
    "q8_0": BlockSteps(32, 127),
    "q4_0": BlockSteps(32, 8, clips=True),
    "q5_0": BlockSteps(32, 16, clips=True),
    "q4_1": BlockSteps(32, 15, asymmetric=True),
    "q5_1": BlockSteps(32, 31, asymmetric=True),
    "q2_k": BlockSteps(16, 3, asymmetric=True, grouped=256, scales=15),
    "q3_k": BlockSteps(16, 4, clips=True, grouped=256, scales=32),
    "q4_k": BlockSteps(32, 15, asymmetric=True, grouped=256, scales=63),
    "q5_k": BlockSteps(32, 31, asymmetric=True, grouped=256, scales=63),
    "q6_k": BlockSteps(16, 32, clips=True, grouped=256, scales=128),
}
"""Type → its blocks (ggml-quants.c: quantize_row_*_ref)."""


def step_sizes(w: np.ndarray, kind: str) -> StepSizes:
    """Returns the steps of the weights [rows, columns] in a type whose blocks fit the columns."""
    blocks = BLOCKS[kind]
    exact, base = _exact_steps(w, blocks)
    least = blocks.scales * _LEAST  # rounding of the step of a block, however small it is
    # half a step, and what the rounding of scale and minimum adds to it, twice
    moved = blocks.below * np.maximum(exact * _HALF, least) + np.maximum(base * _HALF, least)
    step = np.maximum(exact + 2 * moved, NEGLIGIBLE).astype(np.float32)
    own = grid = None
    if blocks.grouped:
        step = _largest_of_group(step, blocks)
        # Scales are multiples of a fraction of the group's largest one, so none is much smaller.
        # And blocks may be too small for float16, which may store them as zeros.
        smallest = _largest_of_group(exact, blocks) * _LEAST_SCALE
        smallest = np.maximum(smallest, np.float32(2 * blocks.below * least))
        own = np.repeat(np.maximum(exact, smallest), blocks.size, axis=1)
    elif not blocks.asymmetric:
        grid = np.repeat(np.maximum(exact, NEGLIGIBLE), blocks.size, axis=1)
    step = np.repeat(step, blocks.size, axis=1)
    outermost = (step if grid is None else grid) * np.float32(blocks.below - 1)
    return StepSizes(step, own=own, limit=outermost if blocks.clips else None, grid=grid)


def _exact_steps(w: np.ndarray, blocks: BlockSteps) -> tuple[np.ndarray, np.ndarray]:
    """For each block: its range over its number of steps, and the magnitude of its minimum."""
    weights = w.reshape(len(w), -1, blocks.size)
    low, high = weights.min(2), weights.max(2)
    if not blocks.asymmetric:
        exact = np.maximum(high, -low) / np.float32(blocks.below)
        return exact, np.zeros_like(exact)
    least = np.minimum(low, 0) if blocks.grouped else low
    return (high - least) / np.float32(blocks.below), np.abs(least)


def _largest_of_group(steps: np.ndarray, blocks: BlockSteps) -> np.ndarray:
    """The largest step in the group of each block, [rows, blocks]."""
    per_group = blocks.grouped // blocks.size
    return np.repeat(steps.reshape(len(steps), -1, per_group).max(2), per_group, axis=1)
