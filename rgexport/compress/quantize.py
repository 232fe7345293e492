"""`rgexport quantize`: a plan that reaches a quality or a size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.compress.cluster import spread_statistics
from rgexport.compress.layouts import layouts_of
from rgexport.compress.passages import first_tokens, read_text
from rgexport.compress.plan_file import PlanReport, is_plan, write_json
from rgexport.compress.planning import FLAGS, Kind, Planner, PlanTarget
from rgexport.errors import RequestError
from rgexport.export.opening import as_argument
from rgexport.export.origin import folder_of
from rgexport.export.request import bytes_of
from rgexport.files.targets import check_file_target, replace_file
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.quantize.calibration import Calibration, open_calibration
from rgexport.reporting.page import write_text
from rgexport.runtimes.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `rgexport quantize`.

    Attributes:
        calibration: the file of `rgexport calibrate`.
        target_kl: nats per token on the text.
        target_size: of the artifact, such as `1.5GB`.
        bits: per weight of the matrices and the head.
        format: of the export that the plan is for.
        text: to measure the plan on; None for the calibration's held-out text, or else its text.
        tokens: most tokens of it.
    """

    calibration: Path
    target_kl: float | None = None
    target_size: str | None = None
    bits: float | None = None
    format: str = "onnx"
    text: Path | None = None
    tokens: int = 16384

    def __post_init__(self) -> None:
        """Refuses contradictions.

        Raises:
            RequestError: not exactly one target, or one that is no positive number.
        """
        layouts_of(self.format)
        if self.tokens < 1:
            raise RequestError(f"--tokens is {self.tokens}; expected at least 1")
        target = self.target
        if not 0 < target.value < float("inf"):
            raise RequestError(
                f"{FLAGS[target.kind]} is {target.value:g}; expected a positive number"
            )

    @property
    def target(self) -> PlanTarget:
        """The one target."""
        size = None if self.target_size is None else bytes_of("--target-size", self.target_size)
        values: dict[Kind, float | None] = {"kl": self.target_kl, "size": size, "bits": self.bits}
        targets = [PlanTarget(kind, value) for kind, value in values.items() if value is not None]
        if len(targets) != 1:
            raise RequestError(
                f"{len(targets)} targets are given; expected one of --target-kl, --target-size and "
                "--bits"
            )
        return targets[0]


def make_plan(
    checkpoint: Checkpoint,
    options: PlanOptions,
    target: Path,
    *,
    force: bool = False,
    workers: Cluster | None = None,
) -> PlanReport:
    """Finds a plan, and writes it to `target` and its page beside it; `workers` quantize.

    Raises:
        RequestError: an unsound checkpoint, statistics of another model, an unreadable text, a
            target out of reach, or a file that may not be replaced.
    """
    _check_targets(target, force)
    calibration = open_calibration(options.calibration)
    sequences = _sequences(checkpoint, calibration, options)
    hashes = require_sound(checkpoint).values()
    calibration.require_for(record.sha256 for record in hashes)
    statistics = spread_statistics(workers, calibration, checkpoint.config) if workers else None
    planner = Planner(checkpoint, calibration, layouts_of(options.format), statistics)
    report = PlanReport(
        planner.find(options.target, sequences),
        options.target,
        options.format,
        checkpoint.name,
        _name_of(calibration, options),
        options.text is None,
    )
    with replace_file(target, force=force, replaceable=is_plan) as unfinished:
        write_json(report, unfinished)
    write_text(report.page(), page_of(target))
    return report


def _check_targets(target: Path, force: bool) -> None:
    if target.suffix == ".html":
        raise RequestError(
            f"-o is {target}, but a plan is JSON, and its page is written beside it; pass a name "
            "such as plan.json"
        )
    check_file_target(target, force=force, replaceable=is_plan)
    check_file_target(page_of(target), force=force, replaceable=lambda page: True)


def page_of(target: Path) -> Path:
    """Returns the path of a plan's page, where the plan may be called `plan-4.25`."""
    return target.with_name(f"{target.name}.html")


def closing_line(checkpoint: Checkpoint, options: PlanOptions, target: Path) -> str:
    """Returns the last line of the command's output: the plan's path, and the next command."""
    paths = (checkpoint.path, target, options.calibration)
    model, plan, calibration = map(as_argument, paths)
    return (
        f"{target} is complete; {page_of(target)} has a plot. Export it: rgexport {options.format} "
        f"-m {model} --plan {plan} --calibration {calibration}"
    )


def _sequences(
    checkpoint: Checkpoint, calibration: Calibration, options: PlanOptions
) -> Sequence[np.ndarray]:
    if options.text is None:
        return first_tokens(calibration.held_out or calibration.sequences, options.tokens)
    tokenizer = load_tokenizer(folder_of(checkpoint))
    if tokenizer is None:
        raise RequestError(
            f"{checkpoint.name} has no tokenizer to read {options.text} with; leave --text out to "
            "measure on the calibration's text"
        )
    return read_text(options.text, tokenizer, options.tokens)


def _name_of(calibration: Calibration, options: PlanOptions) -> str:
    if options.text is not None:
        return str(options.text)
    if calibration.held_out:
        return "text that the calibration held out"
    return "the calibration's own text, on which a plan is better than elsewhere"
