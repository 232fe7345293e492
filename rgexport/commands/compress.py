"""Commands that prepare a quantization."""

from dataclasses import dataclass
from pathlib import Path

from rgexport.choices import FormatName
from rgexport.commands.options import CheckpointArguments, ClusterArguments, command, group, option
from rgexport.printing import print_result


@dataclass(frozen=True)
class CalibrateArguments:
    checkpoint: CheckpointArguments = group(CheckpointArguments)
    text: Path | None = option("--text", help="A file with text. [default: a built-in one]")
    tokens: int | None = option(
        "--tokens",
        help="Tokens of the statistics. [default: 8192; 16384 for a width of at most 1024]",
    )
    held_out: int | None = option(
        "--held-out",
        help="Further tokens, to measure plans on. [default: a quarter of --tokens; as many for a "
        "width of at most 1024]",
    )
    sampled: int | None = option(
        "--sampled",
        help="How many of --tokens the model writes itself. [default: five sixths; none with "
        "--text]",
    )
    gradient_tokens: int = option(
        "--gradient-tokens", default=1024, help="How many of --tokens also have gradients."
    )
    seed: int = option("--seed", default=0)
    device: str = option("--device", default="auto", metavar="auto|cuda|cpu")
    cluster: ClusterArguments = group(ClusterArguments)
    output: Path | None = option("-o", "--output", help="The file. [default: ./MODEL.calibration]")
    force: bool = option("--force", help="Replace an earlier one.")


@command(CalibrateArguments)
def calibrate(arguments: CalibrateArguments) -> None:
    """Collects statistics of a model on a text, so that it loses less when it is quantized.

    One layer's weights are in memory at a time. After an interruption, the same command goes on.
    """
    from rgexport.compress.calibrate import SUFFIX, CalibrationOptions, closing_line
    from rgexport.compress.calibrate import calibrate as run
    from rgexport.runtimes.cluster import connected

    options = CalibrationOptions(
        text=arguments.text,
        tokens=arguments.tokens,
        held_out=arguments.held_out,
        sampled=arguments.sampled,
        gradient_tokens=arguments.gradient_tokens,
        seed=arguments.seed,
        device=arguments.device,
    )
    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}{SUFFIX}")
    with connected(arguments.cluster.cluster) as workers:
        calibration = run(checkpoint, options, target, force=arguments.force, workers=workers)
    print_result(closing_line(checkpoint, calibration))


@dataclass(frozen=True)
class QuantizeArguments:
    checkpoint: CheckpointArguments = group(CheckpointArguments)
    calibration: Path = option(
        "--calibration", required=True, help="The file of `rgexport calibrate`."
    )
    target_kl: float | None = option(
        "--target-kl", help="The smallest size with at most this KL per token."
    )
    target_size: str | None = option(
        "--target-size",
        metavar="SIZE",
        help="The lowest KL in an artifact of at most this size, such as 1.5GB.",
    )
    bits: float | None = option("--bits", help="The lowest KL at this many bits per weight.")
    format: FormatName = option("--format", default="onnx", help="The format of the export.")
    text: Path | None = option(
        "--text", help="Measure on this text. [default: what the calibration held out]"
    )
    tokens: int = option("--tokens", default=16384, help="At most this many tokens of the text.")
    cluster: ClusterArguments = group(ClusterArguments)
    output: Path | None = option(
        "-o", "--output", help="The file. [default: ./MODEL-FORMAT.plan.json]"
    )
    force: bool = option("--force", help="Replace an earlier one.")


@command(QuantizeArguments)
def quantize(arguments: QuantizeArguments) -> None:
    """Finds the best layout of every tensor for a KL, a size, or a number of bits.

    The cost of each layout is predicted from a calibration; the plan is measured. Exports take it
    with --plan.
    """
    from rgexport.compress.quantize import PlanOptions, closing_line, make_plan
    from rgexport.runtimes.cluster import connected

    options = PlanOptions(
        calibration=arguments.calibration,
        target_kl=arguments.target_kl,
        target_size=arguments.target_size,
        bits=arguments.bits,
        format=arguments.format,
        text=arguments.text,
        tokens=arguments.tokens,
    )
    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}-{options.format}.plan.json")
    with connected(arguments.cluster.cluster) as workers:
        report = make_plan(checkpoint, options, target, force=arguments.force, workers=workers)
    print_result(report.as_text(), end="")
    print_result(closing_line(checkpoint, options, target))
