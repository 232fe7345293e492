"""Commands that inspect, validate, evaluate and time models."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rgexport.choices import (
    GradeName,
    ReferenceImplementation,
    SizeName,
    SuiteName,
    TableFormat,
)
from rgexport.commands.options import (
    CheckpointArguments,
    ClusterArguments,
    ForeignArguments,
    NativeArguments,
    ThreadsArguments,
    argument,
    command,
    group,
    option,
)
from rgexport.printing import print_result

_SUITES = get_args(SuiteName)


@dataclass(frozen=True)
class InspectArguments:
    path: str | None = argument(metavar="MODEL-or-ARTIFACT")
    size: SizeName | None = option(
        "--size", help="Instead: a released model (may download it), or the demo."
    )
    json: bool = option("--json", help="Print JSON.")
    verify: bool = option("--verify", help="Read every byte: values, or hashes.")


@command(InspectArguments)
def inspect(arguments: InspectArguments) -> int:
    """Shows what a checkpoint, an artifact or a .mlpackage holds, and all that is wrong with it.

    The exit code is 1 where a checkpoint or a package has problems.
    """
    from rgexport.export.describe import as_json, as_text, describe

    description = describe(arguments.path, size=arguments.size, verify=arguments.verify)
    print_result((as_json if arguments.json else as_text)(description), end="")
    return 1 if description.get("problems") else 0


@dataclass(frozen=True)
class ReferenceArguments:
    checkpoint: CheckpointArguments = group(CheckpointArguments)
    device: str = option("--device", default="auto", metavar="auto|cuda|cpu")
    impl: ReferenceImplementation = option(
        "--impl",
        default="rgexport",
        help="What computes the reference: rgexport, or DeepMind's package.",
    )
    low_memory: bool = option(
        "--low-memory", help="Hold one layer's weights at a time, even if all fit."
    )
    prompts: Path | None = option(
        "--prompts", help="Lines of text, or a JSON list. [default: built in]"
    )
    output: Path | None = option("-o", "--output", help="The file. [default: ./MODEL.reference]")
    force: bool = option("--force", help="Replace an earlier one.")


@command(ReferenceArguments)
def reference(arguments: ReferenceArguments) -> None:
    """Captures what the full-precision model computes, to validate artifacts without it.

    With the file, `rgexport validate --reference` does not need the model.
    """
    from rgexport.validate.reference.capture import capture, closing_line

    checkpoint = arguments.checkpoint.open()
    captured = capture(
        checkpoint,
        arguments.output or Path(f"{checkpoint.name}.reference"),
        prompts=arguments.prompts,
        device=arguments.device,
        impl=arguments.impl,
        low_memory=arguments.low_memory,
        force=arguments.force,
    )
    print_result(closing_line(captured))


@dataclass(frozen=True)
class ValidateArguments:
    artifacts: tuple[Path, ...] = argument(metavar="ARTIFACT...", required=True)
    reference: Path | None = option(
        "--reference", help="A file of `rgexport reference`, used instead of the original."
    )
    model: str | None = option(
        "-m",
        "--model",
        help="The original, to measure the cost. [default: the demo, or the hub cache's copy]",
    )
    adapter: Path | None = option(
        "--adapter", help="The folder of a LoRA adapter (PEFT) to merge into the model."
    )
    text: Path | None = option("--text", help="Compare on this text. [default: built in]")
    max_tokens: int | None = option(
        "--tokens", least=2, help="How many of its tokens, such as 32768."
    )
    limits: tuple[str, ...] = option(
        "--limit",
        metavar="NAME=VALUE",
        help="Another limit for a check, such as original.kl=0.05. Can be repeated.",
    )
    bisect: bool = option("--bisect", help="Also rank the layers by cost, and name suspects.")
    bench: bool = option("--bench", help="Also measure tokens per second.")
    reproduce: bool = option(
        "--reproduce", help="Encode the original's weights again; every level must agree."
    )
    calibration: Path | None = option(
        "--calibration", help="With --reproduce: what the weights were encoded with."
    )
    allow_ambiguous: bool = option(
        "--allow-ambiguous", help="Exit code 0 also if the verdict is AMBIGUOUS."
    )
    min_quality: GradeName | None = option(
        "--min-quality",
        metavar="GRADE",
        help="Exit code 1 also if the quality is lower: lossless, excellent, good or fair.",
    )
    json_file: Path | None = option("--json", help="Also write the result to this file.")
    html_file: Path | None = option("--html", help="Also write an HTML report.")
    engine: NativeArguments = group(NativeArguments)


@command(ValidateArguments)
def validate(arguments: ValidateArguments) -> int:
    """Compares artifacts with the reference: exit code 0 if all pass, 1 if one does not.

    There are two verdicts. PASS or FAIL says whether the export is correct; it is AMBIGUOUS if a
    limit lies within the error margin of the measured value. A grade says how close the answers are
    to the original's. Several artifacts, of any formats, are shown in one table.
    """
    from rgexport.validate.run import ValidationRequest, validate_artifacts

    request = ValidationRequest(
        model=arguments.model,
        adapter=arguments.adapter,
        text=arguments.text,
        max_tokens=arguments.max_tokens,
        bisect=arguments.bisect,
        bench=arguments.bench,
        reproduce=arguments.reproduce,
        calibration=arguments.calibration,
        min_quality=arguments.min_quality,
        allow_foreign=arguments.engine.allow_foreign,
    )
    return validate_artifacts(
        arguments.artifacts,
        request,
        reference=arguments.reference,
        json_file=arguments.json_file,
        html_file=arguments.html_file,
        limits=arguments.limits,
        allow_ambiguous=arguments.allow_ambiguous,
    )


@dataclass(frozen=True)
class EvaluateArguments:
    models: tuple[str, ...] = argument(metavar="MODEL...", required=True)
    suites: tuple[SuiteName, ...] = option(
        "--suite",
        metavar="NAME",
        help=f"{', '.join(_SUITES[:-1])} or {_SUITES[-1]}. [default: the first three]",
    )
    output: Path = option(
        "-o",
        "--output",
        default=Path("evaluation"),
        help="Folder of the results; an interrupted evaluation goes on from there.",
    )
    texts: tuple[Path, ...] = option("--text", help="File or folder. [default: built in]")
    limit: int | None = option(
        "--limit", least=2, help="Maximum number of tokens of a document in text."
    )
    context: int = option(
        "--context",
        least=4,
        default=512,
        help="Tokens of a chunk, for the perplexity that llama-perplexity reports.",
    )
    stride: int | None = option(
        "--stride",
        least=1,
        help="Also read texts in overlapping chunks of --context; tokens from one to the next.",
    )
    trials: int = option("--trials", least=2, default=32, help="Episodes of each task of memory.")
    farthest: int | None = option(
        "--farthest",
        least=32,
        help="Maximum number of tokens to remember over. [default: 4 windows]",
    )
    seed: int = option(
        "--seed", least=0, default=0, help="Seed of the random choices in memory, noise and tasks."
    )
    length: int = option("--length", least=2, default=1 << 15, help="Tokens of length.")
    state: Path | None = option("--state", help="State file that length goes on from.")
    tasks: tuple[str, ...] = option("--task", metavar="NAME", help="Task of lm_eval for tasks.")
    task_files: Path | None = option("--task-files", help="Folder of task files of lm_eval.")
    examples: int | None = option(
        "--examples", least=1, help="Maximum number of examples of a task."
    )
    threads: ThreadsArguments = group(ThreadsArguments)
    cluster: ClusterArguments = group(ClusterArguments)
    engine: ForeignArguments = group(ForeignArguments)


@command(EvaluateArguments)
def evaluate(arguments: EvaluateArguments) -> None:
    """Measures what models can do: texts, memory, windows, a million tokens, benchmarks.

    MODEL is an artifact of any format, a checkpoint, or `demo`. All models are compared with the
    first one.
    """
    from rgexport.evaluate.models import open_models
    from rgexport.evaluate.pieces import EvaluationRequest
    from rgexport.evaluate.report import JSON, as_text, write_files
    from rgexport.evaluate.run import evaluate as run
    from rgexport.evaluate.run import requested_suites
    from rgexport.runtimes.cluster import connected

    output = arguments.output
    names = requested_suites(arguments.suites, arguments.tasks)
    request = EvaluationRequest(
        folder=output,
        texts=arguments.texts,
        limit=arguments.limit,
        context=arguments.context,
        stride=arguments.stride,
        trials=arguments.trials,
        farthest=arguments.farthest,
        length=arguments.length,
        state=arguments.state,
        tasks=arguments.tasks,
        task_files=arguments.task_files,
        examples=arguments.examples,
        seed=arguments.seed,
    )
    models = open_models(arguments.models, allow_foreign=arguments.engine.allow_foreign)
    with connected(arguments.cluster.cluster) as workers:
        results = run(models, names, request, threads=arguments.threads.threads, workers=workers)
    print_result(as_text(results), end="")
    print_result(f"{write_files(results, output)} has the curves, {output / JSON} all figures.")


@dataclass(frozen=True)
class BenchArguments:
    artifact: Path = argument()
    n_prompt: str = option("-p", "--n-prompt", default="512", help="Lengths of prompts.")
    n_gen: str = option("-n", "--n-gen", default="128", help="Numbers of tokens to generate.")
    n_depth: str = option(
        "-d", "--n-depth", default="0", help="Tokens processed before the measurement."
    )
    repetitions: int = option("-r", "--repetitions", least=1, default=5)
    synthetic: bool = option(
        "--synthetic", help="Fill the state with random values instead: quick, same cost per token."
    )
    threads: int | None = option(
        "-t", "--threads", least=1, most=256, help="[default and maximum: one per usable processor]"
    )
    form: TableFormat = option("-o", "--output", default="table")
    engine: NativeArguments = group(NativeArguments)


@command(BenchArguments)
def bench(arguments: BenchArguments) -> None:
    """Measures tokens per second, and how fast the machine reads memory.

    -p, -n and -d take lists such as 128,512; a length of 0 is left out.
    """
    from rgexport.runtimes.bench.measure import WRITERS, BenchRequest, bench_artifact

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
        threads=arguments.threads,
        allow_foreign=arguments.engine.allow_foreign,
    )
    print_result(WRITERS[arguments.form](rows), end="")
