"""The weight table: how far each stored tensor is from the tensor it was made from.

Beside the error's size, each scheme has a step_sizes of its own: the *step*, the distance between
two neighbouring values that the scheme can store at that place, computed here from the original
weights and not from the artifact. Rounding to nearest is never off by more than half a step,
whatever the weights are; a wrong scale is, where the noise of four bits would hide it in a norm.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import task
from rgexport.quantize.scheme import Palette
from rgexport.validate.weights.steps import (
    is_quantized,
    is_searched,
    is_weighted,
    rows_together,
    step_sizes,
)

_SLAB_BYTES = 1 << 20
"""Float32 bytes of one slab: its temporaries stay in cache, which makes the table 6x faster."""
THREADS = 2
"""That compare weights."""
_PIECE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """W is the original, Ŵ the stored tensor, both as float32.

    relative_error: ‖W−Ŵ‖/‖W‖; projection: ⟨W,Ŵ⟩/⟨W,W⟩, 1 for unbiased rounding, 1.02 where
    every scale is 2 % too large; clipping: the part of `projection - 1` that comes from rounding
    to nearest on the levels of the scheme, and from values beyond the outermost level of their
    block; max_steps: max |W−Ŵ| in steps, clipping apart; noise: ‖W−Ŵ‖² in units of what rounding
    to nearest makes of it, step²/12 for each weight: 1, whatever they are; shift: the sum of
    Ŵ−W in units of that of the steps: 0;
    weighted: whether an importance matrix says which weights may be further off;
    searched: whether the levels of a block were chosen for the least squared error, so that some
    weights clip and all are a little too small; grouped: whether groups of rows share their
    levels, and max_steps is the largest root mean square of W−Ŵ in one of them.
    """

    name: str
    scheme: str
    quantized: bool
    values: int
    relative_error: float
    projection: float
    clipping: float
    max_steps: float
    noise: float
    shift: float
    weighted: bool = False
    searched: bool = False
    grouped: bool = False


def weight_errors(
    original: WeightSource,
    twin: WeightSource,
    tensors: Mapping[str, StoredTensor],
    *,
    weighted: bool = False,
) -> list[WeightError]:
    """Compares all `tensors` of an artifact, two at a time, in slabs.

    Args:
        original: the weights that the artifact was made from.
        twin: the artifact's weights, dequantized.
        tensors: how each of them is stored; all must be in both sources, in the same shape.
        weighted: whether an importance matrix had a say.
    """
    total = sum(4 * math.prod(stored.shape) for stored in tensors.values())
    with task("Comparing weights", total) as advance, ThreadPoolExecutor(THREADS) as pool:

        def measure(name: str) -> WeightError:
            found = tensor_error(name, original[name], twin[name], tensors[name], advance)
            scheme = tensors[name].scheme
            return dataclasses.replace(
                found,
                weighted=is_weighted(scheme, weighted),
                searched=is_searched(scheme, weighted),
            )

        return list(pool.map(measure, tensors))


def check_shapes(original: WeightSource, tensors: Mapping[str, StoredTensor]) -> None:
    """Makes sure that an original can be compared with.

    Raises:
        RequestError: a tensor that `original` lacks or that has another shape there.
    """
    for name, stored in tensors.items():
        if name not in original:
            raise RequestError(f"the original has no tensor {name}; give the model with -m")
        if original[name].shape != stored.shape:
            raise RequestError(
                f"{name} has shape {list(stored.shape)} in the artifact but "
                f"{list(original[name].shape)} in the original; give a model of the same shape"
            )


def tensor_error(
    name: str,
    original: RowTensor,
    twin: RowTensor,
    stored: StoredTensor,
    advance: Callable[[int], None] = lambda done: None,
) -> WeightError:
    """Compares two tensors of one shape in row slabs; the sums are float64."""
    row_values = math.prod(stored.shape[1:])
    sums, steps, levels = np.zeros(4), 0.0, np.zeros(3)
    together = rows_together(stored.scheme)
    for start, stop in slab_bounds(stored.shape[0], 4 * row_values, _SLAB_BYTES, together):
        w, twin_w = (
            t.read(start, stop).astype(np.float32, copy=False).reshape(stop - start, row_values)
            for t in (original, twin)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            error, measure = twin_w - w, step_sizes(name, w, stored)
            steps = max_or_nan(steps, measure.largest(measure.without_clipping(error, w)))
            sums += _products(w, error, measure.beyond_rounding(error, w))
            noise, moved = measure.rounding(row_values).sum(), error.sum(dtype=np.float64)
            levels += noise, moved, measure.total(row_values)
        advance(w.nbytes)
    square, along, along_rounding, error_square = sums.tolist()
    return WeightError(
        name=name,
        scheme=stored.scheme.label,
        quantized=is_quantized(stored.scheme),
        values=math.prod(stored.shape),
        relative_error=ratio(error_square, square) ** 0.5,
        projection=1 + ratio(along, square),
        clipping=ratio(along - along_rounding, square),
        max_steps=steps,
        noise=ratio(error_square, float(levels[0])),
        shift=ratio(float(levels[1]), float(levels[2])),
        grouped=isinstance(stored.scheme, Palette),
    )


def max_or_nan(a: float, b: float) -> float:
    """The larger one; NaN where one is NaN, so that no fault hides behind a comparison."""
    return float(np.maximum(a, b))


def ratio(part: float, whole: float) -> float:
    """0/0 is 0: a tensor of zeros that was stored as zeros has no error."""
    return part / whole if whole else (float("inf") if part else 0.0)


def _products(w: np.ndarray, error: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """⟨W,W⟩, ⟨W,E⟩, ⟨W,E beyond rounding⟩, ⟨E,E⟩: float64, in pieces that stay in cache."""
    total = np.zeros(4)
    columns = [x.reshape(-1) for x in (w, error, rounding)]
    for start in range(0, w.size, _PIECE):
        a, e, r = (x[start : start + _PIECE].astype(np.float64) for x in columns)
        # Not `a @ e`: BLAS would start threads of its own in each of ours.
        total += [np.einsum("i,i->", x, y) for x, y in ((a, a), (a, e), (a, r), (e, e))]
    return total
