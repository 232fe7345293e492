"""ggml's tensor types: as llama-quantize fills them, or with levels by GPTQ.

Scales and minimums are those of ggml's own search. GPTQ replaces the levels in the packed rows
(in the layouts of ggml-common.h).
"""

from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Annotated, ClassVar, Literal

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.algorithms.gptq import choose_levels, output_gain
from rgexport.quantize.algorithms.statistics import Hessian, Statistics
from rgexport.quantize.schemes.base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.ggml_layouts import (
    LAYOUTS,
    GgmlLayout,
    multiply_rows,
    read_levels,
    replace_levels,
)
from rgexport.quantize.schemes.ggml_library import quantize_rows
from rgexport.quantize.schemes.ggml_types import TYPES
from rgexport.quantize.schemes.steps import NEGLIGIBLE, StepSizes, float_steps

_DIGITS = {
    "f32": (23, 2.0**-126),
    "f16": (10, 2.0**-24),
    "bf16": (7, 2.0**-126),
}
"""Type of floats → binary digits after the point, smallest step."""

_STORAGE_CLASSES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "int8",
    "q8_0": "int8",
    "q3_k": "int2",
    "q2_k": "int2",
    "iq3_s": "int2",
    "iq3_xxs": "int2",
    "iq2_s": "int2",
    "iq2_xs": "int2",
    "iq2_xxs": "int2",
}
"""int4 for all other types, which have four to six bits."""

_HALF_ERROR = 2.0**-11
"""Largest relative error of rounding to float16."""

_LEAST_HALF_ERROR = 2.0**-25
"""Largest absolute error of rounding to a float16 near 0."""

_LEAST_SCALE = np.float32(1 / 32)
"""Least scale of a group, of the largest in a block: half a step of 4-bit scales (q2_k)."""

_CODEBOOKS = {
    "iq2_xxs": (1.5, 167),
    "iq2_xs": (1.75, 167),
    "iq2_s": (2, 167),
    "iq3_xxs": (3, 480),
    "iq3_s": (4, 465),
    "iq4_nl": (8, 127),
    "iq4_xs": (8, 32 * 127),
}
"""I-quant → even steps from 0 to a group's largest weight, largest multiple of a block's scale."""

_CODEBOOK_GROUP = 32
"""Weights for which one step is computed; no group of an i-quant that has a scale is larger."""


@dataclass(frozen=True)
class Ggml(Uniform):
    """One of ggml's tensor types (`ggml_types.TYPES`), only for GGUF files."""

    type: Annotated[str, tuple(TYPES)]
    algorithm: str = field(default="ggml", compare=False)
    kind: Literal["ggml"] = "ggml"

    is_gguf_only = True

    @property
    def label(self) -> str:
        """The name of the type."""
        return self.type

    @property
    def is_quantized(self) -> bool:
        """Whether weights share scales; f32, f16 and bf16 are floats."""
        return TYPES[self.type].is_quantized

    @property
    def bits_per_weight(self) -> float:
        """Bits of a block per weight."""
        return TYPES[self.type].bits_per_weight

    @property
    def storage_class(self) -> str:
        """The class of precision whose tolerances hold for the type."""
        return _STORAGE_CLASSES.get(self.type, "int4")

    @property
    def ggml_type(self) -> str:
        """The name of the type."""
        return self.type

    @property
    def rounds_activations(self) -> bool:
        """Whether llama.cpp rounds activations to int8: for all types but floats."""
        return self.is_quantized

    def part_shapes(self, shape: Shape) -> PartShapes:
        """Returns one part, the packed rows; ValueError where a row is no whole number of blocks.

        Matrices of gates, [heads, block, block], have rows of several dimensions.
        """
        rows, *row = shape
        row_bytes = TYPES[self.type].row_bytes(prod(row))
        return {"data": ("uint8", (rows, row_bytes))}

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        """Decodes with gguf-py, which shares no code with the encoder."""
        rows = arrays["data"]
        if self.type == "f32":
            return rows.view(np.float32)
        from gguf import GGMLQuantizationType, quants  # an extra; only validation dequantizes

        kind = GGMLQuantizationType(TYPES[self.type].value)
        return quants.dequantize(rows, kind)

    def _quantize(self, rows: np.ndarray, statistics: Statistics | None) -> Parts:
        importance = None
        if statistics is not None:
            importance = statistics.importance
        return {"data": quantize_rows(rows, self.type, importance)}

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        """Replaces the levels or codes that ggml chose; floats stay as they are."""
        data = self._quantize(rows, statistics)["data"]
        hessians = statistics.hessians
        if self.type in _CODEBOOKS:
            stored = self._replace_codes(rows, data, hessians)
        elif self.type in LAYOUTS:
            data, stored = self._with_chosen_levels(rows, data, hessians)
        else:
            return {"data": data}

        gain = output_gain(rows, stored, hessians)
        multiply_rows(data, self.type, gain)
        return {"data": data}

    def _replace_codes(
        self, rows: np.ndarray, data: np.ndarray, hessians: tuple[Hessian, ...]
    ) -> np.ndarray:
        """Replaces the codes of an i-quant's packed rows in place; returns their values."""
        weights = np.ascontiguousarray(rows, np.float32)
        codebook = _codebook(self.type)
        number = TYPES[self.type].value
        for hessian in hessians:
            library.choose_codes(
                weights, data, number, codebook, hessian.start, hessian.matrix, hessian.factors
            )
        return self.decode({"data": data}, rows.shape[1])

    def _with_chosen_levels(
        self, rows: np.ndarray, data: np.ndarray, hessians: tuple[Hessian, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a copy of packed rows with other levels, and their values."""
        layout = LAYOUTS[self.type]
        scales, offsets, nearest = read_levels(data, self.type)
        scale = np.repeat(scales, layout.group, axis=1)
        offset = np.repeat(offsets, layout.group, axis=1)

        grid = Grid(1, layout.top, scale, offset)
        levels = choose_levels(rows, grid, hessians, nearest)
        return replace_levels(data, self.type, levels), scale * levels + offset

    encoders: ClassVar = {"ggml": _quantize, "gptq": _gptq}

    def rounding_rule(self, weighted: bool) -> str:
        """Returns the rule by the type's kind: floats, i-quants, or even levels."""
        if not self.is_quantized:  # whatever algorithm a file names
            return "cast"
        if self.type in _CODEBOOKS:
            if self.algorithm == "ggml":
                return "codebook"
            return f"codebook, {self.algorithm}"
        if self.algorithm != "ggml":
            return self.algorithm
        if weighted and self.type != "q8_0":  # an importance matrix is not for q8_0
            return "ggml weighted"
        if LAYOUTS[self.type].multiples > 1:
            return "ggml search"
        return "ggml"

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Returns the distance of floats, of even levels, or of an i-quant as if it had these."""
        if not self.is_quantized:
            digits, smallest = _DIGITS[self.type]
            return StepSizes(float_steps(w, digits, smallest))
        if self.type in _CODEBOOKS:
            return _codebook_steps(w, self.type)
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


def _codebook_steps(w: np.ndarray, kind: str) -> StepSizes:
    """Returns even steps up to the largest weight of each group."""
    steps, multiple = _CODEBOOKS[kind]
    groups = np.abs(w).reshape(len(w), -1, _CODEBOOK_GROUP)
    step = groups.max(2) / np.float32(steps)
    step += np.float32(2 * multiple * _LEAST_HALF_ERROR)
    step = np.maximum(step, NEGLIGIBLE)
    return StepSizes(np.repeat(step, _CODEBOOK_GROUP, axis=1))


def _block_steps(w: np.ndarray, layout: GgmlLayout, block: int) -> StepSizes:
    """Returns the steps of even levels, and what float16 scales and minimums move them.

    The steps are those of `quantize_row_*_ref` in ggml-quants.c.
    """
    exact, base = _exact_steps(w, layout)

    least = layout.multiples * _LEAST_HALF_ERROR  # rounding of the step, however small it is
    scale_error = np.maximum(exact * _HALF_ERROR, least)
    minimum_error = np.maximum(base * _HALF_ERROR, least)
    moved = layout.steps * scale_error + minimum_error
    # half a step, plus twice the rounding errors of scale and minimum
    step = np.maximum(exact + 2 * moved, NEGLIGIBLE).astype(np.float32)

    if layout.multiples > 1:
        return _grouped_steps(exact, step, layout, block)
    return _single_scale_steps(exact, step, layout)


def _exact_steps(w: np.ndarray, layout: GgmlLayout) -> tuple[np.ndarray, np.ndarray]:
    """Returns the step of each group before rounding, and the size of its minimum or 0.

    Both are float32 [rows, groups].
    """
    weights = w.reshape(len(w), -1, layout.group)
    low = weights.min(2)
    high = weights.max(2)
    if layout.zero:
        exact = np.maximum(high, -low) / np.float32(layout.steps)
        return exact, np.zeros_like(exact)

    minimum = low
    if layout.multiples > 1:  # k-quants store no positive minimum
        minimum = np.minimum(low, 0)
    exact = (high - minimum) / np.float32(layout.steps)
    return exact, np.abs(minimum)


def _grouped_steps(
    exact: np.ndarray, step: np.ndarray, layout: GgmlLayout, block: int
) -> StepSizes:
    """Returns the steps where the scale of a group is a multiple of its block's scale.

    Small steps are not exact: the largest step of the block counts for all of it. Scales are
    multiples of a fraction of the largest one, so none is much smaller. And blocks may be too
    small for float16, which may store them as zeros.
    """
    groups = block // layout.group
    step = _largest_of_block(step, groups)
    smallest = _largest_of_block(exact, groups) * _LEAST_SCALE
    least = layout.multiples * _LEAST_HALF_ERROR
    smallest = np.maximum(smallest, np.float32(2 * layout.steps * least))

    step = np.repeat(step, layout.group, axis=1)
    distance = np.repeat(np.maximum(exact, smallest), layout.group, axis=1)
    return StepSizes(step, distance, limit=_clip_limit(step, layout))


def _largest_of_block(steps: np.ndarray, groups: int) -> np.ndarray:
    """Returns the largest step of its block for each group, [rows, groups of a row]."""
    blocks = steps.reshape(len(steps), -1, groups)
    return np.repeat(blocks.max(2), groups, axis=1)


def _single_scale_steps(exact: np.ndarray, step: np.ndarray, layout: GgmlLayout) -> StepSizes:
    """Returns the steps where a block has one scale."""
    step = np.repeat(step, layout.group, axis=1)
    if not layout.zero:  # both ends of the range are stored: nothing is clipped
        return StepSizes(step)
    grid = np.repeat(np.maximum(exact, NEGLIGIBLE), layout.group, axis=1)
    return StepSizes(step, limit=_clip_limit(grid, layout), grid=grid)


def _clip_limit(distance: np.ndarray, layout: GgmlLayout) -> np.ndarray | None:
    """Returns the outermost level on the shorter side; None if both sides are as long."""
    if not layout.clips:
        return None
    return distance * np.float32(layout.steps - 1)
