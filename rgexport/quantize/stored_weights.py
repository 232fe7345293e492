"""Weights as a plan stores them, read one slab of rows at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.parallelism import parallel_jobs
from rgexport.quantize import affine, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import encode
from rgexport.quantize.row_groups import members
from rgexport.quantize.scheme import Affine, Float, Ggml, Mixed, Palette, Plan, Scheme, Uniform
from rgexport.quantize.statistics import Known, StatisticsOf

_ROWS = 192
"""Rows that a thread takes at once, or a few more where a table is shared."""


def stored(
    tensor: str,
    rows: np.ndarray,
    scheme: Uniform,
    statistics: Known,
    ids: np.ndarray,
) -> np.ndarray:
    """Rows [n, K] as they are read back, float32, after the tensor's layout stored them.

    `ids` are their numbers in the tensor.
    """
    parts = encode(tensor, rows, scheme, statistics, ids)
    return _DECODE[type(scheme)](parts, scheme, rows.shape[1])


def quantized(weights: WeightSource, plan: Plan, statistics_of: StatisticsOf) -> WeightSource:
    """The weights as a plan stores them: rows are quantized whenever they are read."""
    return {
        name: tensor
        if isinstance(plan[name], Float)
        else _quantized(name, tensor, plan[name], statistics_of)
        for name, tensor in weights.items()
    }


def _quantized(
    name: str, tensor: RowTensor, scheme: Scheme, statistics_of: StatisticsOf
) -> RowTensor:
    groups = _groups(scheme, tensor.shape[0])

    def read(start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, *tensor.shape[1:]), np.float32)
        statistics = statistics_of(name)

        def fill(part: slice) -> None:
            rows = tensor.read(part.start, part.stop)
            for scheme, chosen in groups:
                ids = np.arange(part.start, part.stop)
                if chosen is not None:
                    first, last = np.searchsorted(chosen, [part.start, part.stop])
                    ids = chosen[first:last]
                if len(ids):
                    own = rows[ids - part.start]
                    rows_of_group = stored(name, own, scheme, statistics, ids)
                    places = ids - start
                    inside = (places >= 0) & (places < len(found))
                    found[places[inside]] = rows_of_group[inside]

        with ThreadPoolExecutor(parallel_jobs()) as pool:
            list(pool.map(fill, _parts(start, stop, _together(groups), tensor.shape[0])))
        return found

    return RowTensor(tensor.shape, np.dtype(np.float32), read)


def _groups(scheme: Scheme, rows: int) -> list[tuple[Uniform, np.ndarray | None]]:
    """The layouts of a tensor with the rows of each, ascending; None for all rows."""
    if not isinstance(scheme, Mixed):
        return [(scheme, None)]
    found = members(scheme, rows)
    return [(group.scheme, ids) for group, ids in zip(scheme.groups, found, strict=True)]


def _together(groups: Sequence[tuple[Uniform, Any]]) -> int:
    return max(scheme.group if isinstance(scheme, Palette) else 1 for scheme, _ in groups)


def _parts(start: int, stop: int, together: int, rows: int) -> Iterator[slice]:
    """Rows from `start` to `stop` in parts; those that share a table are not separated."""
    step = -(-_ROWS // together) * together
    for first in range(start // together * together, stop, step):
        last = -(-min(first + step, stop) // together) * together
        yield slice(first, min(last, rows))


def _dequantized(parts: Parts, scheme: Ggml, columns: int) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    from rgexport.quantize.ggml_types import TYPES

    return quants.dequantize(parts["data"], GGMLQuantizationType(TYPES[scheme.type].value))


_DECODE: Mapping[type, Callable[[Parts, Any, int], np.ndarray]] = {
    Affine: affine.decode,
    Palette: palette.decode,
    Ggml: _dequantized,
    Float: lambda parts, scheme, columns: parts["data"].astype(np.float32),
}
