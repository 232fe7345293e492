"""Where a checkpoint's tensors are stored, before they get canonical names and shapes."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rgexport.griffin.file_rows import file_rows, transposed_rows
from rgexport.griffin.tensor import RowTensor


class Stored(ABC):
    """A tensor of a checkpoint."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def rows(self) -> RowTensor:
        """The tensor, read in slabs of rows."""

    @abstractmethod
    def transposed(self) -> RowTensor:
        """The transpose of a matrix, likewise."""


class RowMajor(Stored):
    """One whose items lie one after another."""

    @abstractmethod
    def item(self, index: int, shape: tuple[int, ...]) -> Stored:
        """One item of the first axis, in another shape of as many elements."""


@dataclass(frozen=True)
class Located(RowMajor):
    """A tensor in a file, `offset` bytes from its start."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self) -> RowTensor:
        """See `Stored`."""
        return file_rows(self.path, self.shape, self.dtype, self.offset)

    def transposed(self) -> RowTensor:
        """See `Stored`."""
        height, width = self.shape
        return transposed_rows(self.path, (height, width), self.dtype, self.offset)

    def item(self, index: int, shape: tuple[int, ...]) -> Stored:
        """See `RowMajor`."""
        step = math.prod(shape) * self.dtype.itemsize
        return replace(self, shape=shape, offset=self.offset + index * step)


@dataclass(frozen=True)
class Transposed(Stored):
    """The transpose of a matrix."""

    base: Stored

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """That of the matrix."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """That of the matrix, backwards."""
        return self.base.shape[::-1]

    def rows(self) -> RowTensor:
        """See `Stored`."""
        return self.base.transposed()

    def transposed(self) -> RowTensor:
        """See `Stored`."""
        return self.base.rows()
