"""Integers of 2 to 6 bits with integer scales.

The scale of a block is an int8 code times a unit, a float16 that the blocks of a run share, as in
ggml's k-quants: scales of small blocks cost half as much as float16 does. Each tile of a row
has its levels in planes of bits, so that a vector unit unpacks them by shifts and masks alone.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import Size
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize.algorithms.gptq import choose_levels, output_gain
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.schemes.affine import Affine, pack, storable, unpack, with_least_padding
from rgexport.quantize.schemes.base import Parts, PartShapes, Shape, Uniform
from rgexport.quantize.schemes.steps import Measure, StepSizes

RUN = 16
"""Blocks that share a unit."""
_VECTOR = 64  # bytes, the most that a kernel unpacks at once
_MOST_CODE, _MOST_UNIT = 127, float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Plane:
    """Packs some bits of each byte of a tile; a packed byte holds bits of `groups` bytes.

    Group g of a tile, in order, is `((packed >> step · g) & mask) << shift`.
    """

    mask: int
    step: int
    groups: int
    shift: int = 0

    def pack(self, tiles: np.ndarray) -> np.ndarray:
        """Packs tiles uint8 [n, m], [n, m / groups]."""
        fields = (tiles >> np.uint8(self.shift)) & np.uint8(self.mask)
        grouped = fields.reshape(len(fields), self.groups, -1) << self._shifts
        return np.asarray(np.bitwise_or.reduce(grouped, axis=1))

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        fields = (packed[:, None, :] >> self._shifts) & np.uint8(self.mask)
        return fields.reshape(len(packed), -1) << np.uint8(self.shift)

    @property
    def _shifts(self) -> np.ndarray:
        return np.uint8(self.step) * np.arange(self.groups, dtype=np.uint8)[:, None]


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
        return f"int{self.bits}/{self.block} two-level"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (8 + 16 / RUN) / self.block

    @property
    def unpacked_bits(self) -> Literal[4, 8]:
        return 4 if self.bits <= 4 else 8

    @property
    def affine(self) -> Affine:
        """The same levels with float32 scales."""
        return Affine(self.bits, self.block, symmetric=True)

    def num_blocks(self, columns: int) -> int:
        return self.affine.num_blocks(columns)

    def least_padded(self, columns: int) -> "TwoLevel":
        return with_least_padding(self, columns)

    def part_shapes(self, shape: Shape) -> PartShapes:
        rows, columns = shape
        if self.block % 16:
            raise RequestError(f"blocks of {self.block}: two-level scales take multiples of 16")
        blocks = self.num_blocks(columns)
        tile, width = self.tile(columns), self._row_bytes(columns)
        return {
            "planes": ("uint8", (rows, width // tile, tile * self.bits // self.unpacked_bits)),
            "scales": ("int8", (rows, blocks)),
            "units": ("float16", (rows, -(-blocks // RUN))),
        }

    def tile(self, columns: int) -> int:
        """Returns the unpacked bytes of a tile: a vector for each group; tiles fill a row.

        With 4 bits it is a block, as in `MatMulNBits`: then stock ONNX Runtime needs no copy.
        """
        if self.bits == 4:
            return self.block // 2
        width = self._row_bytes(columns)
        return min(_VECTOR * PLANES[self.bits][-1].groups, width & -width)

    def unpacked_bytes(self, shape: Shape) -> int:
        """Returns the bytes of levels, joined from planes; 0 for 4 bits, which have one plane."""
        if self.bits == self.unpacked_bits:
            return 0
        rows, columns = shape
        return rows * self._row_bytes(columns)

    def _row_bytes(self, columns: int) -> int:
        return self.num_blocks(columns) * self.block * self.unpacked_bits // 8

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        scales = _scales(arrays["scales"], arrays["units"])
        rows, blocks = scales.shape
        levels = unpack(self._unpacked(arrays["planes"], columns), self.unpacked_bits)
        weights = levels.reshape(rows, blocks, self.block).astype(np.float32)
        weights -= 2 ** (self.bits - 1)
        weights *= scales[..., None]
        return np.ascontiguousarray(weights.reshape(rows, blocks * self.block)[:, :columns])

    def _unpacked(self, planes: np.ndarray, columns: int) -> np.ndarray:
        """Returns the bytes of rows of planes, uint8 [n, blocks · block · unpacked bits / 8]."""
        tile, start = self.tile(columns), 0
        tiles = planes.reshape(-1, tile * self.bits // self.unpacked_bits)
        result = np.zeros((len(tiles), tile), np.uint8)
        for plane in PLANES[self.bits]:
            stop = start + tile // plane.groups
            result |= plane.unpack(tiles[:, start:stop])
            start = stop
        return result.reshape(len(planes), -1)

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
        """Stores scales float32 [n, blocks], and chooses levels for the stored scales."""
        columns = rows.shape[1]
        weights = np.zeros((len(rows), scales.shape[1] * self.block), np.float32)
        weights[:, :columns] = rows
        is_zero = ~weights.reshape(*scales.shape, self.block).any(2)
        to_code = np.ceil if self.algorithm == "rtn" else np.rint  # rounding to nearest never clips
        codes, units = _codes(np.where(is_zero, 0, scales), to_code)

        scale = np.repeat(_scales(codes, units), self.block, axis=1)
        zero = np.float32(2 ** (self.bits - 1))
        top = 2**self.bits - 1
        levels = np.clip(np.rint(weights / scale + zero), 0, top).astype(np.uint8)
        if statistics is not None:
            grid = Grid(1, top, scale[:, :columns], (-scale * zero)[:, :columns])
            nearest = np.ascontiguousarray(levels[:, :columns])
            levels[:, :columns] = choose_levels(rows, grid, statistics.hessians, nearest)
            stored = ((levels - zero) * scale)[:, :columns]
            gain = output_gain(rows, stored, statistics.hessians)
            units = np.minimum(units * gain[:, None], _MOST_UNIT).astype(np.float16)
        return {"planes": self._planes(levels), "scales": codes, "units": units}

    def _planes(self, levels: np.ndarray) -> np.ndarray:
        """Returns the tiles of levels [n, padded columns] as planes of bits, [n, tiles, bytes]."""
        unpacked = pack(levels, self.unpacked_bits)
        tiles = unpacked.reshape(-1, self.tile(levels.shape[1]))
        planes = np.hstack([plane.pack(tiles) for plane in PLANES[self.bits]])
        return planes.reshape(len(levels), -1, planes.shape[1])

    def rounding_rule(self, weighted: bool) -> str:
        return self.affine.with_algorithm(self.algorithm).rounding_rule(weighted)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        exact = self.affine.weight_steps(w).step[:, :: self.block]
        stored = np.repeat(_scales(*_codes(exact, np.ceil)), self.block, axis=1)[:, : w.shape[1]]
        return StepSizes(stored, limit=stored * (2 ** (self.bits - 1) - 1), grid=stored)

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        return self.affine.stored_steps(dequantized)

    def _span_steps(self, w: np.ndarray, measure: Measure) -> StepSizes:
        exact = self.affine.step_sizes(w, measure)
        units = _units(exact.levels[:, :: self.block]).max(1, keepdims=True)
        return replace(exact, step=exact.step + 2**self.bits * units)


def _units(scales: np.ndarray) -> np.ndarray:
    """Returns float16 numbers as float32 [n, runs]; 127 times one is no less than its scales."""
    padded = np.pad(np.abs(scales), ((0, 0), (0, -scales.shape[1] % RUN)))
    largest = padded.reshape(len(scales), -1, RUN).max(2)
    return storable(largest / np.float32(_MOST_CODE), "float16")


def _codes(scales: np.ndarray, to_code: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 [n, blocks] and float16 [n, runs]; their products are near to the scales."""
    units = _units(scales)
    sizes = np.abs(scales) / np.repeat(units, RUN, axis=1)[:, : scales.shape[1]]
    codes = np.clip(to_code(sizes), 1, _MOST_CODE) * np.where(scales < 0, -1, 1)
    return codes.astype(np.int8), units.astype(np.float16)


def _scales(codes: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Returns the scales, float32 [n, blocks], of codes and units."""
    spread = np.repeat(units.astype(np.float32), RUN, axis=1)[:, : codes.shape[1]]
    return codes * spread
