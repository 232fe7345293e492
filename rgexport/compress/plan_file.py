"""Reports of plans: on the terminal, as JSON, and as a page with a plot."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rgexport._version import __version__
from rgexport.compress.planning import PlanPoint, PlanResult, PlanTarget
from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.quantize.scheme import Plan
from rgexport.reporting.chart import Chart, Series, logarithmic_axis
from rgexport.reporting.numbers import number, plus_minus
from rgexport.reporting.page import render_page
from rgexport.reporting.tables import Table, render
from rgexport.units import amount

_ELSEWHERE = (
    " Text that the model would not write itself costs more, from 1.3 times to several times as "
    "much; --text FILE measures on yours."
)


@dataclass(frozen=True)
class PlanReport:
    """A plan, with the facts that its reports name.

    Attributes:
        result: the plan, its figures, and the front.
        target: of the request.
        kind: the format.
        model: the checkpoint's name.
        text: the name of the text that it was measured on.
        is_calibration_text: whether that text is from the calibration.
    """

    result: PlanResult
    target: PlanTarget
    kind: str
    model: str
    text: str
    is_calibration_text: bool

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the file: `plan`, which `--plan` reads, and its figures."""
        result, error = self.result, self.result.measured.error
        return {
            "rgexport": __version__,
            "model": self.model,
            "format": self.kind,
            "target": {self.target.kind: self.target.value},
            "bits": result.chosen.bits,
            "size": result.chosen.size,
            "predicted_kl": result.chosen.kl,
            "measured_kl": result.measured.kl,
            "standard_error": error if math.isfinite(error) else None,
            "text": {"name": self.text, "tokens": result.measured.tokens},
            "front": [asdict(point) for point in result.front],
            "plan": {name: scheme.to_dict() for name, scheme in result.plan.items()},
        }

    def as_text(self) -> str:
        """Returns the front, the plan by kinds of matrices, and its cost."""
        return render([self._front(), self._layouts(), self.sentence()])

    def sentence(self) -> str:
        """Summarizes the plan: bits, size, cost; warns if it was measured on calibration text."""
        chosen, measured = self.result.chosen, self.result.measured
        kl = number(measured.kl)
        if math.isfinite(measured.error):
            kl = plus_minus(measured.kl, measured.error)
        return (
            f"{chosen.bits:.3f} bits per weight, {amount(chosen.size)}. Measured on "
            f"{measured.tokens:,} tokens of {self.text}: KL {kl} ({number(chosen.kl)} predicted)."
            f"{_ELSEWHERE if self.is_calibration_text else ''}"
        )

    def _front(self) -> Table:
        rows = [(f"{p.bits:.3f}", amount(p.size), number(p.kl)) for p in self.result.front]
        header = "bits per weight", "size", "KL, predicted"
        return Table(f"Plans for {self.kind}:", header, rows, header)

    def _layouts(self) -> Table:
        rows = [(kind, layouts) for kind, layouts in _by_kind(self.result.plan)]
        return Table("The chosen plan:", ("matrices", "layouts"), rows)

    def page(self) -> str:
        """Returns an HTML page."""
        return render_page(
            "compress",
            "plan.html.j2",
            report=self,
            front=self._front(),
            layouts=self._layouts(),
            chart=self._chart(),
        )

    def _chart(self) -> Chart:
        front, chosen = self.result.front, self.result.chosen
        line = Series("twin", "predicted", [(point.bits, point.kl) for point in front])
        dot = Series("original", "measured", [(chosen.bits, self.result.measured.kl)], dots=True)
        return Chart(
            title="What bits cost",
            summary=self._summary(front[0], front[-1]),
            labels=("bits per weight", "KL, nats per token"),
            series=[line, dot],
            y=logarithmic_axis([*(point.kl for point in front), self.result.measured.kl]),
            column="bits",
            show_x="{:.3f}".format,
        )

    def _summary(self, least: PlanPoint, most: PlanPoint) -> str:
        return (
            f"The best plans have from {least.bits:.3g} to {most.bits:.3g} bits per weight; their "
            f"KL falls from {number(least.kl)} to {number(most.kl)}."
        )


def is_plan(path: Path) -> bool:
    """Whether a file is a plan of `rgexport quantize`."""
    try:
        return "plan" in parse_json(read_regular(path))
    except (RequestError, OSError, ValueError, RecursionError, TypeError):
        return False


def write_json(report: PlanReport, path: Path) -> None:
    """Writes the plan's file."""
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n", "utf-8")


def _by_kind(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yields kind of matrix → the numbers of matrices by layout, most frequent first."""
    kinds: dict[str, Counter[str]] = {}
    for name, scheme in plan.items():
        if input_site(name) is None:
            continue
        kind = "head" if name == EMBEDDING else name.split(".", 2)[2].removesuffix(".weight")
        kinds.setdefault(kind, Counter())[scheme.label] += 1
    for kind, counts in kinds.items():
        yield kind, ", ".join(f"{count} × {label}" for label, count in counts.most_common())
