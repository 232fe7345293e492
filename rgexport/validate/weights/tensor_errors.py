"""Measures how far each stored tensor Ŵ is from the tensor W that it was made from.

The original's numbers come from the model (`weight_errors`), or from the sketches in a reference
file (`sketch_errors`). E = Ŵ−W throughout. Steps follow from the original weights and the scheme,
not from the artifact's scales: so they show a wrong scale, even where the noise of four bits would
hide it in a norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import StoredGroup, groups_of
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import Advance
from rgexport.quantize.schemes.registry import Uniform
from rgexport.quantize.schemes.steps import StepSizes
from rgexport.validate.weights import sketch
from rgexport.validate.weights.expectations import expectation, expectation_key
from rgexport.validate.weights.tensor_pairs import of_each_tensor, paired_slabs

_MAXIMA = ("max_steps", "worst_row", "most_expected")
"""Entries of `Sums` that are the largest value of any row instead of a sum."""

Sums = dict[str, float]
"""Sums over rows of a tensor, by name, in float64; of `_MAXIMA` the largest."""


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


ErrorT = TypeVar("ErrorT", bound=TensorError)


class TensorComparison(ABC, Generic[ErrorT]):
    """A comparison of stored tensors with one source of their originals, slab by slab.

    Several threads call the methods, each for another tensor.
    """

    @abstractmethod
    def original(self, name: str) -> RowTensor:
        """Returns the rows that the source knows of a tensor: its weights, or their sketches."""

    @abstractmethod
    def measure(
        self, name: str, scheme: Uniform, original_rows: np.ndarray, rows: np.ndarray
    ) -> Sums:
        """Adds up the errors of some rows; both matrices are float32 and have as many rows."""

    @abstractmethod
    def summarize(self, name: str, group: StoredGroup, sums: Sums) -> ErrorT:
        """Returns the errors of a tensor, or of one of its row groups, from its sums."""

    def compare(
        self, label: str, dequantized: WeightSource, tensors: Mapping[str, StoredTensor]
    ) -> list[ErrorT]:
        """Compares all `tensors`, each row group by itself; `label` names the task."""

        def compare_tensor(name: str, advance: Advance) -> list[ErrorT]:
            return self._compare_tensor(name, dequantized[name], tensors[name], advance)

        errors_of_each = of_each_tensor(label, tensors, compare_tensor)
        return list(chain.from_iterable(errors_of_each))

    def _compare_tensor(
        self, name: str, dequantized: RowTensor, stored: StoredTensor, advance: Advance
    ) -> list[ErrorT]:
        groups = groups_of(stored)
        totals: list[Sums] = [{} for _ in groups]
        # Temporaries of small slabs stay in cache, which makes the table 6x faster.
        slabs = paired_slabs(self.original(name), dequantized, stored, sketch.SLAB_BYTES)
        for start, original_rows, rows in slabs:
            for group, total in zip(groups, totals, strict=True):
                chosen = group.chosen(start, start + len(rows))
                group_rows = rows[chosen]
                if not len(group_rows):
                    continue
                with np.errstate(invalid="ignore", over="ignore"):
                    sums = self.measure(
                        name, group.stored.uniform, original_rows[chosen], group_rows
                    )
                _add_sums(total, sums)
            advance(rows.nbytes)

        errors = []
        for group, total in zip(groups, totals, strict=True):
            errors.append(self.summarize(name, group, total))
        return errors


def _add_sums(total: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        before = total.get(name, 0.0)
        if name in _MAXIMA:
            # Unlike `max`, this is NaN if one of the two is.
            total[name] = float(np.maximum(before, value))
        else:
            total[name] = float(np.add(before, value))


def shared_fields(name: str, group: StoredGroup, weighted: bool, sums: Sums) -> dict[str, Any]:
    """Returns the fields of `TensorError`, except for `rows`, from the sums of a row group."""
    scheme = group.stored.uniform
    output_noise = None
    if "output" in sums:
        output_noise = ratio(sums["output"], sums["expected_output"])
    return {
        "name": name,
        "scheme": group.label,
        "quantized": scheme.is_quantized,
        "relative_error": ratio(sums["error"], sums["square"]) ** 0.5,
        "projection": 1 + ratio(sums["along"], sums["square"]),
        "noise": ratio(sums["error"], sums["expected"]),
        "shift": ratio(sums["moved"], sums["steps"]),
        "output_noise": output_noise,
        "weighted": expectation(scheme, weighted).weighted,
        "chosen": expectation_key(scheme, weighted),
    }


def output_sums(moved: np.ndarray, steps: StepSizes, mixtures: np.ndarray) -> Sums:
    """Adds up ‖E p‖² over mixtures p [m, K], of the stored errors and of rounding to nearest.

    `moved` [rows, m] is E p.
    """
    squares = np.square(mixtures, dtype=np.float64).sum(0)
    return {
        "output": float(np.square(moved).sum()),
        "expected_output": float(steps.rounding(mixtures.shape[1], squares).sum()),
    }


def ratio(part: float, whole: float) -> float:
    """Divides; 0/0 is 0: a tensor of zeros that was stored as zeros has no error."""
    if whole:
        return part / whole
    return float("inf") if part else 0.0
