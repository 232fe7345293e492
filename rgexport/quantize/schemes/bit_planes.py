"""Bit planes: a few bits of each of many levels, packed into bytes.

Levels of 3, 5 or 6 bits fill no whole number of bytes. Their low bits are in one plane and their
high bits in another, so that shifts and masks alone unpack each plane.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plane:
    """A plane that holds some bits of each byte of a row.

    A row is cut into runs of `groups * width` bytes, and each run into groups of `width` bytes. A
    packed byte holds the bits of one byte of each group. Group g of a run, in order, is
    `((packed >> step * g) & mask) << shift`.

    Attributes:
        mask: the bits of one group in a packed byte, moved to the low end.
        step: bits from one group to the next in a packed byte.
        groups: groups of a run.
        shift: the position of the mask's lowest bit in an unpacked byte.
        width: packed bytes of a run; None if a row is one run.
    """

    mask: int
    step: int
    groups: int
    shift: int = 0
    width: int | None = None

    def pack(self, unpacked: np.ndarray) -> np.ndarray:
        """Returns the packed bytes, uint8 [n, m / groups], of rows uint8 [n, m]."""
        rows, columns = unpacked.shape
        packed_columns = columns // self.groups
        runs, width = self._runs(packed_columns)

        bits = (unpacked >> np.uint8(self.shift)) & np.uint8(self.mask)
        grouped = bits.reshape(rows, runs, self.groups, width)
        packed = np.bitwise_or.reduce(grouped << self._shifts, axis=2)
        return np.asarray(packed).reshape(rows, packed_columns)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Returns rows uint8 [n, m] from packed bytes uint8 [n, m / groups]; other bits are 0."""
        rows, packed_columns = packed.shape
        runs, width = self._runs(packed_columns)

        grouped = packed.reshape(rows, runs, 1, width) >> self._shifts
        bits = (grouped & np.uint8(self.mask)) << np.uint8(self.shift)
        return np.asarray(bits).reshape(rows, packed_columns * self.groups)

    def _runs(self, packed_columns: int) -> tuple[int, int]:
        """Returns the number of runs of a row, and the packed bytes of each."""
        if self.width is None:
            return 1, packed_columns
        return packed_columns // self.width, self.width

    @property
    def _shifts(self) -> np.ndarray:
        """The shift of each group, uint8 [groups, 1]."""
        groups = np.arange(self.groups, dtype=np.uint8)
        return np.uint8(self.step) * groups[:, None]
