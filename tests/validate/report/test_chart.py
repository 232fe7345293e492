import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.validate.report import chart
from rgexport.validate.report.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Series

values = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-15, 1e6), st.sampled_from([math.nan, math.inf])),
    max_size=20,
)


def draw(*series: Series, y: Axis, **more: Any) -> Chart:
    return Chart(
        title="title", summary="", labels=("x", "y"), series=series, y=y, column="x", **more
    )


@given(values)
def test_finite_values_and_ticks_lie_in_the_picture(numbers):
    for axis in (chart.logarithmic_axis(numbers), chart.linear_axis(numbers)):
        drawn = draw(Series("twin", "twin", list(enumerate(numbers)), dots=True), y=axis)
        ((_, dots),) = drawn.dots
        assert len(dots) == sum(map(math.isfinite, numbers))
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in dots)
        assert all(LEFT <= drawn.x(x) <= RIGHT for x, _ in drawn.x.ticks)
        assert 2 <= len(axis.ticks) <= 6
        assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)


@given(st.integers(1, 10**6), st.integers(0, 10**7), st.booleans())
def test_ticks_of_x_are_a_few_round_numbers(low, span, doubling):
    ticks = (chart.doubling_ticks if doubling else chart.whole_ticks)(low, low + span)
    assert len(ticks) <= 6 and all(low <= tick <= low + span for tick in ticks)
    assert len(ticks) >= 2 or span < 3 * (low if doubling else 1)
    assert not doubling or all(tick & (tick - 1) == 0 for tick in ticks)


def test_decades_have_equal_distances_and_are_labelled():
    axis = chart.logarithmic_axis([2e-3, 0.5])
    assert (axis.low, axis.high) == (1e-3, 1)
    assert [label for _, label in axis.ticks] == ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]
    places = [axis(value) for value, _ in axis.ticks]
    assert places[0] == BOTTOM and places[-1] == TOP
    assert places[0] - places[1] == pytest.approx(places[2] - places[3], abs=0.2)


def test_shares_end_at_one_and_begin_below_the_smallest():
    axis = chart.share_axis([0.83, 0.99])
    assert (axis.low, axis.high) == (0.8, 1)
    assert axis.ticks[0] == (1, "100 %")
    assert chart.share_axis([1.0]).low == 0.9
    assert len(chart.share_axis([0.0]).ticks) == 6


def test_a_line_has_a_gap_where_a_value_is_missing():
    points = [(0, 0.0), (1, 1.0), (2, math.nan), (3, 1.0)]
    ((_, path),) = draw(Series("twin", "twin", points), y=chart.linear_axis([1.0])).paths
    assert path == f"M52 {BOTTOM} L162.7 {TOP} M384 {TOP} h0.1"


def test_a_limit_is_drawn_from_edge_to_edge_where_it_is_near():
    limit = Series("limit", "limit", [(0, 0.3)])
    near, far = (chart.logarithmic_axis(ys, 0.3) for ys in ([1e-3, 1e-2], [1e-9, 1e-8]))
    path = draw(y=near, limit=limit).limit_path
    assert TOP < near(0.3) < BOTTOM
    assert path.startswith(f"M{LEFT} {near(0.3):g} ") and path.endswith(f"L{RIGHT} {near(0.3):g}")
    assert draw(y=far, limit=limit).limit_path == "" == draw(y=near).limit_path


def test_a_table_has_a_row_for_each_x_and_all_that_lies_there():
    first = Series("a", "a", [(2000, 0.5), (1, 0.25), (1, 0.125)])
    drawn = draw(first, Series("b", "b", [(1, 3.0)]), y=chart.linear_axis([1]))
    assert drawn.rows == [["1", "0.25, 0.125", "3"], ["2,000", "0.5", ""]]
