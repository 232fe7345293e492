"""ggml's tensor types: as llama-quantize fills them, or with levels by GPTQ.

Scales and minimums are those of ggml's own search. GPTQ replaces the levels in the packed rows
(in the layouts of ggml-common.h).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Annotated, ClassVar, Literal

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.algorithms.gptq import choose_levels, output_gain
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.schemes.base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.ggml_library import quantize_rows
from rgexport.quantize.schemes.ggml_types import TYPES
from rgexport.quantize.schemes.steps import NEGLIGIBLE, StepSizes, float_steps

Blocks = np.ndarray
"""uint8 [blocks, bytes of a block]."""
Scales = tuple[np.ndarray, np.ndarray | None]
"""float32 [blocks, groups]: the distance of levels, and the value of level 0 or None."""


def read_levels(packed: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales, offsets and levels of rows uint8 [n, row_bytes]; `kind` is in `LAYOUTS`.

    A weight is `scale · level + offset` of its group: float32 [n, groups], the scale also negative,
    and 0 where a group has one value. Levels are uint8 [n, columns], from 0 to the layout's top.
    """
    layout, blocks = LAYOUTS[kind], packed.reshape(-1, TYPES[kind].block_bytes)
    with np.errstate(all="ignore"):
        scale, offset = layout.scales(blocks)
        if offset is None:
            offset = -layout.zero * scale
    levels = sum((plane.read(blocks) for plane in layout.planes), layout.bias)
    rows, columns = len(packed), packed.shape[1] // TYPES[kind].block_bytes * TYPES[kind].block
    groups = rows, columns // layout.group
    scale, offset = (x.astype(np.float32, copy=False).reshape(groups) for x in (scale, offset))
    return scale, offset, levels.reshape(rows, columns)


def replace_levels(packed: np.ndarray, kind: str, levels: np.ndarray) -> np.ndarray:
    """Returns a copy of packed rows with other levels, uint8 [n, columns], none above the top."""
    layout, copy = LAYOUTS[kind], packed.copy()
    blocks = copy.reshape(-1, TYPES[kind].block_bytes)
    stored = levels.reshape(len(blocks), TYPES[kind].block) - layout.bias
    for plane in layout.planes:
        plane.write(blocks, stored)
    return copy


HALVES = {"q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}
HALVES |= {"q4_k": (0, 2), "q5_k": (0, 2)}
"""Offsets of a block's float16 numbers, which all scales and minimums multiply; else 0."""


def multiply_rows(packed: np.ndarray, kind: str, factors: np.ndarray) -> None:
    """Multiplies the scales of packed rows by `factors`, float32 [n], in place."""
    blocks = packed.reshape(-1, TYPES[kind].block_bytes)
    by_block = np.repeat(factors, packed.shape[1] // TYPES[kind].block_bytes)
    for start in HALVES.get(kind, (0,)):
        scales = (_half(blocks, start)[:, 0] * by_block).clip(-_MOST_HALF, _MOST_HALF)
        blocks[:, start : start + 2] = scales.astype("<f2")[:, None].view(np.uint8)


@dataclass(frozen=True)
class _Plane:
    """Some bits of all levels of a block, the lowest at `shift`, in `count` bytes from `start` on.

    A run of `width` bytes holds the bits of `8 / bits` such runs of levels, one above the other.
    """

    start: int
    count: int
    bits: int
    width: int
    shift: int = 0

    def read(self, blocks: Blocks) -> np.ndarray:
        runs = self._bytes(blocks).reshape(len(blocks), self.count // self.width, 1, self.width)
        bits = (runs >> self._shifts) & np.uint8((1 << self.bits) - 1)
        return bits.reshape(len(blocks), self.count * 8 // self.bits) << np.uint8(self.shift)

    def write(self, blocks: Blocks, levels: np.ndarray) -> None:
        bits = (levels >> np.uint8(self.shift)) & np.uint8((1 << self.bits) - 1)
        shape = len(blocks), self.count // self.width, 8 // self.bits, self.width
        joined = np.bitwise_or.reduce(bits.reshape(shape) << self._shifts, axis=2)
        self._bytes(blocks)[:] = joined.reshape(len(blocks), self.count)

    def _bytes(self, blocks: Blocks) -> np.ndarray:
        return blocks[:, self.start : self.start + self.count]

    @property
    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


def _half(blocks: Blocks, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _one_scale(blocks: Blocks) -> Scales:
    return _half(blocks, 0), None


def _two_scales(blocks: Blocks) -> Scales:
    return _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: Blocks) -> Scales:
    """16 groups, with 4 bits each for scale and minimum."""
    packed = blocks[:, :16]
    return _half(blocks, 80) * (packed & 15), -_half(blocks, 82) * (packed >> 4)


def _q3_k(blocks: Blocks) -> Scales:
    """16 groups, with 6 bits each: the lower 4 in 8 bytes, the upper 2 in 4."""
    low = _Plane(96, 8, 4, 8).read(blocks)
    high = _Plane(104, 4, 2, 4, shift=4).read(blocks)
    return _half(blocks, 108) * ((low | high).astype(np.float32) - 32), None


def _q45_k(blocks: Blocks) -> Scales:
    """8 groups, with 6 bits each for scale and minimum; the last four share bytes."""
    scales, minimums, both = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.hstack((scales & 63, (both & 15) | (scales >> 6 << 4)))
    minimums = np.hstack((minimums & 63, (both >> 4) | (minimums >> 6 << 4)))
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minimums


def _q6_k(blocks: Blocks) -> Scales:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), None


@dataclass(frozen=True)
class GgmlLayout:
    """The levels and scales of a block.

    `group` levels share a scale; `zero` is the level that is 0, or 0 where level 0 is a minimum
    that is stored. `multiples` is the largest multiple of the block's scale that is a group's
    scale; types with more than 1 choose their scales for the least squared error. `bias` is added
    to stored numbers.
    """

    group: int
    top: int
    zero: int
    planes: tuple[_Plane, ...]
    scales: Callable[[Blocks], Scales]
    multiples: int = 1
    bias: np.uint8 = np.uint8(0)  # noqa: RUF009

    @property
    def steps(self) -> int:
        """Steps between 0, or the minimum, and the outermost level on its longer side."""
        return self.zero or self.top

    @property
    def clips(self) -> bool:
        """Whether the side above 0 has one level less."""
        return 0 < self.top < 2 * self.zero


LAYOUTS = {
    # ggml writes no -128, which has no negative in the kernels
    "q8_0": GgmlLayout(32, 254, 127, (_Plane(2, 32, 8, 32),), _one_scale, bias=np.uint8(127)),
    "q4_0": GgmlLayout(32, 15, 8, (_Plane(2, 16, 4, 16),), _one_scale),
    "q4_1": GgmlLayout(32, 15, 0, (_Plane(4, 16, 4, 16),), _two_scales),
    "q5_0": GgmlLayout(32, 31, 16, (_Plane(6, 16, 4, 16), _Plane(2, 4, 1, 1, 4)), _one_scale),
    "q5_1": GgmlLayout(32, 31, 0, (_Plane(8, 16, 4, 16), _Plane(4, 4, 1, 1, 4)), _two_scales),
    "q2_k": GgmlLayout(16, 3, 0, (_Plane(16, 64, 2, 32),), _q2_k, 15),
    "q3_k": GgmlLayout(16, 7, 4, (_Plane(32, 64, 2, 32), _Plane(0, 32, 1, 32, 2)), _q3_k, 32),
    "q4_k": GgmlLayout(32, 15, 0, (_Plane(16, 128, 4, 32),), _q45_k, 63),
    "q5_k": GgmlLayout(32, 31, 0, (_Plane(48, 128, 4, 32), _Plane(16, 32, 1, 32, 4)), _q45_k, 63),
    "q6_k": GgmlLayout(16, 63, 32, (_Plane(0, 128, 4, 64), _Plane(128, 64, 2, 32, 4)), _q6_k, 128),
}


_DIGITS = {"f32": (23, 2.0**-126), "f16": (10, 2.0**-24), "bf16": (7, 2.0**-126)}
"""Type of floats → binary digits after the point, smallest step."""
_STORAGE_CLASSES = {
    **{"f32": "float32", "f16": "float16", "bf16": "int8", "q8_0": "int8"},
    **dict.fromkeys(("q3_k", "q2_k", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), "int2"),
}
"""int4 for all other types, which have four to six bits."""
_MOST_HALF = np.float32(np.finfo(np.float16).max)
_HALF, _LEAST = 2.0**-11, 2.0**-25  # largest relative and absolute errors of rounding to float16
_CODEBOOKS = {"iq2_xxs": (1.5, 167), "iq2_xs": (1.75, 167), "iq2_s": (2, 167), "iq3_xxs": (3, 480)}
_CODEBOOKS |= {"iq3_s": (4, 465), "iq4_nl": (8, 127), "iq4_xs": (8, 32 * 127)}
"""I-quant → even steps from 0 to a group's largest weight, largest multiple of a block's scale."""
_LEAST_SCALE = np.float32(1 / 32)  # of a group's largest: half the distance of 4-bit scales (q2_k)


@dataclass(frozen=True)
class Ggml(Uniform):
    """One of ggml's tensor types (`ggml_types.TYPES`), only for GGUF files."""

    type: Annotated[str, tuple(TYPES)]
    algorithm: str = field(default="ggml", compare=False)
    kind: Literal["ggml"] = "ggml"

    is_gguf_only = True

    @property
    def label(self) -> str:
        return self.type

    @property
    def is_quantized(self) -> bool:
        return TYPES[self.type].is_quantized

    @property
    def bits_per_weight(self) -> float:
        return TYPES[self.type].bits_per_weight

    @property
    def storage_class(self) -> str:
        return _STORAGE_CLASSES.get(self.type, "int4")

    @property
    def ggml_type(self) -> str:
        return self.type

    @property
    def rounds_activations(self) -> bool:
        return self.is_quantized

    def part_shapes(self, shape: Shape) -> PartShapes:
        rows, *row = shape
        return {"data": ("uint8", (rows, TYPES[self.type].row_bytes(prod(row))))}

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        """Decodes with gguf-py, which shares no code with the encoder."""
        rows = arrays["data"]
        if self.type == "f32":
            return rows.view(np.float32)
        from gguf import GGMLQuantizationType, quants  # an extra; only validation dequantizes

        return quants.dequantize(rows, GGMLQuantizationType(TYPES[self.type].value))

    def _quantize(self, rows: np.ndarray, statistics: Statistics | None) -> Parts:
        importance = None if statistics is None else statistics.importance
        return {"data": quantize_rows(rows, self.type, importance)}

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        data = self._quantize(rows, statistics)["data"]
        if self.type in _CODEBOOKS:
            weights, codes = np.ascontiguousarray(rows, np.float32), _codebook(self.type)
            number = TYPES[self.type].value
            for h in statistics.hessians:
                library.choose_codes(weights, data, number, codes, h.start, h.matrix, h.factors)
            stored = self.decode({"data": data}, rows.shape[1])
        elif self.type in LAYOUTS:
            layout = LAYOUTS[self.type]
            *steps, levels = read_levels(data, self.type)
            scale, offset = (np.repeat(x, layout.group, axis=1) for x in steps)
            grid = Grid(1, layout.top, scale, offset)
            levels = choose_levels(rows, grid, statistics.hessians, levels)
            data, stored = replace_levels(data, self.type, levels), scale * levels + offset
        else:
            return {"data": data}
        multiply_rows(data, self.type, output_gain(rows, stored, statistics.hessians))
        return {"data": data}

    encoders: ClassVar = {"ggml": _quantize, "gptq": _gptq}

    def rounding_rule(self, weighted: bool) -> str:
        if not self.is_quantized:  # whatever algorithm a file names
            return "cast"
        if self.type in _CODEBOOKS:
            return "codebook" if self.algorithm == "ggml" else f"codebook, {self.algorithm}"
        if self.algorithm != "ggml":
            return self.algorithm
        if weighted and self.type != "q8_0":  # an importance matrix is not for q8_0
            return "ggml weighted"
        return "ggml search" if LAYOUTS[self.type].multiples > 1 else "ggml"

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        if not self.is_quantized:
            return StepSizes(float_steps(w, *_DIGITS[self.type]))
        if self.type in _CODEBOOKS:
            steps, multiple = _CODEBOOKS[self.type]
            step = np.abs(w).reshape(len(w), -1, 32).max(2) / np.float32(steps)
            step += np.float32(2 * multiple * _LEAST)
            return StepSizes(np.repeat(np.maximum(step, NEGLIGIBLE), 32, axis=1))
        return _block_steps(w, LAYOUTS[self.type], TYPES[self.type].block)


@cache
def _codebook(kind: str) -> np.ndarray:
    """Returns the values of a type's entries, float32 [weights of an entry, entries]."""
    from gguf import quants

    if kind.startswith("iq4"):
        return np.array([quants.IQ4_NL.kvalues], np.float32)
    codec = getattr(quants, kind.upper())
    codec.init_grid()
    return np.ascontiguousarray(codec.grid[0, 0].T)


def _block_steps(w: np.ndarray, layout: GgmlLayout, block: int) -> StepSizes:
    """The steps of ggml-quants.c: quantize_row_*_ref, where float16 scales move all values."""
    weights = w.reshape(len(w), -1, layout.group)
    low, high = weights.min(2), weights.max(2)
    is_grouped = layout.multiples > 1
    if layout.zero:
        exact = np.maximum(high, -low) / np.float32(layout.steps)
        base = np.zeros_like(exact)
    else:
        minimum = np.minimum(low, 0) if is_grouped else low
        exact, base = (high - minimum) / np.float32(layout.steps), np.abs(minimum)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, layout.group, axis=1)

    def largest_of_block(steps: np.ndarray) -> np.ndarray:
        groups = block // layout.group
        return np.repeat(steps.reshape(len(steps), -1, groups).max(2), groups, axis=1)

    least = layout.multiples * _LEAST  # rounding of the step, however small it is
    # half a step, plus twice the rounding errors of scale and minimum
    moved = layout.steps * np.maximum(exact * _HALF, least) + np.maximum(base * _HALF, least)
    step = np.maximum(exact + 2 * moved, NEGLIGIBLE).astype(np.float32)
    distance = grid = None
    if is_grouped:
        # Small steps are not exact: the largest step of the block counts for all of it. Scales are
        # multiples of a fraction of the largest one, so none is much smaller. And blocks may be too
        # small for float16, which may store them as zeros.
        step = largest_of_block(step)
        smallest = largest_of_block(exact) * _LEAST_SCALE
        smallest = np.maximum(smallest, np.float32(2 * layout.steps * least))
        distance = spread(np.maximum(exact, smallest))
    elif layout.zero:
        grid = spread(np.maximum(exact, NEGLIGIBLE))
    step = spread(step)
    outermost = (step if grid is None else grid) * np.float32(layout.steps - 1)
    return StepSizes(step, distance, limit=outermost if layout.clips else None, grid=grid)
