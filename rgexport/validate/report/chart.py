"""Charts as data: series of points on two axes, which `templates/chart.html.j2` draws as SVG."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rgexport.validate.report.words import number

WIDTH, HEIGHT = 400, 230
"""Of a chart, in pixels: as wide as a phone's screen; a laptop shows it half as large again."""
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 24, 192
"""The edges of the plot; the scales stand outside."""
_MARGIN = 6
"""Between the left and right edges and the outermost points."""
_MOST_DECADES = 8
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]
Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y), ascending in x; `kind` is a CSS class, `names` are written beside dots.

    `intervals` are error bars (x, low, high).
    """

    kind: str
    label: str
    points: Sequence[Point]
    dots: bool = False
    names: Sequence[str] = ()
    intervals: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """Maps numbers from `low` to `high` to pixels; others lie at the nearer end.

    `ticks` are numbers and what is written there.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False
    start: float = BOTTOM
    stop: float = TOP

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        low, high, value = (self._measure(x) for x in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return round(self.start + (self.stop - self.start) * min(1.0, max(0.0, share)), 1)

    def _measure(self, value: float) -> float:
        if not self.logarithmic:
            return value
        return math.log10(value) if value > 0 else math.log10(self.low) - 1


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture, its summary in words, and its numbers as a table."""

    title: str
    summary: str
    labels: tuple[str, str]
    """Of the axes, x first."""
    series: Sequence[Series]
    y: Axis
    column: str = "layer"
    """What x is called in the table."""
    show_x: Show = "{:,.0f}".format
    show_y: Show = number
    limit: Series | None = None
    doubling: bool = False
    """Whether x is drawn by its logarithm; it is positive then."""

    @property
    def x(self) -> Axis:
        """From the first to the last point of all series."""
        xs = [x for one in self.series for x, _ in one.points]
        low, high = min(xs, default=1), max(xs, default=1)
        ticks = (doubling_ticks if self.doubling else whole_ticks)(low, high)
        labelled = [(x, f"{x:,}") for x in ticks]
        return Axis(low, high, labelled, self.doubling, LEFT + _MARGIN, RIGHT - _MARGIN)

    @property
    def paths(self) -> list[tuple[Series, str]]:
        """The lines, as paths of SVG."""
        lines = [one for one in self.series if not one.dots]
        return [(one, " ".join(_path(self._places(one)))) for one in lines]

    @property
    def error_bars(self) -> list[tuple[Series, str]]:
        """The intervals of each series, as a path."""
        return [(one, " ".join(self._bars(one))) for one in self.series if one.intervals]

    @property
    def dots(self) -> list[tuple[Series, list[Point]]]:
        """The dots' pixels."""
        dotted = [one for one in self.series if one.dots]
        return [(one, [place for place in self._places(one) if place]) for one in dotted]

    @property
    def limit_path(self) -> str:
        """From edge to edge; empty where there is no limit, or it ends outside the picture."""
        if self.limit is None or not self.y.low <= self.limit.points[-1][1] <= self.y.high:
            return ""
        places = [place for place in self._places(self.limit) if place]
        return " ".join(_path([(LEFT, places[0][1]), *places, (RIGHT, places[-1][1])]))

    @property
    def rows(self) -> list[list[str]]:
        """Of each x, what the series have there; empty where one has nothing."""
        xs = sorted({x for one in self.series for x, _ in one.points})
        return [[self.show_x(x), *(self._cell(one, x) for one in self.series)] for x in xs]

    def _bars(self, series: Series) -> Iterator[str]:
        x_axis = self.x
        for x, low, high in series.intervals:
            yield f"M{x_axis(x):g} {self.y(low):g}V{self.y(high):g}"

    def _cell(self, series: Series, x: float) -> str:
        return ", ".join(self.show_y(y) for at, y in series.points if at == x)

    def _places(self, series: Series) -> list[Point | None]:
        """Pixels; None where a number is not finite."""
        x_axis = self.x
        return [(x_axis(x), self.y(y)) if math.isfinite(y) else None for x, y in series.points]


def _path(places: Sequence[Point | None]) -> Iterator[str]:
    """Lifts the pen where a value is missing; a lone point becomes a dot of the line's width."""
    pen = "M"
    for index, place in enumerate(places):
        if place is None:
            pen = "M"
            continue
        yield f"{pen}{place[0]:g} {place[1]:g}"
        if pen == "M" and not any(places[index + 1 : index + 2]):
            yield "h0.1"
        pen = "L"


def logarithmic_axis(values: Sequence[float], limit: float | None = None) -> Axis:
    """Whole decades around all positive values and, where it is not far above them, a limit."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1e-12]
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive)) - 1e-9), high - _MOST_DECADES)
    if limit and 0 <= math.ceil(math.log10(limit)) - high <= 2:
        high = max(high, math.ceil(math.log10(limit)))
    exponents = range(low, high + 1, math.ceil((high - low) / 5))
    ticks = [(10.0**e, f"10{str(e).translate(_SUPERSCRIPT)}") for e in exponents]
    return Axis(10.0**low, 10.0**high, ticks, logarithmic=True)


def linear_axis(values: Sequence[float]) -> Axis:
    """From 0, or below all values, to a round number above all of them."""
    finite = [value for value in values if math.isfinite(value)]
    reach = max(map(abs, finite), default=0) or 1.0
    unit = 10.0 ** math.floor(math.log10(reach))
    high = next(f * unit for f in (1, 2, 3, 5, 10) if f * unit >= reach)
    below = math.ceil(-5 * min([0, *finite]) / high)
    ticks = [high * fifth / 5 for fifth in range(-below, 6)]
    return Axis(ticks[0], high, [(tick, f"{tick:.3g}") for tick in ticks])


def share_axis(values: Sequence[float]) -> Axis:
    """From the tenth below the smallest share up to 1, in per cent."""
    smallest = min((v for v in values if math.isfinite(v)), default=0.0)
    low = min(0.9, math.floor(smallest * 10) / 10)
    percents = round(low * 100)
    step = next(s for s in (2, 5, 10, 20) if (100 - percents) / s <= 5)
    return Axis(low, 1.0, [(p / 100, f"{p} %") for p in range(100, percents - 1, -step)])


def whole_ticks(low: float, high: float) -> list[int]:
    """Round whole numbers, at most six, from `low` to `high`."""
    span = max(1.0, high - low)
    magnitude = 10 ** max(0, math.floor(math.log10(span)) - 1)
    steps = (factor * magnitude for factor in (1, 2, 5, 10, 20, 50, 100))
    step = next(s for s in steps if span / s <= 5)
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def doubling_ticks(low: float, high: float) -> list[int]:
    """Powers of two, at most six, from `low` to `high`."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = 1 + max(0, last - first) // 6
    return [2**exponent for exponent in range(first, last + 1, step)]
