"""ggml's tensor types: as llama-quantize fills them, or with levels by GPTQ.

Scales and minimums are always those of ggml's own search, with importances where there are some.
GPTQ then chooses other levels on them, and any llama.cpp reads the rows as before.
"""

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.quantize import ggml_steps, gptq
from rgexport.quantize.ggml_grid import read_levels, replace_levels
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme_base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.statistics import Statistics
from rgexport.quantize.steps import StepSizes, float_steps

_DIGITS = {"f32": (23, 2.0**-126), "f16": (10, 2.0**-24), "bf16": (7, 2.0**-126)}
"""Type of floats → binary digits after the point, smallest step."""
_STORAGE_CLASSES = {
    **{"f32": "float32", "f16": "float16", "bf16": "int8", "q8_0": "int8"},
    **{"q3_k": "int2", "q2_k": "int2"},
}
"""int4 for all other types, which have four to six bits."""
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
    def precision(self) -> str:
        return self.type

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

    def decode(self, parts: Parts, columns: int) -> np.ndarray:
        """Decodes with gguf-py, which shares no code with the encoder."""
        rows = parts["data"]
        if self.type == "f32":
            return rows.view(np.float32)
        from gguf import GGMLQuantizationType, quants  # an extra; only validation dequantizes

        return quants.dequantize(rows, GGMLQuantizationType(TYPES[self.type].value))

    def _quantize(self, rows: np.ndarray, statistics: Statistics | None) -> Parts:
        importance = None if statistics is None else statistics.importance
        return {"data": quantize_rows(rows, self.type, importance)}

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        parts = self._quantize(rows, statistics)
        if not self.is_quantized:
            return parts
        grid = read_levels(parts["data"], self.type)
        columns = (np.repeat(part, grid.group, axis=1) for part in (grid.scale, grid.offset))
        levels = gptq.choose_levels(
            rows, library.Grid(1, grid.top, *columns), statistics.hessians, grid.levels
        )
        return {"data": replace_levels(parts["data"], self.type, levels)}

    encoders: ClassVar = {"ggml": _quantize, "gptq": _gptq}

    @classmethod
    def candidates(cls) -> tuple["Ggml", ...]:
        return tuple(cls(kind, algorithm="gptq") for kind in _CANDIDATES)

    def rounding_rule(self, weighted: bool) -> str:
        if self.algorithm != "ggml":
            return self.algorithm
        if not self.is_quantized:
            return "cast"
        if weighted and self.type != "q8_0":  # an importance matrix is not for q8_0
            return "ggml weighted"
        return "ggml search" if ggml_steps.BLOCKS[self.type].grouped else "ggml"

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        if not self.is_quantized:
            return StepSizes(float_steps(w, *_DIGITS[self.type]))
        return ggml_steps.step_sizes(w, self.type)
