"""The charts of the comparison with a reference file."""

from collections.abc import Iterator, Sequence

from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.reference.stream_errors import LayerError
from rgexport.validate.report.chart import Chart, Limit, Series, decade_ticks, logarithmic_scale
from rgexport.validate.report.drift_pictures import kinds_chart
from rgexport.validate.report.file_report import DRIFT, STREAM
from rgexport.validate.report.picture_parts import all_ys, by_x, picture, span, whole
from rgexport.validate.report.report_words import number


def file_charts(found: AgainstFile) -> Iterator[Chart]:
    """All that can be drawn of it."""
    if found.layers:
        yield _stream_chart(found.layers)
    if found.drift:
        yield from kinds_chart(DRIFT, found.drift)


def _stream_chart(layers: Sequence[LayerError]) -> Chart:
    series = [Series("plain", "error", [(e.layer, e.relative_rms) for e in layers], dots=True)]
    limit = Limit("limit", lambda layer: layers[0].limit)
    return picture(
        STREAM,
        f"Error of what each layer hands on, with that of all layers before it: "
        f"{span(series[0].points, number)}; the limit is {number(layers[0].limit)}.",
        ("layer", "‖Δ‖ ÷ ‖x‖"),
        series,
        logarithmic_scale(all_ys(series), layers[0].limit),
        decade_ticks,
        limit=limit,
        rows=("layer", by_x(series, whole, number)),
    )
