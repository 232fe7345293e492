"""`rgexport quantize`: a plan that reaches a quality or a size."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rgexport._version import __version__
from rgexport.artifacts.format import format_of
from rgexport.artifacts.opening import as_argument, model_argument
from rgexport.artifacts.origin import folder_of
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.request import bytes_of
from rgexport.files.kinds import is_plan
from rgexport.files.targets import check_file_target, replace_file, write_text
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.griffin.tokenizer_files import has_tokenizer
from rgexport.planning.calibrate import known_calibration
from rgexport.planning.cluster import encoder_statistics
from rgexport.planning.passages import first_tokens, read_text
from rgexport.planning.search import (
    FLAGS,
    Kind,
    Planner,
    PlanResult,
    PlanTarget,
    require_reachable,
)
from rgexport.quantize.algorithms.calibration_file import Calibration
from rgexport.reporting.chart import Chart, Series, logarithmic_axis
from rgexport.reporting.numbers import number, plus_minus
from rgexport.reporting.page import render_page
from rgexport.reporting.tables import Table, render
from rgexport.runtimes.cluster import Cluster
from rgexport.units import amount

PLAN_SUFFIX = ".plan.json"
_ELSEWHERE = (
    " Text that the model would not write itself costs more, from 1.3 times to several times as "
    "much; --text FILE measures on yours."
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `rgexport quantize`, with exactly one target; `api.quantize` explains them."""

    calibration: Path | None = None
    target_kl: float | None = None
    target_size: str | float | None = None
    bits: float | None = None
    format: str = "onnx"
    text: Path | None = None
    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise RequestError(f"--tokens is {self.tokens}; expected at least 1")
        if self.format not in FORMATS:
            raise RequestError(f"--format is {self.format!r}; expected one of {', '.join(FORMATS)}")
        target = self.target
        if not 0 < target.value < float("inf"):
            raise RequestError(f"{FLAGS[target.kind]} is {target.value:g}; expected more than 0")

    @property
    def target(self) -> PlanTarget:
        size = None if self.target_size is None else bytes_of("--target-size", self.target_size)
        values: dict[Kind, float | None] = {"kl": self.target_kl, "size": size, "bits": self.bits}
        targets = [PlanTarget(kind, value) for kind, value in values.items() if value is not None]
        if len(targets) != 1:
            raise RequestError(
                f"{len(targets)} targets are given; expected one of --target-kl, --target-size and "
                "--bits"
            )
        return targets[0]


@dataclass(frozen=True, repr=False)
class PlanReport:
    """A plan with its figures; `export` takes it as `plan`.

    `model` and `text` are names of the model and the measured text, `path` is the plan's file.
    """

    result: PlanResult
    options: PlanOptions
    model: str
    text: str
    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def as_json(self) -> str:
        """Returns the content of the file: `plan`, which `--plan` reads, and its figures."""
        result, target = self.result, self.options.target
        error = result.measured.error
        content = {
            "rgexport": __version__,
            "model": self.model,
            "format": self.options.format,
            "target": {target.kind: target.value},
            "bits": result.chosen.bits,
            "size": result.chosen.size,
            "predicted_kl": result.chosen.kl,
            "measured_kl": result.measured.kl,
            "standard_error": error if math.isfinite(error) else None,
            "text": {"name": self.text, "tokens": result.measured.tokens},
            "front": [asdict(point) for point in result.front],
            "plan": {name: scheme.to_dict() for name, scheme in result.plan.items()},
        }
        return json.dumps(content, indent=1) + "\n"

    def __repr__(self) -> str:
        return f"<PlanReport {self.model}: {self.sentence()}>"

    def as_text(self) -> str:
        return render([self._front(), self._layouts(), self.sentence()])

    def sentence(self) -> str:
        """Summarizes the plan: bits, size, cost; warns if it was measured on calibration text."""
        chosen, measured = self.result.chosen, self.result.measured
        kl = number(measured.kl)
        if math.isfinite(measured.error):
            kl = plus_minus(measured.kl, measured.error)
        return (
            f"{chosen.bits:.3f} bits per weight in matrices and head, {amount(chosen.size)}. "
            f"Measured on {measured.tokens:,} tokens of {self.text}: KL {kl} nats per token "
            f"({number(chosen.kl)} predicted)."
            f"{_ELSEWHERE if self.options.text is None else ''}"
        )

    def _front(self) -> Table:
        points = self.result.front
        rows = [(f"{point.bits:.3f}", amount(point.size), number(point.kl)) for point in points]
        header = "bits/weight", "size", "KL, predicted"
        title = f"Plans for {self.options.format}; bits are those in matrices and head:"
        return Table(title, header, rows, header)

    def _layouts(self) -> Table:
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for name, scheme in self.result.plan.items():
            if input_site(name) is not None:
                in_layer = "head" if name == EMBEDDING else name.split(".", 2)[2]
                kinds[in_layer.removesuffix(".weight")][scheme.label] += 1
        rows = [
            (kind, ", ".join(f"{count} × {label}" for label, count in counts.most_common()))
            for kind, counts in kinds.items()
        ]
        return Table("The chosen plan:", ("matrices", "layouts"), rows)

    def page(self) -> str:
        front, chosen = self.result.front, self.result.chosen
        line = Series("twin", "predicted", [(point.bits, point.kl) for point in front])
        dot = Series("original", "measured", [(chosen.bits, self.result.measured.kl)], dots=True)
        chart = Chart(
            title="What bits cost",
            summary=(
                f"The best plans have from {front[0].bits:.3g} to {front[-1].bits:.3g} bits per "
                f"weight; their KL falls from {number(front[0].kl)} to {number(front[-1].kl)}."
            ),
            labels=("bits per weight", "KL, nats per token"),
            series=[line, dot],
            y=logarithmic_axis([*(point.kl for point in front), self.result.measured.kl]),
            column="bits",
            show_x="{:.3f}".format,
        )
        tables = {"front": self._front(), "layouts": self._layouts()}
        return render_page("planning", "plan.html.j2", report=self, chart=chart, **tables)


def make_plans(
    checkpoint: Checkpoint,
    options: Sequence[PlanOptions],
    target: Path | None = None,
    *,
    force: bool = False,
    workers: Cluster | None = None,
) -> list[PlanReport]:
    """Finds plans; writes each to `target`, or a path like it, and its page; `workers` quantize.

    The options differ only in their target, so the plans share the predictions and the original's
    run. Raises RequestError for an unsound checkpoint, statistics of another model, an unreadable
    text, a target out of reach, or a file that may not be replaced.
    """
    first = options[0]
    form = format_of(first.format)
    requests = dict(zip(plan_paths(checkpoint, options, target), options, strict=True))
    for path, request in requests.items():
        _require_free(path, force)
        require_reachable(request.target, checkpoint, form)
    calibration = known_calibration(checkpoint, first.calibration, workers)
    text_name, sequences = _text(checkpoint, calibration, first)
    hashes = require_sound(checkpoint).values()
    calibration.require_for(record.sha256 for record in hashes)
    statistics = encoder_statistics(calibration, checkpoint.config, workers)
    planner = Planner(checkpoint, calibration, form, statistics)
    reports = []
    for path, request in requests.items():
        result = planner.find(request.target, sequences)
        reports.append(PlanReport(result, request, checkpoint.name, text_name, path))
        with replace_file(path, force=force, replaceable=is_plan) as unfinished:
            unfinished.write_text(reports[-1].as_json(), "utf-8")
        write_text(reports[-1].page(), page_of(path))
    return reports


def _require_free(target: Path, force: bool) -> None:
    if target.suffix == ".html":
        raise RequestError(
            f"-o is {target}, but a plan is JSON, and its page is written beside it; pass a name "
            "such as plan.json"
        )
    check_file_target(target, force=force, replaceable=is_plan)
    check_file_target(page_of(target), force=force, replaceable=lambda page: True)


def plan_paths(
    checkpoint: Checkpoint, requests: Sequence[PlanOptions], path: Path | None
) -> list[Path]:
    """Returns paths of plans that end in their targets; `path` itself for a single plan."""
    if path is not None and len(requests) == 1:
        return [path]
    path = path or Path(f"{checkpoint.name}-{requests[0].format}{PLAN_SUFFIX}")
    suffix = PLAN_SUFFIX if path.name.endswith(PLAN_SUFFIX) else path.suffix
    name = path.name.removesuffix(suffix)
    return [path.with_name(f"{name}-{request.target.label}{suffix}") for request in requests]


def page_of(target: Path) -> Path:  # `with_suffix` would cut a name such as `plan-4.25`
    return target.with_name(f"{target.name}.html")


def closing_line(checkpoint: Checkpoint, report: PlanReport) -> str:
    options, target = report.options, report.path
    paths = {"--plan": target, "--calibration": options.calibration}
    flags = [f" {flag} {as_argument(path)}" for flag, path in paths.items() if path]
    return (
        f"{target} is complete; {page_of(target)} has a plot. Export it: rgexport {options.format} "
        f"{model_argument(checkpoint)}{''.join(flags)}"
    )


def _text(
    checkpoint: Checkpoint, calibration: Calibration, options: PlanOptions
) -> tuple[str, Sequence[np.ndarray]]:
    if options.text is None:
        name = "the calibration's own text, on which a plan is better than elsewhere"
        if calibration.held_out:
            name = "text that the calibration held out"
        return name, first_tokens(calibration.held_out or calibration.sequences, options.tokens)
    if not has_tokenizer(folder_of(checkpoint)):
        raise RequestError(
            f"{checkpoint.name} has no tokenizer to read {options.text} with; leave --text out to "
            "measure on the calibration's text"
        )
    tokenizer = load_tokenizer(folder_of(checkpoint))
    return str(options.text), read_text(options.text, tokenizer, options.tokens)
