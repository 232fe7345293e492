"""Measures how far each stored tensor Ŵ is from the tensor W that it was made from.

The original's numbers come from the model, or from the sketches in a reference file. E = Ŵ−W
throughout. Steps follow from the original weights and the scheme, not from the artifact's scales:
so they show a wrong scale, even where the noise of four bits would hide it in a norm.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import StoredGroup, groups_of
from rgexport.errors import RequestError
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import RowTensor, WeightSource, from_array, slab_bounds
from rgexport.progress import Advance, task
from rgexport.quantize.plan import quantized
from rgexport.quantize.scheme import Scheme, Uniform
from rgexport.quantize.statistics import no_statistics
from rgexport.quantize.steps import NEGLIGIBLE, Measure, StepSizes
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.weights import sketch
from rgexport.validate.weights.expectations import OUTPUT_NOISE, expectation, expectation_key

_THREADS = 2
_PIECE = 1 << 14
_MAXIMA = "max_steps", "worst_row", "most_expected"
_KEPT = 2.0**-22  # relative error of a number in a sketch: float32, and four times as much for sums

T = TypeVar("T")
Sums = dict[str, float]
"""Sums over rows of a tensor, by name, in float64; of `_MAXIMA` the largest."""


def step_sizes(name: str, w: np.ndarray, scheme: Uniform, measure: Measure = "weight") -> StepSizes:
    """Returns the steps of the tensor `name` from its original weights.

    `w` is [rows, columns] float32, in whole groups of `rows_together`. One step of a block or row
    is twice the root mean square of rounding to nearest there: rounding is off by half a step.
    """
    if name.endswith("norm.weight"):  # stored with 1 added
        return StepSizes(np.spacing(np.abs(w + np.float32(1))))
    if name.endswith("recurrent_param"):
        return StepSizes(decay_steps(w))
    return scheme.step_sizes(w, measure)


def shown_steps(name: str, dequantized: np.ndarray, scheme: Uniform) -> StepSizes:
    """Returns the steps that an artifact's weights [rows, columns] show, without the original's."""
    if scheme.is_quantized:
        return scheme.stored_steps(dequantized)
    return step_sizes(name, dequantized, scheme)


def decay_steps(w: np.ndarray) -> np.ndarray:
    """GGUF stores Λ as -8 softplus(Λ): rounding moves Λ by softplus/sigmoid times as much."""
    wide = w.astype(np.float64)
    softplus = np.logaddexp(0, wide)
    moved = softplus * (1 + np.exp(-wide)) * 2.0**-23
    return np.maximum(moved + np.spacing(np.abs(w)), NEGLIGIBLE).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """The numbers that both sources of W give; `WeightError` explains them."""

    name: str
    scheme: str
    quantized: bool
    rows: int
    relative_error: float
    projection: float
    noise: float
    shift: float
    output_noise: float | None = None
    weighted: bool = False
    chosen: str = "rtn"


@dataclass(frozen=True, kw_only=True)
class WeightError(TensorError):
    """The original tensor W against the stored Ŵ, both as float32.

    - `relative_error`: ‖W−Ŵ‖/‖W‖.
    - `projection`: ⟨W,Ŵ⟩/⟨W,W⟩: 1 for unbiased rounding, 1.02 where every scale is 2 % too large.
    - `clipping`: the part of `projection - 1` that comes from rounding to nearest on the levels of
      the scheme, and from values beyond the outermost level of their block.
    - `max_steps`: max |W−Ŵ| in steps, without what clipping adds; where it is `grouped`, the
      largest root mean square of a block, a row or a group of rows.
    - `noise`: ‖W−Ŵ‖² in units of Σ step²/12, which rounding to nearest makes: about 1.
    - `shift`: Σ(Ŵ−W) in units of Σ step: about 0.
    - `output_noise`: ‖(Ŵ−W)X‖² in units of what rounding to nearest makes with the inputs X of a
      text; null where they are not known, or the weights are no linear's.
    - `encoder_noise`: the output noise of the original's weights, encoded again; null where it is
      not needed.
    - `searched`: whether levels were chosen for the least squared error; `chosen`: how.
    """

    values: int
    clipping: float
    max_steps: float
    searched: bool = False
    grouped: bool = False
    encoder_noise: float | None = None


@dataclass(frozen=True, kw_only=True)
class SketchError(TensorError):
    """The stored tensor Ŵ against a sketch of the original W; see `WeightError` for common fields.

    `directions` counts the products that are known of each row; null where the row itself is.
    `expected_error` is the relative error that rounding to nearest makes, `evenness` how many rows
    of equal shares would make it up, `largest_share` that of the row with most of it. Of row
    groups, the projection and the relative errors are `estimated`, with W without its mean row: few
    directions do not tell how long what all rows have in common is.
    """

    columns: int
    directions: int | None
    expected_error: float
    worst_row: float
    evenness: float
    largest_share: float
    estimated: bool = False


def weight_errors(
    original: WeightSource,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    weighted: bool = False,
    inputs: sketch.Mixtures | None = None,
) -> list[WeightError]:
    """Compares all `tensors`, each row group for itself, also over mixed `inputs` of linears."""

    def measure(name: str, scheme: Uniform, w: np.ndarray, rows: np.ndarray) -> Sums:
        expected, error, columns = expectation(scheme, weighted), rows - w, w.shape[1]
        steps = step_sizes(name, w, scheme, expected.measure)
        names = "square", "along", "along_rounding", "error"
        measured = _products(w, error, steps.beyond_rounding(error, w))
        sums = {
            **dict(zip(names, measured, strict=True)),
            "max_steps": steps.largest(steps.without_clipping(error, w)),
            "expected": float(steps.rounding(columns).sum()),
            "moved": float(error.sum(dtype=np.float64)),
            "steps": steps.total(columns),
        }
        mixtures = (inputs or {}).get(input_site(name) or "")
        if mixtures is not None:
            sums |= _output_sums(sketch.products(error, mixtures), steps, mixtures)
        return sums

    def summarize(name: str, group: StoredGroup, sums: Sums) -> WeightError:
        shape, expected = group.stored.shape, expectation(group.stored.uniform, weighted)
        return WeightError(
            **_shared_fields(name, group, weighted, sums),
            values=math.prod(shape),
            rows=shape[0],
            clipping=_ratio(sums["along"] - sums["along_rounding"], sums["square"]),
            max_steps=sums["max_steps"],
            searched=expected.searched,
            grouped=expected.measure != "weight",
        )

    def compare(label: str, weights: WeightSource, names: Iterable[str]) -> list[WeightError]:
        chosen = {name: tensors[name] for name in names}
        return _compare(label, original.__getitem__, weights, chosen, measure, summarize)

    errors = compare("Comparing weights", dequantized, tensors)
    weighed = {error.name for error in errors if error.weighted}  # their encoders need statistics
    clipped = {error.name for error in errors if _may_be_clipped(error)} - weighed
    plan = {name: tensors[name].scheme for name in clipped}
    if not plan:
        return errors
    encoded = quantized({name: original[name] for name in plan}, plan, no_statistics)
    again = compare("Encoding the weights again", encoded, plan)
    known = {(error.name, error.scheme): error.output_noise for error in again}
    return [replace(e, encoder_noise=known.get((e.name, e.scheme))) for e in errors]


def _may_be_clipped(error: WeightError) -> bool:
    """Whether the search, which knows no inputs, may have made so much noise of the outputs."""
    noise, searched = error.output_noise, error.chosen.startswith("search")
    return searched and noise is not None and not noise <= OUTPUT_NOISE


def sketch_errors(
    reference: ReferenceFile,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    weighted: bool = False,
) -> list[SketchError]:
    """Compares all `tensors` of an artifact with a file's sketches; see `weight_errors`."""
    array = functools.cache(reference.array)

    def original(name: str) -> RowTensor:
        known, stored = reference.array(f"weights.{name}"), tensors[name]
        if _known_site(name, stored.scheme) is not None:
            known = np.hstack([known, reference.array(f"outputs.{name}")])
        return from_array(known.reshape(stored.shape[0], -1, known.shape[1]))

    @functools.cache
    def mean_row(name: str) -> np.ndarray:
        return np.asarray(array(f"weights.{name}").mean(0, dtype=np.float64))

    def measure(name: str, scheme: Uniform, known: np.ndarray, rows: np.ndarray) -> Sums:
        shape = sketch.sketch_shape(tensors[name].shape)
        w, outputs = known[:, : shape.width].astype(np.float64), known[:, shape.width :]
        delta, steps = shape.project(rows) - w, shown_steps(name, rows, scheme)
        varied = w - mean_row(name) if shape.directions else w
        error, stored_exactly = shape.dots(delta, delta), w * _KEPT
        expected = steps.rounding(shape.columns) + shape.dots(stored_exactly, stored_exactly)
        shares = np.divide(error, expected, out=np.zeros_like(error), where=error != 0)
        sums = {
            "worst_row": float(shares.max()),
            "square": float(shape.dots(varied, varied).sum()),
            "along": float(shape.dots(varied, delta).sum()),
            "error": float(error.sum()),
            "expected": float(expected.sum()),
            "expected_square": float(np.square(expected).sum()),
            "most_expected": float(expected.max()),
            "moved": float(shape.sums(delta).sum()),
            "steps": steps.total(shape.columns),
            "stored_square": sketch.square_sum(rows),
        }
        if (site := _known_site(name, scheme)) is not None:
            mixtures = array(f"inputs.{site}")
            sums |= _output_sums(sketch.products(rows, mixtures) - outputs, steps, mixtures)
        return sums

    def summarize(name: str, group: StoredGroup, sums: Sums) -> SketchError:
        shape, estimated = sketch.sketch_shape(tensors[name].shape), group.rows is not None
        if not estimated:
            # ‖Ŵ‖² = ‖W‖² + 2⟨W,E⟩ + ‖E‖²: the norms tell ⟨W,E⟩ better than any product does.
            sums["square"] = reference.square(name)
            sums["along"] = (sums["stored_square"] - sums["square"] - sums["error"]) / 2
        return SketchError(
            **_shared_fields(name, group, weighted, sums),
            rows=math.prod(group.stored.shape) // shape.columns,
            columns=shape.columns,
            directions=shape.directions or None,
            expected_error=_ratio(sums["expected"], sums["square"]) ** 0.5,
            worst_row=sums["worst_row"],
            evenness=_ratio(sums["expected"] ** 2, sums["expected_square"]),
            largest_share=_ratio(sums["most_expected"], sums["expected"]),
            estimated=estimated,
        )

    label = "Comparing weights with their sketches"
    return _compare(label, original, dequantized, tensors, measure, summarize)


def _known_site(name: str, scheme: Scheme) -> str | None:
    return input_site(name) if scheme.is_quantized else None


def _shared_fields(name: str, group: StoredGroup, weighted: bool, sums: Sums) -> dict[str, Any]:
    scheme = group.stored.uniform
    output = _ratio(sums["output"], sums["expected_output"]) if "output" in sums else None
    return {
        "name": name,
        "scheme": group.label,
        "quantized": scheme.is_quantized,
        "relative_error": _ratio(sums["error"], sums["square"]) ** 0.5,
        "projection": 1 + _ratio(sums["along"], sums["square"]),
        "noise": _ratio(sums["error"], sums["expected"]),
        "shift": _ratio(sums["moved"], sums["steps"]),
        "output_noise": output,
        "weighted": expectation(scheme, weighted).weighted,
        "chosen": expectation_key(scheme, weighted),
    }


def _output_sums(moved: np.ndarray, steps: StepSizes, mixtures: np.ndarray) -> Sums:
    """Sums ‖E p‖² over mixtures p [m, K]: of the stored errors (`moved` is E p) and of rounding."""
    squares = np.square(mixtures, dtype=np.float64).sum(0)
    return {
        "output": float(np.square(moved).sum()),
        "expected_output": float(steps.rounding(mixtures.shape[1], squares).sum()),
    }


def _compare(
    label: str,
    original: Callable[[str], RowTensor],
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    measure: Callable[[str, Uniform, np.ndarray, np.ndarray], Sums],
    summarize: Callable[[str, StoredGroup, Sums], T],
) -> list[T]:
    def compare_tensor(name: str, advance: Advance) -> list[T]:
        stored = tensors[name]
        totals: list[tuple[StoredGroup, Sums]] = [(group, {}) for group in groups_of(stored)]
        # Temporaries of small slabs stay in cache, which makes the table 6x faster.
        pairs = paired_slabs(original(name), dequantized[name], stored, sketch.SLAB_BYTES)
        for start, known, rows in pairs:
            for group, total in totals:
                chosen = group.chosen(start, start + len(rows))
                if not len(some := rows[chosen]):
                    continue
                with np.errstate(invalid="ignore", over="ignore"):
                    sums = measure(name, group.stored.uniform, known[chosen], some)
                for key, value in sums.items():
                    add = np.maximum if key in _MAXIMA else np.add  # NaN if one of them is
                    total[key] = float(add(total.get(key, 0.0), value))
            advance(rows.nbytes)
        return [summarize(name, group, total) for group, total in totals]

    return list(chain.from_iterable(of_each_tensor(label, tensors, compare_tensor)))


def of_each_tensor(
    label: str, tensors: Mapping[str, StoredTensor], measure: Callable[[str, Advance], T]
) -> list[T]:
    """Calls `measure` for each name, two at a time; it reports float32 bytes as progress."""
    total = sum(4 * math.prod(stored.shape) for stored in tensors.values())
    with task(label, total) as advance, ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: measure(name, advance), tensors))


def paired_slabs(
    original: RowTensor, dequantized: RowTensor, stored: StoredTensor, limit: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields a slab's first row, and its rows of both sources as float32 matrices."""
    row_bytes, together = 4 * math.prod(stored.shape[1:]), stored.scheme.rows_together
    for start, stop in slab_bounds(stored.shape[0], row_bytes, limit, together):
        known, rows = (
            tensor.read(start, stop)
            .astype(np.float32, copy=False)
            .reshape(-1, tensor.shape[-1] if len(tensor.shape) > 1 else 1)
            for tensor in (original, dequantized)
        )
        yield start, known, rows


def check_shapes(original: WeightSource, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises RequestError for a tensor that `original` lacks or has in another shape."""
    for name, stored in tensors.items():
        theirs = list(original[name].shape) if name in original else "none"
        if theirs != list(stored.shape):
            raise RequestError(
                f"{name} has shape {list(stored.shape)} in the artifact but {theirs} in the "
                "original; give a model of the same shape with -m"
            )


def _ratio(part: float, whole: float) -> float:
    """Divides; 0/0 is 0: a tensor of zeros that was stored as zeros has no error."""
    return part / whole if whole else (float("inf") if part else 0.0)


def _products(w: np.ndarray, error: np.ndarray, rest: np.ndarray) -> list[float]:
    """Returns ⟨W,W⟩, ⟨W,E⟩, ⟨W,rest⟩, ⟨E,E⟩ in float64, from pieces that stay in cache."""
    total = np.zeros(4)
    columns = [x.reshape(-1) for x in (w, error, rest)]
    for start in range(0, w.size, _PIECE):
        a, e, r = (x[start : start + _PIECE].astype(np.float64) for x in columns)
        # Not `a @ e`: BLAS would start threads of its own in each of ours.
        total += [np.einsum("i,i->", x, y) for x, y in ((a, a), (a, e), (a, r), (e, e))]
    return total.tolist()
