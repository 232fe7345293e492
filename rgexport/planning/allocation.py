"""Chooses an option for each item, with the least loss for every budget of bytes: a knapsack.

Sizes are counted in their common divisor, or else rounded up, so that a budget is always kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

_UNITS = 100_000  # units between the smallest choice and the largest


@dataclass(frozen=True)
class Option:
    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    picks: tuple[int, ...]
    bytes: int
    loss: float


@dataclass(frozen=True)
class Front:
    """The best choices for all budgets, in units of `unit` bytes beyond `least`, the smallest.

    `losses` float64 [units + 1] are the least ones, `picks` uint8 [items, units + 1] the option of
    each item if only it and those before it share the units, `extras` the units of its options.
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
        units = min(int((budget - self.least) // self.unit), len(self.losses) - 1)
        return self._choice(units)

    def below(self, loss: float) -> Choice | None:
        """Returns the smallest choice with at most this loss, or None."""
        units = int(np.searchsorted(-self.losses, -loss))
        return None if units == len(self.losses) else self._choice(units)

    def points(self, count: int) -> list[Choice]:
        """Returns at most `count` choices, evenly from the smallest to the largest."""
        units = np.linspace(0, len(self.losses) - 1, count).round().astype(int)
        choices = [self._choice(int(unit)) for unit in units]
        ends = [choice for choice, after in pairwise(choices) if after.bytes > choice.bytes]
        return [*ends, choices[-1]]

    def _choice(self, units: int) -> Choice:
        # The fewest units with this loss: the rest would only be left over.
        units = int(np.searchsorted(-self.losses, -self.losses[units]))
        picks = []
        for chosen, extras in zip(self.picks[::-1], self.extras[::-1], strict=True):
            picks.append(int(chosen[units]))
            units -= extras[picks[-1]]
        picks.reverse()
        options = [options[pick] for options, pick in zip(self.items, picks, strict=True)]
        nbytes, loss = sum(one.bytes for one in options), sum(one.loss for one in options)
        return Choice(tuple(picks), nbytes, loss)


def solve(items: Sequence[Sequence[Option]]) -> Front:
    """Returns the front of items with at most 256 options each."""
    useful = [_undominated(options) for options in items]
    least = [options[indices[0]].bytes for options, indices in zip(items, useful, strict=True)]
    sizes_beyond = [
        {index: options[index].bytes - start for index in indices}
        for options, indices, start in zip(items, useful, least, strict=True)
    ]
    reach = sum(max(sizes.values()) for sizes in sizes_beyond)
    divisor = gcd(*(size for sizes in sizes_beyond for size in sizes.values()))
    unit = max(divisor, -(-reach // _UNITS), 1)
    extras = tuple({i: -(-size // unit) for i, size in sizes.items()} for sizes in sizes_beyond)
    count = sum(max(sizes.values()) for sizes in extras) + 1
    losses, picks = np.zeros(count), np.zeros((len(items), count), np.uint8)
    for options, sizes, chosen in zip(items, extras, picks, strict=True):
        best = np.full(count, np.inf)
        for index, size in sizes.items():
            sums = losses[: count - size] + options[index].loss
            better = sums < best[size:]
            best[size:][better] = sums[better]
            chosen[size:][better] = index
        losses = best
    return Front(tuple(map(tuple, items)), unit, sum(least), losses, picks, extras)


def _undominated(options: Sequence[Option]) -> list[int]:
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].loss))
    best = order[:1]
    for index in order[1:]:
        if options[index].loss < options[best[-1]].loss:
            best.append(index)
    return best
