"""The registry of algorithms: what chooses the values of a tensor, for each way to store it.

A scheme says how a tensor is laid out. An algorithm fills that layout: it chooses scales, zero
points and levels. Code that reads, runs or compares the tensor sees only the layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.kernels.rounding import library
from rgexport.progress import warn
from rgexport.quantize import affine, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import ggml, gptq, search
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import (
    Affine,
    Float,
    Ggml,
    Mixed,
    Palette,
    Plan,
    Scheme,
    Uniform,
    uniform_schemes,
)
from rgexport.quantize.statistics import Known, RemoteStatistics, RowKinds, Statistics

Encode = Callable[[np.ndarray, Any, Statistics | None], Parts]
"""Rows [n, K] of any float dtype, the scheme, and statistics or None → the parts.

Rows do not depend on one another, but for those of a palette's group. Raises RequestError for a
weight that the scheme cannot hold.
"""


@dataclass(frozen=True)
class Algorithm:
    """Fills layouts.

    Attributes:
        layouts: type of scheme → what fills it.
        title: for people.
        needs_statistics: whether it cannot do without statistics.
    """

    layouts: Mapping[type[Uniform], Encode]
    title: str
    needs_statistics: bool = False


def encode(
    name: str,
    rows: np.ndarray,
    scheme: Scheme,
    statistics: Known = None,
    ids: np.ndarray | None = None,
) -> Parts:
    """Rows of the tensor `name` as `scheme` stores them, by the algorithm that it names.

    Rows of one row group, where the tensor has several.

    Args:
        name: for messages.
        rows: any float dtype [n, K].
        scheme: no mixed one.
        statistics: of the tensor's inputs, for algorithms.
        ids: the numbers of the rows in the tensor, where its statistics have kinds of rows.

    Raises:
        RequestError: a weight that the scheme cannot hold, or missing statistics.
    """
    assert not isinstance(scheme, Mixed), name
    if isinstance(statistics, RemoteStatistics):
        if not isinstance(scheme, Float):
            return statistics.encode(name, rows, scheme, ids)
        statistics = None
    chosen = ALGORITHMS[scheme.algorithm]
    if chosen.needs_statistics and (statistics is None or not statistics.hessians):
        raise RequestError(
            f"{name}: {scheme.algorithm} needs statistics of its inputs; give --calibration FILE"
        )
    fill = chosen.layouts[type(scheme)]
    try:
        if chosen.needs_statistics and statistics and statistics.kinds and ids is not None:
            return _by_kinds(rows, fill, scheme, statistics.kinds, ids)
        return fill(rows, scheme, statistics)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def _by_kinds(
    rows: np.ndarray, fill: Encode, scheme: Uniform, kinds: RowKinds, ids: np.ndarray
) -> Parts:
    """Rows of each kind by its own statistics; those that share a table are of the last kind."""
    together = scheme.group if isinstance(scheme, Palette) else 1
    own = kinds.kind[ids].reshape(-1, together).max(1).repeat(together)
    found: Parts = {}
    for kind in np.unique(own):
        places = np.flatnonzero(own == kind)
        for label, part in fill(rows[places], scheme, kinds.statistics[kind]).items():
            share = len(places) // len(part)  # rows of one of the part's
            whole = found.setdefault(
                label, np.empty((len(rows) // share, *part.shape[1:]), part.dtype)
            )
            whole[places[::share] // share] = part
    return found


def require_known(scheme: Scheme) -> None:
    """Refuses a scheme whose algorithm, or that of a row group, is unknown or for another layout.

    Raises:
        RequestError: it is refused.
    """
    for uniform in uniform_schemes(scheme):
        _require_known(uniform)


def _require_known(scheme: Uniform) -> None:
    found = ALGORITHMS.get(scheme.algorithm)
    if found is None or type(scheme) not in found.layouts:
        fitting = [word for word, row in ALGORITHMS.items() if type(scheme) in row.layouts]
        raise RequestError(
            f"a scheme has algorithm = {scheme.algorithm!r}; expected {', '.join(fitting)}"
        )


def needs_statistics(scheme: Scheme) -> bool:
    """Whether a known algorithm of a scheme, or of one of its row groups, needs statistics."""
    known = (ALGORITHMS.get(one.algorithm) for one in uniform_schemes(scheme))
    return any(row is not None and row.needs_statistics for row in known)


def by_algorithm(plan: Plan, word: str) -> Plan:
    """The plan with the algorithm `word` for all tensors whose layout it fills."""
    return {name: _by_algorithm(scheme, word) for name, scheme in plan.items()}


def filled(plan: Plan, word: str | None, *, keep: bool) -> Plan:
    """The plan with the algorithm that is asked for; without one, its own or else the default.

    Args:
        plan: the layouts.
        word: a key of `ALGORITHMS`, or None.
        keep: whether the plan is somebody's, who chose its algorithms.
    """
    if word is not None:
        return by_algorithm(plan, word)
    return plan if keep else by_default(plan)


def by_default(plan: Plan) -> Plan:
    """The plan with what needs no data: clip search, or without its library rounding to nearest."""
    uniform = (one for scheme in plan.values() for one in uniform_schemes(scheme))
    if not any(isinstance(one, Affine) for one in uniform):
        return plan
    if library.is_there():
        return by_algorithm(plan, "search")
    warn(
        "weights are rounded to nearest, as the library that chooses better levels is missing: "
        f"{library.unusable()}"
    )
    return by_algorithm(plan, "rtn")


def _by_algorithm(scheme: Scheme, word: str) -> Scheme:
    if isinstance(scheme, Mixed):
        return scheme.each(lambda one: replace(one, algorithm=word))
    if isinstance(scheme, Float) or type(scheme) not in ALGORITHMS[word].layouts:
        return scheme
    if isinstance(scheme, Ggml) and not TYPES[scheme.type].is_quantized:
        return scheme
    return replace(scheme, algorithm=word)


def _cast(rows: np.ndarray, scheme: Float, _: Statistics | None) -> Parts:
    with np.errstate(over="ignore"):
        stored = rows.astype(scheme.dtype)
    if not np.isfinite(stored).all():
        raise RequestError(
            f"a weight of {np.abs(rows).max():.4g} is more than {scheme.dtype} holds; "
            "store it in another precision"
        )
    assert scheme.dtype != "bfloat16" or (stored.astype(rows.dtype) == rows).all()
    return {"data": stored}


ALGORITHMS: dict[str, Algorithm] = {
    "cast": Algorithm({Float: _cast}, "rounding to the type"),
    "rtn": Algorithm(
        {Affine: lambda rows, scheme, _: affine.encode(rows, scheme)}, "rounding to nearest"
    ),
    "search": Algorithm(
        {Affine: lambda rows, scheme, _: search.encode(rows, scheme, None)}, "clip search"
    ),
    "importance": Algorithm(
        {Affine: search.encode}, "clip search weighed by importance", needs_statistics=True
    ),
    "kmeans": Algorithm({Palette: lambda rows, scheme, _: palette.encode(rows, scheme)}, "k-means"),
    "ggml": Algorithm({Ggml: ggml.encode}, "the rules of llama-quantize"),
    "gptq": Algorithm(
        {Affine: gptq.encode_affine, Palette: gptq.encode_palette, Ggml: ggml.encode_gptq},
        "GPTQ",
        needs_statistics=True,
    ),
}
"""Word → algorithm. `rtn` rounds to nearest on the scale of the extremes."""
