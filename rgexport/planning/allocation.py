"""Chooses an option for each item, with the least loss for every budget of bytes.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: Knapsack Problems,
chapter 11), solved by dynamic programming over the budget. Budgets are counted in units: in the
common divisor of all sizes, or in a larger unit if that would make too many budgets. Sizes are then
rounded up, so that a budget is always kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

_MAX_UNITS = 100_000
"""Largest number of units between the smallest choice and the largest, which bounds the tables."""


@dataclass(frozen=True)
class Option:
    """An option of an item: its size, and its loss in nats per token."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """One option for each item.

    Attributes:
        picks: the index of the option of each item.
        bytes: the sum of their sizes.
        loss: the sum of their losses.
    """

    picks: tuple[int, ...]
    bytes: int
    loss: float


@dataclass(frozen=True)
class Front:
    """The best choices for all budgets.

    A budget is a number of units beyond the smallest choice, from 0 to that of the largest choice.

    Attributes:
        items: the options of each item.
        unit: bytes of a unit.
        least: bytes of the smallest choice.
        losses: the least loss for each budget, float64 [budgets], in descending order.
        picks: the option of each item for each budget, uint8 [items, budgets], if only this item
            and those before it share the budget.
        extras: option → units beyond the smallest option, for each item. Options that are larger
            than another one without having less loss are missing.
    """

    items: tuple[tuple[Option, ...], ...]
    unit: int
    least: int
    losses: np.ndarray
    picks: np.ndarray
    extras: tuple[dict[int, int], ...]

    def within(self, budget: float) -> Choice | None:
        """Returns the choice of least loss in at most `budget` bytes, or None."""
        if budget < self.least:
            return None
        units = int((budget - self.least) // self.unit)
        largest = len(self.losses) - 1
        return self._choice(min(units, largest))

    def below(self, loss: float) -> Choice | None:
        """Returns the smallest choice with at most this loss, or None."""
        units = self._fewest_units(loss)
        if units == len(self.losses):
            return None
        return self._choice(units)

    def points(self, count: int) -> list[Choice]:
        """Returns at most `count` choices, evenly from the smallest to the largest."""
        largest = len(self.losses) - 1
        budgets = np.linspace(0, largest, count).round().astype(int)
        choices = [self._choice(units) for units in budgets.tolist()]

        growing = pairwise(choices)
        points = [choice for choice, following in growing if following.bytes > choice.bytes]
        points.append(choices[-1])
        return points

    def _fewest_units(self, loss: float) -> int:
        """Returns the smallest budget with at most this loss; one after the last if none has."""
        return int(np.searchsorted(-self.losses, -loss))

    def _choice(self, units: int) -> Choice:
        """Returns the best choice for a budget, found from the last item to the first."""
        # A budget may have the loss of a smaller one, and would leave the difference unused.
        remaining = self._fewest_units(self.losses[units])
        picks: list[int] = []
        for item_picks, extras in zip(self.picks[::-1], self.extras[::-1], strict=True):
            pick = int(item_picks[remaining])
            picks.append(pick)
            remaining -= extras[pick]
        picks.reverse()

        chosen = [options[pick] for options, pick in zip(self.items, picks, strict=True)]
        return Choice(
            picks=tuple(picks),
            bytes=sum(option.bytes for option in chosen),
            loss=sum(option.loss for option in chosen),
        )


def solve(items: Sequence[Sequence[Option]]) -> Front:
    """Returns the front of items with at most 256 options each."""
    least = 0
    sizes_beyond: list[dict[int, int]] = []
    for options in items:
        useful = _undominated(options)
        smallest = options[useful[0]].bytes
        least += smallest
        sizes_beyond.append({index: options[index].bytes - smallest for index in useful})

    unit = _unit_bytes(sizes_beyond)
    extras: list[dict[int, int]] = []
    for sizes in sizes_beyond:
        units = {index: -(-size // unit) for index, size in sizes.items()}
        extras.append(units)

    budgets = 1 + sum(max(units.values()) for units in extras)
    losses = np.zeros(budgets)
    picks = np.zeros((len(items), budgets), np.uint8)
    for item, options in enumerate(items):
        losses = _add_item(losses, options, extras[item], picks[item])
    return Front(
        items=tuple(tuple(options) for options in items),
        unit=unit,
        least=least,
        losses=losses,
        picks=picks,
        extras=tuple(extras),
    )


def _undominated(options: Sequence[Option]) -> list[int]:
    """Returns the options with less loss than all smaller ones, in ascending order of size."""
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].loss))
    best = order[:1]
    for index in order[1:]:
        if options[index].loss < options[best[-1]].loss:
            best.append(index)
    return best


def _unit_bytes(sizes_beyond: Sequence[dict[int, int]]) -> int:
    """Returns the bytes of a unit, from the sizes of options beyond the smallest of their item."""
    divisor = 0
    range_bytes = 0
    for sizes in sizes_beyond:
        divisor = gcd(divisor, *sizes.values())
        range_bytes += max(sizes.values())
    coarsest_needed = -(-range_bytes // _MAX_UNITS)
    return max(divisor, coarsest_needed, 1)


def _add_item(
    losses: np.ndarray, options: Sequence[Option], extras: dict[int, int], picks: np.ndarray
) -> np.ndarray:
    """Returns the least losses [budgets] when one more item shares each budget.

    Writes the item's option for each budget into `picks`, uint8 [budgets].
    """
    budgets = len(losses)
    best = np.full(budgets, np.inf)
    for index, units in extras.items():
        sums = losses[: budgets - units] + options[index].loss
        best_with_room = best[units:]
        is_better = sums < best_with_room
        best_with_room[is_better] = sums[is_better]
        picks[units:][is_better] = index
    return best
