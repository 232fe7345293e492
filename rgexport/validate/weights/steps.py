"""Computes the distance between neighbouring values of a storage scheme, at each weight.

Steps follow from the original weights and the scheme, not from the artifact's scales. So they show
a wrong scale, even where the noise of four bits would hide it in a norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rgexport.quantize.scheme import Affine, Palette, Scheme

Measure = Literal["weight", "block", "row", "group"]
"""Unit whose largest error counts: a single weight, or the root mean square of several."""

NEGLIGIBLE = np.float32(2.0**-100)
"""Lower bound of the steps of integers: smaller weights may be stored as zeros."""
_HALF = 2.0**-11
"""Largest relative error of rounding to float16; `_LEAST` is the largest absolute one."""
_LEAST = 2.0**-25
_LEAST_SCALE = np.float32(1 / 32)
"""Lower bound of scales relative to the group's largest: half the distance of 4-bit scales."""
_FLOATS = {
    "float32": (23, 2.0**-126),
    "f32": (23, 2.0**-126),
    "float16": (10, 2.0**-24),
    "f16": (10, 2.0**-24),
    "bf16": (7, 2.0**-126),
    "bfloat16": (23, 2.0**-126),
}
"""dtype or ggml type → binary digits after the point, smallest step.

In ONNX, bfloat16 holds what the checkpoint has in bfloat16: nothing may be rounded.
"""


@dataclass(frozen=True)
class Blocks:
    """A ggml type's division of rows. Scales and minimums are float16.

    Attributes:
        size: weights that share a step.
        below: steps from 0 to the outermost level on the side of the largest magnitude where
            levels lie around 0; else steps from the least weight (or 0) to the largest.
        asymmetric: whether levels begin at the least weight.
        clips: whether the side opposite to the largest magnitude has one level less.
        grouped: weights whose steps are multiples of one number, so that small steps are not
            exact: the largest step of the group counts for all of it. These types choose their
            steps for the least squared error. 0 for the other types.
        scales: the largest of those multiples, which multiplies the rounding error of the number.
    """

    size: int
    below: int
    asymmetric: bool = False
    clips: bool = False
    grouped: int = 0
    scales: int = 1


BLOCKS = {
    "q8_0": Blocks(32, 127),
    "q4_0": Blocks(32, 8, clips=True),
    "q5_0": Blocks(32, 16, clips=True),
    "q4_1": Blocks(32, 15, asymmetric=True),
    "q5_1": Blocks(32, 31, asymmetric=True),
    "q2_k": Blocks(16, 3, asymmetric=True, grouped=256, scales=15),
    "q3_k": Blocks(16, 4, clips=True, grouped=256, scales=32),
    "q4_k": Blocks(32, 15, asymmetric=True, grouped=256, scales=63),
    "q5_k": Blocks(32, 31, asymmetric=True, grouped=256, scales=63),
    "q6_k": Blocks(16, 32, clips=True, grouped=256, scales=128),
}
"""ggml type → its blocks (ggml-quants.c: quantize_row_*_ref)."""


@dataclass(frozen=True)
class StepSizes:
    """Units of the errors of a slab of weights [rows, columns].

    Attributes:
        step: at each weight, [rows, columns]; with `spans`, [rows or groups of rows, spans].
        levels: the distance of levels at each weight, or one number for each row, [rows, 1].
            `step` may be larger: it allows for rounded scales.
        limit: the magnitude, at each weight, beyond which it may be stored as the outermost
            level; None where no level is missing.
        grid: the distance of levels at each weight, before scales are rounded; None where 0 is no
            level, or levels are chosen for the least squared error.
        spans: the first columns of the blocks, rows or groups of rows whose root mean squares
            count; None where single weights do.
    """

    step: np.ndarray
    levels: np.ndarray
    limit: np.ndarray | None = None
    grid: np.ndarray | None = None
    spans: np.ndarray | None = None

    def without_clipping(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Subtracts the part of the error that comes from values beyond the outermost levels.

        Some schemes have one level less on one side. The encoder chooses the side, so the smaller
        error counts.
        """
        if self.limit is None:
            return error
        return _smaller(error, error + (w - np.clip(w, -self.limit, self.limit)))

    def beyond_rounding(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Subtracts the error of rounding to nearest, clipped or not, whichever leaves less.

        Rounding is biased where a block has one weight so large that most others are nearer to
        zero than to the first level.
        """
        if self.grid is None:
            return self.without_clipping(error, w)
        nearest = np.rint(w / self.grid) * self.grid
        rest = error - (nearest - w)
        if self.limit is None:
            return rest
        return _smaller(rest, error - (np.clip(nearest, -self.limit, self.limit) - w))

    def rounding(self, columns: int, squares: np.ndarray | None = None) -> np.ndarray:
        """Returns Σ step²/12 of each row, [rows] float64: the noise of rounding to nearest.

        An error that is uniform within half a step has the variance step²/12. With the `squares`
        [columns] of inputs, each column's share is multiplied with its square.
        """
        steps = np.square(self.levels, dtype=np.float64)
        if squares is None:
            return steps.sum(1) * (columns / steps.shape[1] / 12)
        if steps.shape[1] == 1:
            return steps[:, 0] * (squares.sum() / 12)
        return np.asarray(np.einsum("nk,k->n", steps, squares / 12))

    def total(self, columns: int) -> float:
        """Returns Σ step over all weights."""
        return float(self.levels.sum(dtype=np.float64)) * columns / self.levels.shape[1]

    def largest(self, error: np.ndarray) -> float:
        """Returns the largest error in steps: of a weight, or the root mean square of a span."""
        if self.spans is not None:
            error = _root_mean_squares(error, self.spans, len(error) // max(1, len(self.step)))
        return float((np.abs(error) / self.step).max(initial=0))


def step_sizes(name: str, w: np.ndarray, scheme: Scheme, measure: Measure = "weight") -> StepSizes:
    """Returns the steps of a tensor's original weights.

    Args:
        name: of the tensor, since some are stored as something else.
        w: rows [rows, columns] float32, in whole groups of `rows_together`.
        scheme: for these rows.
        measure: the unit whose error counts. One step of a block or row is twice the root mean
            square of rounding to nearest there, so that rounding is off by half a step as usual.
    """
    if isinstance(scheme, Affine):
        if measure in ("block", "row"):
            return _affine_spans(w, scheme, measure)
        return _affine(w, scheme)
    if isinstance(scheme, Palette):
        return _palette(w, scheme, measure)
    for end, transformed in _TRANSFORMED.items():
        if name.endswith(end):
            return _of_each_weight(transformed(w))
    if scheme.label in _FLOATS:
        return _of_each_weight(_float_steps(w, *_FLOATS[scheme.label]))
    return _ggml(w, BLOCKS[scheme.label])


def shown_steps(name: str, dequantized: np.ndarray, scheme: Scheme) -> StepSizes:
    """Returns the steps that an artifact's weights [rows, columns] show, without the original's.

    Where levels are even, the outermost ones of a block tell their distance.
    """
    if isinstance(scheme, Affine):
        exact, _, _ = _affine_ranges(dequantized, scheme)
        return _of_each_weight(_spread(exact, scheme.block, dequantized))
    if isinstance(scheme, Palette):
        return _of_each_weight(_palette_gaps(dequantized, scheme))
    return step_sizes(name, dequantized, scheme)


def rows_together(scheme: Scheme) -> int:
    """Returns how many rows share their steps."""
    return scheme.group if isinstance(scheme, Palette) else 1


def is_quantized(scheme: Scheme) -> bool:
    """Returns whether weights are stored as integers or indices, and not as floats."""
    return scheme.label not in _FLOATS


def _of_each_weight(steps: np.ndarray) -> StepSizes:
    return StepSizes(steps, steps)


def _root_mean_squares(error: np.ndarray, spans: np.ndarray, rows: int = 1) -> np.ndarray:
    """Averages groups of `rows`, from each first column in `spans` to the next: [groups, spans]."""
    squares = np.square(error, dtype=np.float64)
    counts = rows * np.diff(spans, append=error.shape[1])
    sums = np.add.reduceat(squares, spans, axis=1)
    means = sums.reshape(len(error) // rows, rows, len(spans)).sum(1) / counts
    return np.asarray(np.sqrt(means))


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.abs(b) < np.abs(a), b, a)


def _spread(blocks: np.ndarray, size: int | None, w: np.ndarray) -> np.ndarray:
    """Repeats each block's value at each of its weights; `size` None is a whole row."""
    columns = w.shape[1]
    return np.repeat(blocks, size or columns, axis=1)[:, :columns]


def _spacing(values: np.ndarray) -> np.ndarray:
    """Returns at least the distance between float16s around positive values."""
    return np.maximum(values * values.dtype.type(2.0**-10), values.dtype.type(2.0**-24))


def _float_steps(w: np.ndarray, digits: int, smallest: float) -> np.ndarray:
    # frexp: |w| = m · 2^e with m in [0.5, 1), where the floats are 2^(e - 1 - digits) apart.
    exponent = np.frexp(w)[1] - (1 + digits)
    return np.maximum(np.ldexp(np.float32(1), exponent), np.float32(smallest))


def _norm_steps(w: np.ndarray) -> np.ndarray:
    """Norms are stored with 1 added."""
    return np.spacing(np.abs(w + np.float32(1)))


def decay_steps(w: np.ndarray) -> np.ndarray:
    """Λ is stored as -8 softplus(Λ): rounding moves Λ by softplus/sigmoid times as much."""
    wide = w.astype(np.float64)
    softplus = np.logaddexp(0, wide)
    moved = softplus * (1 + np.exp(-wide)) * 2.0**-23
    return np.maximum(moved + np.spacing(np.abs(w)), NEGLIGIBLE).astype(np.float32)


_TRANSFORMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "norm.weight": _norm_steps,
    "recurrent_param": decay_steps,
}
"""End of a tensor's name → its steps in a GGUF file, where it is stored as something else."""


def _ranges(w: np.ndarray, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest and the least weight of each block, [rows, blocks]."""
    starts = np.arange(0, w.shape[1], size or w.shape[1])
    return np.maximum.reduceat(w, starts, axis=1), np.minimum.reduceat(w, starts, axis=1)


def _affine_ranges(w: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each block's step, its range over its number of steps; largest and least weight.

    Symmetric: 2^(bits - 1) steps from zero to the value of largest magnitude, whatever its sign;
    asymmetric: 2^bits - 1 from min(w, 0) to max(w, 0).
    """
    high, low = _ranges(w, scheme.block)
    if scheme.symmetric:
        exact = np.maximum(high, -low) / np.float32(2 ** (scheme.bits - 1))
    else:
        exact = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(2**scheme.bits - 1)
    return np.maximum(exact, NEGLIGIBLE), high, low


def _affine(w: np.ndarray, scheme: Affine) -> StepSizes:
    exact, _, _ = _affine_ranges(w, scheme)
    grid = step = _spread(exact, scheme.block, w)
    if scheme.scale == "float16":
        # the scale is rounded up, and in Core ML its product with the integer to nearest
        step = _spread(exact + _spacing(exact), scheme.block, w)
        step = step + _spacing(np.abs(w) + step)
    limit = grid * np.float32(2 ** (scheme.bits - 1) - 1) if scheme.symmetric else None
    return StepSizes(step, step, limit, grid)


def _affine_spans(w: np.ndarray, scheme: Affine, measure: Measure) -> StepSizes:
    """Rounds to nearest with the scales of the extremes, as `quantize.affine` does."""
    top = 2**scheme.bits - 1
    exact, high, low = _affine_ranges(w, scheme)
    levels = _spread(exact, scheme.block, w)
    if scheme.symmetric:
        # the extreme has the level without an opposite
        sign = np.where(high > -low, -1, 1).astype(np.float32)
        step, zeros = _spread(exact * sign, scheme.block, w), np.array(top // 2 + 1, np.float32)
    else:
        step = levels
        zeros = _spread(np.clip(np.rint(-np.minimum(low, 0) / exact), 0, top), scheme.block, w)
    error = (np.clip(np.rint(w / step) + zeros, 0, top) - zeros) * step - w
    # how far rounded scales move a level
    largest = np.maximum(high, -low)
    moved = largest * np.float32(2.0**-22)
    if scheme.scale == "float16":  # of the scale, and of its product with the level
        moved = top * _spacing(exact) + _spacing(largest)
    columns = w.shape[1]
    spans = np.arange(0, columns, columns if measure == "row" else scheme.block or columns)
    rounding = 2 * (_root_mean_squares(error, spans) + moved.max(1, keepdims=True))
    return StepSizes(np.maximum(rounding, NEGLIGIBLE), levels, spans=spans)


def _palette(w: np.ndarray, scheme: Palette, measure: Measure) -> StepSizes:
    """Twice the rms error of even levels from the least to the largest weight of a group.

    With those, rounding is off by half a step of `max_steps`; the least squared error is less.
    """
    groups = w.reshape(len(w) // scheme.group, -1).astype(np.float64)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    even = np.maximum((high - low) / (2**scheme.bits - 1), NEGLIGIBLE)
    error = groups - low
    error -= np.rint(error / even) * even
    largest = np.maximum(high, -low)
    rounded = _spacing(largest) if scheme.lut == "float16" else largest * 2.0**-23
    step = 2 * np.sqrt(np.square(error).mean(1, keepdims=True)) + rounded
    step = np.maximum(step, NEGLIGIBLE)
    of_rows = np.repeat(step, scheme.group, axis=0)
    # Half a step is an rms error here, and a step over √12 elsewhere.
    levels = 3**0.5 * of_rows
    return StepSizes(of_rows if measure == "row" else step, levels, spans=np.zeros(1, np.intp))


def _palette_gaps(dequantized: np.ndarray, scheme: Palette) -> np.ndarray:
    """Returns half the distance between the neighbours of each weight's level on both sides."""
    gaps = np.empty_like(dequantized)
    for start in range(0, len(gaps), scheme.group):
        group = dequantized[start : start + scheme.group]
        levels = np.unique(group)
        if len(levels) < 2:
            levels = np.append(levels, levels + NEGLIGIBLE)
        gaps[start : start + scheme.group] = np.gradient(levels)[np.searchsorted(levels, group)]
    return gaps


def _ggml(w: np.ndarray, blocks: Blocks) -> StepSizes:
    """Steps of whole blocks; rounded scales and minimums move every value of a block."""
    high, low = _ranges(w, blocks.size)
    if blocks.asymmetric:
        least = np.minimum(low, 0) if blocks.grouped else low
        exact, minimum = (high - least) / np.float32(blocks.below), np.abs(least)
    else:
        exact = np.maximum(high, -low) / np.float32(blocks.below)
        minimum = np.zeros_like(exact)
    smallest = blocks.scales * _LEAST  # what rounding may do to a step, however small it is
    moved = blocks.below * np.maximum(exact * _HALF, smallest)
    moved += np.maximum(minimum * _HALF, smallest)
    step = np.maximum(exact + 2 * moved, NEGLIGIBLE)
    levels, grid = step, None
    if blocks.grouped:
        step = _largest_of_group(step, blocks)
        # Rounding to nearest has the block's own step, within the resolution of its scale.
        resolution = _largest_of_group(exact, blocks) * _LEAST_SCALE
        rounded = np.float32(2 * blocks.below * smallest)
        levels = np.maximum(exact, np.maximum(resolution, rounded))
    elif not blocks.asymmetric:
        grid = _spread(np.maximum(exact, NEGLIGIBLE), blocks.size, w)
    step, levels = (_spread(values, blocks.size, w) for values in (step, levels))
    outermost = (step if grid is None else grid) * np.float32(blocks.below - 1)
    return StepSizes(step, levels, outermost if blocks.clips else None, grid)


def _largest_of_group(steps: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Returns the largest step in the group of each block, [rows, blocks]."""
    per_group = blocks.grouped // blocks.size
    return np.repeat(steps.reshape(len(steps), -1, per_group).max(2), per_group, axis=1)
