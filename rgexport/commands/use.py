"""Commands that run artifacts."""

import sys
from pathlib import Path
from typing import Any

import click

from rgexport import progress
from rgexport.commands.options import (
    FOLDER,
    native_option,
    sampling_options,
    verbose,
)

FORMS = "table", "md", "json", "csv"


@click.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--prompt", help="The text to continue.")
@click.option("--ids", help="Instead of a text: token ids, such as 2,651,603; prints ids.")
@sampling_options
@verbose
def generate(artifact: Path, **request: Any) -> None:
    """Continues a prompt."""
    from rgexport.chat.from_artifact import continue_prompt, summary

    pieces, stats = continue_prompt(artifact, sampler=_sampler(request), **request)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    progress.note(summary(stats))


@click.command()
@click.argument("artifact", type=FOLDER)
@sampling_options
@verbose
def chat(artifact: Path, **request: Any) -> None:
    """Chats with an instruction-tuned model."""
    from rgexport.chat.from_artifact import open_conversation
    from rgexport.chat.terminal import chat_loop

    conversation = open_conversation(artifact, sampler=_sampler(request), **request)
    chat_loop(conversation, sys.stdin, sys.stdout)


def _sampler(request: dict[str, Any]) -> Any:
    """Takes the options of sampling out of `request`."""
    from rgexport.chat.sampling import Sampler

    names = "temperature", "top_k", "top_p", "seed"
    return Sampler(**{name: request.pop(name) for name in names})


@click.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Lengths of prompts.")
@click.option(
    "-n", "--n-gen", default="128", show_default=True, help="Numbers of tokens to generate."
)
@click.option(
    "-d",
    "--n-depth",
    default="0",
    show_default=True,
    help="Tokens processed before the measurement.",
)
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--synthetic",
    is_flag=True,
    help="Fill the state with random values instead: quick, same cost per token.",
)
@click.option("-t", "--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option(
    "-o", "--output", "form", type=click.Choice(FORMS), default="table", show_default=True
)
@native_option
@verbose
def bench(
    artifact: Path,
    n_prompt: str,
    n_gen: str,
    n_depth: str,
    threads: int | None,
    form: str,
    **options: Any,
) -> None:
    """Measures tokens per second, beside how fast the machine reads memory.

    -p, -n and -d take lists such as 128,512; a length of 0 is left out.
    """
    from rgexport.runtimes.bench.measure import BenchRequest, bench_artifact
    from rgexport.runtimes.bench.rows import WRITERS

    request = BenchRequest.parse(n_prompt, n_gen, n_depth, **options)
    click.echo(WRITERS[form](bench_artifact(artifact, request, threads=threads)), nl=False)
