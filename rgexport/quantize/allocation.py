"""Which layout each part of a model gets: the least loss for every budget of bytes.

A knapsack with one choice per item, solved by dynamic programming over bytes. Bytes are counted in
units; where the sizes have a large common divisor, that is the unit and the solution is exact.
Otherwise sizes are rounded up, so that a budget is always kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

_UNITS = 100_000
"""How finely bytes are counted, between the smallest choice and the largest."""


@dataclass(frozen=True)
class Option:
    """One way to store an item: what it takes and what it costs."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """One option for each item: their indices, and what they sum to."""

    picks: tuple[int, ...]
    bytes: int
    loss: float


@dataclass(frozen=True)
class Front:
    """The best choices for all budgets.

    Attributes:
        items: the options of each item.
        unit: bytes of a unit.
        least: bytes of the smallest choice.
        losses: float64 [units + 1], the least loss with at most so many units beyond `least`.
        picks: uint8 [items, units + 1], the option that each item gets there if only the items
            before it and itself share these units.
        extras: units of each item's options beyond its smallest.
    """

    items: tuple[tuple[Option, ...], ...]
    unit: int
    least: int
    losses: np.ndarray
    picks: np.ndarray
    extras: tuple[dict[int, int], ...]

    def within(self, budget: float) -> Choice | None:
        """The choice of least loss in at most `budget` bytes; None where nothing is so small."""
        if budget < self.least:
            return None
        units = min(int((budget - self.least) // self.unit), len(self.losses) - 1)
        return self._choice(units)

    def below(self, loss: float) -> Choice | None:
        """The smallest choice with at most this loss; None where there is none."""
        units = int(np.searchsorted(-self.losses, -loss))
        return None if units == len(self.losses) else self._choice(units)

    def points(self, count: int) -> list[Choice]:
        """At most `count` choices, evenly from the smallest to the largest."""
        places = np.linspace(0, len(self.losses) - 1, count).round().astype(int)
        found = [self._choice(int(place)) for place in places]
        ends = [one for one, after in pairwise(found) if after.bytes > one.bytes]
        return [*ends, found[-1]]

    def _choice(self, units: int) -> Choice:
        # The fewest units with this loss: others would only be left over.
        units = int(np.searchsorted(-self.losses, -self.losses[units]))
        picks = []
        for chosen, extras in zip(self.picks[::-1], self.extras[::-1], strict=True):
            picks.append(int(chosen[units]))
            units -= extras[picks[-1]]
        picks.reverse()
        options = [options[pick] for options, pick in zip(self.items, picks, strict=True)]
        return Choice(
            tuple(picks), sum(one.bytes for one in options), sum(one.loss for one in options)
        )


def solve(items: Sequence[Sequence[Option]], units: int = _UNITS) -> Front:
    """The front of items that each get one of their options; at most 256 options an item."""
    useful = [_undominated(options) for options in items]
    least = [options[places[0]].bytes for options, places in zip(items, useful, strict=True)]
    more = [
        {place: options[place].bytes - start for place in places}
        for options, places, start in zip(items, useful, least, strict=True)
    ]
    reach = sum(max(sizes.values()) for sizes in more)
    unit = max(gcd(*(size for sizes in more for size in sizes.values())), -(-reach // units), 1)
    extras = tuple({place: -(-size // unit) for place, size in sizes.items()} for sizes in more)
    count = sum(max(sizes.values()) for sizes in extras) + 1
    losses, picks = np.zeros(count), np.zeros((len(items), count), np.uint8)
    for options, sizes, chosen in zip(items, extras, picks, strict=True):
        losses = _with_item(losses, options, sizes, chosen)
    return Front(tuple(map(tuple, items)), unit, sum(least), losses, picks, extras)


def _with_item(
    losses: np.ndarray, options: Sequence[Option], extras: dict[int, int], chosen: np.ndarray
) -> np.ndarray:
    """The least losses with one more item; `chosen` is filled."""
    best = np.full(len(losses), np.inf)
    for place, size in extras.items():
        found = losses[: len(losses) - size] + options[place].loss
        better = found < best[size:]
        best[size:][better] = found[better]
        chosen[size:][better] = place
    return best


def _undominated(options: Sequence[Option]) -> list[int]:
    """The options that no other one beats in both bytes and loss, by ascending bytes."""
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].loss))
    kept = order[:1]
    for place in order[1:]:
        if options[place].loss < options[kept[-1]].loss:
            kept.append(place)
    return kept
