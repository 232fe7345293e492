"""Commands that inspect, validate, evaluate and time models."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click

from rgexport import choices
from rgexport.commands.options import (
    PATH_OR_ID,
    ArtifactArguments,
    CheckpointArguments,
    ClusterArguments,
    ForeignArguments,
    NativeArguments,
    ThreadsArguments,
    argument,
    command,
    group,
    model_option,
    option,
    shared,
)
from rgexport.printing import print_outcome, print_result, print_sentences

_SUITES = get_args(choices.SuiteName)
_STDOUT = "-"


@dataclass(frozen=True)
class InspectArguments:
    named: tuple[str, ...] = argument(metavar="[MODEL-or-ARTIFACT]...", type=PATH_OR_ID)
    model: tuple[str, ...] = model_option("Another way to give an argument.", "MODEL")
    size: choices.SizeName | None = option("Instead of MODEL: a released model, or the demo model.")
    json: bool = option("Print the description as JSON.")
    verify: bool = option("Read every byte: values, or hashes.")


@command(InspectArguments)
def inspect(arguments: InspectArguments) -> int:
    """Shows what a checkpoint, an artifact or a .mlpackage holds, and all that is wrong with it.

    The exit code is 1 where a checkpoint or a package has problems.
    """
    from rgexport.artifacts.describe import as_json, as_text, describe

    size, verify = arguments.size, arguments.verify
    models = (*arguments.named, *arguments.model) or (None,)
    descriptions = [describe(model, size=size, verify=verify) for model in models]
    as_one = as_json(descriptions if len(models) > 1 else descriptions[0])
    print_result(as_one if arguments.json else "\n".join(map(as_text, descriptions)), end="")
    return 1 if any(description.get("problems") for description in descriptions) else 0


@dataclass(frozen=True)
class ReferenceArguments:
    checkpoint: CheckpointArguments = group()
    device: str = option("Device that computes.", default="auto", metavar="auto|cuda|cpu")
    impl: choices.ReferenceImplementation = option(
        "Implementation that computes the reference: rgexport's, or DeepMind's package.",
        default="rgexport",
    )
    low_memory: bool = option("Hold one layer's weights at a time, even if all fit.")
    prompts: Path | None = option("Lines of text, or a JSON list. [default: built in]")
    output: Path | None = option("The file to write. [default: ./MODEL.reference]", "-o")
    force: bool = option("Replace an existing file.")
    json: bool = option("Print the path and size as JSON.")


@command(ReferenceArguments)
def reference(arguments: ReferenceArguments) -> None:
    """Captures what the full-precision model computes, to validate artifacts without it.

    With the file, `rgexport validate --reference` does not need the model.
    """
    from rgexport.validate.reference.capture import capture, closing_line

    checkpoint = arguments.checkpoint.open()
    target = arguments.output or Path(f"{checkpoint.name}.reference")
    others = "checkpoint", "output", "json"
    values = {name: value for name, value in vars(arguments).items() if name not in others}
    file = capture(checkpoint, target, **values)
    print_outcome(closing_line(file), file, as_json=arguments.json)


@dataclass(frozen=True)
class ValidateArguments:
    artifacts: tuple[str, ...] = argument(metavar="ARTIFACT...", type=PATH_OR_ID)
    reference: Path | None = option("A file of `rgexport reference`, used instead of the original.")
    model: str | None = model_option(
        "The original, to measure the cost. [default: the demo, or the hub cache's copy]", "MODEL"
    )
    adapter: Path | None = option("The folder of a LoRA adapter (PEFT) to merge into the model.")
    text: Path | None = option("Compare on this text. [default: built in]")
    max_tokens: int | None = option("Tokens to compare, such as 32768.", "--tokens", least=2)
    limits: tuple[str, ...] = option(
        "Another limit for a check, such as original.kl=0.05. Can be repeated.",
        "--limit",
        metavar="NAME=VALUE",
    )
    bisect: bool = option("Also rank the layers by cost, and name suspects.")
    reproduce: bool = option("Encode the original's weights again; every level must agree.")
    calibration: Path | None = option("Calibration of the export, for --reproduce.")
    allow_ambiguous: bool = option("Exit with code 0 also if the verdict is AMBIGUOUS.")
    min_quality: choices.GradeName | None = option(
        "Exit with code 1 also if the quality is lower: lossless, excellent, good or fair.",
        metavar="GRADE",
    )
    json: str | None = option(
        "Print the result as JSON; or write it to FILE, beside the report.",
        is_flag=False,
        flag_value=_STDOUT,
        type=PATH_OR_ID,
        metavar="[FILE]",
    )
    html_file: Path | None = option("Also write an HTML report to FILE.", "--html", metavar="FILE")
    engine: NativeArguments = group()


@command(ValidateArguments)
def validate(arguments: ValidateArguments) -> int:
    """Compares artifacts with the reference: exit code 0 if all pass, 1 if one does not.

    There are two verdicts. PASS or FAIL says whether the export is correct; it is AMBIGUOUS if a
    limit lies within the error margin of the measured value. A grade says how close the answers are
    to the original's. Several artifacts, of any formats, are shown in one table.
    """
    from rgexport.artifacts.opening import means_artifact
    from rgexport.validate.checks import parse_limits
    from rgexport.validate.opening import ValidationRequest
    from rgexport.validate.reference.reference_file import read_reference
    from rgexport.validate.run import validate_artifacts

    artifacts, json_file = arguments.artifacts, arguments.json
    if json_file and means_artifact(Path(json_file)):
        artifacts, json_file = (json_file, *artifacts), _STDOUT  # --json ARTIFACT
    if not artifacts:
        took = f"; --html took {arguments.html_file} as its FILE" if arguments.html_file else ""
        message = f"Missing argument 'ARTIFACT...'{took}."
        raise click.UsageError(message, click.get_current_context())
    file, limits = arguments.reference, parse_limits(arguments.limits)
    reference = None if file is None else read_reference(file)
    values = shared(arguments, ValidationRequest) | shared(arguments.engine, ValidationRequest)
    request = ValidationRequest(**values | {"reference": reference, "limits": limits})
    return validate_artifacts(
        [Path(artifact) for artifact in artifacts],
        request,
        json_file=None if json_file in (None, _STDOUT) else Path(json_file),
        html_file=arguments.html_file,
        prints_json=json_file == _STDOUT,
        allow_ambiguous=arguments.allow_ambiguous,
    )


@dataclass(frozen=True)
class EvaluateArguments:
    named: tuple[str, ...] = argument(metavar="[MODEL]...", type=PATH_OR_ID)
    model: tuple[str, ...] = model_option("Another way to give a MODEL.", "MODEL")
    suites: tuple[choices.SuiteName, ...] = option(
        f"Suite to run: {', '.join(_SUITES[:-1])} or {_SUITES[-1]}; can be repeated. "
        "[default: the first three]",
        "--suite",
        metavar="NAME",
    )
    output: Path = option(
        "Folder of the results; an interrupted evaluation goes on from there.",
        "-o",
        default=Path("evaluation"),
    )
    json: bool = option("Print all figures as JSON.")
    texts: tuple[Path, ...] = option("File or folder with the texts. [default: built in]", "--text")
    limit: int | None = option("Maximum number of tokens of a document in the suite text.", least=2)
    context: int = option(
        "Tokens of a chunk, for the perplexity that llama-perplexity reports.", least=4, default=512
    )
    stride: int | None = option(
        "Tokens between the beginnings of overlapping chunks. [default: chunks do not overlap]",
        least=1,
    )
    trials: int = option("Episodes of each task of the suite memory.", least=2, default=32)
    farthest: int | None = option(
        "Maximum number of tokens to remember over. [default: 4 windows]", least=32
    )
    seed: int = option("Seed of the random choices in memory, noise and tasks.", least=0, default=0)
    length: int = option("Number of tokens that the suite length reads.", least=2, default=1 << 15)
    state: Path | None = option("State file from which the suite length continues.")
    tasks: tuple[str, ...] = option(
        "Task of lm_eval, for the suite tasks. Can be repeated.", "--task", metavar="NAME"
    )
    task_files: Path | None = option("Folder of task files of lm_eval.")
    examples: int | None = option("Maximum number of examples of a task.", least=1)
    threads: ThreadsArguments = group()
    cluster: ClusterArguments = group()
    engine: ForeignArguments = group()


@command(EvaluateArguments)
def evaluate(arguments: EvaluateArguments) -> None:
    """Measures what models can do: texts, memory, windows, a million tokens, benchmarks.

    MODEL is an artifact, a checkpoint or `demo`. All models are compared with the first one.
    """
    from rgexport.evaluation.models import open_models
    from rgexport.evaluation.pieces import EvaluationRequest
    from rgexport.evaluation.report import JSON, as_text, write_files
    from rgexport.evaluation.run import evaluate as run
    from rgexport.evaluation.run import requested_suites
    from rgexport.runtimes.cluster import connected

    output = arguments.output
    names = requested_suites(arguments.suites, arguments.tasks)
    request = EvaluationRequest(folder=output, **shared(arguments, EvaluationRequest))
    named = *arguments.named, *arguments.model
    models = open_models(named, allow_foreign=arguments.engine.allow_foreign)
    with connected(arguments.cluster.cluster) as workers:
        results = run(models, names, request, threads=arguments.threads.threads, workers=workers)
    page = write_files(results, output)
    if arguments.json:
        print_result((output / JSON).read_text("utf-8"), end="")
        return
    print_result(as_text(results), end="")
    print_sentences(
        f"{page} has tables and curves (-v prints the tables), {output / JSON} all figures."
    )


@dataclass(frozen=True)
class BenchArguments(ArtifactArguments):
    n_prompt: str = option("Lengths of prompts.", "-p", default="512")
    n_gen: str = option("Numbers of tokens to generate.", "-n", default="128")
    n_depth: str = option("Tokens processed before the measurement.", "-d", default="0")
    repetitions: int = option("Number of repetitions.", "-r", least=1, default=5)
    synthetic: bool = option("Fill the state with random values: quick, same cost per token.")
    threads: ThreadsArguments = group()
    form: choices.TableFormat = option("Format of the table.", "--format", default="table")
    json: bool = option("Print the figures as JSON, as with --format json.")
    output: str | None = option("The file to write. [default: the terminal]", "-o", type=PATH_OR_ID)
    force: bool = option("Replace an existing file.")
    engine: NativeArguments = group()


@command(BenchArguments)
def bench(arguments: BenchArguments) -> None:
    """Measures tokens per second, and how fast the machine reads memory.

    -p, -n and -d take lists such as 128,512; a length of 0 is left out.
    """
    from rgexport.files.atomic import write_file
    from rgexport.files.targets import check_file_target
    from rgexport.runtimes.bench.measure import WRITERS, BenchRequest, bench_artifact

    form: str = "json" if arguments.json else arguments.form
    output = arguments.output and Path(arguments.output)
    if arguments.output in WRITERS:  # an earlier spelling
        form, output = arguments.output, None
    if output:
        check_file_target(output, force=arguments.force, replaceable=lambda path: True)
    request = BenchRequest.parse(
        arguments.n_prompt,
        arguments.n_gen,
        arguments.n_depth,
        repetitions=arguments.repetitions,
        synthetic=arguments.synthetic,
    )
    rows = bench_artifact(
        arguments.artifact,
        request,
        threads=arguments.threads.threads,
        allow_foreign=arguments.engine.allow_foreign,
    )
    text = WRITERS[form](rows)
    if output:
        write_file(output, [text.encode()])
    else:
        print_result(text, end="")
