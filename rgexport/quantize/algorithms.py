"""The registry of algorithms: what chooses the values of a tensor, for each way to store it.

A scheme says how a tensor is laid out. An algorithm fills that layout: it chooses scales, zero
points and levels. Code that reads, runs or compares the tensor sees only the layout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize import affine, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.scheme import Affine, Float, Ggml, Palette, Scheme

Importance = np.ndarray | None
"""float32 [columns]: the weight of each column's squared error, such as the mean square of its
inputs; None where nothing is known of them."""


def encode(name: str, rows: np.ndarray, scheme: Scheme, importance: Importance = None) -> Parts:
    """Rows [n, K] of the tensor `name` as `scheme` stores them, by the algorithm that it names.

    Raises:
        RequestError: a weight that the scheme cannot hold.
    """
    _, fill = ALGORITHMS[scheme.algorithm]
    try:
        return fill(rows, scheme, importance)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def require_known(scheme: Scheme) -> None:
    """Refuses a scheme whose algorithm is unknown, or is for another layout.

    Raises:
        RequestError: it is refused.
    """
    fitting = [word for word, (layout, _) in ALGORITHMS.items() if isinstance(scheme, layout)]
    if scheme.algorithm not in fitting:
        raise RequestError(
            f"a scheme has algorithm = {scheme.algorithm!r}; expected {', '.join(fitting)}"
        )


def _cast(rows: np.ndarray, scheme: Float, _: Importance) -> Parts:
    with np.errstate(over="ignore"):
        stored = rows.astype(scheme.dtype)
    if not np.isfinite(stored).all():
        raise RequestError(
            f"a weight of {np.abs(rows).max():.4g} is more than {scheme.dtype} holds; "
            "store it in another precision"
        )
    return {"data": stored}


def _ggml(rows: np.ndarray, scheme: Ggml, importance: Importance) -> Parts:
    return {"data": quantize_rows(rows, scheme.type, importance)}


ALGORITHMS: dict[str, tuple[type[Scheme], Callable[[np.ndarray, Any, Importance], Parts]]] = {
    "cast": (Float, _cast),
    "rtn": (Affine, lambda rows, scheme, _: affine.encode(rows, scheme)),
    "kmeans": (Palette, lambda rows, scheme, _: palette.encode(rows, scheme)),
    "ggml": (Ggml, _ggml),
}
"""Word → the type of scheme that the algorithm fills, and the algorithm.

`rtn` rounds to nearest; `ggml` is what llama-quantize does for a type. An algorithm raises
RequestError for a weight that the scheme cannot hold.
"""
