"""Affine integers in blocks: `w ≈ (q - zero_point) * scale`.

A row of K weights is cut into ceil(K / block) blocks; the last one is padded with zeros. The parts
have the layout of ONNX Runtime's `MatMulNBits` (its ContribOperators.md), row by row:

| part | per row | |
|---|---|---|
| `data` | ceil(blocks · block · bits / 8) bytes | unsigned, see `packing` |
| `scales` | blocks float32 or float16 | |
| `zero_points` | ceil(blocks · bits / 8) bytes | asymmetric only, packed likewise |

Scales are rounded to float16 before the integers are chosen, and away from zero, so that no weight
is beyond the last level. Integers of 4 or 8 bits are packed. Those of other sizes have no packed
form here: `TwoLevel` looks for the scales of its levels with this scheme.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rgexport.files.typed_json import Size
from rgexport.kernels.rounding import library
from rgexport.quantize.algorithms.gptq import refined
from rgexport.quantize.algorithms.statistics import Hessian, Statistics
from rgexport.quantize.schemes.base import FloatDtype, Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.blocks import (
    BLOCKS,
    SMALLEST_BLOCK,
    BlockRanges,
    block_ranges,
    largest_divisor,
    storable,
    with_least_padding,
)
from rgexport.quantize.schemes.packing import pack, packed_width, unpack
from rgexport.quantize.schemes.steps import (
    NEGLIGIBLE,
    Measure,
    StepSizes,
    float16_spacing,
    span_steps,
)

_LEAST_IMPORTANCE = np.float32(1e-30)

_LANES = 16
"""The blocks of the search kernel are multiples of this."""

_FLOAT32_ERROR = np.float32(2.0**-22)
"""Relative error of a scale and of its product with a level, both in float32."""


@dataclass(frozen=True)
class _BlockLevels:
    """The levels of rows and the grids of their blocks, changed in place.

    Attributes:
        levels: uint8 [n, blocks · block].
        scales: float32 [n, blocks].
        zeros: zero points, whole numbers in float32 [n, blocks].
    """

    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


@dataclass(frozen=True)
class Affine(Uniform):
    """`bits`-bit unsigned integers with one scale per `block` columns of a row, or per row (None).

    Symmetric: the zero point is `2**(bits - 1)`; else there is an integer one per block.
    """

    bits: Literal[2, 3, 4, 5, 6, 8]
    block: Size | None
    symmetric: bool
    scale: FloatDtype = "float32"
    algorithm: str = field(default="rtn", compare=False)
    kind: Literal["affine"] = "affine"

    rounds_activations = True
    has_matmul_nbits_layout = True
    has_block_options = True

    @property
    def label(self) -> str:
        """The name for people, such as `int4/32 asym`."""
        name = f"int{self.bits}/{self.block or 'row'}"
        if self.symmetric:
            return name
        return f"{name} asym"

    @property
    def bits_per_weight(self) -> float:
        """Bits of a level, with its share of the scale and zero point of a block."""
        if self.block is None:
            return float(self.bits)
        bits_of_block = 8 * np.dtype(self.scale).itemsize
        if not self.symmetric:
            bits_of_block += self.bits
        return self.bits + bits_of_block / self.block

    @property
    def symmetric_bits(self) -> int | None:
        """Bits of levels around the fixed zero point; None with zero points for each block."""
        if self.symmetric:
            return self.bits
        return None

    @property
    def scale_dtype(self) -> FloatDtype:
        """The dtype of its scales, one for each block."""
        return self.scale

    @property
    def largest_multiple(self) -> int:
        """The distance of the outermost level from the zero point."""
        if self.symmetric:
            return self._middle
        return self._top

    @property
    def has_onnx_op(self) -> bool:
        """Whether `MatMulNBits` takes such blocks, and graphs can unpack such levels."""
        return self.block in BLOCKS and self.bits in (4, 8)

    @property
    def has_mil_op(self) -> bool:
        """Whether `constexpr_blockwise_shift_scale` has integers of so many bits."""
        return self.bits in (4, 8)

    @property
    def _top(self) -> int:
        """The largest level."""
        return int(2**self.bits - 1)

    @property
    def _middle(self) -> int:
        """The zero point of symmetric levels."""
        return int(2 ** (self.bits - 1))

    def block_size(self, columns: int) -> int:
        """Returns the weights of a block in rows of so many columns."""
        return self.block or columns

    def num_blocks(self, columns: int) -> int:
        """Returns the blocks of a row, with the one that is padded."""
        return -(-columns // self.block_size(columns))

    def pads_zero_points(self, columns: int) -> bool:
        """Whether a row has an odd number of zero points of 4 bits."""
        if self.symmetric or self.bits != 4:
            return False
        return self.num_blocks(columns) % 2 == 1

    def part_shapes(self, shape: Shape) -> PartShapes:
        """Returns `data`, `scales` and, if asymmetric, `zero_points` of a matrix [N, K]."""
        rows, columns = shape
        blocks = self.num_blocks(columns)
        padded = blocks * self.block_size(columns)
        shapes: PartShapes = {
            "data": ("uint8", (rows, packed_width(padded, self.bits))),
            "scales": (self.scale, (rows, blocks)),
        }
        if not self.symmetric:
            shapes["zero_points"] = ("uint8", (rows, packed_width(blocks, self.bits)))
        return shapes

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        """Returns float32 [n, columns]: (level − zero point) · scale."""
        scales = arrays["scales"].astype(np.float32)
        rows, blocks = scales.shape
        block = self.block_size(columns)
        padded = blocks * block

        levels = unpack(arrays["data"], self.bits)[:, :padded]
        weights = levels.astype(np.float32).reshape(rows, blocks, block)
        if self.symmetric:
            weights -= self._middle
        else:
            zero_points = unpack(arrays["zero_points"], self.bits)
            weights -= zero_points[:, :blocks, None]
        weights *= scales[..., None]

        flat = weights.reshape(rows, padded)
        return np.ascontiguousarray(flat[:, :columns])

    def _round(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        weights = self._in_blocks(rows)
        scales, zeros = self._extreme_scales(weights)
        # In place: a slab of weights in float32 is large.
        weights *= np.reciprocal(scales)[..., None]
        np.rint(weights, out=weights)
        weights += zeros[..., None]
        np.clip(weights, 0, self._top, out=weights)
        return self._pack(weights.astype(np.uint8), scales, zeros)

    def _clip_search(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        levels, scales, zeros = self.search(rows)
        return self._pack(levels, scales, zeros)

    def _weighted_search(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        levels, scales, zeros = self.search(rows, statistics)
        return self._pack(levels, scales, zeros)

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        nearest, scales, zeros = self.search(rows, statistics)
        count, blocks, block = nearest.shape
        chosen = _BlockLevels(nearest.reshape(count, blocks * block), scales, zeros)
        for hessian in statistics.hessians:
            if self._cuts_a_block(hessian, rows.shape[1]):
                self._refine_levels(rows, chosen, hessian)
            else:
                self._refine_levels_and_scales(rows, chosen, hessian)
        levels = chosen.levels.reshape(nearest.shape)
        return self._pack(levels, scales, zeros)

    encoders: ClassVar = {
        "rtn": _round,
        "search": _clip_search,
        "importance": _weighted_search,
        "gptq": _gptq,
    }

    def _cuts_a_block(self, hessian: Hessian, columns: int) -> bool:
        """Whether a block belongs to this Hessian and to another one."""
        block = self.block_size(columns)
        starts_inside = hessian.start % block != 0
        stops_inside = hessian.stop % block != 0 and hessian.stop != columns
        return starts_inside or stops_inside

    def _refine_levels(self, rows: np.ndarray, chosen: _BlockLevels, hessian: Hessian) -> None:
        """Chooses the levels of a Hessian's columns, in place; scales stay as they are.

        The grid has a scale for each column, because blocks do not begin where the Hessian does.
        """
        columns = slice(hessian.start, hessian.stop)
        block = self.block_size(rows.shape[1])
        block_of_column = np.arange(hessian.start, hessian.stop) // block
        scale = np.ascontiguousarray(chosen.scales[:, block_of_column])
        zero = np.ascontiguousarray(chosen.zeros[:, block_of_column])

        grid = library.Grid(1, self._top, scale, -scale * zero)
        nearest = chosen.levels[:, columns]
        chosen.levels[:, columns] = refined(rows[:, columns], grid, hessian, nearest)

    def _refine_levels_and_scales(
        self, rows: np.ndarray, chosen: _BlockLevels, hessian: Hessian
    ) -> None:
        """Chooses levels and scales of a Hessian's columns, which are whole blocks, in place."""
        columns = slice(hessian.start, hessian.stop)
        block = self.block_size(rows.shape[1])
        blocks = slice(hessian.start // block, -(-hessian.stop // block))
        scale = chosen.scales[:, blocks].copy()
        zero = chosen.zeros[:, blocks].copy()

        grid = library.Grid(block, self._top, scale, -scale * zero)
        chosen.levels[:, columns] = refined(
            rows[:, columns],
            grid,
            hessian,
            nearest=chosen.levels[:, columns],
            zeros=zero,
            half=self.scale == "float16",
        )
        chosen.scales[:, blocks] = scale  # the kernel has fitted it in place

    def search(
        self, rows: np.ndarray, statistics: Statistics | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns levels uint8 [n, blocks, block], and scales and zero points float32 [n, blocks].

        The largest weights of a block may be clipped, so that all others are nearer to a level.
        Fractions of the scale of the extremes are tried, with both signs or three zero points; then
        the scale is fitted to the levels. No block is worse than by rounding to nearest. Statistics
        weigh the errors of columns by their importance. Raises RequestError for a weight that is
        too large for float16 scales.
        """
        weights = self._in_blocks(rows)
        scales, zeros = self._extreme_scales(weights)
        importance = None
        if statistics is not None:
            importance = self._relative_importance(statistics)

        levels = library.search(
            _in_lanes(weights),
            importance,
            self.bits,
            self.symmetric,
            self.scale == "float16",
            scales,
            zeros,
        )
        block = weights.shape[2]
        return levels[..., :block], scales, zeros

    def _relative_importance(self, statistics: Statistics) -> np.ndarray:
        """Returns the importance of columns, at most 1, float32 [blocks, lanes of a block]."""
        largest = statistics.importance.max(initial=_LEAST_IMPORTANCE)
        relative = statistics.importance / largest
        in_blocks = self._in_blocks(relative[None])
        return _in_lanes(in_blocks)[0]

    def _in_blocks(self, rows: np.ndarray) -> np.ndarray:
        """Returns float32 [n, blocks, block] of rows [n, K], padded with zeros."""
        count, columns = rows.shape
        blocks = self.num_blocks(columns)
        block = self.block_size(columns)
        padded = np.zeros((count, blocks * block), np.float32)
        padded[:, :columns] = rows
        return padded.reshape(count, blocks, block)

    def _extreme_scales(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns scales and zero points float32 [n, blocks] by the extremes of [n, blocks, block].

        Symmetric: as in ggml's q4_0, the extreme gets the level -2**(bits - 1), with a negative
        scale where it is positive, so that 16 levels are used instead of 15. Asymmetric: the range
        contains zero.
        """
        high = weights.max(-1)
        low = weights.min(-1)
        if self.symmetric:
            extreme = np.where(high > -low, high, low)
            scales = storable(extreme / np.float32(-self._middle), self.scale)
            return scales, np.full_like(high, self._middle)

        high = np.maximum(high, 0)
        low = np.minimum(low, 0)
        scales = storable((high - low) / np.float32(self._top), self.scale)
        zeros = np.rint(-low / scales)
        return scales, np.clip(zeros, 0, self._top)

    def _pack(self, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Parts:
        """Returns the parts of levels uint8 [n, blocks, block] and their blocks' grids."""
        count, blocks, block = levels.shape
        flat = levels.reshape(count, blocks * block)
        arrays = {
            "data": pack(flat, self.bits),
            "scales": scales.astype(self.scale),
        }
        if not self.symmetric:
            arrays["zero_points"] = pack(zeros.astype(np.uint8), self.bits)
        return arrays

    def rounding_rule(self, weighted: bool) -> str:
        """Returns the algorithm, apart for a clip search in large blocks or with few levels.

        A search over more weights, or with fewer levels, clips larger outliers among them.
        """
        is_coarse = self.block is None or self.block > 32 or self.bits < 4
        if self.algorithm == "search" and is_coarse:
            return "search, coarse"
        return self.algorithm

    def fitted(self, shape: Shape) -> "Affine":
        """Returns the scheme with blocks that divide a row; one scale per row if those are tiny."""
        columns = shape[1]
        if self.bits == 4 and columns % 2:
            return replace(self, bits=8).fitted(shape)
        if self.bits == 4 and not self.symmetric:
            return replace(self, block=self._half_row_block(columns))
        block = largest_divisor(columns, self.block or columns)
        if SMALLEST_BLOCK <= block < columns:
            return replace(self, block=block)
        return replace(self, block=None)

    def _half_row_block(self, columns: int) -> int:
        """Returns a block that divides half a row: packed zero points need an even number."""
        half = columns // 2
        block = largest_divisor(half, self.block or half)
        if block < SMALLEST_BLOCK:
            return half
        return block

    def least_padded(self, columns: int) -> "Affine":
        """Returns the scheme with the block that takes the fewest bytes; one per row as it is."""
        if self.block is None:
            return self
        return with_least_padding(self, columns)

    def with_dtype(self, dtype: FloatDtype) -> "Affine":
        """Returns the scheme with scales of another dtype."""
        return replace(self, scale=dtype)

    def with_blocks(self, block: int | None, symmetric: bool | None) -> "Affine":
        """Returns the scheme with another block size and symmetry; None keeps its own."""
        if symmetric is None:
            symmetric = self.symmetric
        return replace(self, block=block or self.block, symmetric=symmetric)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Divides each block's range, from zero to the extreme if symmetric, by its steps."""
        ranges = self._ranges(w)
        exact = self._exact_steps(ranges)
        grid = ranges.spread(exact)
        limit = None
        if self.symmetric:
            limit = grid * np.float32(self._middle - 1)
        if self.scale == "float32":
            return StepSizes(grid, limit=limit, grid=grid)

        # The scale is rounded up, and in Core ML its product with the integer to nearest.
        rounded_up = ranges.spread(exact + float16_spacing(exact))
        product_error = float16_spacing(np.abs(w) + rounded_up)
        return StepSizes(rounded_up + product_error, limit=limit, grid=grid)

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        """Divides each block's range of dequantized weights by its steps."""
        ranges = self._ranges(dequantized)
        exact = self._exact_steps(ranges)
        return StepSizes(ranges.spread(exact))

    def _span_steps(self, w: np.ndarray, measure: Measure) -> StepSizes:
        """Returns the error of rounding to nearest on the scales of the extremes, by span."""
        columns = w.shape[1]
        spans = np.zeros(1, np.intp)
        if measure == "block":
            spans = np.arange(0, columns, self.block_size(columns))

        ranges = self._ranges(w)
        exact = self._exact_steps(ranges)
        step, zeros = self._extreme_grid(ranges, exact)
        nearest = np.rint(w / step) + zeros
        multiples = np.clip(nearest, 0, self._top) - zeros
        error = multiples * step - w

        largest = ranges.largest
        moved = largest * _FLOAT32_ERROR
        if self.scale == "float16":
            scale_error = float16_spacing(exact)
            product_error = float16_spacing(largest)
            moved = self._top * scale_error + product_error
        return span_steps(error, moved, spans, ranges.spread(exact))

    def _extreme_grid(
        self, ranges: BlockRanges, exact: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns scale and zero point at each weight, before scales are rounded.

        If symmetric, the extreme has the level without an opposite, as in `_extreme_scales`.
        """
        if self.symmetric:
            is_positive = ranges.high > -ranges.low
            sign = np.where(is_positive, -1, 1).astype(np.float32)
            step = ranges.spread(exact * sign)
            return step, np.array(self._middle, np.float32)

        least = np.minimum(ranges.low, 0)
        zeros = np.rint(-least / exact)
        zeros = np.clip(zeros, 0, self._top)
        return ranges.spread(exact), ranges.spread(zeros)

    def _ranges(self, w: np.ndarray) -> BlockRanges:
        return block_ranges(w, self.block_size(w.shape[1]))

    def _exact_steps(self, ranges: BlockRanges) -> np.ndarray:
        """Returns the distance of levels in each block, [rows, blocks], before it is rounded."""
        if self.symmetric:
            exact = ranges.largest / np.float32(self._middle)
        else:
            exact = ranges.spans / np.float32(self._top)
        return np.maximum(exact, NEGLIGIBLE)


INT8_ROWS = Affine(8, None, symmetric=True)
"""One scale per row, the only int8 that integer matrix products can take."""


def _in_lanes(weights: np.ndarray) -> np.ndarray:
    """Returns blocks [n, blocks, block] padded with zeros, which no scale leaves an error of."""
    padding = -weights.shape[2] % _LANES
    if not padding:
        return weights
    return np.pad(weights, ((0, 0), (0, 0), (0, padding)))
