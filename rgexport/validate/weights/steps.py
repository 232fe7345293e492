"""Computes the distance between neighbouring values of a storage scheme, at each weight.

Steps follow from the original weights and the scheme, not from the artifact's scales. So they show
a wrong scale, even where the noise of four bits would hide it in a norm.
"""

from dataclasses import dataclass, replace
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
    """Even levels in each block of a row.

    Attributes:
        size: weights that share a step.
        below: steps from 0 to the level of the largest magnitude, whatever its sign; where
            `asymmetric`, steps from the least weight to the largest.
        with_zero: extends that range to 0, at its lower end or at both.
        clips: whether the side opposite to the largest magnitude has one level less.
        grouped: weights whose steps are multiples of one number, so that small steps are not
            exact: the largest step of the group counts. 0 for types without such groups; the
            others choose their steps for the least squared error.
        scales: the largest multiple.
    """

    size: int
    below: int
    asymmetric: bool = False
    with_zero: Literal["", "low", "both"] = ""
    clips: bool = False
    grouped: int = 0
    scales: int = 1

    @property
    def inner(self) -> np.float32:
        """Steps from 0 to the outermost level on the side that has one less."""
        return np.float32(self.below - 1)


_LOW = Blocks(0, 0, asymmetric=True, with_zero="low", grouped=256)
BLOCKS = {
    "q8_0": Blocks(32, 127),
    "q4_0": Blocks(32, 8, clips=True),
    "q5_0": Blocks(32, 16, clips=True),
    "q4_1": Blocks(32, 15, asymmetric=True),
    "q5_1": Blocks(32, 31, asymmetric=True),
    "q2_k": replace(_LOW, size=16, below=3, scales=15),
    "q3_k": Blocks(16, 4, clips=True, grouped=256, scales=32),
    "q4_k": replace(_LOW, size=32, below=15, scales=63),
    "q5_k": replace(_LOW, size=32, below=31, scales=63),
    "q6_k": Blocks(16, 32, clips=True, grouped=256, scales=128),
}
"""ggml type → its blocks, with float16 scales (ggml-quants.c: quantize_row_*_ref)."""


@dataclass(frozen=True)
class StepSizes:
    """Units of the errors of a slab of weights [rows, columns].

    Attributes:
        step: at each weight, [rows, columns]; with `spans`, [rows or groups of rows, spans].
        levels: the distance of levels at each weight or of each row, [rows, 1]. `step` may be
            larger: it allows for rounded scales.
        limit: the magnitude at each weight beyond which it may be stored as the outermost level;
            None where no level is missing.
        grid: `levels` before scales are rounded; None where 0 is no level, or levels are chosen
            for the least squared error.
        spans: first columns of the blocks, rows or groups of rows whose root mean squares count;
            None where single weights do.
    """

    step: np.ndarray
    levels: np.ndarray
    limit: np.ndarray | None = None
    grid: np.ndarray | None = None
    spans: np.ndarray | None = None

    def without_clipping(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Subtracts the error of values beyond the outermost levels.

        The encoder chooses which side has one level less, so the smaller error counts.
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

        The `squares` [columns] of inputs multiply each column's share.
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
    """Returns the steps of the tensor `name` from its original weights.

    `w` is [rows, columns] float32, in whole groups of `rows_together`. One step of a block or row
    is twice the root mean square of rounding to nearest there: rounding is off by half a step.
    """
    if isinstance(scheme, Affine):
        if measure in ("block", "row"):
            return _affine_spans(w, scheme, measure)
        return _affine(w, scheme)
    if isinstance(scheme, Palette):
        return _palette(w, scheme, measure)
    if scheme.label in BLOCKS:
        return _ggml(w, BLOCKS[scheme.label])
    if name.endswith("norm.weight"):  # stored with 1 added
        steps = np.spacing(np.abs(w + np.float32(1)))
    elif name.endswith("recurrent_param"):
        steps = decay_steps(w)
    else:
        steps = _float_steps(w, *_FLOATS[scheme.label])
    return StepSizes(steps, steps)


def shown_steps(name: str, dequantized: np.ndarray, scheme: Scheme) -> StepSizes:
    """Returns the steps that an artifact's weights [rows, columns] show, without the original's.

    Where levels are even, the outermost ones of a block tell their distance.
    """
    if isinstance(scheme, Affine):
        blocks = _affine_blocks(scheme, dequantized)
        exact, _, _ = _block_steps(dequantized, blocks)
        steps = _spread(exact, blocks, dequantized)
        return StepSizes(steps, steps)
    if isinstance(scheme, Palette):
        steps = _palette_gaps(dequantized, scheme)
        return StepSizes(steps, steps)
    return step_sizes(name, dequantized, scheme)


def rows_together(scheme: Scheme) -> int:
    """Number of rows that share their steps."""
    return scheme.group if isinstance(scheme, Palette) else 1


def is_quantized(scheme: Scheme) -> bool:
    """Returns whether weights are stored as integers or indices, and not as floats."""
    return scheme.label not in _FLOATS


def _root_mean_squares(error: np.ndarray, spans: np.ndarray, rows: int = 1) -> np.ndarray:
    """Averages groups of `rows`, from each first column in `spans` to the next: [groups, spans]."""
    squares = np.square(error, dtype=np.float64)
    counts = rows * np.diff(spans, append=error.shape[1])
    sums = np.add.reduceat(squares, spans, axis=1)
    means = sums.reshape(len(error) // rows, rows, len(spans)).sum(1) / counts
    return np.asarray(np.sqrt(means))


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.abs(b) < np.abs(a), b, a)


def _spread(values: np.ndarray, blocks: Blocks, w: np.ndarray) -> np.ndarray:
    """Repeats each block's value at each of its weights."""
    return np.repeat(values, blocks.size, axis=1)[:, : w.shape[1]]


def _spacing(values: np.ndarray) -> np.ndarray:
    """Returns at least the distance between float16s around positive values."""
    return np.maximum(values * values.dtype.type(2.0**-10), values.dtype.type(2.0**-24))


def _float_steps(w: np.ndarray, digits: int, smallest: float) -> np.ndarray:
    # frexp: |w| = m · 2^e with m in [0.5, 1), where the floats are 2^(e - 1 - digits) apart.
    exponent = np.frexp(w)[1] - (1 + digits)
    return np.maximum(np.ldexp(np.float32(1), exponent), np.float32(smallest))


def decay_steps(w: np.ndarray) -> np.ndarray:
    """GGUF stores Λ as -8 softplus(Λ): rounding moves Λ by softplus/sigmoid times as much."""
    wide = w.astype(np.float64)
    softplus = np.logaddexp(0, wide)
    moved = softplus * (1 + np.exp(-wide)) * 2.0**-23
    return np.maximum(moved + np.spacing(np.abs(w)), NEGLIGIBLE).astype(np.float32)


def _block_steps(w: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each block's step, its range over its number of steps; and the range's ends."""
    starts = np.arange(0, w.shape[1], blocks.size)
    high, low = (end.reduceat(w, starts, axis=1) for end in (np.maximum, np.minimum))
    if not blocks.asymmetric:
        return np.maximum(np.maximum(high, -low) / np.float32(blocks.below), NEGLIGIBLE), high, low
    if blocks.with_zero:
        low = np.minimum(low, 0)
    if blocks.with_zero == "both":
        high = np.maximum(high, 0)
    return np.maximum((high - low) / np.float32(blocks.below), NEGLIGIBLE), high, low


def _affine_blocks(scheme: Affine, w: np.ndarray) -> Blocks:
    size = scheme.block or w.shape[1]
    if scheme.symmetric:
        return Blocks(size, 2 ** (scheme.bits - 1), clips=True)
    return Blocks(size, 2**scheme.bits - 1, asymmetric=True, with_zero="both")


def _affine(w: np.ndarray, scheme: Affine) -> StepSizes:
    blocks = _affine_blocks(scheme, w)
    exact, _, _ = _block_steps(w, blocks)
    grid = step = _spread(exact, blocks, w)
    if scheme.scale == "float16":
        # the scale is rounded up, and in Core ML its product with the integer to nearest
        step = _spread(exact + _spacing(exact), blocks, w)
        step = step + _spacing(np.abs(w) + step)
    return StepSizes(step, step, grid * blocks.inner if blocks.clips else None, grid)


def _affine_spans(w: np.ndarray, scheme: Affine, measure: Measure) -> StepSizes:
    """Rounds to nearest with the scales of the extremes, as `quantize.affine` does."""
    top, blocks = 2**scheme.bits - 1, _affine_blocks(scheme, w)
    exact, high, low = _block_steps(w, blocks)
    levels = _spread(exact, blocks, w)
    if scheme.symmetric:
        # the extreme has the level without an opposite
        sign = np.where(high > -low, -1, 1).astype(np.float32)
        step, zeros = _spread(exact * sign, blocks, w), np.array(top // 2 + 1, np.float32)
    else:
        step, zeros = levels, _spread(np.clip(np.rint(-low / exact), 0, top), blocks, w)
    error = (np.clip(np.rint(w / step) + zeros, 0, top) - zeros) * step - w
    # how far rounded scales move a level
    largest = np.maximum(high, -low)
    moved = largest * np.float32(2.0**-22)
    if scheme.scale == "float16":  # of the scale, and of its product with the level
        moved = top * _spacing(exact) + _spacing(largest)
    columns = w.shape[1]
    spans = np.arange(0, columns, columns if measure == "row" else blocks.size)
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
    levels = 3**0.5 * of_rows  # half a step is an rms error here, and a step over √12 elsewhere
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
    exact, _, low = _block_steps(w, blocks)
    minimum = np.abs(low) if blocks.asymmetric else np.zeros_like(low)
    smallest = blocks.scales * _LEAST  # what rounding may do to a step, however small it is
    moved = blocks.below * np.maximum(exact * _HALF, smallest)
    moved += np.maximum(minimum * _HALF, smallest)
    step = levels = exact + 2 * moved
    grid = None
    if blocks.grouped:
        step = _largest_of_group(step, blocks)
        # Rounding to nearest has the block's own step, within the resolution of its scale.
        resolution = _largest_of_group(exact, blocks) * _LEAST_SCALE
        rounded = np.float32(2 * blocks.below * smallest)
        levels = np.maximum(exact, np.maximum(resolution, rounded))
    elif not blocks.asymmetric:
        grid = _spread(exact, blocks, w)
    step, levels = (_spread(values, blocks, w) for values in (step, levels))
    limit = (step if grid is None else grid) * blocks.inner if blocks.clips else None
    return StepSizes(step, levels, limit, grid)


def _largest_of_group(steps: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Returns the largest step in the group of each block, [rows, blocks]."""
    per_group = blocks.grouped // blocks.size
    return np.repeat(steps.reshape(len(steps), -1, per_group).max(2), per_group, axis=1)
