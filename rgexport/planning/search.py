"""Finds the plan of least loss for a size, or of least size for a loss, and measures it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rgexport.artifacts.format import Format
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.planning.allocation import Choice, Option, solve
from rgexport.planning.losses import Divergence, OriginalRun, PredictedLosses
from rgexport.planning.plan_items import artifact_bytes, items_of, layout_bytes, plan_of
from rgexport.progress import group, task
from rgexport.quantize.algorithms.calibration_file import Calibration
from rgexport.quantize.algorithms.statistics import StatisticsOf
from rgexport.quantize.plan import bfloat16_gates, quantized
from rgexport.quantize.schemes.registry import BFLOAT16, Plan, Uniform
from rgexport.units import amount

_ATTEMPTS = 4  # most plans that are measured until one reaches the target KL
_NEAR = 0.03  # tolerated relative difference from the target KL
_POINTS = 12  # points of the front in reports

Kind = Literal["kl", "size", "bits"]
FLAGS: dict[Kind, str] = {"kl": "--target-kl", "size": "--target-size", "bits": "--bits"}


@dataclass(frozen=True)
class PlanTarget:
    """A limit for a plan: nats per token, bytes, or bits per weight."""

    kind: Kind
    value: float

    @property
    def label(self) -> str:
        """Such as `4.5bits`, `9.00MB` or `0.02kl`."""
        is_size = self.kind == "size"
        return amount(self.value).replace(" ", "") if is_size else f"{self.value:g}{self.kind}"


@dataclass(frozen=True)
class PlanPoint:
    """A plan's bits per weight with scales, bytes of the artifact, and predicted KL in nats."""

    bits: float
    size: int
    kl: float


@dataclass(frozen=True)
class PlanResult:
    """The chosen plan, its figures, predicted and measured, and the front of good plans."""

    plan: Plan
    chosen: PlanPoint
    measured: Divergence
    front: tuple[PlanPoint, ...]


def require_reachable(target: PlanTarget, checkpoint: Checkpoint, form: Format) -> None:
    """Refuses a number of bits or bytes that even the smallest layouts exceed, before any work."""
    items = items_of(checkpoint.config, None)
    sizes = [layout_bytes(form, item.shape) for item in items]
    smallest = [min(of_item, key=lambda layout: of_item[layout]) for of_item in sizes]
    counts = [len(item.tensors) for item in items]
    stored = sum(
        count * min(of_item.values()) for count, of_item in zip(counts, sizes, strict=True)
    )
    bits = 8 * stored / sum(item.weights for item in items)
    plan = plan_of(checkpoint.config, items, smallest) | _gates(checkpoint, form)
    size = artifact_bytes(form, plan, checkpoint)
    if target.value < {"bits": bits, "size": size, "kl": 0.0}[target.kind]:
        raise _out_of_reach(target, PlanPoint(bits, size, 0.0))
    most = max(layout.bits_per_weight for of_item in sizes for layout in of_item)
    if target.kind == "bits" and target.value > math.ceil(most):
        raise RequestError(f"--bits is {target.value:g}; plans have at most {most:g}")


def _gates(checkpoint: Checkpoint, form: Format) -> Plan:
    if not form.keeps_bfloat16_gates:
        return {}
    return dict.fromkeys(bfloat16_gates(checkpoint.config, checkpoint.weights), BFLOAT16)


def _out_of_reach(target: PlanTarget, smallest: PlanPoint, kl: float = 0.0) -> RequestError:
    value, limit = {
        "kl": (f"{target.value:g}", f"{kl:.2g}"),
        "size": (amount(target.value), amount(smallest.size)),
        "bits": (f"{target.value:g}", f"{smallest.bits:.3f}"),
    }[target.kind]
    return RequestError(
        f"{FLAGS[target.kind]} is {value}, which no plan reaches; expected {limit} or more"
    )


class Planner:
    """Predicts the cost of every layout once; then finds plans in seconds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        form: Format,
        statistics: StatisticsOf,
    ):
        self._checkpoint, self._form, self._statistics = checkpoint, form, statistics
        config, weights = checkpoint.config, checkpoint.weights
        losses = PredictedLosses(config, weights, calibration, statistics)
        importance = losses.row_importance() if form.has_row_groups else None
        self._items = items_of(config, importance)
        self._weights = sum(item.weights for item in self._items)
        self._gates = _gates(checkpoint, form)
        self._scale = 1.0  # measured KL divided by predicted KL
        self._original: tuple[Sequence[np.ndarray], OriginalRun] | None = None
        self._schemes: list[list[Uniform]] = []
        options: list[list[Option]] = []
        with task("Trying layouts", self._weights, "weights") as done:
            for item in self._items:
                sizes = layout_bytes(form, item.shape)
                self._schemes.append(list(sizes))
                predicted = losses.of(item, self._schemes[-1])
                sums = (len(item.tensors) * size for size in sizes.values())
                options.append([Option(*one) for one in zip(sums, predicted, strict=True)])
                done(item.weights)
        self._front = solve(options)

    def find(self, target: PlanTarget, sequences: Sequence[np.ndarray]) -> PlanResult:
        """Returns the plan for a target, measured on a text; refuses a target out of reach.

        Further targets on the same text share the run of the original.
        """
        self._scale = 1.0
        choice = self._choose(target)
        if self._original is None or self._original[0] is not sequences:
            with group("Running the original"):
                run = OriginalRun(self._checkpoint.config, self._checkpoint.weights, sequences)
            self._original = sequences, run
        original = self._original[1]
        for attempt in range(1, _ATTEMPTS + 1):
            plan, predicted = self._plan(choice), self._point(choice)
            weights = quantized(self._checkpoint.weights, plan, self._statistics)
            with group(f"Measuring a plan of {predicted.bits:.3f} bits"):
                measured = original.divergence(weights)
            if choice.loss > 0 and measured.kl > 0:
                self._scale = measured.kl / choice.loss
            near = abs(measured.kl / target.value - 1) <= _NEAR
            if target.kind != "kl" or near or attempt == _ATTEMPTS:
                break
            before, choice = choice, self._choose(target)
            if choice == before:
                break  # no other plan is nearer
        front = tuple(map(self._point, self._front.points(_POINTS)))
        return PlanResult(plan, predicted, measured, front)

    def _choose(self, target: PlanTarget) -> Choice:
        if target.kind == "kl":
            choice = self._front.below(target.value / self._scale)
        elif target.kind == "bits":
            choice = self._front.within(target.value * self._weights / 8)
        else:
            budget = target.value  # with the bytes beside the matrices, which depend on the plan
            while choice := self._front.within(budget):
                excess = self._point(choice).size - target.value
                if excess <= 0:
                    break
                budget = choice.bytes - excess
        if choice is not None:
            return choice
        smallest, largest = map(self._point, self._front.points(2))
        raise _out_of_reach(target, smallest, largest.kl)

    def _plan(self, choice: Choice) -> Plan:
        layouts = [schemes[pick] for schemes, pick in zip(self._schemes, choice.picks, strict=True)]
        return plan_of(self._checkpoint.config, self._items, layouts) | self._gates

    def _point(self, choice: Choice) -> PlanPoint:
        size = artifact_bytes(self._form, self._plan(choice), self._checkpoint)
        return PlanPoint(8 * choice.bytes / self._weights, size, choice.loss * self._scale)
