"""Affine integers in blocks: `w ≈ (q - zero_point) * scale`.

A row of K weights is cut into ceil(K / block) blocks; the last one is padded with zeros. The parts
have the layout of ONNX Runtime's `MatMulNBits` (its ContribOperators.md), row by row:

| part | per row | |
|---|---|---|
| `data` | ceil(blocks · block · bits / 8) bytes | unsigned, see `pack` |
| `scales` | blocks float32 or float16 | |
| `zero_points` | ceil(blocks · bits / 8) bytes | asymmetric only, packed likewise |

Scales are rounded to float16 before the integers are chosen, and away from zero, so that no weight
is beyond the last level. Integers of 2, 3 or 4 bits are a stream of bits, the low ones of the first
integer first, as in MIL's blobs; a row is padded to whole bytes.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import Size
from rgexport.kernels.rounding import library
from rgexport.quantize.algorithms.gptq import refined
from rgexport.quantize.algorithms.statistics import Hessian, Statistics
from rgexport.quantize.schemes import base as scheme_base
from rgexport.quantize.schemes.steps import (
    NEGLIGIBLE,
    Measure,
    StepSizes,
    float16_spacing,
    span_steps,
)


def packed_width(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned values [n, m] of 4 or 8 bits: of two of 4 bits, the even one is low."""
    if bits == 8:
        return values
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(even[:, ::2] | even[:, 1::2] << np.uint8(4))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks bytes uint8 [n, m], also the zeros that pad rows."""
    if bits == 8:
        return packed
    levels = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), -1)
    return levels.reshape(len(packed), 2 * packed.shape[1])


BLOCKS = (16, 32, 64, 128)
"""Block sizes that a user may ask for."""
SMALLEST_BLOCK = 8
"""Smaller blocks cost more in scales than they gain."""
_TINY = np.float32(np.finfo(np.float32).tiny)
_LANES = 16  # the blocks of the search kernel are multiples of this


@dataclass(frozen=True)
class Affine(scheme_base.Uniform):
    """`bits`-bit unsigned integers with one scale per `block` columns of a row, or per row (None).

    Symmetric: the zero point is `2**(bits - 1)`; else there is an integer one per block.
    """

    bits: Literal[2, 3, 4, 5, 6, 8]
    block: Size | None
    symmetric: bool
    scale: scheme_base.FloatDtype = "float32"
    algorithm: str = field(default="rtn", compare=False)
    kind: Literal["affine"] = "affine"

    rounds_activations = True
    has_matmul_nbits_layout = True
    has_block_options = True

    @property
    def label(self) -> str:
        return f"int{self.bits}/{self.block or 'row'}" + ("" if self.symmetric else " asym")

    @property
    def bits_per_weight(self) -> float:
        if self.block is None:
            return float(self.bits)
        zero_point = 0 if self.symmetric else self.bits
        return self.bits + (8 * np.dtype(self.scale).itemsize + zero_point) / self.block

    @property
    def symmetric_bits(self) -> int | None:
        """Bits of levels around the fixed zero point; None with zero points for each block."""
        if self.symmetric:
            return self.bits
        return None

    @property
    def scale_dtype(self) -> scheme_base.FloatDtype:
        """The dtype of its scales, one for each block."""
        return self.scale

    @property
    def largest_multiple(self) -> int:
        """The distance of the outermost level from the zero point."""
        if self.symmetric:
            return int(2 ** (self.bits - 1))
        return self._top

    @property
    def has_onnx_op(self) -> bool:
        """Whether `MatMulNBits` takes such blocks, and graphs can unpack such levels."""
        return self.block in BLOCKS and self.bits in (4, 8)

    def pads_zero_points(self, columns: int) -> bool:
        """Whether a row has an odd number of zero points of 4 bits."""
        return not self.symmetric and self.bits == 4 and self.num_blocks(columns) % 2 == 1

    @property
    def has_mil_op(self) -> bool:
        """Whether `constexpr_blockwise_shift_scale` has integers of so many bits."""
        return self.bits in (4, 8)

    @property
    def _top(self) -> int:
        return int(2**self.bits - 1)

    def block_size(self, columns: int) -> int:
        return self.block or columns

    def rounding_rule(self, weighted: bool) -> str:
        """A search over more weights, or with fewer levels, clips larger outliers among them."""
        is_coarse = self.block is None or self.block > 32 or self.bits < 4
        return "search, coarse" if self.algorithm == "search" and is_coarse else self.algorithm

    def num_blocks(self, columns: int) -> int:
        return -(-columns // self.block_size(columns))

    def part_shapes(self, shape: scheme_base.Shape) -> scheme_base.PartShapes:
        rows, columns = shape
        blocks = self.num_blocks(columns)
        padded = blocks * self.block_size(columns)
        shapes: scheme_base.PartShapes = {
            "data": ("uint8", (rows, packed_width(padded, self.bits))),
            "scales": (self.scale, (rows, blocks)),
        }
        if not self.symmetric:
            shapes["zero_points"] = ("uint8", (rows, packed_width(blocks, self.bits)))
        return shapes

    def decode(self, arrays: scheme_base.Parts, columns: int) -> np.ndarray:
        scales = arrays["scales"].astype(np.float32)
        count, blocks = scales.shape
        shape = (count, blocks, self.block_size(columns))
        levels = unpack(arrays["data"], self.bits)[:, : shape[1] * shape[2]]
        weights = levels.astype(np.float32).reshape(shape)
        if self.symmetric:
            weights -= 2 ** (self.bits - 1)
        else:
            weights -= unpack(arrays["zero_points"], self.bits)[:, :blocks, None]
        weights *= scales[..., None]
        return np.ascontiguousarray(weights.reshape(count, shape[1] * shape[2])[:, :columns])

    def _round(self, rows: np.ndarray, _: Statistics | None) -> scheme_base.Parts:
        weights = self._in_blocks(rows)
        scales, zeros = self._extreme_scales(weights)
        weights *= np.reciprocal(scales)[..., None]
        np.rint(weights, out=weights)
        weights += zeros[..., None]
        np.clip(weights, 0, self._top, out=weights)
        return self._pack(weights.astype(np.uint8), scales, zeros)

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> scheme_base.Parts:
        nearest, scales, zeros = self.search(rows, statistics)
        count, blocks, block = nearest.shape
        levels = nearest.reshape(count, blocks * block)
        for hessian in statistics.hessians:
            if self._cuts_a_block(hessian, rows.shape[1]):
                self._refine_levels(rows, levels, scales, zeros, hessian)
            else:
                self._refine_levels_and_scales(rows, levels, scales, zeros, hessian)
        return self._pack(levels.reshape(nearest.shape), scales, zeros)

    def _cuts_a_block(self, hessian: Hessian, columns: int) -> bool:
        """Whether a block belongs to this Hessian and to another one."""
        block = self.block_size(columns)
        starts_inside = hessian.start % block != 0
        stops_inside = hessian.stop % block != 0 and hessian.stop != columns
        return starts_inside or stops_inside

    def _refine_levels(
        self,
        rows: np.ndarray,
        levels: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray,
        hessian: Hessian,
    ) -> None:
        """Chooses the levels of a Hessian's columns, in place; scales stay as they are.

        The grid has a scale for each column, because blocks do not begin where the Hessian does.
        """
        columns = slice(hessian.start, hessian.stop)
        block_of_column = np.arange(hessian.start, hessian.stop) // self.block_size(rows.shape[1])
        scale = np.ascontiguousarray(scales[:, block_of_column])
        zero = np.ascontiguousarray(zeros[:, block_of_column])
        grid = library.Grid(1, self._top, scale, -scale * zero)
        levels[:, columns] = refined(rows[:, columns], grid, hessian, levels[:, columns])

    def _refine_levels_and_scales(
        self,
        rows: np.ndarray,
        levels: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray,
        hessian: Hessian,
    ) -> None:
        """Chooses levels and scales of a Hessian's columns, which are whole blocks, in place."""
        columns = slice(hessian.start, hessian.stop)
        block = self.block_size(rows.shape[1])
        blocks = slice(hessian.start // block, -(-hessian.stop // block))
        scale = scales[:, blocks].copy()
        zero = zeros[:, blocks].copy()
        grid = library.Grid(block, self._top, scale, -scale * zero)
        half = self.scale == "float16"
        levels[:, columns] = refined(
            rows[:, columns], grid, hessian, levels[:, columns], zero, half
        )
        scales[:, blocks] = scale  # the kernel has fitted it in place

    encoders: ClassVar = {
        "rtn": _round,
        "search": lambda self, rows, _: self._pack(*self.search(rows)),
        "importance": lambda self, rows, statistics: self._pack(*self.search(rows, statistics)),
        "gptq": _gptq,
    }

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
            weighs = statistics.importance / statistics.importance.max(initial=np.float32(1e-30))
            importance = _in_lanes(self._in_blocks(weighs[None]))[0]
        half = self.scale == "float16"
        levels = library.search(
            _in_lanes(weights), importance, self.bits, self.symmetric, half, scales, zeros
        )
        return levels[..., : weights.shape[2]], scales, zeros

    def _in_blocks(self, rows: np.ndarray) -> np.ndarray:
        count, columns = rows.shape
        blocks, block = self.num_blocks(columns), self.block_size(columns)
        padded = np.zeros((count, blocks * block), np.float32)
        padded[:, :columns] = rows
        return padded.reshape(count, blocks, block)

    def _extreme_scales(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points float32 [n, blocks] by the extremes of [n, blocks, block].

        Symmetric: as in ggml's q4_0, the extreme gets the level -2**(bits - 1), with a negative
        scale where it is positive, so that 16 levels are used instead of 15. Asymmetric: the range
        contains zero.
        """
        high, low = weights.max(-1), weights.min(-1)
        if self.symmetric:
            extreme = np.where(high > -low, high, low)
            zero = 2 ** (self.bits - 1)
            scales = storable(extreme / np.float32(-zero), self.scale)
            return scales, np.full_like(high, zero)
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        scales = storable((high - low) / np.float32(self._top), self.scale)
        return scales, np.clip(np.rint(-low / scales), 0, self._top)

    def _pack(self, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> scheme_base.Parts:
        count, blocks, block = levels.shape
        arrays = {
            "data": pack(levels.reshape(count, blocks * block), self.bits),
            "scales": scales.astype(self.scale),
        }
        if not self.symmetric:
            arrays["zero_points"] = pack(zeros.astype(np.uint8), self.bits)
        return arrays

    def fitted(self, shape: scheme_base.Shape) -> "Affine":
        columns = shape[1]
        if self.bits == 4 and columns % 2:
            return replace(self, bits=8).fitted(shape)
        if self.bits == 4 and not self.symmetric:  # an even number of blocks
            half = columns // 2
            block = largest_divisor(half, self.block or half)
            return replace(self, block=block if block >= SMALLEST_BLOCK else half)
        block = largest_divisor(columns, self.block or columns)
        return replace(self, block=block if SMALLEST_BLOCK <= block < columns else None)

    def least_padded(self, columns: int) -> "Affine":
        return self if self.block is None else with_least_padding(self, columns)

    def with_dtype(self, dtype: scheme_base.FloatDtype) -> "Affine":
        return replace(self, scale=dtype)

    def with_blocks(self, block: int | None, symmetric: bool | None) -> "Affine":
        """Returns the scheme with another block size and symmetry; None keeps its own."""
        if symmetric is None:
            symmetric = self.symmetric
        return replace(self, block=block or self.block, symmetric=symmetric)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Divides each block's range, from zero to the extreme if symmetric, by its steps."""
        _, _, exact = self._ranges(w)
        grid = step = self._spread(exact, w)
        limit = step * np.float32(2 ** (self.bits - 1) - 1) if self.symmetric else None
        if self.scale == "float16":
            # the scale is rounded up, and in Core ML its product with the integer to nearest
            step = self._spread(exact + float16_spacing(exact), w)
            step = step + float16_spacing(np.abs(w) + step)
        return StepSizes(step, limit=limit, grid=grid)

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        return StepSizes(self._spread(self._ranges(dequantized)[2], dequantized))

    def _span_steps(self, w: np.ndarray, measure: Measure) -> StepSizes:
        high, low, exact = self._ranges(w)
        top, spans = self._top, np.zeros(1, np.intp)
        if measure == "block":
            spans = np.arange(0, w.shape[1], self.block_size(w.shape[1]))
        if self.symmetric:
            # As in `_extreme_scales`, the extreme has the level without an opposite.
            sign = np.where(high > -low, -1, 1).astype(np.float32)
            step, zeros = self._spread(exact * sign, w), np.array(top // 2 + 1, np.float32)
        else:
            step = self._spread(exact, w)
            zeros = self._spread(np.clip(np.rint(-np.minimum(low, 0) / exact), 0, top), w)
        levels = np.clip(np.rint(w / step) + zeros, 0, top) - zeros
        largest = np.maximum(high, -low)
        moved = largest * np.float32(2.0**-22)
        if self.scale == "float16":  # of the scale, and of its product with the level
            moved = top * float16_spacing(exact) + float16_spacing(largest)
        return span_steps(levels * step - w, moved, spans, self._spread(exact, w))

    def _ranges(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Largest weight, least weight and exact step of each block, [rows, blocks]."""
        starts = np.arange(0, w.shape[1], self.block_size(w.shape[1]))
        high = np.maximum.reduceat(w, starts, axis=1)
        low = np.minimum.reduceat(w, starts, axis=1)
        if self.symmetric:
            exact = np.maximum(high, -low) / np.float32(2 ** (self.bits - 1))
        else:
            exact = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(self._top)
        return high, low, np.maximum(exact, NEGLIGIBLE)

    def _spread(self, blocks: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.repeat(blocks, self.block_size(w.shape[1]), axis=1)[:, : w.shape[1]]


INT8_ROWS = Affine(8, None, symmetric=True)
"""One scale per row, the only int8 that integer matrix products can take."""


def with_least_padding(scheme: Any, columns: int) -> Any:
    """Chooses the block size of a scheme: small blocks cost scales, large ones padding."""
    blocks = (replace(scheme, block=block) for block in BLOCKS if block <= scheme.block)
    return min(blocks, key=lambda scheme: scheme_base.nbytes_of(scheme.part_shapes((1, columns))))


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` up to `limit`, at least 1."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _in_lanes(weights: np.ndarray) -> np.ndarray:
    """Blocks padded with zeros, which are without error in any scale."""
    padding = -weights.shape[2] % _LANES
    return np.pad(weights, ((0, 0), (0, 0), (0, padding))) if padding else weights


def storable(scales: np.ndarray, dtype: scheme_base.FloatDtype) -> np.ndarray:
    """Scales rounded to `dtype`, as float32, float16 away from zero; 1 for a block of zeros."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            near = scales.astype(np.float16)
        away = np.nextafter(near, np.copysign(np.float16(np.inf), near))
        short = np.abs(near.astype(np.float32)) < np.abs(scales)
        rounded = np.where(short, away, near).astype(np.float32)
        if not np.isfinite(rounded).all():
            raise RequestError(
                f"its weights need a scale of {np.abs(scales).max():.4g}, and float16 holds at "
                'most 65504; take a plan with "scale": "float32" for it, or another precision'
            )
        scales = rounded
    return np.where(np.abs(scales) < _TINY, np.float32(1), scales)
