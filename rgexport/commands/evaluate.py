"""The command that evaluates."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import FOLDER, verbose


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--suite", "suites", multiple=True, metavar="NAME", help="text, memory or noise. [all]"
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("evaluation"),
    show_default=True,
    help="Folder of the results; a run that was cut off goes on there.",
)
@click.option("--text", "texts", type=FOLDER, multiple=True, help="File or folder. [built in]")
@click.option("--limit", type=click.IntRange(2), help="Most tokens of a text.")
@click.option(
    "--context",
    type=click.IntRange(4),
    default=512,
    show_default=True,
    help="Tokens of a chunk, for the figure of llama-perplexity.",
)
@click.option(
    "--trials",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Episodes of each task of memory.",
)
@click.option("--farthest", type=click.IntRange(32), help="Tokens to remember over. [4 windows]")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of what is drawn in memory and noise.",
)
@verbose
def evaluate(
    models: tuple[str, ...],
    suites: tuple[str, ...],
    output: Path,
    texts: tuple[Path, ...],
    **settings: Any,
) -> None:
    """Measures what models can do: texts, and what they remember.

    MODEL is an artifact of any format, a checkpoint, or `demo`; the first one is what the others
    are compared with.
    """
    from rgexport.evaluate.report import JSON, as_text, write_files
    from rgexport.evaluate.request import Request
    from rgexport.evaluate.run import evaluate as run
    from rgexport.evaluate.run import require_known
    from rgexport.evaluate.subjects import open_subjects

    names = require_known(suites)
    found = run(open_subjects(models), names, Request(texts=texts, **settings), output)
    click.echo(as_text(found), nl=False)
    click.echo(f"{write_files(found, output)} has the curves, {output / JSON} all figures.")
