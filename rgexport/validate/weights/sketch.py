"""Random projections, which stand for a tensor or for a text's inputs where these are missing.

A *sketch* has the products of a tensor's rows with a few directions of random signs, which keep
lengths (Johnson and Lindenstrauss; Achlioptas 2003): the mean of (p·e)² over the directions p is
‖e‖², with a relative error of √(2/directions) for one row, and less by the root of their number for
many. So the sketches of W and of Ŵ tell ‖W−Ŵ‖, row by row and for the tensor.

A *mixture* p = X s adds the inputs X of a linear over a text with random signs s. An error E = Ŵ−W
matters as far as it changes the linear's output, and mean ‖E p‖² = ‖E X‖² (Hutchinson 1990).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import PCG64  # here, since threads that import it at once recurse

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import linear_inputs
from rgexport.griffin.tensor import RowTensor, slab_bounds

DIRECTIONS = 3
"""The fewest random directions: they show nine in ten exchanged rows of an embedding."""
PRODUCTS = 1024
"""The fewest random products of a tensor: they give the size of its error to 2.2 %."""
SLAB_BYTES = 1 << 18
"""Float32 bytes that are projected at a time: they and their float64 stay in cache."""
MIXTURES = 4
"""Mixtures of the inputs of each linear."""
_SEED = 20240411

Mixtures = Mapping[str, np.ndarray]
"""Input site of linears → mixtures of its values, [MIXTURES, K] float32."""


@dataclass(frozen=True)
class SketchShape:
    """Shape of a tensor's sketch; with 0 `directions`, the short rows are kept as they are."""

    rows: int
    columns: int
    directions: int

    @property
    def width(self) -> int:
        """Numbers for each row: its sum and its products, or the row itself."""
        if not self.directions:
            return self.columns
        return 1 + self.directions

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Returns the sketches [n, width] float64 of rows [n, columns]."""
        wide = rows.astype(np.float64)
        if not self.directions:
            return wide
        return products(wide, directions(self.columns, self.directions))

    def sums(self, sketch: np.ndarray) -> np.ndarray:
        """Returns the sum of each row, [n], from its sketch."""
        if self.directions:
            return sketch[:, 0]
        return np.asarray(sketch.sum(1))

    def dots(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the dot products of rows with rows, [n], as their sketches estimate them."""
        if not self.directions:
            return np.asarray((a * b).sum(1))
        return np.asarray((a[:, 1:] * b[:, 1:]).mean(1))


def sketch_shape(shape: tuple[int, ...]) -> SketchShape:
    """Returns the shape of the sketch of a tensor; vectors count as one column."""
    columns = 1
    if len(shape) > 1:
        columns = shape[-1]
    rows = math.prod(shape) // columns
    count = max(DIRECTIONS, math.ceil(PRODUCTS / rows))
    if 1 + count >= columns:
        count = 0  # the rows themselves are no larger
    return SketchShape(rows, columns, count)


@functools.cache
def directions(columns: int, count: int) -> np.ndarray:
    """Returns [1 + count, columns]: ones and signs, equal in all releases of numpy (NEP 19)."""
    numbers = PCG64(_SEED).random_raw(math.ceil(columns * count / 64))
    octets = numbers.astype("<u8").view(np.uint8)
    bits = np.unpackbits(octets)[: columns * count]
    signs = 1.0 - 2.0 * bits.reshape(count, columns)
    return np.vstack([np.ones(columns), signs])


def sketch(tensor: RowTensor) -> tuple[np.ndarray, float]:
    """Returns the sketch [rows, width] float32 of a tensor, and the sum of its squares."""
    shape = sketch_shape(tensor.shape)
    blocks = []
    square = 0.0
    row_bytes = 4 * math.prod(tensor.shape[1:])
    for start, stop in slab_bounds(tensor.shape[0], row_bytes, SLAB_BYTES):
        rows = tensor.read(start, stop).astype(np.float32, copy=False).reshape(-1, shape.columns)
        blocks.append(shape.project(rows).astype(np.float32))
        square += square_sum(rows)
    return np.concatenate(blocks), square


def square_sum(rows: np.ndarray) -> float:
    """Returns Σ x². Rows are summed in float32: that error is far below any limit."""
    return float(np.einsum("nk,nk->n", rows, rows).sum(dtype=np.float64))


def products(rows: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Returns the products of rows [n, K] with vectors [m, K]: [n, m] float64."""
    # Not `rows @ vectors.T`: BLAS would start threads of its own in each of ours.
    columns = [np.einsum("nk,k->n", rows, vector) for vector in vectors]
    return np.stack(columns, 1).astype(np.float64, copy=False)


class MixtureRecorder:
    """Mixes the inputs of all linears while a reference runs over one text from its beginning."""

    def __init__(self, config: GriffinConfig, tokens: int):
        self._sites = set(linear_inputs(config).values())
        signs = np.random.default_rng(_SEED).integers(0, 2, (MIXTURES, tokens))
        self._signs = (2 * signs - 1).astype(np.float32)
        self._tokens: dict[str, int] = {}
        self.mixtures: dict[str, np.ndarray] = {}
        """Input site of linears → mixtures of its values at the tokens so far."""

    def look(
        self, site: str, op: str, arguments: tuple[Any, ...], results: tuple[np.ndarray, ...]
    ) -> None:
        """Takes the results of an op over the next tokens, as `NumpyReference.look` does."""
        if site not in self._sites:
            return
        inputs = results[0][0]
        start = self._tokens.get(site, 0)
        mixed = self._signs[:, start : start + len(inputs)] @ inputs
        self._tokens[site] = start + len(inputs)
        self.mixtures[site] = self.mixtures.get(site, 0) + mixed
