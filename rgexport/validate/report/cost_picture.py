"""The chart of several artifacts: what each costs, by its size."""

import math
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from rgexport.validate.report.chart import Chart, Series, decade_ticks, logarithmic_scale
from rgexport.validate.report.picture_parts import all_ys, picture
from rgexport.validate.report.report_words import number
from rgexport.validate.result import Result

_MOST_NAME = 26


def cost_chart(results: Sequence[Result]) -> Iterator[Chart]:
    """KL to the original by size; of artifacts that were compared with one, if there are two."""
    found = [
        (r.artifact.bytes / 1e6, cost.kl.mean, PurePath(r.artifact.path).name)
        for r in results
        if (cost := r.original or r.reference) is not None and math.isfinite(cost.kl.mean)
    ]
    if len(found) < 2:
        return
    found.sort()
    names = [name if len(name) <= _MOST_NAME else f"{name[:_MOST_NAME]}…" for *_, name in found]
    points = [(size, kl) for size, kl, _ in found]
    series = [Series("original", "KL to the original", points, dots=True, names=names)]
    told = "; ".join(f"{name}: {size:,.0f} MB, {number(kl)}" for size, kl, name in found)
    yield picture(
        "What compression costs, by size",
        f"Mean KL in nats per token against the size of the files. {told}.",
        ("size, MB", "KL, nats per token"),
        series,
        logarithmic_scale(all_ys(series)),
        decade_ticks,
        rows=("size, MB", [[f"{size:,.1f}", number(kl)] for size, kl, _ in found]),
    )
