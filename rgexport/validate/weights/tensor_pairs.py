"""Reads an artifact's tensors and their originals side by side."""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.errors import RequestError
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance, task

_THREADS = 2
"""Threads that each read and compare one tensor."""

T = TypeVar("T")


def check_shapes(original: WeightSource, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises RequestError for a tensor that `original` lacks or has in another shape."""
    for name, stored in tensors.items():
        shape = list(stored.shape)
        original_shape: list[int] | str = "none"
        if name in original:
            original_shape = list(original[name].shape)
        if original_shape != shape:
            raise RequestError(
                f"{name} has shape {shape} in the artifact but {original_shape} in the "
                "original; give a model of the same shape with -m"
            )


def of_each_tensor(
    label: str, tensors: Mapping[str, StoredTensor], measure: Callable[[str, Advance], T]
) -> list[T]:
    """Calls `measure` for each name, two at a time; it reports float32 bytes as progress."""
    total = sum(4 * math.prod(stored.shape) for stored in tensors.values())
    with task(label, total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(measure, tensors, repeat(advance)))


def paired_slabs(
    original: RowTensor, dequantized: RowTensor, stored: StoredTensor, limit: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields a slab's first row, and its rows of both sources as float32 matrices.

    A slab has at most `limit` bytes, but at least the rows that share stored data.
    """
    row_bytes = 4 * math.prod(stored.shape[1:])
    rows_together = stored.scheme.rows_together
    for start, stop in slab_bounds(stored.shape[0], row_bytes, limit, rows_together):
        original_rows = _float32_matrix(original, start, stop)
        stored_rows = _float32_matrix(dequantized, start, stop)
        yield start, original_rows, stored_rows


def _float32_matrix(tensor: RowTensor, start: int, stop: int) -> np.ndarray:
    """Reads the first axis from `start` to `stop`; vectors become matrices of one column."""
    columns = 1
    if len(tensor.shape) > 1:
        columns = tensor.shape[-1]
    rows = tensor.read(start, stop).astype(np.float32, copy=False)
    return rows.reshape(-1, columns)
