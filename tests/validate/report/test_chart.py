import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.validate.report import chart
from rgexport.validate.report.chart import BOTTOM, LEFT, RIGHT, TOP, Limit, Scale, Series

values = st.lists(
    st.one_of(
        st.just(0.0),
        st.floats(1e-15, 1e6),
        st.sampled_from([math.nan, math.inf]),
    ),
    max_size=20,
)


@given(values)
def test_every_value_lies_in_the_picture(numbers: list[float]) -> None:
    for scale in (chart.logarithmic_scale(numbers), chart.linear_scale(numbers)):
        series = Series("twin", "twin", list(enumerate(numbers)), dots=True)
        (drawn,), ticks, _ = chart.draw([series], scale)
        assert len(drawn.dots) == sum(map(math.isfinite, numbers))
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in drawn.dots)
        assert all(LEFT <= x <= RIGHT for x, _ in ticks)


@given(values)
def test_scales_have_a_few_ticks_inside(numbers: list[float]) -> None:
    logarithmic, linear = chart.logarithmic_scale(numbers), chart.linear_scale(numbers)
    for ticks in (chart.decade_ticks(logarithmic), chart.fifth_ticks(linear)):
        assert 2 <= len(ticks) <= 6
        assert all(TOP <= place <= BOTTOM for place, _ in ticks)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_whole_ticks(low: int, span: int) -> None:
    ticks = chart.whole_ticks(low, low + span)
    assert all(low <= tick <= low + span for tick in ticks)
    assert len(ticks) <= 6 and (len(ticks) >= 2 or span < 3)


def test_decades_are_evenly_apart_and_named() -> None:
    scale = chart.logarithmic_scale([2e-3, 0.5])
    assert (scale.low, scale.high) == (1e-3, 1)
    ticks = chart.decade_ticks(scale)
    assert [name for _, name in ticks] == ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]
    places = [place for place, _ in ticks]
    assert places[0] == BOTTOM and places[-1] == TOP
    assert places[0] - places[1] == pytest.approx(places[2] - places[3], abs=0.2)


def test_shares_end_at_one_and_begin_below_the_smallest() -> None:
    scale = chart.share_scale([0.83, 0.99])
    assert (scale.low, scale.high) == (0.8, 1)
    assert [name for _, name in chart.share_ticks(scale)][0] == "100 %"
    assert chart.share_scale([1.0]).low == 0.9
    assert len(chart.share_ticks(chart.share_scale([0.0]))) == 6


def test_the_pen_is_lifted_where_a_value_is_missing() -> None:
    scale = Scale(0, 1, BOTTOM, TOP)
    points = [(0, 0.0), (1, 1.0), (2, math.nan), (3, 1.0)]
    (drawn,), _, _ = chart.draw([Series("twin", "twin", points)], scale)
    assert drawn.path == f"M52 {BOTTOM} L162.7 {TOP} M384 {TOP} h0.1"


def test_a_limit_is_drawn_where_it_is_near() -> None:
    limit = Limit("limit", lambda x: 0.3)
    near = chart.logarithmic_scale([1e-3, 1e-2], limit=0.3)
    _, _, line = chart.draw([], near, limit)
    assert line is not None and TOP < line.end < BOTTOM
    assert line.path.startswith(f"M{LEFT} {line.end:g} ")
    assert line.path.endswith(f" {RIGHT} {line.end:g}")
    far = chart.logarithmic_scale([1e-9, 1e-8], limit=0.3)
    assert chart.draw([], far, limit)[2] is None


def test_a_limit_that_grows_is_at_each_x_where_it_should_be() -> None:
    series = Series("twin", "twin", [(1, 0.1), (256, 0.9)])
    _, _, line = chart.draw(
        [series], Scale(0, 1, BOTTOM, TOP), Limit("limit", lambda x: x / 256), doubling=True
    )
    assert line is not None
    numbers = list(map(float, line.path[1:].split()))
    x_scale = Scale(1, 256, LEFT + 6, RIGHT - 6, logarithmic=True)
    for x, y in zip(numbers[2:-2:2], numbers[3:-2:2], strict=True):
        assert y == pytest.approx(Scale(0, 1, BOTTOM, TOP)(x_scale.value(x) / 256), abs=0.1)
    assert numbers[:2] == [LEFT, pytest.approx(Scale(0, 1, BOTTOM, TOP)(1 / 256))]


@given(st.integers(1, 10**7), st.integers(0, 10**7))
def test_ticks_that_double(low: int, more: int) -> None:
    ticks = chart.doubling_ticks(low, low + more)
    assert len(ticks) <= 6 and all(low <= tick <= low + more for tick in ticks)
    assert all(tick & (tick - 1) == 0 for tick in ticks)
    assert len(ticks) >= 2 or more < 3 * low


@given(st.floats(1e-3, 1e3), st.floats(1, 1e3), st.booleans(), st.floats(0, 1))
def test_a_place_has_the_value_that_lies_there(
    low: float, factor: float, logarithmic: bool, share: float
) -> None:
    scale = Scale(low, low * factor, LEFT, RIGHT, logarithmic)
    place = LEFT + share * (RIGHT - LEFT)
    assert low * 0.999 <= scale.value(place) <= low * factor * 1.001
    if factor > 1.01:
        assert scale(scale.value(place)) == pytest.approx(place, abs=0.11)
