"""The command that finds a plan."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import FOLDER, model_options, verbose


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
    "--text", type=FOLDER, help="Measure on this text. [default: that of the calibration]"
)
@click.option(
    "--tokens", type=int, default=8192, show_default=True, help="How many tokens of the text."
)
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL-FORMAT.plan.json]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def quantize(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
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

    asked = PlanOptions(**options)
    checkpoint = open_checkpoint(model, size=size, window=window, soft_cap=soft_cap)
    target = output or Path(f"{checkpoint.name}-{asked.format}.plan.json")
    report = make_plan(checkpoint, asked, target, force=force)
    click.echo(report.as_text(), nl=False)
    click.echo(closing_line(checkpoint, asked, target))
