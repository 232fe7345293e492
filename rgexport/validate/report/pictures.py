"""The charts of a result along its text."""

import math
from collections.abc import Callable, Iterator, Sequence

from rgexport.validate.positions import PositionBlock
from rgexport.validate.report.chart import (
    Chart,
    Series,
    decade_ticks,
    logarithmic_scale,
    share_scale,
    share_ticks,
)
from rgexport.validate.report.drift_pictures import drift_charts
from rgexport.validate.report.layer_pictures import state_chart, weight_chart
from rgexport.validate.report.picture_parts import all_ys, by_x, picture, sides, span, worst
from rgexport.validate.report.report_words import LABELS, number, percent
from rgexport.validate.result import Result

AGREEMENT_BLOCKS = 32
"""A share needs more positions than a mean of KL before it says something."""


def charts(r: Result) -> Iterator[Chart]:
    """All that can be drawn of a result."""
    if found := sides(r):
        yield kl_chart(r)
        yield agreement_chart(r)
        yield from drift_charts(r)
        if found[0][1].states:
            yield state_chart(r)
    yield from weight_chart(r.weights or [])


def kl_chart(r: Result) -> Chart:
    """KL along the text."""
    series = [
        Series(kind, LABELS[kind], [(b.start, b.kl_mean) for b in side.blocks])
        for kind, side in sides(r)
    ]
    told = (f"against the {one.label} {span(one.points, number)}" for one in series)
    return picture(
        "KL by position",
        f"Mean KL per block of positions, {', '.join(told)}.",
        ("position in the text", "KL, nats"),
        series,
        logarithmic_scale(all_ys(series)),
        decade_ticks,
        rows=("positions", by_x(series, _span_of(sides(r)[0][1].blocks), number)),
    )


def agreement_chart(r: Result) -> Chart:
    """Top-1 agreement along the text."""
    blocks = [(kind, _merged(side.blocks)) for kind, side in sides(r)]
    series = [
        Series(kind, LABELS[kind], [(b.start, b.top1) for b in found]) for kind, found in blocks
    ]
    told = (f"with the {one.label} {span(one.points, percent)}" for one in series)
    return picture(
        "Top-1 agreement by position",
        f"Share of positions with the same most likely token, {', '.join(told)}.",
        ("position in the text", "top-1 agreement"),
        series,
        share_scale(all_ys(series)),
        share_ticks,
        rows=("positions", by_x(series, _span_of(blocks[0][1]), percent)),
    )


def _merged(blocks: Sequence[PositionBlock]) -> list[PositionBlock]:
    """Neighbouring blocks as one, so that there are at most `AGREEMENT_BLOCKS`."""
    together = math.ceil(len(blocks) / AGREEMENT_BLOCKS)
    groups = (blocks[start : start + together] for start in range(0, len(blocks), together))
    return [_merge(group) for group in groups]


def _merge(blocks: Sequence[PositionBlock]) -> PositionBlock:
    start, stop = blocks[0].start, blocks[-1].stop

    def mean(field: str) -> float:
        total = sum(getattr(b, field) * (b.stop - b.start) for b in blocks)
        return float(total / (stop - start))

    return PositionBlock(
        start=start,
        stop=stop,
        kl_mean=mean("kl_mean"),
        kl_max=worst([b.kl_max for b in blocks]),
        top1=mean("top1"),
    )


def _span_of(blocks: Sequence[PositionBlock]) -> Callable[[float], str]:
    spans = {
        b.start: f"{b.start:,}–{b.stop - 1:,}" if b.stop - b.start > 1 else f"{b.start:,}"
        for b in blocks
    }
    return lambda start: spans[int(start)]
