"""Weights as a plan stores them, encoded and decoded whenever rows are read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.parallelism import parallel_jobs
from rgexport.quantize.scheme import Float, Plan, Scheme
from rgexport.quantize.statistics import StatisticsOf

_ROWS = 192
"""Rows that a thread encodes at once, or a few more where a table is shared."""


def quantized(weights: WeightSource, plan: Plan, statistics_of: StatisticsOf) -> WeightSource:
    """Returns the weights as a plan stores them; those of float schemes are unchanged."""
    return {
        name: tensor
        if isinstance(plan[name], Float)
        else _quantized(name, tensor, plan[name], statistics_of)
        for name, tensor in weights.items()
    }


def _quantized(
    name: str, tensor: RowTensor, scheme: Scheme, statistics_of: StatisticsOf
) -> RowTensor:
    groups = scheme.row_groups(tensor.shape[0])

    def read(start: int, stop: int) -> np.ndarray:
        result = np.empty((stop - start, *tensor.shape[1:]), np.float32)
        statistics = statistics_of(name)

        def fill(slab: slice) -> None:
            rows = tensor.read(slab.start, slab.stop)
            for _, uniform, members in groups:
                ids = np.arange(slab.start, slab.stop)
                if members is not None:
                    first, last = np.searchsorted(members, [slab.start, slab.stop])
                    ids = members[first:last]
                if len(ids):
                    stored = uniform.round_trip(name, rows[ids - slab.start], statistics, ids)
                    inside = (ids >= start) & (ids < stop)
                    result[ids[inside] - start] = stored[inside]

        with ThreadPoolExecutor(parallel_jobs()) as pool:
            list(pool.map(fill, _slabs(start, stop, scheme.rows_together, tensor.shape[0])))
        return result

    return RowTensor(tensor.shape, np.dtype(np.float32), read)


def _slabs(start: int, stop: int, together: int, rows: int) -> Iterator[slice]:
    """Slabs that cover `start` to `stop`, in whole groups of `together` rows."""
    step = -(-_ROWS // together) * together
    for first in range(start // together * together, stop, step):
        last = -(-min(first + step, stop) // together) * together
        yield slice(first, min(last, rows))
