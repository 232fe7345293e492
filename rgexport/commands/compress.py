"""Commands that prepare a quantization."""

from dataclasses import dataclass
from pathlib import Path

from rgexport.choices import FormatName
from rgexport.commands.options import (
    CheckpointArguments,
    ClusterArguments,
    command,
    group,
    option,
    shared,
)
from rgexport.printing import print_result


@dataclass(frozen=True)
class CalibrateArguments:
    checkpoint: CheckpointArguments = group()
    text: Path | None = option("A file with text. [default: a built-in one]")
    tokens: int | None = option(
        "Tokens of the statistics. [default: 8192; 16384 for a width of at most 1024]"
    )
    held_out: int | None = option(
        "Further tokens, to measure plans on. [default: a quarter of --tokens; as many for a "
        "width of at most 1024]"
    )
    sampled: int | None = option(
        "How many of --tokens the model writes itself. [default: five sixths; none with --text]"
    )
    gradient_tokens: int = option("How many of --tokens also have gradients.", default=1024)
    seed: int = option(default=0)
    device: str = option(default="auto", metavar="auto|cuda|cpu")
    cluster: ClusterArguments = group()
    output: Path | None = option("The file. [default: ./MODEL.calibration]", "-o")
    force: bool = option("Replace an earlier one.")


@command(CalibrateArguments)
def calibrate(arguments: CalibrateArguments) -> None:
    """Collects statistics of a model on a text, so that it loses less when it is quantized.

    One layer's weights are in memory at a time. After an interruption, the same command goes on.
    """
    from rgexport.compress.calibrate import SUFFIX, CalibrationOptions, closing_line
    from rgexport.compress.calibrate import calibrate as run
    from rgexport.runtimes.cluster import connected

    options = CalibrationOptions(**shared(arguments, CalibrationOptions))
    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}{SUFFIX}")
    with connected(arguments.cluster.cluster) as workers:
        calibration = run(checkpoint, options, target, force=arguments.force, workers=workers)
    print_result(closing_line(checkpoint, calibration))


@dataclass(frozen=True)
class QuantizeArguments:
    checkpoint: CheckpointArguments = group()
    calibration: Path = option("The file of `rgexport calibrate`.", required=True)
    target_kl: float | None = option("The smallest size with at most this KL per token.")
    target_size: str | None = option(
        "The lowest KL in an artifact of at most this size, such as 1.5GB.", metavar="SIZE"
    )
    bits: float | None = option("The lowest KL at this many bits per weight.")
    format: FormatName = option("The format of the export.", default="onnx")
    text: Path | None = option("Measure on this text. [default: what the calibration held out]")
    tokens: int = option("At most this many tokens of the text.", default=16384)
    cluster: ClusterArguments = group()
    output: Path | None = option("The file. [default: ./MODEL-FORMAT.plan.json]", "-o")
    force: bool = option("Replace an earlier one.")


@command(QuantizeArguments)
def quantize(arguments: QuantizeArguments) -> None:
    """Finds the best layout of every tensor for a KL, a size, or a number of bits.

    The cost of each layout is predicted from a calibration; the plan is measured. Exports take it
    with --plan.
    """
    from rgexport.compress.quantize import PlanOptions, closing_line, make_plan
    from rgexport.runtimes.cluster import connected

    options = PlanOptions(**shared(arguments, PlanOptions))
    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}-{options.format}.plan.json")
    with connected(arguments.cluster.cluster) as workers:
        report = make_plan(checkpoint, options, target, force=arguments.force, workers=workers)
    print_result(report.as_text(), end="")
    print_result(closing_line(checkpoint, options, target))
