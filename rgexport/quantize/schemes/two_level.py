"""Integers of 2 to 6 bits with integer scales.

The scale of a block is an int8 code times a unit, a float16 that the blocks of a run share, as in
ggml's k-quants: scales of small blocks cost half as much as float16 does. Each tile of a row
has its levels in planes of bits, so that a vector unit unpacks them by shifts and masks alone.

The parts of N rows of K weights in blocks:

| part | rows | per row | |
|---|---|---|---|
| `planes` | N | tiles of bytes, uint8 | see `PLANES` |
| `scales` | N | ceil(K / block) int8 | codes, negative ones too |
| `units` | N | ceil(blocks / 16) float16 | positive |
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import Size
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.algorithms.gptq import choose_levels, output_gain
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.schemes.affine import Affine
from rgexport.quantize.schemes.base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.bit_planes import Plane
from rgexport.quantize.schemes.blocks import storable, with_least_padding
from rgexport.quantize.schemes.packing import pack, unpack
from rgexport.quantize.schemes.steps import Measure, StepSizes

RUN = 16
"""Blocks that share a unit."""

_VECTOR = 64
"""Bytes, the most that a kernel unpacks at once."""

_MOST_CODE = 127
_MOST_UNIT = float(np.finfo(np.float16).max)

PLANES: dict[int, tuple[Plane, ...]] = {
    2: (Plane(0x33, 2, 2),),
    3: (Plane(0x33, 2, 2), Plane(0x11, 1, 4, 2)),
    4: (Plane(0xFF, 0, 1),),
    5: (Plane(0x0F, 4, 2), Plane(0x01, 1, 8, 4)),
    6: (Plane(0x0F, 4, 2), Plane(0x03, 2, 4, 4)),
}
"""Bits of a level → its planes. Up to 4 bits, a byte holds two levels, the even one low."""


@dataclass(frozen=True)
class TwoLevel(Uniform):
    """`bits`-bit levels; the scale of each `block` columns of a row is an int8 times a float16.

    The zero point is `2**(bits - 1)`: one of its own for each block costs more than it gains.
    """

    bits: Literal[2, 3, 4, 5, 6]
    block: Size
    algorithm: str = field(default="search", compare=False)
    kind: Literal["two_level"] = "two_level"

    rounds_activations = True
    has_onnx_op = True
    needs_local_function = True
    extra_graph_bytes = 1_200  # for more parts and nodes than other schemes have

    @property
    def symmetric_bits(self) -> int:
        """Bits of a level: the zero point is always 2**(bits - 1)."""
        return self.bits

    @property
    def label(self) -> str:
        """The name for people, such as `int3/16 two-level`."""
        return f"int{self.bits}/{self.block} two-level"

    @property
    def bits_per_weight(self) -> float:
        """Bits of a level, with its share of the code and the unit."""
        bits_of_scale = 8 + 16 / RUN
        return self.bits + bits_of_scale / self.block

    @property
    def unpacked_bits(self) -> Literal[4, 8]:
        """Bits of a level after its planes are joined: half a byte or a byte."""
        if self.bits <= 4:
            return 4
        return 8

    @property
    def affine(self) -> Affine:
        """The same levels with float32 scales."""
        return Affine(self.bits, self.block, symmetric=True)

    def num_blocks(self, columns: int) -> int:
        """Returns the blocks of a row, with the one that is padded."""
        return self.affine.num_blocks(columns)

    def least_padded(self, columns: int) -> "TwoLevel":
        """Returns the scheme with the block, up to its own, that takes the fewest bytes a row."""
        return with_least_padding(self, columns)

    def part_shapes(self, shape: Shape) -> PartShapes:
        """Returns the parts; RequestError for blocks that are no multiple of 16."""
        rows, columns = shape
        if self.block % 16:
            raise RequestError(f"blocks of {self.block}: two-level scales take multiples of 16")
        blocks = self.num_blocks(columns)
        tile = self.tile(columns)
        tiles = self._row_bytes(columns) // tile
        packed_tile = tile * self.bits // self.unpacked_bits
        return {
            "planes": ("uint8", (rows, tiles, packed_tile)),
            "scales": ("int8", (rows, blocks)),
            "units": ("float16", (rows, -(-blocks // RUN))),
        }

    def tile(self, columns: int) -> int:
        """Returns the unpacked bytes of a tile: a vector for each group; tiles fill a row.

        With 4 bits it is a block, as in `MatMulNBits`: then stock ONNX Runtime needs no copy.
        """
        if self.bits == 4:
            return self.block // 2
        finest = PLANES[self.bits][-1]
        row_bytes = self._row_bytes(columns)
        power_of_two = row_bytes & -row_bytes  # the largest that divides a row
        return min(_VECTOR * finest.groups, power_of_two)

    def unpacked_bytes(self, shape: Shape) -> int:
        """Returns the bytes of levels, joined from planes; 0 for 4 bits, which have one plane."""
        if self.bits == self.unpacked_bits:
            return 0
        rows, columns = shape
        return rows * self._row_bytes(columns)

    def _row_bytes(self, columns: int) -> int:
        """Returns the unpacked bytes of a row."""
        padded = self.num_blocks(columns) * self.block
        return padded * self.unpacked_bits // 8

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        """Returns float32 [n, columns]: (level − zero point) · (code · unit)."""
        scales = _scales(arrays["scales"], arrays["units"])
        rows, blocks = scales.shape
        joined = self._joined(arrays["planes"], columns)
        levels = unpack(joined, self.unpacked_bits)

        weights = levels.reshape(rows, blocks, self.block).astype(np.float32)
        weights -= 2 ** (self.bits - 1)
        weights *= scales[..., None]
        padded = weights.reshape(rows, blocks * self.block)
        return np.ascontiguousarray(padded[:, :columns])

    def _joined(self, planes: np.ndarray, columns: int) -> np.ndarray:
        """Returns the unpacked bytes of rows from their planes, uint8 [n, row bytes].

        `planes` are uint8 [n, tiles, packed bytes of a tile].
        """
        tile = self.tile(columns)
        packed_tile = tile * self.bits // self.unpacked_bits
        tiles = planes.reshape(-1, packed_tile)

        joined = np.zeros((len(tiles), tile), np.uint8)
        start = 0
        for plane in PLANES[self.bits]:
            stop = start + tile // plane.groups
            joined |= plane.unpack(tiles[:, start:stop])
            start = stop
        return joined.reshape(len(planes), -1)

    def _round(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        scales = self.affine.encode("", rows)["scales"]
        return self._store(rows, scales)

    def _search(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        _levels, scales, _zeros = self.affine.search(rows)
        return self._store(rows, scales)

    def _gptq(self, rows: np.ndarray, statistics: Statistics) -> Parts:
        _levels, scales, _zeros = self.affine.search(rows, statistics)
        return self._store(rows, scales, statistics)

    encoders: ClassVar = {"rtn": _round, "search": _search, "gptq": _gptq}

    def _store(
        self, rows: np.ndarray, scales: np.ndarray, statistics: Statistics | None = None
    ) -> Parts:
        """Stores scales float32 [n, blocks], and chooses levels for the stored scales.

        With statistics levels are chosen by GPTQ, and without them by rounding to nearest.
        """
        columns = rows.shape[1]
        blocks = scales.shape[1]
        weights = np.zeros((len(rows), blocks * self.block), np.float32)
        weights[:, :columns] = rows
        codes, units = self._stored_scales(weights, scales)

        scale = np.repeat(_scales(codes, units), self.block, axis=1)
        zero = np.float32(2 ** (self.bits - 1))
        top = 2**self.bits - 1
        nearest = np.rint(weights / scale + zero)
        levels = np.clip(nearest, 0, top).astype(np.uint8)

        if statistics is not None:
            grid = Grid(1, top, scale[:, :columns], (-scale * zero)[:, :columns])
            chosen = np.ascontiguousarray(levels[:, :columns])
            levels[:, :columns] = choose_levels(rows, grid, statistics.hessians, chosen)
            stored = ((levels - zero) * scale)[:, :columns]
            gain = output_gain(rows, stored, statistics.hessians)
            larger = np.minimum(units * gain[:, None], _MOST_UNIT)
            units = larger.astype(np.float16)
        return {"planes": self._planes(levels), "scales": codes, "units": units}

    def _stored_scales(
        self, weights: np.ndarray, scales: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the codes and units of scales [n, blocks], the least for blocks of zeros.

        Rounding to nearest promises that no weight is beyond the last level, so it takes the next
        larger code; other algorithms may clip and take the nearest code.
        """
        in_blocks = weights.reshape(*scales.shape, self.block)
        is_zero = ~in_blocks.any(2)
        to_code: np.ufunc = np.rint
        if self.algorithm == "rtn":
            to_code = np.ceil
        return _codes(np.where(is_zero, 0, scales), to_code)

    def _planes(self, levels: np.ndarray) -> np.ndarray:
        """Returns the tiles of levels [n, padded columns] as planes of bits, [n, tiles, bytes]."""
        unpacked = pack(levels, self.unpacked_bits)
        tiles = unpacked.reshape(-1, self.tile(levels.shape[1]))
        planes = np.hstack([plane.pack(tiles) for plane in PLANES[self.bits]])
        return planes.reshape(len(levels), -1, planes.shape[1])

    def rounding_rule(self, weighted: bool) -> str:
        """Returns the rule of the same levels with float32 scales."""
        affine = self.affine.with_algorithm(self.algorithm)
        return affine.rounding_rule(weighted)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Returns the scales that rounding to nearest would store, at each weight."""
        exact = self.affine.weight_steps(w).step[:, :: self.block]
        codes, units = _codes(exact, np.ceil)
        stored = np.repeat(_scales(codes, units), self.block, axis=1)
        stored = stored[:, : w.shape[1]]

        limit = stored * (2 ** (self.bits - 1) - 1)
        return StepSizes(stored, limit=limit, grid=stored)

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        """Returns the steps of the same levels with float32 scales."""
        return self.affine.stored_steps(dequantized)

    def _span_steps(self, w: np.ndarray, measure: Measure) -> StepSizes:
        """Adds to the steps of float32 scales how far a unit, the step of scales, moves levels."""
        exact = self.affine.step_sizes(w, measure)
        scales = exact.levels[:, :: self.block]
        units = _units(scales).max(1, keepdims=True)
        return replace(exact, step=exact.step + 2**self.bits * units)


def _units(scales: np.ndarray) -> np.ndarray:
    """Returns float16 numbers as float32 [n, runs]; 127 times one is no less than its scales."""
    padding = -scales.shape[1] % RUN
    padded = np.pad(np.abs(scales), ((0, 0), (0, padding)))
    largest = padded.reshape(len(scales), -1, RUN).max(2)
    return storable(largest / np.float32(_MOST_CODE), "float16")


def _codes(scales: np.ndarray, to_code: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 [n, blocks] and float16 [n, runs]; their products are near to the scales."""
    units = _units(scales)
    sizes = np.abs(scales) / _spread(units, scales.shape[1])
    codes = np.clip(to_code(sizes), 1, _MOST_CODE)
    signs = np.where(scales < 0, -1, 1)
    return (codes * signs).astype(np.int8), units.astype(np.float16)


def _scales(codes: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns the scales, float32 [n, blocks], of codes and units."""
    return codes * _spread(units.astype(np.float32), codes.shape[1])


def _spread(units: np.ndarray, blocks: int) -> np.ndarray:
    """Returns the unit of each block, [n, blocks]."""
    return np.repeat(units, RUN, axis=1)[:, :blocks]
