"""The command that evaluates."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import (
    FOLDER,
    cluster_option,
    foreign_option,
    threads_option,
    verbose,
)
from rgexport.printing import print_result


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAME",
    help="text, memory, noise, window, length or tasks. [the first three]",
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
@click.option("--limit", type=click.IntRange(2), help="Most tokens of a document in text.")
@click.option(
    "--context",
    type=click.IntRange(4),
    default=512,
    show_default=True,
    help="Tokens of a chunk, for the figure of llama-perplexity.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Also read texts in pieces of --context that overlap: tokens between two beginnings.",
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
    help="Of what is drawn in memory, noise and tasks.",
)
@click.option(
    "--length",
    type=click.IntRange(2),
    default=1 << 15,
    show_default=True,
    help="Tokens of length.",
)
@click.option("--state", type=FOLDER, help="State file that length goes on from.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Task of lm_eval for tasks.")
@click.option("--task-files", type=FOLDER, help="Folder of task files of lm_eval.")
@click.option("--examples", type=click.IntRange(1), help="Most examples of a task.")
@threads_option
@cluster_option
@foreign_option
@verbose
def evaluate(
    models: tuple[str, ...],
    suites: tuple[str, ...],
    output: Path,
    texts: tuple[Path, ...],
    threads: int | None,
    cluster: str | None,
    allow_foreign: bool,
    **settings: Any,
) -> None:
    """Measures what models can do: texts, memory, windows, a million tokens, benchmarks.

    MODEL is an artifact of any format, a checkpoint, or `demo`; the others are compared with the
    first one.
    """
    from rgexport.evaluate.models import open_models
    from rgexport.evaluate.report import JSON, as_text, write_files
    from rgexport.evaluate.request import EvaluationRequest, require_overlap
    from rgexport.evaluate.run import evaluate as run
    from rgexport.evaluate.run import require_known
    from rgexport.runtimes.cluster import connected

    names = require_known(suites, settings["tasks"])
    require_overlap(settings["stride"], settings["context"])
    opened = open_models(models, allow_foreign=allow_foreign)
    request = EvaluationRequest(folder=output, texts=texts, **settings)
    with connected(cluster) as workers:
        evaluation = run(opened, names, request, threads=threads, workers=workers)
    print_result(as_text(evaluation), end="")
    print_result(f"{write_files(evaluation, output)} has the curves, {output / JSON} all figures.")
