"""Commands that prepare a quantization."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import FOLDER, cluster_option, model_options, verbose
from rgexport.printing import print_result


@click.command()
@model_options
@click.option("--text", type=FOLDER, help="A file with text. [default: a built-in one]")
@click.option(
    "--tokens",
    type=int,
    help="Tokens of the statistics. [default: 8192; 16384 for a width of at most 1024]",
)
@click.option(
    "--held-out",
    type=int,
    help="Tokens beside them to measure plans on. [default: a quarter of that; as many for a width "
    "of at most 1024]",
)
@click.option(
    "--sampled",
    type=int,
    help="How many of --tokens the model writes itself. [default: five sixths; none with --text]",
)
@click.option(
    "--gradient-tokens",
    type=int,
    default=1024,
    show_default=True,
    help="How many of them also have gradients.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda|cpu")
@cluster_option
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL.calibration]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def calibrate(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    adapter: Path | None,
    cluster: str | None,
    output: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Collects statistics of a model on a text, so that it loses less when it is quantized.

    One layer's weights are in memory at a time. After an interruption, the same command goes on.
    """
    from rgexport.compress.calibrate import SUFFIX, CalibrationOptions, closing_line
    from rgexport.compress.calibrate import calibrate as run
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.runtimes.cluster import connected

    asked = CalibrationOptions(**options)
    checkpoint = open_checkpoint(
        model, size=size, window=window, soft_cap=soft_cap, adapter=adapter
    )
    target = output or Path(f"{checkpoint.name}{SUFFIX}")
    with connected(cluster) as workers:
        done = run(checkpoint, asked, target, force=force, workers=workers)
    print_result(closing_line(checkpoint, done))


@click.command()
@model_options
@click.option("--calibration", type=FOLDER, required=True, help="The file of `rgexport calibrate`.")
@click.option("--target-kl", type=float, help="The least size with at most this KL per token.")
@click.option("--target-size", metavar="SIZE", help="The least KL in an artifact of 1.5GB, say.")
@click.option("--bits", type=float, help="The least KL in so many bits per weight.")
@click.option(
    "--format",
    metavar="onnx|coreml|gguf",
    default="onnx",
    show_default=True,
    help="What the plan is for.",
)
@click.option(
    "--text", type=FOLDER, help="Measure on this text. [default: what the calibration held out]"
)
@click.option(
    "--tokens", type=int, default=16384, show_default=True, help="At most so many tokens of it."
)
@cluster_option
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL-FORMAT.plan.json]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def quantize(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    adapter: Path | None,
    cluster: str | None,
    output: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Finds the best layout for every tensor: for a quality, a size, or so many bits.

    What each layout costs is predicted from a calibration; the plan is measured. Exports take it
    with --plan.
    """
    from rgexport.compress.quantize import PlanOptions, closing_line, make_plan
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.runtimes.cluster import connected

    asked = PlanOptions(**options)
    checkpoint = open_checkpoint(
        model, size=size, window=window, soft_cap=soft_cap, adapter=adapter
    )
    target = output or Path(f"{checkpoint.name}-{asked.format}.plan.json")
    with connected(cluster) as workers:
        report = make_plan(checkpoint, asked, target, force=force, workers=workers)
    print_result(report.as_text(), end="")
    print_result(closing_line(checkpoint, asked, target))
