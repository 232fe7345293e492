"""The weight table: how far each stored tensor is from the tensor it was made from.

Each scheme has a *step* of its own: the distance between two neighbouring values that it can store
at that place, computed here from the original weights and not from the artifact. Rounding to
nearest is never off by more than half a step, whatever the weights are. A wrong scale is, even
where the noise of four bits would hide it in a norm.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.manifest import StoredTensor
from rgexport.export.row_groups import StoredGroup, groups_of
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance, task
from rgexport.validate.weights.expectations import EXPECTATIONS, expectation_key
from rgexport.validate.weights.input_mixtures import Mixtures, output_noise
from rgexport.validate.weights.steps import step_sizes

_SLAB_BYTES = 1 << 20
"""Float32 bytes of one slab: its temporaries stay in cache, which makes the table 6x faster."""
_THREADS = 2
_PIECE = 1 << 14

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """The original tensor W against the stored Ŵ, both as float32.

    Attributes:
        name: of the tensor.
        scheme: its label; that of a row group, where the tensor has several.
        quantized: whether it is stored as integers or indices.
        values: weights in all.
        rows: of the matrix.
        relative_error: ‖W−Ŵ‖/‖W‖.
        projection: ⟨W,Ŵ⟩/⟨W,W⟩: 1 for unbiased rounding, 1.02 where every scale is 2 % too large.
        clipping: the part of `projection - 1` that comes from rounding to nearest on the levels of
            the scheme, and from values beyond the outermost level of their block.
        max_steps: max |W−Ŵ| in steps, without what clipping adds; or, where the algorithm bounds
            only blocks, rows or groups of rows, the largest root mean square of one of them.
        noise: ‖W−Ŵ‖² in units of Σ step²/12, which rounding to nearest makes: about 1.
        shift: Σ(Ŵ−W) in units of Σ step: about 0.
        output_noise: ‖(Ŵ−W)X‖² in units of what rounding to nearest makes with the inputs X of a
            text; None where they are not known, or the weights are no linear's.
        weighted: whether an importance matrix says which weights may be further off.
        searched: whether levels were chosen for the least squared error, so that some weights clip
            and all are a little too small.
        grouped: whether `max_steps` is not of single weights.
        chosen: what chose the levels, a key of `expectations.EXPECTATIONS`.
    """

    name: str
    scheme: str
    quantized: bool
    values: int
    rows: int
    relative_error: float
    projection: float
    clipping: float
    max_steps: float
    noise: float
    shift: float
    output_noise: float | None = None
    weighted: bool = False
    searched: bool = False
    grouped: bool = False
    chosen: str = "rtn"


def weight_errors(
    original: WeightSource,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    *,
    weighted: bool = False,
    inputs: Mixtures | None = None,
) -> list[WeightError]:
    """Compares all `tensors` of an artifact, two at a time, in slabs.

    A tensor in row groups has an error for each, by the label of its own scheme.

    Args:
        original: the weights that the artifact was made from.
        dequantized: the artifact's own.
        tensors: how each of them is stored; all must be in both sources, in the same shape.
        weighted: whether the artifact was made with an importance matrix, or a calibration.
        inputs: mixtures of the linears' inputs, where they are known.
    """

    def measure(name: str, advance: Advance) -> list[WeightError]:
        stored, mixtures = tensors[name], (inputs or {}).get(input_site(name) or "")
        groups = groups_of(stored)
        sums = [
            _Sums(group, expectation_key(group.stored.uniform, weighted), mixtures)
            for group in groups
        ]
        for start, w, other in paired_slabs(original[name], dequantized[name], stored):
            for group, total in zip(groups, sums, strict=True):
                chosen = group.chosen(start, start + len(w))
                if len(rows := w[chosen]):
                    total.add(rows, other[chosen], name)
            advance(w.nbytes)
        return [total.error(name) for total in sums]

    return list(chain.from_iterable(of_each_tensor("Comparing weights", tensors, measure)))


def of_each_tensor(
    label: str, tensors: Mapping[str, StoredTensor], measure: Callable[[str, Advance], Found]
) -> list[Found]:
    """What `measure` gives for each name, two at a time; it reports float32 bytes as progress."""
    total = sum(4 * math.prod(stored.shape) for stored in tensors.values())
    with task(label, total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: measure(name, advance), tensors))


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


class _Sums:
    """Sums over the rows of a group, in float64; `chosen` is the key of what is expected."""

    def __init__(self, group: StoredGroup, chosen: str, mixtures: np.ndarray | None):
        """`mixtures` [m, K] of the inputs, or None."""
        self.group, self.chosen, self.mixtures = group, chosen, mixtures
        self.max_steps, self.products, self.levels = 0.0, np.zeros(4), np.zeros(3)
        self.output = np.zeros(2)

    def add(self, w: np.ndarray, found: np.ndarray, name: str) -> None:
        """Adds rows of the original and of what is stored."""
        stored, expected = self.group.stored, EXPECTATIONS[self.chosen]
        with np.errstate(invalid="ignore", over="ignore"):
            error, steps = found - w, step_sizes(name, w, stored, expected)
            largest = steps.largest(steps.without_clipping(error, w))
            self.max_steps = float(np.maximum(self.max_steps, largest))  # NaN if one of them is
            self.products += _products(w, error, steps.beyond_rounding(error, w))
            noise, moved = steps.rounding(w.shape[1]).sum(), error.sum(dtype=np.float64)
            self.levels += noise, moved, steps.total(w.shape[1])
            if self.mixtures is not None:
                self.output += output_noise(error, steps, self.mixtures)

    def error(self, name: str) -> WeightError:
        """What they say of the rows."""
        square, along, along_rounding, error_square = self.products.tolist()
        noise, moved, total = self.levels.tolist()
        group, expected = self.group, EXPECTATIONS[self.chosen]
        return WeightError(
            name=name,
            scheme=group.label,
            quantized=group.stored.scheme.is_quantized,
            values=math.prod(group.stored.shape),
            rows=group.stored.shape[0],
            relative_error=ratio(error_square, square) ** 0.5,
            projection=1 + ratio(along, square),
            clipping=ratio(along - along_rounding, square),
            max_steps=self.max_steps,
            noise=ratio(error_square, noise),
            shift=ratio(moved, total),
            output_noise=None if self.mixtures is None else ratio(*self.output.tolist()),
            weighted=expected.weighted,
            searched=expected.searched,
            grouped=expected.measure != "weight",
            chosen=self.chosen,
        )


def paired_slabs(
    original: RowTensor, dequantized: RowTensor, stored: StoredTensor, limit: int = _SLAB_BYTES
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The first row, and rows of both, [n, values of a row] float32, of at most `limit` bytes."""
    columns = math.prod(stored.shape[1:])
    together = stored.scheme.rows_together
    for start, stop in slab_bounds(stored.shape[0], 4 * columns, limit, together):
        both = (tensor.read(start, stop) for tensor in (original, dequantized))
        w, found = (x.astype(np.float32, copy=False).reshape(-1, columns) for x in both)
        yield start, w, found


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
