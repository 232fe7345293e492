"""Finds the plan of least loss in some bytes, or of fewest bytes for some loss, and checks it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rgexport.compress.items import items_of, plan_of
from rgexport.compress.layouts import FormatLayouts
from rgexport.compress.losses import Losses
from rgexport.compress.measure import Divergence, Original
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import group, task
from rgexport.quantize.allocation import Choice, Front, Option, solve
from rgexport.quantize.calibration import Calibration
from rgexport.quantize.plan import bfloat16_gates
from rgexport.quantize.scheme import BFLOAT16, Plan, Uniform
from rgexport.quantize.statistics import Calibrated, StatisticsOf
from rgexport.quantize.stored_weights import quantized
from rgexport.units import amount

_ATTEMPTS = 4
"""Plans that are measured, at most, until one costs what was asked for."""
_NEAR = 0.03
"""Of the target, by which a plan may be off."""
_POINTS = 12
"""Of the front, in reports."""


Kind = Literal["kl", "size", "bits"]
FLAGS: dict[Kind, str] = {"kl": "--target-kl", "size": "--target-size", "bits": "--bits"}


@dataclass(frozen=True)
class Target:
    """What a plan is to reach: at most so many nats per token, bytes, or bits per weight."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Point:
    """A plan of the front.

    Attributes:
        bits: per weight of the matrices and the head, scales and zero points included.
        size: bytes of the artifact.
        kl: predicted, in nats per token.
    """

    bits: float
    size: int
    kl: float


@dataclass(frozen=True)
class Found:
    """A plan, and what is known of it and of others.

    Attributes:
        plan: the layout of every tensor.
        chosen: its bits, its size, and what it was predicted to cost after all measurements but
            its own.
        measured: what it costs.
        front: from the smallest plan to the largest; predicted after all measurements.
    """

    plan: Plan
    chosen: Point
    measured: Divergence
    front: tuple[Point, ...]


class Planner:
    """Predicts once what every layout costs; then plans are a matter of seconds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        layouts: FormatLayouts,
        statistics: StatisticsOf | None = None,
    ):
        """Quantizes some rows of every matrix in every layout.

        Args:
            checkpoint: the model.
            calibration: of the model.
            layouts: to choose from.
            statistics: those of the calibration, if there are such already.

        Raises:
            RequestError: a weight that a layout cannot hold, or a damaged calibration.
        """
        self._checkpoint, self._layouts = checkpoint, layouts
        self._statistics = statistics or Calibrated(calibration, checkpoint.config)
        losses = Losses(checkpoint.config, checkpoint.weights, calibration, self._statistics)
        importance = losses.row_importance() if layouts.row_groups else None
        self._items = items_of(checkpoint.config, importance)
        exact = bfloat16_gates(checkpoint.config, checkpoint.weights)
        self._gates: Plan = dict.fromkeys(exact if layouts.bfloat16_gates else (), BFLOAT16)
        self._schemes: list[list[Uniform]] = []
        self._front = self._predicted(losses)
        self._scale = 1.0
        """Of predictions: what measured plans cost beside what was predicted."""

    def _predicted(self, losses: Losses) -> Front:
        options: list[list[Option]] = []
        with task("Trying layouts", sum(item.weights for item in self._items), "weights") as done:
            for item in self._items:
                sizes = self._layouts.options(item.shape)
                self._schemes.append(list(sizes))
                found = losses.of(item, self._schemes[-1])
                sums = (len(item.tensors) * size for size in sizes.values())
                options.append([Option(*one) for one in zip(sums, found, strict=True)])
                done(item.weights)
        return solve(options)

    def find(self, target: Target, sequences: Sequence[np.ndarray]) -> Found:
        """The plan for a target, measured on a text.

        Raises:
            RequestError: no plan is so small or so good.
        """
        choice, original = self._choose(target), self._original(sequences)
        for attempt in range(1, _ATTEMPTS + 1):
            plan, predicted = self._plan(choice), self._point(choice)
            measured = self._measured(original, plan, predicted)
            if choice.loss > 0 and measured.kl > 0:
                self._scale = measured.kl / choice.loss
            near = abs(measured.kl / target.value - 1) <= _NEAR
            if target.kind != "kl" or near or attempt == _ATTEMPTS:
                break
            before, choice = choice, self._choose(target)
            if choice == before:
                break  # no other plan is nearer
        front = tuple(map(self._point, self._front.points(_POINTS)))
        return Found(plan, predicted, measured, front)

    def _measured(self, original: Original, plan: Plan, point: Point) -> Divergence:
        weights = quantized(self._checkpoint.weights, plan, self._statistics)
        with group(f"Measuring a plan of {point.bits:.3f} bits"):
            return original.divergence(weights)

    def _original(self, sequences: Sequence[np.ndarray]) -> Original:
        with group("Running the original"):
            return Original(self._checkpoint.config, self._checkpoint.weights, sequences)

    def _choose(self, target: Target) -> Choice:
        if target.kind == "kl":
            found = self._front.below(target.value / self._scale)
        elif target.kind == "bits":
            found = self._front.within(target.value * self._weights / 8)
        else:
            found = self._of_size(target.value)
        if found is None:
            raise self._out_of_reach(target)
        return found

    def _of_size(self, size: float) -> Choice | None:
        """The best plan of an artifact of at most so many bytes.

        What is between and beside the matrices depends a little on the plan.
        """
        budget = size
        while found := self._front.within(budget):
            excess = self._point(found).size - size
            if excess <= 0:
                break
            budget = found.bytes - excess
        return found

    def _out_of_reach(self, target: Target) -> RequestError:
        smallest, largest = map(self._point, (self._end(0), self._end(-1)))
        asked, limit = {
            "kl": (f"{target.value:g}", f"{largest.kl:.2g}"),
            "size": (amount(target.value), amount(smallest.size)),
            "bits": (f"{target.value:g}", f"{smallest.bits:.3f}"),
        }[target.kind]
        return RequestError(
            f"{FLAGS[target.kind]} is {asked}, which no plan reaches; expected {limit} or more"
        )

    def _end(self, place: int) -> Choice:
        return self._front.points(2)[place]

    def _plan(self, choice: Choice) -> Plan:
        layouts = [own[pick] for own, pick in zip(self._schemes, choice.picks, strict=True)]
        return plan_of(self._checkpoint.config, self._items, layouts) | self._gates

    def _point(self, choice: Choice) -> Point:
        size = self._layouts.artifact_bytes(self._plan(choice), self._checkpoint)
        return Point(8 * choice.bytes / self._weights, size, choice.loss * self._scale)

    @property
    def _weights(self) -> int:
        return sum(item.weights for item in self._items)
