"""The geometry of small charts: numbers become places in a picture, which a template draws.

One size serves all screens: as wide as a phone's, enlarged by half on a laptop.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 24, 192
"""The edges of the plot; what is outside holds the scales."""
_MOST_DECADES = 8
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]
Tick = tuple[float, str]
"""A place in the picture, and what it says there."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) by x; `kind` is how they are drawn and what the legend calls them."""

    kind: str
    label: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` → places from `start` to `stop`; beyond it, at the edge."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies."""
        low, high, value = (self._measure(x) for x in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return round(self.start + (self.stop - self.start) * min(1.0, max(0.0, share)), 1)

    def _measure(self, value: float) -> float:
        if not self.logarithmic:
            return value
        return math.log10(value) if value > 0 else math.log10(self.low) - 1


@dataclass(frozen=True)
class Drawn:
    """A series as a path of SVG, or as dots."""

    kind: str
    label: str
    path: str
    dots: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """All that a template needs: places are pixels of a picture of WIDTH × HEIGHT."""

    title: str
    summary: str
    """What the picture shows, in words."""
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    series: Sequence[Drawn]
    limit: Tick | None
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The numbers, for those who read them."""


def draw(
    series: Sequence[Series], y_scale: Scale, limit: tuple[float, str] | None = None
) -> tuple[list[Drawn], list[Tick], Tick | None]:
    """Places series and limit in a picture; returns them and the ticks of x."""
    xs = [x for one in series for x, _ in one.points]
    x_scale = Scale(min(xs, default=0), max(xs, default=0), LEFT + 6, RIGHT - 6)
    drawn = [_draw(one, x_scale, y_scale) for one in series]
    ticks = [(x_scale(x), f"{x:,}") for x in whole_ticks(x_scale.low, x_scale.high)]
    inside = limit is not None and y_scale.low <= limit[0] <= y_scale.high
    return drawn, ticks, (y_scale(limit[0]), limit[1]) if limit and inside else None


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> Drawn:
    places = [(x_scale(x), y_scale(y)) if math.isfinite(y) else None for x, y in series.points]
    if series.dots:
        return Drawn(series.kind, series.label, "", [place for place in places if place])
    return Drawn(series.kind, series.label, " ".join(_path(places)), [])


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


def logarithmic_scale(values: Sequence[float], limit: float | None = None) -> Scale:
    """Whole decades around all positive values and, where it is not far above them, a limit."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1e-12]
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive)) - 1e-9), high - _MOST_DECADES)
    if limit and 0 <= math.ceil(math.log10(limit)) - high <= 2:
        high = max(high, math.ceil(math.log10(limit)))
    return Scale(10.0**low, 10.0**high, BOTTOM, TOP, logarithmic=True)


def decade_ticks(scale: Scale) -> list[Tick]:
    """Powers of ten, at most six of them."""
    low, high = round(math.log10(scale.low)), round(math.log10(scale.high))
    step = math.ceil((high - low) / 5)
    exponents = range(low, high + 1, step)
    return [(scale(10.0**e), f"10{str(e).translate(_SUPERSCRIPT)}") for e in exponents]


def linear_scale(values: Sequence[float]) -> Scale:
    """From 0 to a round number above all values."""
    high = max((v for v in values if math.isfinite(v)), default=0) or 1.0
    unit = 10.0 ** math.floor(math.log10(high))
    return Scale(0, next(f * unit for f in (1, 2, 3, 5, 10) if f * unit >= high), BOTTOM, TOP)


def fifth_ticks(scale: Scale) -> list[Tick]:
    """Six, from 0 on."""
    return [(scale(scale.high * fifth / 5), f"{scale.high * fifth / 5:.3g}") for fifth in range(6)]


def share_scale(values: Sequence[float]) -> Scale:
    """From the tenth below the smallest share up to 1."""
    low = min((v for v in values if math.isfinite(v)), default=0.0)
    return Scale(min(0.9, math.floor(low * 10) / 10), 1.0, BOTTOM, TOP)


def share_ticks(scale: Scale) -> list[Tick]:
    """Per cent, at most six of them."""
    low = round(scale.low * 100)
    step = next(s for s in (2, 5, 10, 20) if (100 - low) / s <= 5)
    return [(scale(p / 100), f"{p} %") for p in range(100, low - 1, -step)]


def whole_ticks(low: float, high: float) -> list[int]:
    """Round whole numbers, at most six, from `low` to `high`."""
    span = max(1.0, high - low)
    magnitude = 10 ** max(0, math.floor(math.log10(span)) - 1)
    steps = (factor * magnitude for factor in (1, 2, 5, 10, 20, 50, 100))
    step = next(s for s in steps if span / s <= 5)
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))
