"""The geometry of small charts: numbers become places in a picture, which a template draws.

One size serves all screens: as wide as a phone's, enlarged by half on a laptop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
    names: Sequence[str] = ()
    """Of the dots, written beside them."""


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

    def value(self, place: float) -> float:
        """The number that lies at `place`, of those from `low` to `high`."""
        share = min(1.0, max(0.0, (place - self.start) / (self.stop - self.start)))
        low, high = self._measure(self.low), self._measure(self.high)
        found = low + (high - low) * share
        return 10**found if self.logarithmic else found

    def _measure(self, value: float) -> float:
        if not self.logarithmic:
            return value
        return math.log10(value) if value > 0 else math.log10(self.low) - 1


@dataclass(frozen=True)
class Limit:
    """What values should stay below; it may grow with x."""

    label: str
    at: Callable[[float], float]


@dataclass(frozen=True)
class Drawn:
    """A series as a path of SVG, or as dots."""

    kind: str
    label: str
    path: str
    dots: Sequence[Point]
    names: Sequence[tuple[Point, str]] = ()


@dataclass(frozen=True)
class DrawnLimit:
    """A limit as a path of SVG, and where on the right it ends."""

    label: str
    path: str
    end: float


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
    limit: DrawnLimit | None
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The numbers, for those who read them."""


def draw(
    series: Sequence[Series],
    y_scale: Scale,
    limit: Limit | None = None,
    *,
    doubling: bool = False,
) -> tuple[list[Drawn], list[Tick], DrawnLimit | None]:
    """Places series and limit in a picture; returns them and the ticks of x.

    Args:
        series: the points; x are whole numbers.
        y_scale: where their y lie.
        limit: drawn where it ends inside the picture.
        doubling: whether x is drawn by its logarithm; it is positive then.
    """
    xs = [x for one in series for x, _ in one.points]
    ends = min(xs, default=1), max(xs, default=1)
    x_scale = Scale(*ends, LEFT + 6, RIGHT - 6, doubling)
    drawn = [_draw(one, x_scale, y_scale) for one in series]
    ticks = (doubling_ticks if doubling else whole_ticks)(*ends)
    places = [(x_scale(x), f"{x:,}") for x in ticks]
    return drawn, places, _draw_limit(limit, x_scale, y_scale) if limit else None


def _draw_limit(limit: Limit, x_scale: Scale, y_scale: Scale) -> DrawnLimit | None:
    """From edge to edge; a curve is straight between its eleven places."""
    places = [LEFT, *range(LEFT + 6, RIGHT - 5, (RIGHT - LEFT - 12) // 8), RIGHT]
    values = [limit.at(x_scale.value(place)) for place in places]
    if not y_scale.low <= values[-1] <= y_scale.high:
        return None
    path = " ".join(f"{x:g} {y_scale(y):g}" for x, y in zip(places, values, strict=True))
    return DrawnLimit(limit.label, f"M{path}", y_scale(values[-1]))


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> Drawn:
    places = [(x_scale(x), y_scale(y)) if math.isfinite(y) else None for x, y in series.points]
    if series.dots:
        dots = [place for place in places if place]
        named = zip(places, series.names, strict=False)
        names = [(place, name) for place, name in named if place]
        return Drawn(series.kind, series.label, "", dots, names)
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


def doubling_ticks(low: float, high: float) -> list[int]:
    """Powers of two, at most six, from `low` to `high`; ones that are far enough apart."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = 1 + max(0, last - first) // 6
    return [2**exponent for exponent in range(first, last + 1, step)]
