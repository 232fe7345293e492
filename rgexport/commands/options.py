"""Options that several commands of the command line have in common."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rgexport import progress
from rgexport.printing import print_result

SIZES = "demo|2b|2b-it|9b|9b-it"
FOLDER = click.Path(path_type=Path)
NO_NATIVE = "RGEXPORT_NO_NATIVE"
"""The environment variable that turns the native kernels off."""
_Command = Callable[..., Any]


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _set_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    progress.verbose = progress.verbose or value


def _set_no_native(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.with_resource(_no_native())


@contextmanager
def _no_native() -> Iterator[None]:
    """Sets the variable while the command runs."""
    before = os.environ.get(NO_NATIVE)
    os.environ[NO_NATIVE] = "1"
    try:
        yield
    finally:
        del os.environ[NO_NATIVE]
        if before is not None:
            os.environ[NO_NATIVE] = before


def help_if_alone(context: click.Context) -> None:
    """Prints the help of a group that no command came after."""
    if context.invoked_subcommand is None:
        print_result(context.get_help())


def port_option(default: int) -> Callable[[_Command], _Command]:
    """The port of a server."""
    return click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=default,
        show_default=True,
        help="The port to listen on; 0 takes a free one.",
    )


verbose = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbose, help="More detail."
)
native_option = click.option(
    "--no-native",
    is_flag=True,
    expose_value=False,
    callback=_set_no_native,
    help=f"Use only the engine's own kernels, as with {NO_NATIVE}=1.",
)
foreign_option = click.option(
    "--allow-foreign",
    is_flag=True,
    help="Run ONNX graphs with ops that rgexport does not write, from someone you trust.",
)
adapter_option = click.option(
    "--adapter", type=FOLDER, help="The folder of a LoRA adapter (PEFT) to merge into the model."
)
model_options = _options(
    click.option("-m", "--model", help="A folder, a DeepMind .pt file, or a hub id."),
    click.option("--size", metavar=SIZES, help="Instead of -m: a released model, or the demo."),
    click.option("--window", type=int, help="A smaller window; or that of a DeepMind file. [2048]"),
    click.option("--soft-cap", type=float, help="Cap of the logits of one. [default: 30]"),
    adapter_option,
)
output_options = _options(
    click.option(
        "-o", "--output", type=FOLDER, help="The folder. [default: ./MODEL-PRECISION-FORMAT]"
    ),
    click.option("--force", is_flag=True, help="Replace an existing output."),
)
width_options = _options(
    click.option("--int4", is_flag=True, help="Same as --precision int4."),
    click.option("--int8", is_flag=True, help="Same as --precision int8."),
)
check_option = click.option("--no-check", is_flag=True, help="Skip the self-check of the artifact.")
plan_option = click.option(
    "--plan",
    type=FOLDER,
    help="A JSON file with the storage of every tensor, as `inspect --json` prints it.",
)
cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="A Dask scheduler, such as tcp://host:8786, whose workers share the work.",
)
quality_options = _options(
    click.option(
        "--quality",
        metavar="fast|default|best",
        help="How levels are chosen: rounding to nearest, clip search, or GPTQ by a calibration.",
    ),
    click.option(
        "--calibration",
        type=FOLDER,
        help="A file of `rgexport calibrate`, for --quality best.",
    ),
    cluster_option,
)
state_precision = click.option(
    "--state-precision",
    metavar="fp32|fp16",
    help="Precision of state files. [default: what the engine computes with]",
)
state_options = _options(
    click.option("--load-state", type=FOLDER, help="Go on from a state file."),
    click.option("--save-state", type=FOLDER, help="Write a state file at the end."),
    state_precision,
)
no_lookup = click.option(
    "--no-lookup",
    "lookup",
    flag_value=False,
    default=True,
    help="Turn prompt lookup off: write one token a step.",
)
draft_options = _options(
    click.option(
        "--draft-text", type=FOLDER, help="A text that replies may repeat: they come sooner."
    ),
    no_lookup,
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 256), help="[default and most: one per usable processor]"
)
sampling_options = _options(
    click.option(
        "-n",
        "--max-new-tokens",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Most tokens of a reply.",
    ),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0: greedy."),
    click.option("--top-k", type=int, default=0, help="Sample from the k most likely tokens."),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample from the most likely tokens that sum to p.",
    ),
    click.option(
        "--min-p", type=float, default=0.0, help="Drop tokens less likely than p times the best."
    ),
    click.option(
        "--repetition-penalty", type=float, default=1.0, help="Above 1: tokens repeat less."
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="Above 0: tokens of the reply occur less.",
    ),
    click.option(
        "--frequency-penalty", type=float, default=0.0, help="The same, in proportion to how often."
    ),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    threads_option,
    native_option,
)


def storing_options(block: str, symmetry: str, embedding: str) -> Callable[[_Command], _Command]:
    """How quantized weights are stored; the arguments say what a format's defaults are."""
    return _options(
        click.option("--block-size", type=int, help=f"16, 32, 64 or 128. [default: {block}]"),
        click.option("--symmetric/--asymmetric", default=None, help=f"[default: {symmetry}]"),
        click.option(
            "--embedding-precision",
            metavar="WORD",
            help=f"Precision of the embedding (also the output head). [default: {embedding}]",
        ),
    )
