"""The distance between neighbouring values that a scheme can store, at each weight of a tensor."""

from dataclasses import dataclass

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.scheme import Affine, Float, Ggml, Palette, Scheme
from rgexport.validate.weights import ggml_steps

_AS_GOOD_AS_ZERO = 2.0**-100
"""No integer step is taken for smaller than this: such weights may be stored as zeros."""


@dataclass(frozen=True)
class StepSizes:
    """What the error of the weights [rows, columns] of a slab is measured by.

    Attributes:
        step: at each weight; where rows are `grouped`, of each group, [groups, 1].
        own: the distance of levels in a weight's own block, at each weight, or of each row,
            [rows, 1], where `step` is only a bound of it; else None.
        limit: the magnitude, at each weight, beyond which it may be stored as the outermost
            level; None where no level is missing.
        grid: the distance of levels at each weight, without what the rounding of scales adds to
            it; None where 0 is no level, or levels are chosen for the least squared error.
        grouped: rows share their values, which are chosen for the least squared error: no weight
            by itself need be near to one of them, but the whole group is.
    """

    step: np.ndarray
    own: np.ndarray | None = None
    limit: np.ndarray | None = None
    grid: np.ndarray | None = None
    grouped: bool = False

    def without_clipping(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The error against what the outermost levels allow.

        Some schemes have one level less on one side, so a value beyond it may be stored as that
        level. Which side that is, is the encoder's choice: the smaller error counts.
        """
        if self.limit is None:
            return error
        beyond = w - np.clip(w, -self.limit, self.limit)
        return np.where(np.abs(error + beyond) < np.abs(error), error + beyond, error)

    def beyond_rounding(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The error against that of rounding to nearest, clipped or not: which, the encoder chose.

        Rounding is no noise where a block has one weight so large that most others are nearer to
        zero than to the first level.
        """
        if self.grid is None:
            return self.without_clipping(error, w)
        nearest = np.rint(w / self.grid) * self.grid
        rest = error - (nearest - w)
        if self.limit is None:
            return rest
        clipped = error - (np.clip(nearest, -self.limit, self.limit) - w)
        return np.where(np.abs(clipped) < np.abs(rest), clipped, rest)

    def rounding(self, columns: int) -> np.ndarray:
        """Σ step²/12 of each row, [rows] float64: the noise of rounding to nearest.

        An error that is uniform within half a step has the variance step²/12.
        """
        square = np.square(self._levels(), dtype=np.float64)
        return square.sum(1) * (columns / square.shape[1] / 12)

    def total(self, columns: int) -> float:
        """Σ step over all weights."""
        levels = self._levels()
        return float(levels.sum(dtype=np.float64)) * columns / levels.shape[1]

    def _levels(self) -> np.ndarray:
        return self.step if self.own is None else self.own

    def largest(self, error: np.ndarray) -> float:
        """The largest error in steps: of a weight, or the root mean square of a group."""
        if self.grouped:
            groups = error.reshape(len(self.step), -1).astype(np.float64)
            error = np.sqrt(np.square(groups).mean(1, keepdims=True))
        return float((np.abs(error) / self.step).max(initial=0))


def step_sizes(name: str, w: np.ndarray, stored: StoredTensor) -> StepSizes:
    """The steps of the weights [rows, columns], from them and the way of storing alone.

    The rows are whole groups of `rows_together`.
    """
    scheme = stored.scheme
    if isinstance(scheme, Affine):
        return _affine(w, scheme)
    if isinstance(scheme, Palette):
        return _palette(w, scheme)
    for end, steps in ggml_steps.TRANSFORMED.items():
        if name.endswith(end):
            return StepSizes(steps(w))
    if isinstance(scheme, Float):
        return StepSizes(_float_steps(w, *_FLOATS[scheme.dtype]))
    return _ggml(w, scheme.type)


def shown_rounding(
    name: str, stored_weights: np.ndarray, stored: StoredTensor
) -> tuple[np.ndarray, float]:
    """Σ step²/12 of each row, and Σ step, of the steps that an artifact's weights themselves show.

    Without those that they were made from: where levels are even, the outermost ones of a block
    tell their distance.
    """
    columns = stored_weights.shape[1]
    if isinstance(stored.scheme, Affine):
        exact, counts = _affine_steps(stored_weights, stored.scheme)
        return np.square(exact, dtype=np.float64) @ (counts / 12), float((exact @ counts).sum())
    if isinstance(stored.scheme, Palette):
        steps = StepSizes(_palette_gaps(stored_weights, stored.scheme))
    else:
        steps = step_sizes(name, stored_weights, stored)
    return steps.rounding(columns), steps.total(columns)


def rows_together(scheme: Scheme) -> int:
    """How many rows have one step_sizes."""
    return scheme.group if isinstance(scheme, Palette) else 1


def is_quantized(scheme: Scheme) -> bool:
    """Whether weights are stored as integers or indices, and not as floats."""
    return not isinstance(scheme, Float) and scheme.label not in ggml_steps.FLOATS


def is_searched(scheme: Scheme, weighted: bool) -> bool:
    """Whether levels are chosen for the least squared error, not for each weight."""
    if not isinstance(scheme, Ggml):
        return isinstance(scheme, Palette)
    blocks = ggml_steps.BLOCKS.get(scheme.type)
    return blocks is not None and (blocks.grouped > 0 or is_weighted(scheme, weighted))


def is_weighted(scheme: Scheme, weighted: bool) -> bool:
    """Whether some weights count more than others, where a file has an importance matrix."""
    if not (weighted and isinstance(scheme, Ggml) and is_quantized(scheme)):
        return False
    return ggml_steps.BLOCKS[scheme.type].below < ggml_steps.BLOCKS["q8_0"].below


def _ggml(w: np.ndarray, kind: str) -> StepSizes:
    blocks = ggml_steps.BLOCKS.get(kind)
    if blocks is None:
        return StepSizes(_float_steps(w, *ggml_steps.FLOATS[kind]))
    step = ggml_steps.block_steps(w, blocks)
    limit = step * np.float32(blocks.below - 1) if blocks.clips else None
    own = ggml_steps.own_steps(w, blocks) if blocks.grouped else None
    return StepSizes(step, own, limit, ggml_steps.block_grid(w, blocks))


_FLOATS = {"float32": (23, 2.0**-126), "float16": (10, 2.0**-24)}
"""dtype → digits behind the point, smallest step."""


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
        # the scale is rounded up, and its product with the integer to nearest
        step = _spread(exact + _spacing(exact), block, w)
        step = step + _spacing(np.abs(w) + step)
    return StepSizes(step, limit=limit, grid=grid)


def _affine_steps(w: np.ndarray, scheme: Affine) -> tuple[np.ndarray, np.ndarray]:
    """The step of each block, [rows, blocks], and how many weights it has, [blocks] float64."""
    starts = np.arange(0, w.shape[1], scheme.block or w.shape[1])
    high = np.maximum.reduceat(w, starts, axis=1)
    low = np.minimum.reduceat(w, starts, axis=1)
    if scheme.symmetric:
        exact = np.maximum(high, -low) / np.float32(2 ** (scheme.bits - 1))
    else:
        exact = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(2**scheme.bits - 1)
    counts = np.diff(starts, append=w.shape[1]).astype(np.float64)
    return np.maximum(exact, np.float32(_AS_GOOD_AS_ZERO)), counts


def _palette(w: np.ndarray, scheme: Palette) -> StepSizes:
    """Twice the rms error of even levels from the least to the largest weight of a group.

    With those, rounding is off by half a step of `max_steps`; the least squared error is less.
    """
    groups = w.reshape(len(w) // scheme.group, -1).astype(np.float64)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    even = np.maximum((high - low) / (2**scheme.bits - 1), _AS_GOOD_AS_ZERO)
    error = groups - low
    error -= np.rint(error / even) * even
    largest = np.maximum(high, -low)
    rounded = _spacing(largest) if scheme.lut == "float16" else largest * 2.0**-23
    step = 2 * np.sqrt(np.square(error).mean(1, keepdims=True)) + rounded
    step = np.maximum(step, _AS_GOOD_AS_ZERO)
    # Half a step is an rms error here, and a step over √12 elsewhere.
    return StepSizes(step, np.repeat(3**0.5 * step, scheme.group, axis=0), grouped=True)


def _palette_gaps(stored_weights: np.ndarray, scheme: Palette) -> np.ndarray:
    """At each weight, half the distance between the neighbours of its level on both sides."""
    gaps = np.empty_like(stored_weights)
    for start in range(0, len(gaps), scheme.group):
        group = stored_weights[start : start + scheme.group]
        levels = np.unique(group)
        if len(levels) < 2:
            levels = np.append(levels, levels + np.float32(_AS_GOOD_AS_ZERO))
        gaps[start : start + scheme.group] = np.gradient(levels)[np.searchsorted(levels, group)]
    return gaps


def _spread(blocks: np.ndarray, block: int, w: np.ndarray) -> np.ndarray:
    """The value of a weight's block, at each weight."""
    return np.repeat(blocks, block, axis=1)[:, : w.shape[1]]


def _spacing(values: np.ndarray) -> np.ndarray:
    """At least the distance between float16s around positive values."""
    return np.maximum(values * values.dtype.type(2.0**-10), values.dtype.type(2.0**-24))
