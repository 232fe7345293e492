"""Commands that inspect, and that validate."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import (
    FOLDER,
    SIZES,
    adapter_option,
    foreign_option,
    model_options,
    native_option,
    verbose,
)
from rgexport.printing import print_result


@click.command()
@click.argument("thing", metavar="MODEL-or-ARTIFACT", required=False)
@click.option(
    "--size", metavar=SIZES, help="Instead: a released model (may download it), or the demo."
)
@click.option("--json", "to_json", is_flag=True, help="Print JSON.")
@click.option("--verify", is_flag=True, help="Read every byte: values, or hashes.")
@verbose
def inspect(thing: str | None, size: str | None, to_json: bool, verify: bool) -> int:
    """Shows what a checkpoint, an artifact or a .mlpackage holds, and all that is wrong with it.

    The exit code is 1 where a checkpoint or a package has problems.
    """
    from rgexport.export.describe import as_json, as_text, describe

    description = describe(thing, size=size, verify=verify)
    print_result((as_json if to_json else as_text)(description), end="")
    return 1 if description.get("problems") else 0


@click.command()
@model_options
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda|cpu")
@click.option(
    "--impl",
    type=click.Choice(["rgexport", "deepmind"]),
    default="rgexport",
    show_default=True,
    help="What computes the reference: rgexport, or DeepMind's package.",
)
@click.option(
    "--low-memory", is_flag=True, help="Hold one layer's weights at a time, even if all fit."
)
@click.option("--prompts", type=FOLDER, help="Lines of text, or a JSON list. [default: built in]")
@click.option("-o", "--output", type=FOLDER, help="The file. [default: ./MODEL.reference]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@verbose
def reference(
    model: str | None,
    size: str | None,
    window: int | None,
    soft_cap: float | None,
    adapter: Path | None,
    output: Path | None,
    **request: Any,
) -> None:
    """Captures what the full-precision model computes, to validate artifacts without it.

    With the file, `rgexport validate --reference` does not need the model.
    """
    from rgexport.griffin.checkpoint import open_checkpoint
    from rgexport.validate.reference.capture import capture, closing_line

    checkpoint = open_checkpoint(
        model, size=size, window=window, soft_cap=soft_cap, adapter=adapter
    )
    target = output or Path(f"{checkpoint.name}.reference")
    print_result(closing_line(capture(checkpoint, target, **request)))


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--reference",
    type=FOLDER,
    help="Made by `rgexport reference`; it takes the place of the original.",
)
@click.option(
    "-m",
    "--model",
    help="The original, to measure the cost. [default: the demo, or the hub cache's copy]",
)
@adapter_option
@click.option("--text", type=FOLDER, help="Compare on this text. [default: built in]")
@click.option(
    "--tokens", "max_tokens", type=click.IntRange(2), help="How many of its tokens, such as 32768."
)
@click.option(
    "--limit",
    "limits",
    metavar="NAME=VALUE",
    multiple=True,
    help="Another limit for a check, such as original.kl=0.05. Can be repeated.",
)
@click.option("--bisect", is_flag=True, help="Also rank the layers by cost, and name suspects.")
@click.option("--bench", is_flag=True, help="Also measure tokens per second.")
@click.option(
    "--reproduce", is_flag=True, help="Encode the original's weights again; every level must agree."
)
@click.option(
    "--calibration", type=FOLDER, help="With --reproduce: what the weights were encoded with."
)
@click.option(
    "--allow-ambiguous", is_flag=True, help="Exit code 0 also if the verdict is AMBIGUOUS."
)
@click.option(
    "--min-quality",
    metavar="GRADE",
    type=click.Choice(["lossless", "excellent", "good", "fair", "poor"]),
    help="Exit code 1 also if the quality is lower: lossless, excellent, good or fair.",
)
@click.option("--json", "json_file", type=FOLDER, help="Also write the result to this file.")
@click.option("--html", "html_file", type=FOLDER, help="Also write an HTML report.")
@foreign_option
@native_option
@verbose
def validate(
    artifacts: tuple[Path, ...],
    model: str | None,
    adapter: Path | None,
    text: Path | None,
    max_tokens: int | None,
    bisect: bool,
    bench: bool,
    reproduce: bool,
    calibration: Path | None,
    min_quality: Any,
    allow_foreign: bool,
    **files: Any,
) -> int:
    """Compares artifacts with the reference: exit code 0 if all pass, 1 if one does not.

    There are two verdicts. PASS or FAIL says whether the export is correct; it is AMBIGUOUS if a
    limit lies within the error margin of the measured value. A grade says how close the answers are
    to the original's. Several artifacts, of any formats, are shown in one table.
    """
    from rgexport.validate.opening import ValidationRequest
    from rgexport.validate.run import validate_artifacts

    asked = ValidationRequest(
        model=model,
        adapter=adapter,
        text=text,
        max_tokens=max_tokens,
        bisect=bisect,
        bench=bench,
        reproduce=reproduce,
        calibration=calibration,
        min_quality=min_quality,
        allow_foreign=allow_foreign,
    )
    return validate_artifacts(artifacts, asked, **files)
