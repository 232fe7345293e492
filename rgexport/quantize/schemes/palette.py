"""Palettes: every weight is one of 16 values, which a group of rows shares.

The parts of N rows of K weights:

| part | rows | per row | |
|---|---|---|---|
| `data` | N | ceil(K / 2) bytes | indices, low nibble first |
| `lut` | N / group | 16 float16 or float32 | ascending |

The values of a group minimize its squared error: k-means in one dimension, see `algorithms`. They
are rounded to the table's dtype before the nearest of them is chosen for each weight.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import Size
from rgexport.kernels.rounding import library
from rgexport.quantize.algorithms.gptq import choose_levels
from rgexport.quantize.algorithms.kmeans import centers
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.schemes.affine import Affine
from rgexport.quantize.schemes.base import FloatDtype, Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.blocks import largest_divisor
from rgexport.quantize.schemes.packing import pack, packed_width, unpack
from rgexport.quantize.schemes.steps import NEGLIGIBLE, StepSizes, float16_spacing


@dataclass(frozen=True)
class Palette(Uniform):
    """`bits`-bit indices into a table of `2**bits` values that `group` rows share."""

    bits: Literal[4] = 4
    group: Size = 16
    lut: FloatDtype = "float16"
    algorithm: str = field(default="kmeans", compare=False)
    kind: Literal["palette"] = "palette"

    has_mil_op = True

    @property
    def label(self) -> str:
        return f"pal{self.bits}/{self.group}"

    @property
    def bits_per_weight(self) -> float:
        return float(self.bits)

    @property
    def rows_together(self) -> int:
        return self.group

    def part_shapes(self, shape: Shape) -> PartShapes:
        rows, columns = shape
        return {
            "data": ("uint8", (rows, packed_width(columns, self.bits))),
            "lut": (self.lut, (rows // self.group, 2**self.bits)),
        }

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        lut = arrays["lut"].astype(np.float32)
        indices = unpack(arrays["data"], self.bits)[:, :columns].reshape(len(lut), -1)
        rows = np.take_along_axis(lut, indices.astype(np.intp), axis=1)
        return rows.reshape(-1, columns)

    def _cluster(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        lut, indices = self._nearest(rows)
        return {"data": pack(indices, self.bits), "lut": lut}

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        lut, nearest = self._nearest(rows)
        table = np.repeat(lut.astype(np.float32), self.group, axis=0)
        grid = library.Grid(1, 2**self.bits - 1, table=table)
        indices = choose_levels(rows, grid, statistics.hessians, nearest)
        return {"data": pack(indices, self.bits), "lut": lut}

    encoders: ClassVar = {"kmeans": _cluster, "gptq": _gptq}

    def _nearest(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tables [groups, 2**bits] in their dtype, and the index of each weight, uint8 [n, K]."""
        groups = rows.astype(np.float32).reshape(len(rows) // self.group, -1)
        with np.errstate(over="ignore"):
            lut = np.stack([centers(group, 2**self.bits) for group in groups]).astype(self.lut)
        if not np.isfinite(lut).all():
            raise RequestError(
                f"weights of {np.abs(groups).max():.4g} exceed {self.lut}; take --compute fp32"
            )
        table = lut.astype(np.float32)
        borders = table[:, :-1] + (table[:, 1:] - table[:, :-1]) / 2
        indices = np.zeros(groups.shape, np.uint8)
        for border in borders.T:  # 15 comparisons are faster than a binary search
            indices += groups > border[:, None]
        return lut, indices.reshape(rows.shape)

    def fitted(self, shape: Shape) -> Uniform:
        rows, columns = shape
        if columns % 2:
            return Affine(8, None, symmetric=True, scale=self.lut).fitted(shape)
        return replace(self, group=largest_divisor(rows, self.group))

    def with_dtype(self, dtype: FloatDtype) -> "Palette":
        return replace(self, lut=dtype)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Computes twice the rms error of even levels; the least squared error is less."""
        groups = w.reshape(len(w) // self.group, -1).astype(np.float64)
        low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
        even = np.maximum((high - low) / (2**self.bits - 1), NEGLIGIBLE)
        error = groups - low
        error -= np.rint(error / even) * even
        largest = np.maximum(high, -low)
        rounded = float16_spacing(largest) if self.lut == "float16" else largest * 2.0**-23
        step = 2 * np.sqrt(np.square(error).mean(1, keepdims=True)) + rounded
        step = np.maximum(step, NEGLIGIBLE)
        # Half a step is an rms error here, and a step over √12 elsewhere.
        distance = np.repeat(3**0.5 * step, self.group, axis=0)
        return StepSizes(step, distance, spans=np.zeros(1, np.intp))

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        """Computes half the distance between the neighbours of each weight's level."""
        gaps = np.empty_like(dequantized)
        for start in range(0, len(gaps), self.group):
            group = dequantized[start : start + self.group]
            levels = np.unique(group)
            if len(levels) < 2:
                levels = np.append(levels, levels + NEGLIGIBLE)
            gaps[start : start + self.group] = np.gradient(levels)[np.searchsorted(levels, group)]
        return StepSizes(gaps)
