"""Charts as data: series of points on two axes, which `templates/chart.html.j2` draws as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rgexport.reporting.numbers import number

WIDTH, HEIGHT = 400, 230
"""Pixels of a chart: as wide as a phone's screen; a laptop shows it half as large again."""
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 24, 192
"""The edges of the plot; the scales stand outside."""
_MARGIN = 6  # pixels between the left and right edges and the outermost points
_MOST_DECADES = 8
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

MARKS = {
    "●": "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "■": "m-3 -3h6v6h-6z",
    "▲": "m0 -4l4 7h-8z",
    "◆": "m0 -4l4 4l-4 4l-4 -4z",
    "▼": "m0 4l4 -7h-8z",
    "✚": "m-1 -4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
}
"""A mark in the legend → its SVG path around a point."""
Point = tuple[float, float]
FormatNumber = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y), ascending in x, and error bars (x, low, high); `kind` is a CSS class.

    `mark` of `MARKS` stands at each point of a line; `shift` moves all to the right, in pixels.
    """

    kind: str
    label: str
    points: Sequence[Point]
    dots: bool = False
    intervals: Sequence[tuple[float, float, float]] = ()
    mark: str = ""
    shift: float = 0


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
    """A picture, its summary in words, and its numbers, with their intervals, as a table.

    `labels` are those of x and y; the table calls x `column`, if that is another word. `level`, a
    name and a y, is drawn from edge to edge; `doubling` draws a positive x by its logarithm.
    """

    title: str
    summary: str
    labels: tuple[str, str]
    series: Sequence[Series]
    y: Axis
    column: str = ""
    show_x: FormatNumber = "{:,.0f}".format
    show_y: FormatNumber = number
    level: tuple[str, float] | None = None
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
            step = max(1, round(_steps(low, high)[0]))
            ticks = list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))
        labelled = [(x, f"{x:,}") for x in ticks]
        return Axis(low, high, labelled, self.doubling, LEFT + _MARGIN, RIGHT - _MARGIN)

    @property
    def rows(self) -> list[list[str]]:
        """The table: each x with the y of every series, empty where a series has no point."""
        xs = sorted({x for line in self.series for x, _ in line.points})
        return [[self.show_x(x), *(self._cell(line, x) for line in self.series)] for x in xs]

    def _cell(self, series: Series, x: float) -> str:
        show, bars = self.show_y, {at: ends for at, *ends in series.intervals}
        interval = f" ({' to '.join(map(show, bars[x]))})" if x in bars else ""
        return ", ".join(show(y) + interval for at, y in series.points if at == x)

    def path(self, series: Series) -> str:
        return _path(self.pixels(series))

    def pixels(self, series: Series) -> list[Point | None]:
        """Returns where the points lie, None for those that are not finite."""
        return [
            (self.place(series, x), self.y(y)) if math.isfinite(y) else None
            for x, y in series.points
        ]

    def place(self, series: Series, x: float) -> float:
        return round(self.x(x) + series.shift, 1)


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
    """Returns all values, and the ends of all error bars."""
    ends = (y for line in series for _, *bar in line.intervals for y in bar)
    return [*(y for line in series for _, y in line.points), *ends]


def logarithmic_axis(values: Sequence[float]) -> Axis:
    """Returns whole decades around all positive values."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1e-12]
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive)) - 1e-9), high - _MOST_DECADES)
    exponents = range(low, high + 1, math.ceil((high - low) / 5))
    ticks = [(10.0**e, f"10{str(e).translate(_SUPERSCRIPT)}") for e in exponents]
    return Axis(10.0**low, 10.0**high, ticks, logarithmic=True)


def linear_axis(values: Sequence[float]) -> Axis:
    """Returns an axis between round numbers around all values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    step, first, last = _steps(min(finite), max(finite))
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(step * n, f"{step * n:.{digits}f}") for n in range(first, max(last, first + 1) + 1)]
    return Axis(ticks[0][0], ticks[-1][0], ticks)


def share_axis(values: Sequence[float]) -> Axis:
    """Returns an axis in per cent, from a round share below all values to 1."""
    axis = linear_axis([0.9, 1.0, *values])
    return replace(axis, ticks=[(share, f"{100 * share:.0f} %") for share, _ in axis.ticks])


def _steps(low: float, high: float) -> tuple[float, int, int]:
    """Returns a round number, and its multiples at or outside of two ends, at most five apart."""
    span = max(high - low, 1e-6 * abs(high)) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    for step in (factor * magnitude for factor in (1, 2, 5, 10, 20)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 5:
            break
    return step, first, last
