"""The registry of algorithms: what chooses the values of a tensor, for each way to store it.

A scheme says how a tensor is laid out. An algorithm fills that layout: it chooses scales, zero
points and levels. Code that reads, runs or compares the tensor sees only the layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize import affine, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.scheme import (
    Affine,
    Float,
    Ggml,
    Mixed,
    Palette,
    Scheme,
    Uniform,
    uniform_schemes,
)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a matrix's inputs.

    Attributes:
        importance: float32 [columns], the weight of each column's squared error, such as the mean
            square of its inputs.
    """

    importance: np.ndarray


@dataclass(frozen=True)
class Algorithm:
    """Fills a layout.

    Attributes:
        layout: the type of scheme that it fills.
        encode: rows [n, K] of any float dtype, the scheme, and statistics or None → parts; raises
            RequestError for a weight that the scheme cannot hold.
        needs_statistics: whether it cannot do without statistics.
    """

    layout: type[Uniform]
    encode: Callable[[np.ndarray, Any, Statistics | None], Parts]
    needs_statistics: bool = False


def encode(
    name: str, rows: np.ndarray, scheme: Scheme, statistics: Statistics | None = None
) -> Parts:
    """Rows of the tensor `name` as `scheme` stores them, by the algorithm that it names.

    Rows of one row group, where the tensor has several.

    Raises:
        RequestError: a weight that the scheme cannot hold, or missing statistics.
    """
    assert not isinstance(scheme, Mixed), name
    chosen = ALGORITHMS[scheme.algorithm]
    if chosen.needs_statistics and statistics is None:
        raise RequestError(f"{name}: {scheme.algorithm} needs statistics of its inputs")
    try:
        return chosen.encode(rows, scheme, statistics)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def require_known(scheme: Scheme) -> None:
    """Refuses a scheme whose algorithm, or that of a row group, is unknown or for another layout.

    Raises:
        RequestError: it is refused.
    """
    for uniform in uniform_schemes(scheme):
        _require_known(uniform)


def _require_known(scheme: Uniform) -> None:
    found = ALGORITHMS.get(scheme.algorithm)
    if found is None or not isinstance(scheme, found.layout):
        fitting = [word for word, row in ALGORITHMS.items() if isinstance(scheme, row.layout)]
        raise RequestError(
            f"a scheme has algorithm = {scheme.algorithm!r}; expected {', '.join(fitting)}"
        )


def _cast(rows: np.ndarray, scheme: Float, _: Statistics | None) -> Parts:
    with np.errstate(over="ignore"):
        stored = rows.astype(scheme.dtype)
    if not np.isfinite(stored).all():
        raise RequestError(
            f"a weight of {np.abs(rows).max():.4g} is more than {scheme.dtype} holds; "
            "store it in another precision"
        )
    return {"data": stored}


def _ggml(rows: np.ndarray, scheme: Ggml, statistics: Statistics | None) -> Parts:
    importance = None if statistics is None else statistics.importance
    return {"data": quantize_rows(rows, scheme.type, importance)}


ALGORITHMS: dict[str, Algorithm] = {
    "cast": Algorithm(Float, _cast),
    "rtn": Algorithm(Affine, lambda rows, scheme, _: affine.encode(rows, scheme)),
    "kmeans": Algorithm(Palette, lambda rows, scheme, _: palette.encode(rows, scheme)),
    "ggml": Algorithm(Ggml, _ggml),
}
"""Word → algorithm. `rtn` rounds to nearest; `ggml` is what llama-quantize does for a type."""
