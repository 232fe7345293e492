"""The outcome of `validate` as one HTML page that needs nothing else, neither network nor script.

Names and texts may hold anything: the templates escape all they show, and the page forbids itself
to load or run whatever might slip through.
"""

from collections.abc import Sequence
from pathlib import Path

from rgexport.progress import amount
from rgexport.validate.bisect.suspects import site_evidence
from rgexport.validate.report import chart
from rgexport.validate.report.cost_picture import cost_chart
from rgexport.validate.report.overview import counted_verdicts, overview, verdict_of
from rgexport.validate.report.page_text import breakable, piece, visible
from rgexport.validate.report.page_view import View
from rgexport.validate.report.report_words import check_words, number, percent, value_words
from rgexport.validate.result import Result, write_text

_FILTERS = (
    *(amount, breakable, check_words, number, percent, piece, site_evidence, value_words),
    visible,
)


def write_html(results: Sequence[Result], path: Path) -> None:
    """Writes the page of one artifact or several.

    Raises:
        RequestError: the file cannot be written.
    """
    write_text(render_page(results), path)


def render_page(results: Sequence[Result]) -> str:
    """The page: the verdict first, of several artifacts their table next."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rgexport.validate.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {f.__name__: f for f in _FILTERS}
    return environment.get_template("page.html.j2").render(
        views=[View(f"a{index}", result) for index, result in enumerate(results, 1)],
        verdict=verdict_of(results),
        counts=counted_verdicts(results),
        overview=overview(results),
        costs=list(cost_chart(results)),
        plot=chart,
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )
