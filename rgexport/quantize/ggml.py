"""ggml's tensor types: as llama-quantize fills them, or with levels by GPTQ.

Scales and minimums are always those of ggml's own search, with importances where there are some.
GPTQ then chooses other levels on them, and any llama.cpp reads the rows as before.
"""

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.quantize import gptq
from rgexport.quantize.ggml_grid import LAYOUTS, GgmlLayout, read_levels, replace_levels
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme_base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.statistics import Statistics
from rgexport.quantize.steps import NEGLIGIBLE, StepSizes, float_steps

_DIGITS = {"f32": (23, 2.0**-126), "f16": (10, 2.0**-24), "bf16": (7, 2.0**-126)}
"""Type of floats → binary digits after the point, smallest step."""
_STORAGE_CLASSES = {
    **{"f32": "float32", "f16": "float16", "bf16": "int8", "q8_0": "int8"},
    **{"q3_k": "int2", "q2_k": "int2"},
}
"""int4 for all other types, which have four to six bits."""
_HALF, _LEAST = 2.0**-11, 2.0**-25
"""Largest relative and absolute errors of rounding to float16."""
_LEAST_SCALE = np.float32(1 / 32)
"""In units of a group's largest scale: half the distance of scales that have 4 bits (q2_k)."""
_CANDIDATES = "q3_k", "q4_k", "q4_0", "q4_1", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0"


@dataclass(frozen=True)
class Ggml(Uniform):
    """One of ggml's tensor types (`ggml_types.TYPES`), only for GGUF files."""

    type: str
    algorithm: str = field(default="ggml", compare=False)
    kind: Literal["ggml"] = "ggml"

    allowed: ClassVar = {"type": tuple(TYPES)}

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
        nearest = self._quantize(rows, statistics)
        if not self.is_quantized:
            return nearest
        grid = read_levels(nearest["data"], self.type)
        columns = (np.repeat(part, grid.group, axis=1) for part in (grid.scale, grid.offset))
        levels = gptq.choose_levels(
            rows, library.Grid(1, grid.top, *columns), statistics.hessians, grid.levels
        )
        return {"data": replace_levels(nearest["data"], self.type, levels)}

    encoders: ClassVar = {"ggml": _quantize, "gptq": _gptq}

    @classmethod
    def candidates(cls) -> tuple["Ggml", ...]:
        return tuple(cls(kind, algorithm="gptq") for kind in _CANDIDATES)

    def rounding_rule(self, weighted: bool) -> str:
        if not self.is_quantized:  # whatever algorithm a file names
            return "cast"
        if self.algorithm != "ggml":
            return self.algorithm
        if weighted and self.type != "q8_0":  # an importance matrix is not for q8_0
            return "ggml weighted"
        return "ggml search" if LAYOUTS[self.type].multiples > 1 else "ggml"

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        if not self.is_quantized:
            return StepSizes(float_steps(w, *_DIGITS[self.type]))
        return _block_steps(w, LAYOUTS[self.type], TYPES[self.type].block)


def _block_steps(w: np.ndarray, layout: GgmlLayout, block: int) -> StepSizes:
    """The steps of ggml-quants.c: quantize_row_*_ref, from the weights [rows, columns] alone.

    Scales and minimums are float16; their rounding moves every value of a block, and is part of it.
    """
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
