"""The levels of ggml's quantized types: read from packed rows, and replaced in them.

Scales and minimums stay as they are, bit for bit, so a row with other levels is still a row of its
type. The layouts are those of ggml-common.h.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.quantize.ggml_types import TYPES

Blocks = np.ndarray
"""uint8 [blocks, bytes of a block]."""
Scales = tuple[np.ndarray, np.ndarray | None]
"""float32 [blocks, groups]: the distance of levels, and the value of level 0 or None."""


@dataclass(frozen=True)
class GgmlLevels:
    """Rows as levels: the value of a weight is `scale · level + offset` of its group.

    `group` columns share a scale; `top` is the largest level, and the least is 0. `scale` (also
    negative, and 0 where a group has one value) and `offset` are float32 [n, groups], `levels`
    uint8 [n, columns].
    """

    group: int
    top: int
    scale: np.ndarray
    offset: np.ndarray
    levels: np.ndarray


def read_levels(packed: np.ndarray, kind: str) -> GgmlLevels:
    """Returns the levels of rows uint8 [n, row_bytes] that ggml packed; `kind` is in `LAYOUTS`."""
    layout, blocks = LAYOUTS[kind], packed.reshape(-1, TYPES[kind].block_bytes)
    with np.errstate(all="ignore"):
        scale, offset = layout.scales(blocks)
        if offset is None:
            offset = -layout.zero * scale
    levels = sum((plane.read(blocks) for plane in layout.planes), layout.bias)
    rows, columns = len(packed), packed.shape[1] // TYPES[kind].block_bytes * TYPES[kind].block
    groups = rows, columns // layout.group
    return GgmlLevels(
        layout.group,
        layout.top,
        scale.astype(np.float32, copy=False).reshape(groups),
        offset.astype(np.float32, copy=False).reshape(groups),
        levels.reshape(rows, columns),
    )


def replace_levels(packed: np.ndarray, kind: str, levels: np.ndarray) -> np.ndarray:
    """Returns a copy of packed rows with other levels, uint8 [n, columns], none above the top."""
    layout, copy = LAYOUTS[kind], packed.copy()
    blocks = copy.reshape(-1, TYPES[kind].block_bytes)
    stored = levels.reshape(len(blocks), TYPES[kind].block) - layout.bias
    for plane in layout.planes:
        plane.write(blocks, stored)
    return copy


@dataclass(frozen=True)
class _Plane:
    """Some bits of all levels of a block, in `count` bytes from `start` on.

    A run of `width` bytes holds the bits of `8 / bits` such runs of levels, one above the other.
    `shift` is the position of the lowest bit in a level.
    """

    start: int
    count: int
    bits: int
    width: int
    shift: int = 0

    def read(self, blocks: Blocks) -> np.ndarray:
        runs = self._bytes(blocks).reshape(len(blocks), self.count // self.width, 1, self.width)
        bits = (runs >> self._shifts) & self._mask
        return bits.reshape(len(blocks), self.count * 8 // self.bits) << np.uint8(self.shift)

    def write(self, blocks: Blocks, levels: np.ndarray) -> None:
        bits = (levels >> np.uint8(self.shift)) & self._mask
        shape = len(blocks), self.count // self.width, 8 // self.bits, self.width
        joined = np.bitwise_or.reduce(bits.reshape(shape) << self._shifts, axis=2)
        self._bytes(blocks)[:] = joined.reshape(len(blocks), self.count)

    def _bytes(self, blocks: Blocks) -> np.ndarray:
        return blocks[:, self.start : self.start + self.count]

    @property
    def _mask(self) -> np.uint8:
        return np.uint8((1 << self.bits) - 1)

    @property
    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


def _half(blocks: Blocks, start: int) -> np.ndarray:
    """A float16 of each block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _one_scale(blocks: Blocks) -> Scales:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Blocks) -> Scales:
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
    """16 groups, with a scale of 8 bits each."""
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), None


@dataclass(frozen=True)
class GgmlLayout:
    """The levels and scales of a block.

    `group` levels share a scale; `zero` is the level that is 0, or 0 where level 0 is a minimum
    that is stored. `multiples` is the largest multiple of the block's scale that is a group's
    scale; types with more than 1 choose their scales for the least squared error. `bias` is added,
    modulo 256, to a stored number to get the level.
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
    "q4_1": GgmlLayout(32, 15, 0, (_Plane(4, 16, 4, 16),), _scale_and_minimum),
    "q5_0": GgmlLayout(32, 31, 16, (_Plane(6, 16, 4, 16), _Plane(2, 4, 1, 1, 4)), _one_scale),
    "q5_1": GgmlLayout(
        32, 31, 0, (_Plane(8, 16, 4, 16), _Plane(4, 4, 1, 1, 4)), _scale_and_minimum
    ),
    "q2_k": GgmlLayout(16, 3, 0, (_Plane(16, 64, 2, 32),), _q2_k, 15),
    "q3_k": GgmlLayout(16, 7, 4, (_Plane(32, 64, 2, 32), _Plane(0, 32, 1, 32, 2)), _q3_k, 32),
    "q4_k": GgmlLayout(32, 15, 0, (_Plane(16, 128, 4, 32),), _q45_k, 63),
    "q5_k": GgmlLayout(32, 31, 0, (_Plane(48, 128, 4, 32), _Plane(16, 32, 1, 32, 4)), _q45_k, 63),
    "q6_k": GgmlLayout(16, 63, 32, (_Plane(0, 128, 4, 64), _Plane(128, 64, 2, 32, 4)), _q6_k, 128),
}
