"""The blocks of ggml's types with even levels, as ggml-common.h lays them out.

Reads scales and levels of packed rows, and replaces levels or multiplies scales in them. I-quants
are not among them: their weights are entries of a codebook.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.quantize.schemes.bit_planes import Plane
from rgexport.quantize.schemes.ggml_types import TYPES

Blocks = np.ndarray
"""uint8 [blocks, bytes of a block]."""

Scales = tuple[np.ndarray, np.ndarray | None]
"""float32 [blocks, groups]: the distance of levels, and the value of level 0 or None."""

MOST_HALF = np.float32(np.finfo(np.float16).max)
"""The largest float16."""


@dataclass(frozen=True)
class GgmlLayout:
    """The levels and scales of a block.

    Attributes:
        group: levels that share a scale.
        top: the largest level; the least is 0.
        zero: the level that stands for 0; 0 if the value of level 0, a minimum, is stored.
        planes: offset in the block → the plane of bits that begins there.
        scales: reads the scales, and the minimums if there are some, of blocks.
        multiples: the largest multiple of the block's scale that the scale of a group can be.
            Types with more than 1 choose their scales for the least squared error.
        bias: added to the numbers in the planes.
    """

    group: int
    top: int
    zero: int
    planes: Mapping[int, Plane]
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


HALVES = {
    "q4_1": (0, 2),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
"""Offsets of a block's float16 numbers, which all scales and minimums multiply; else 0."""


def read_levels(packed: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales, offsets and levels of rows uint8 [n, row_bytes]; `kind` is in `LAYOUTS`.

    A weight is `scale · level + offset` of its group: float32 [n, groups], the scale also negative,
    and 0 where a group has one value. Levels are uint8 [n, columns], from 0 to the layout's top.
    """
    layout = LAYOUTS[kind]
    blocks = _blocks(packed, kind)

    # Packed rows can hold any float16, also NaN and infinities, of which numpy would warn.
    with np.errstate(all="ignore"):
        scale, offset = layout.scales(blocks)
        if offset is None:
            offset = -layout.zero * scale

    block = TYPES[kind].block
    levels = np.full((len(blocks), block), layout.bias)
    for start, plane in layout.planes.items():
        stop = start + block // plane.groups
        levels += plane.unpack(blocks[:, start:stop])

    rows = len(packed)
    columns = packed.shape[1] // TYPES[kind].block_bytes * block
    groups = columns // layout.group
    scale = scale.astype(np.float32, copy=False).reshape(rows, groups)
    offset = offset.astype(np.float32, copy=False).reshape(rows, groups)
    return scale, offset, levels.reshape(rows, columns)


def replace_levels(packed: np.ndarray, kind: str, levels: np.ndarray) -> np.ndarray:
    """Returns a copy of packed rows with other levels, uint8 [n, columns], none above the top."""
    layout = LAYOUTS[kind]
    copy = packed.copy()
    blocks = _blocks(copy, kind)  # a view: what is written to it changes the copy

    block = TYPES[kind].block
    stored = levels.reshape(len(blocks), block) - layout.bias
    for start, plane in layout.planes.items():
        stop = start + block // plane.groups
        blocks[:, start:stop] = plane.pack(stored)
    return copy


def multiply_rows(packed: np.ndarray, kind: str, factors: np.ndarray) -> None:
    """Multiplies the scales of packed rows by `factors`, float32 [n], in place."""
    blocks = _blocks(packed, kind)
    blocks_of_row = packed.shape[1] // TYPES[kind].block_bytes
    factor_of_block = np.repeat(factors, blocks_of_row)

    for start in HALVES.get(kind, (0,)):
        scales = _half(blocks, start)[:, 0] * factor_of_block
        scales = scales.clip(-MOST_HALF, MOST_HALF)
        stored = scales.astype("<f2")[:, None]
        blocks[:, start : start + 2] = stored.view(np.uint8)


def _blocks(packed: np.ndarray, kind: str) -> Blocks:
    return packed.reshape(-1, TYPES[kind].block_bytes)


def _half(blocks: Blocks, start: int) -> np.ndarray:
    """Returns the float16 at an offset of each block, as float32 [blocks, 1]."""
    stored = np.ascontiguousarray(blocks[:, start : start + 2])
    return stored.view("<f2").astype(np.float32)


def _one_scale(blocks: Blocks) -> Scales:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Blocks) -> Scales:
    scale = _half(blocks, 0)
    minimum = _half(blocks, 2)
    return scale, minimum


def _q2_k_scales(blocks: Blocks) -> Scales:
    """Reads 16 groups, with 4 bits each for scale and minimum."""
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15)
    minimums = -_half(blocks, 82) * (packed >> 4)
    return scales, minimums


def _q3_k_scales(blocks: Blocks) -> Scales:
    """Reads 16 groups, with 6 bits each: the lower 4 in 8 bytes, the upper 2 in 4."""
    low = _plane(4, width=8).unpack(blocks[:, 96:104])
    high = _plane(2, width=4, shift=4).unpack(blocks[:, 104:108])
    codes = (low | high).astype(np.float32) - 32
    return _half(blocks, 108) * codes, None


def _q4_k_scales(blocks: Blocks) -> Scales:
    """Reads 8 groups, with 6 bits each for scale and minimum; the last four share bytes.

    Their lower 4 bits are in the shared bytes, and their upper 2 above the 6 bits of the first
    four. It is `get_scale_min_k4` in ggml-quants.c, also for q5_k.
    """
    scales = blocks[:, 4:8]
    minimums = blocks[:, 8:12]
    shared = blocks[:, 12:16]

    last_scales = (shared & 15) | (scales >> 6 << 4)
    last_minimums = (shared >> 4) | (minimums >> 6 << 4)
    scales = np.hstack((scales & 63, last_scales))
    minimums = np.hstack((minimums & 63, last_minimums))
    scales = _half(blocks, 0) * scales
    minimums = -_half(blocks, 2) * minimums
    return scales, minimums


def _q6_k_scales(blocks: Blocks) -> Scales:
    """Reads 16 groups, with an int8 each."""
    codes = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _half(blocks, 208) * codes, None


def _plane(bits: int, *, width: int, shift: int = 0) -> Plane:
    """Returns the plane of so many neighbouring bits of each level, from bit `shift` up.

    A packed byte has the bits of `8 / bits` levels, `width` levels apart.
    """
    mask = (1 << bits) - 1
    return Plane(mask, step=bits, groups=8 // bits, shift=shift, width=width)


LAYOUTS = {
    "q8_0": GgmlLayout(
        group=32,
        top=254,
        zero=127,
        planes={2: _plane(8, width=32)},
        scales=_one_scale,
        bias=np.uint8(127),  # ggml writes no -128, which has no negative in the kernels
    ),
    "q4_0": GgmlLayout(
        group=32,
        top=15,
        zero=8,
        planes={2: _plane(4, width=16)},
        scales=_one_scale,
    ),
    "q4_1": GgmlLayout(
        group=32,
        top=15,
        zero=0,
        planes={4: _plane(4, width=16)},
        scales=_scale_and_minimum,
    ),
    "q5_0": GgmlLayout(
        group=32,
        top=31,
        zero=16,
        planes={6: _plane(4, width=16), 2: _plane(1, width=1, shift=4)},
        scales=_one_scale,
    ),
    "q5_1": GgmlLayout(
        group=32,
        top=31,
        zero=0,
        planes={8: _plane(4, width=16), 4: _plane(1, width=1, shift=4)},
        scales=_scale_and_minimum,
    ),
    "q2_k": GgmlLayout(
        group=16,
        top=3,
        zero=0,
        planes={16: _plane(2, width=32)},
        scales=_q2_k_scales,
        multiples=15,
    ),
    "q3_k": GgmlLayout(
        group=16,
        top=7,
        zero=4,
        planes={32: _plane(2, width=32), 0: _plane(1, width=32, shift=2)},
        scales=_q3_k_scales,
        multiples=32,
    ),
    "q4_k": GgmlLayout(
        group=32,
        top=15,
        zero=0,
        planes={16: _plane(4, width=32)},
        scales=_q4_k_scales,
        multiples=63,
    ),
    "q5_k": GgmlLayout(
        group=32,
        top=31,
        zero=0,
        planes={48: _plane(4, width=32), 16: _plane(1, width=32, shift=4)},
        scales=_q4_k_scales,
        multiples=63,
    ),
    "q6_k": GgmlLayout(
        group=16,
        top=63,
        zero=32,
        planes={0: _plane(4, width=64), 128: _plane(2, width=32, shift=4)},
        scales=_q6_k_scales,
        multiples=128,
    ),
}
"""Type → layout of its blocks."""
