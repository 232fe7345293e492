"""The distance between neighbouring values that a scheme can store, at each weight of a tensor."""

from dataclasses import dataclass

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.scheme import Affine, Palette, Scheme
from rgexport.validate.weights import ggml_steps
from rgexport.validate.weights.expectations import Expectation
from rgexport.validate.weights.ggml_steps import BLOCKS, NEGLIGIBLE

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
class StepSizes:
    """What the error of the weights [rows, columns] of a slab is measured by.

    Attributes:
        step: at each weight; where `spans` are given, of each, [rows or groups of rows, spans].
        own: the distance of levels in a weight's own block, at each weight, or of each row,
            [rows, 1]; None where it is `step`, which may be only an upper bound of it.
        limit: the magnitude, at each weight, beyond which it may be stored as the outermost
            level; None where no level is missing.
        grid: the distance of levels at each weight, before scales are rounded; None where 0 is no
            level, or levels are chosen for the least squared error.
        spans: the first columns of the blocks, rows or groups of rows whose root mean squares
            count; None where single weights do.
    """

    step: np.ndarray
    own: np.ndarray | None = None
    limit: np.ndarray | None = None
    grid: np.ndarray | None = None
    spans: np.ndarray | None = None

    def without_clipping(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The error less what comes from values beyond the outermost levels.

        Some schemes have one level less on one side. Which side that is, is the encoder's choice,
        so the smaller error counts.
        """
        if self.limit is None:
            return error
        return _smaller(error, error + (w - np.clip(w, -self.limit, self.limit)))

    def beyond_rounding(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The error less that of rounding to nearest, clipped or not, whichever the encoder chose.

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
        """Σ step²/12 of each row, [rows] float64: the noise of rounding to nearest.

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
        """Σ step over all weights."""
        levels = self.levels
        return float(levels.sum(dtype=np.float64)) * columns / levels.shape[1]

    @property
    def levels(self) -> np.ndarray:
        """The distance of levels at each weight, or one number for each row, [rows, 1]."""
        return self.step if self.own is None else self.own

    def largest(self, error: np.ndarray) -> float:
        """The largest error in steps: of a weight, or the root mean square of a span."""
        if self.spans is not None:
            error = _root_mean_squares(error, self.spans, len(error) // max(1, len(self.step)))
        return float((np.abs(error) / self.step).max(initial=0))


def step_sizes(
    name: str, w: np.ndarray, stored: StoredTensor, expected: Expectation | None = None
) -> StepSizes:
    """The steps of the weights [rows, columns], from them and the way of storing alone.

    Args:
        name: of the tensor.
        w: its rows, in whole groups of `rows_together`.
        stored: how they are stored.
        expected: what is measured where that is more than single weights.
    """
    if expected is not None and expected.measure in ("block", "row"):
        return _steps_of_spans(name, w, stored, expected.measure == "row")
    scheme = stored.scheme
    if isinstance(scheme, Affine):
        return _affine(w, scheme)
    if isinstance(scheme, Palette):
        return _palette(w, scheme)
    for end, steps in ggml_steps.TRANSFORMED.items():
        if name.endswith(end):
            return StepSizes(steps(w))
    if scheme.label in _FLOATS:
        return StepSizes(_float_steps(w, *_FLOATS[scheme.label]))
    blocks = BLOCKS[scheme.label]
    step, grid = ggml_steps.block_steps(w, blocks), ggml_steps.block_grid(w, blocks)
    outermost = (step if grid is None else grid) * np.float32(blocks.below - 1)
    return StepSizes(
        step,
        own=ggml_steps.own_steps(w, blocks) if blocks.grouped else None,
        limit=outermost if blocks.clips else None,
        grid=grid,
    )


def shown_steps(name: str, dequantized: np.ndarray, stored: StoredTensor) -> StepSizes:
    """The steps of an artifact's weights [rows, columns], from these alone.

    The original weights are not needed: where levels are even, the outermost ones of a block tell
    their distance.
    """
    if isinstance(stored.scheme, Affine):
        exact, _ = _affine_steps(dequantized, stored.scheme)
        return StepSizes(_spread(exact, stored.scheme.block or dequantized.shape[1], dequantized))
    if isinstance(stored.scheme, Palette):
        return StepSizes(_palette_gaps(dequantized, stored.scheme))
    return step_sizes(name, dequantized, stored)


def rows_together(scheme: Scheme) -> int:
    """How many rows share their steps."""
    return scheme.group if isinstance(scheme, Palette) else 1


def is_quantized(scheme: Scheme) -> bool:
    """Whether weights are stored as integers or indices, and not as floats."""
    return scheme.label not in _FLOATS


def _steps_of_spans(name: str, w: np.ndarray, stored: StoredTensor, rows: bool) -> StepSizes:
    """Twice the root mean square of rounding to nearest, of each row or of each block.

    So that, as for single weights, rounding to nearest is off by half a step.
    """
    scheme, columns = stored.scheme, w.shape[1]
    spans = np.zeros(1, np.intp)
    if isinstance(scheme, Affine):
        if not rows:
            spans = np.arange(0, columns, scheme.block or columns)
        error, moved = _rounding_error(w, scheme)
        exact, _ = _affine_steps(w, scheme)
        own = _spread(exact, scheme.block or columns, w)
    else:
        plain = step_sizes(name, w, stored)
        own = plain.step if plain.own is None else plain.own
        error, moved = np.broadcast_to(own * 12**-0.5, w.shape), np.zeros((1, 1))
    step = 2 * (_root_mean_squares(error, spans) + moved.max(1, keepdims=True))
    return StepSizes(np.maximum(step, NEGLIGIBLE), own=own, spans=spans)


def _rounding_error(w: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """The error of rounding to nearest with the scales of the extremes, [rows, columns].

    And how far a level may be from where it would be if scales were not rounded, [rows, blocks].
    """
    block, top = scheme.block or w.shape[1], 2**scheme.bits - 1
    high, low, exact, _ = _ranges(w, scheme)
    if scheme.symmetric:
        # As in `quantize.affine`, the extreme has the level without an opposite.
        sign = np.where(high > -low, -1, 1).astype(np.float32)
        step, zeros = _spread(exact * sign, block, w), np.array(top // 2 + 1, np.float32)
    else:
        step = _spread(exact, block, w)
        zeros = _spread(np.clip(np.rint(-np.minimum(low, 0) / exact), 0, top), block, w)
    levels = np.clip(np.rint(w / step) + zeros, 0, top) - zeros
    largest = np.maximum(high, -low)
    moved = largest * np.float32(2.0**-22)
    if scheme.scale == "float16":  # of the scale, and of its product with the level
        moved = top * _spacing(exact) + _spacing(largest)
    return levels * step - w, moved


def _root_mean_squares(error: np.ndarray, spans: np.ndarray, rows: int = 1) -> np.ndarray:
    """Of groups of `rows`, from each first column in `spans` to the next: [groups, spans]."""
    squares = np.square(error, dtype=np.float64)
    counts = rows * np.diff(spans, append=error.shape[1])
    sums = np.add.reduceat(squares, spans, axis=1)
    found = np.sqrt(sums.reshape(len(error) // rows, rows, len(spans)).sum(1) / counts)
    return np.asarray(found)


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.abs(b) < np.abs(a), b, a)


def _float_steps(w: np.ndarray, digits: int, smallest: float) -> np.ndarray:
    # frexp: |w| = m · 2^e with m in [0.5, 1), where the floats are 2^(e - 1 - digits) apart.
    exponent = np.frexp(w)[1] - (1 + digits)
    return np.maximum(np.ldexp(np.float32(1), exponent), np.float32(smallest))


def _affine(w: np.ndarray, scheme: Affine) -> StepSizes:
    """A block's range over the number of steps in it.

    Symmetric: 2^(bits - 1) from zero to the value of largest magnitude, whatever its sign;
    asymmetric: 2^bits - 1 from min(w, 0) to max(w, 0).
    """
    block, below = scheme.block or w.shape[1], 2 ** (scheme.bits - 1)
    exact, _ = _affine_steps(w, scheme)
    grid = step = _spread(exact, block, w)
    limit = step * np.float32(below - 1) if scheme.symmetric else None
    if scheme.scale == "float16":
        # the scale is rounded up, and in Core ML its product with the integer to nearest
        step = _spread(exact + _spacing(exact), block, w)
        step = step + _spacing(np.abs(w) + step)
    return StepSizes(step, limit=limit, grid=grid)


def _affine_steps(w: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """The step of each block, [rows, blocks], and how many weights it has, [blocks] float64."""
    _, _, exact, counts = _ranges(w, scheme)
    return exact, counts


def _ranges(w: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Largest and least weight of each block, and what `_affine_steps` gives."""
    starts = np.arange(0, w.shape[1], scheme.block or w.shape[1])
    high = np.maximum.reduceat(w, starts, axis=1)
    low = np.minimum.reduceat(w, starts, axis=1)
    if scheme.symmetric:
        exact = np.maximum(high, -low) / np.float32(2 ** (scheme.bits - 1))
    else:
        exact = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(2**scheme.bits - 1)
    counts = np.diff(starts, append=w.shape[1]).astype(np.float64)
    return high, low, np.maximum(exact, NEGLIGIBLE), counts


def _palette(w: np.ndarray, scheme: Palette) -> StepSizes:
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
    # Half a step is an rms error here, and a step over √12 elsewhere.
    own = np.repeat(3**0.5 * step, scheme.group, axis=0)
    return StepSizes(step, own, spans=np.zeros(1, np.intp))


def _palette_gaps(dequantized: np.ndarray, scheme: Palette) -> np.ndarray:
    """At each weight, half the distance between the neighbours of its level on both sides."""
    gaps = np.empty_like(dequantized)
    for start in range(0, len(gaps), scheme.group):
        group = dequantized[start : start + scheme.group]
        levels = np.unique(group)
        if len(levels) < 2:
            levels = np.append(levels, levels + NEGLIGIBLE)
        gaps[start : start + scheme.group] = np.gradient(levels)[np.searchsorted(levels, group)]
    return gaps


def _spread(blocks: np.ndarray, block: int, w: np.ndarray) -> np.ndarray:
    """The value of a weight's block, at each weight."""
    return np.repeat(blocks, block, axis=1)[:, : w.shape[1]]


def _spacing(values: np.ndarray) -> np.ndarray:
    """At least the distance between float16s around positive values."""
    return np.maximum(values * values.dtype.type(2.0**-10), values.dtype.type(2.0**-24))
