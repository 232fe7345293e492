"""The allocation: beside an exhaustive search, and by its promises."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.quantize.allocation import Option, solve

OPTIONS = st.builds(
    Option, st.integers(1, 10**7), st.floats(0, 1, allow_subnormal=False).map(lambda x: x + 1e-6)
)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def all_choices(items):
    for options in product(*items):
        yield sum(one.bytes for one in options), sum(one.loss for one in options)


@given(ITEMS, st.floats(0, 1.2))
@settings(deadline=None)
def test_least_loss_within_a_budget(items, share):
    sizes, losses = map(np.array, zip(*all_choices(items), strict=True))
    budget = sizes.min() + share * (sizes.max() - sizes.min())
    found = solve(items).within(budget)
    assert found.bytes <= budget
    # Rounding up may waste a unit for each item: the best in so much less is the bound.
    waste = len(items) * (1 + (sizes.max() - sizes.min()) // 100_000)
    bound = losses[sizes <= max(budget - waste, sizes.min())].min()
    assert losses[sizes <= budget].min() * (1 - 1e-9) <= found.loss <= bound * (1 + 1e-9)


@given(ITEMS, st.floats(0, 1))
@settings(deadline=None)
def test_fewest_bytes_below_a_loss(items, share):
    sizes, losses = map(np.array, zip(*all_choices(items), strict=True))
    target = losses.min() + share * (losses.max() - losses.min()) + 1e-12
    found = solve(items).below(target)
    assert found.loss <= target * (1 + 1e-9)
    waste = len(items) * (1 + (sizes.max() - sizes.min()) // 100_000)
    least = sizes[losses <= target].min()
    assert least <= found.bytes <= least + waste


@given(ITEMS, st.integers(2, 12))
@settings(deadline=None)
def test_points_of_the_front_rise_in_bytes_and_fall_in_loss(items, count):
    front = solve(items)
    points = front.points(count)
    assert 1 <= len(points) <= count
    assert points[0].bytes == front.least
    for one, after in pairwise(points):
        assert one.bytes < after.bytes and one.loss > after.loss
    for point in points:
        chosen = [options[pick] for options, pick in zip(items, point.picks, strict=True)]
        assert point.bytes == sum(one.bytes for one in chosen)
        assert point.loss == pytest.approx(sum(one.loss for one in chosen))


def test_nothing_is_small_or_good_enough():
    front = solve([[Option(10, 1.0), Option(20, 0.5)], [Option(5, 1.0)]])
    assert front.within(14) is None and front.below(1.4) is None
    assert front.within(15).picks == (0, 0) and front.below(1.5).picks == (1, 0)
