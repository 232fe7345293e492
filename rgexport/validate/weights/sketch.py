"""A sketch of a tensor, by which an artifact's weights can be judged without the original model.

The rows of a tensor are projected onto a few directions. Products with random signs keep lengths
(Johnson and Lindenstrauss; Achlioptas 2003): the mean of (p·e)² over the directions p is ‖e‖², with
a relative error of √(2/directions) for one row, and less by the root of their number for many. So
the sketches of W and of Ŵ tell ‖W−Ŵ‖, row by row and for the tensor.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64  # here, since threads that import it at once recurse

from rgexport.griffin.tensor import RowTensor, slab_bounds

DIRECTIONS = 3
"""The fewest random directions: they show nine in ten exchanged rows of an embedding."""
PRODUCTS = 1024
"""The fewest random products of a tensor: they give the size of its error to 2.2 %."""
SLAB_BYTES = 1 << 18
"""Float32 bytes that are projected at a time: they and their float64 stay in cache."""
_SEED = 20240411


@dataclass(frozen=True)
class SketchShape:
    """How a tensor is sketched, as a matrix whose rows are its last axis.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        directions: random ones; 0 where the rows are so short that they are kept as they are.
    """

    rows: int
    columns: int
    directions: int

    @property
    def width(self) -> int:
        """Numbers that are kept of a row: its sum and its products, or the row itself."""
        return 1 + self.directions if self.directions else self.columns

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, columns] → their sketch [n, width] float64."""
        wide = rows.astype(np.float64)
        if not self.directions:
            return wide
        # Not `wide @ …`: BLAS would start threads of its own in each of ours.
        products = [
            np.einsum("nk,k->n", wide, p) for p in directions(self.columns, self.directions)
        ]
        return np.stack(products, 1)

    def sums(self, sketch: np.ndarray) -> np.ndarray:
        """The rows' sums, [n], from their sketch."""
        return sketch[:, 0] if self.directions else sketch.sum(1)

    def squares(self, sketch: np.ndarray) -> np.ndarray:
        """The rows' squared lengths, [n], from their sketch: estimates where it is of products."""
        return self.products(sketch, sketch)

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The products of rows with rows, [n], from their sketches: estimates as `squares`."""
        if not self.directions:
            return np.asarray((a * b).sum(1))
        return np.asarray((a[:, 1:] * b[:, 1:]).mean(1))


def sketch_shape(shape: tuple[int, ...]) -> SketchShape:
    """How a tensor of a shape is sketched."""
    columns = shape[-1] if len(shape) > 1 else 1
    rows = math.prod(shape) // columns
    wanted = max(DIRECTIONS, -(-PRODUCTS // rows))
    return SketchShape(rows, columns, wanted if 1 + wanted < columns else 0)


@functools.cache
def directions(columns: int, count: int) -> np.ndarray:
    """Ones, and `count` vectors of random signs: [1 + count, columns] float64.

    They are the same wherever a file is read: PCG64's raw numbers do not change between releases
    of numpy (NEP 19).
    """
    words = PCG64(_SEED).random_raw(-(-columns * count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: columns * count]
    signs = 1.0 - 2.0 * bits.reshape(count, columns)
    return np.vstack([np.ones(columns), signs])


def sketch(tensor: RowTensor) -> tuple[np.ndarray, float]:
    """The sketch [rows, width] float32 of a tensor, and the sum of its squares; in slabs."""
    shape, parts, square = sketch_shape(tensor.shape), [], 0.0
    row_bytes = 4 * math.prod(tensor.shape[1:])
    for start, stop in slab_bounds(tensor.shape[0], row_bytes, SLAB_BYTES):
        rows = tensor.read(start, stop).astype(np.float32, copy=False).reshape(-1, shape.columns)
        parts.append(shape.project(rows).astype(np.float32))
        square += square_sum(rows)
    return np.concatenate(parts), square


def square_sum(rows: np.ndarray) -> float:
    """Σ x²; row by row in float32, whose error is far below any limit."""
    return float(np.einsum("nk,nk->n", rows, rows).sum(dtype=np.float64))
