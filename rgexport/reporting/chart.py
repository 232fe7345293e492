"""Charts as data: series of points on two axes, which `templates/chart.html.j2` draws as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rgexport.reporting.numbers import number

WIDTH, HEIGHT = 400, 230
"""Pixels of a chart: as wide as a phone's screen; a laptop shows it half as large again."""
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 24, 192
"""The edges of the plot; the scales stand outside."""
_MARGIN = 6
"""Pixels between the left and right edges and the outermost points."""
_MOST_DECADES = 8
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]
FormatNumber = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y), ascending in x, and error bars (x, low, high); `kind` is a CSS class."""

    kind: str
    label: str
    points: Sequence[Point]
    dots: bool = False
    names: Sequence[str] = ()
    intervals: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """Maps numbers from `low` to `high` to pixels; numbers outside lie at the nearer end."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False
    start: float = BOTTOM
    stop: float = TOP

    def __call__(self, value: float) -> float:
        low, high, value = (self._measure(x) for x in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return round(self.start + (self.stop - self.start) * min(1.0, max(0.0, share)), 1)

    def _measure(self, value: float) -> float:
        if not self.logarithmic:
            return value
        return math.log10(value) if value > 0 else math.log10(self.low) - 1


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture, its summary in words, and its numbers as a table, in which x is called `column`.

    `labels` are those of x and y; `limit` is drawn from edge to edge; `doubling` draws a positive x
    by its logarithm.
    """

    title: str
    summary: str
    labels: tuple[str, str]
    series: Sequence[Series]
    y: Axis
    column: str = "layer"
    show_x: FormatNumber = "{:,.0f}".format
    show_y: FormatNumber = number
    limit: Series | None = None
    doubling: bool = False

    @property
    def x(self) -> Axis:
        xs = [x for line in self.series for x, _ in line.points]
        low, high = min(xs, default=1), max(xs, default=1)
        if self.doubling:  # at most six ticks in either case
            first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
            exponents = range(first, last + 1, 1 + max(0, last - first) // 6)
            ticks = [2**exponent for exponent in exponents]
        else:
            span = max(1.0, high - low)
            magnitude = 10 ** max(0, math.floor(math.log10(span)) - 1)
            steps = (factor * magnitude for factor in (1, 2, 5, 10, 20, 50, 100))
            step = next(s for s in steps if span / s <= 5)
            ticks = list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))
        labelled = [(x, f"{x:,}") for x in ticks]
        return Axis(low, high, labelled, self.doubling, LEFT + _MARGIN, RIGHT - _MARGIN)

    @property
    def paths(self) -> list[tuple[Series, str]]:
        return [(s, _path(self._pixels(s))) for s in self.series if not s.dots]

    @property
    def error_bars(self) -> list[tuple[Series, str]]:
        x, y = self.x, self.y
        return [
            (s, " ".join(f"M{x(at):g} {y(low):g}V{y(high):g}" for at, low, high in s.intervals))
            for s in self.series
            if s.intervals
        ]

    @property
    def dots(self) -> list[tuple[Series, list[Point]]]:
        return [(s, [p for p in self._pixels(s) if p]) for s in self.series if s.dots]

    @property
    def limit_path(self) -> str:
        """The limit as an SVG path; empty without a limit, or if it ends outside the picture."""
        if self.limit is None or not self.y.low <= self.limit.points[-1][1] <= self.y.high:
            return ""
        pixels = [pixel for pixel in self._pixels(self.limit) if pixel]
        return _path([(LEFT, pixels[0][1]), *pixels, (RIGHT, pixels[-1][1])])

    @property
    def rows(self) -> list[list[str]]:
        """The table: each x with the y of every series, empty where a series has no point."""
        xs = sorted({x for line in self.series for x, _ in line.points})
        return [[self.show_x(x), *(self._cell(line, x) for line in self.series)] for x in xs]

    def _cell(self, series: Series, x: float) -> str:
        return ", ".join(self.show_y(y) for at, y in series.points if at == x)

    def _pixels(self, series: Series) -> list[Point | None]:
        x_axis = self.x
        return [(x_axis(x), self.y(y)) if math.isfinite(y) else None for x, y in series.points]


def _path(pixels: Sequence[Point | None]) -> str:
    """Returns an SVG path: missing points interrupt it, a lone point is as wide as the line."""
    commands, pen = [], "M"
    for index, pixel in enumerate(pixels):
        if pixel is None:
            pen = "M"
            continue
        commands.append(f"{pen}{pixel[0]:g} {pixel[1]:g}")
        if pen == "M" and not any(pixels[index + 1 : index + 2]):
            commands.append("h0.1")
        pen = "L"
    return " ".join(commands)


def y_values(series: Sequence[Series]) -> list[float]:
    return [y for line in series for _, y in line.points]


def logarithmic_axis(values: Sequence[float], limit: float | None = None) -> Axis:
    """Returns whole decades around all positive values; a limit near above them is included."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1e-12]
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive)) - 1e-9), high - _MOST_DECADES)
    if limit and 0 <= math.ceil(math.log10(limit)) - high <= 2:
        high = max(high, math.ceil(math.log10(limit)))
    exponents = range(low, high + 1, math.ceil((high - low) / 5))
    ticks = [(10.0**e, f"10{str(e).translate(_SUPERSCRIPT)}") for e in exponents]
    return Axis(10.0**low, 10.0**high, ticks, logarithmic=True)


def linear_axis(values: Sequence[float]) -> Axis:
    """Returns an axis from 0, or from below all values, to a round number above them."""
    finite = [value for value in values if math.isfinite(value)]
    reach = max(map(abs, finite), default=0) or 1.0
    unit = 10.0 ** math.floor(math.log10(reach))
    high = next(f * unit for f in (1, 2, 3, 5, 10) if f * unit >= reach)
    below = math.ceil(-5 * min([0, *finite]) / high)
    ticks = [high * fifth / 5 for fifth in range(-below, 6)]
    return Axis(ticks[0], high, [(tick, f"{tick:.3g}") for tick in ticks])


def share_axis(values: Sequence[float]) -> Axis:
    """Returns an axis in per cent, from the tenth below the smallest share to 1."""
    smallest = min((v for v in values if math.isfinite(v)), default=0.0)
    low = min(0.9, math.floor(smallest * 10) / 10)
    percents = round(low * 100)
    step = next(s for s in (2, 5, 10, 20) if (100 - percents) / s <= 5)
    return Axis(low, 1.0, [(p / 100, f"{p} %") for p in range(100, percents - 1, -step)])
