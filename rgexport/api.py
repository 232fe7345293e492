"""The Python API: each command's work as a function, with the same options and errors.

All functions raise RequestError where a command ends with exit code 2. They print progress to
stderr, unless `progress` is given: then they call it with the stage and how much of it is done.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_args

from rgexport import choices
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.format import format_of
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.export.exporter import exporter_of
from rgexport.export.request import algorithm_word, require_word
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.progress import Listener, heard_by, task
from rgexport.quantize.plan import load_plan, plan_bits
from rgexport.quantize.schemes.registry import Plan

if TYPE_CHECKING:
    from rgexport.evaluation.pieces import EvaluationRequest
    from rgexport.evaluation.report import Evaluation
    from rgexport.planning.plan_request import PlanReport
    from rgexport.validate.result import ValidationResult

Model = str | Path | Checkpoint
"""A folder, a `.pt` file, a hub id, a name such as `demo` or `2b`, or an opened checkpoint."""


class FormatOptions(TypedDict, total=False):
    """The options of single formats, named as on the command line; others take the defaults."""

    precision: str
    compute: choices.FloatPrecision
    block_size: int
    symmetric: bool
    embedding_precision: str
    profile: choices.Profile
    exact: bool
    genai_native: bool
    prefill_length: int
    all_logits: bool
    recurrent_state: choices.RecurrentState
    split: int | str
    type: str
    pure: bool
    tensor_types: Sequence[str]
    imatrix: str | Path


def export_model(
    model: Model,
    *,
    format: choices.FormatName = "onnx",
    output: str | Path | None = None,
    force: bool = False,
    check: bool = True,
    quality: choices.Quality | None = None,
    calibration: str | Path | None = None,
    plan: "str | Path | PlanReport | None" = None,
    cluster: str | None = None,
    progress: Listener | None = None,
    **options: Unpack[FormatOptions],
) -> Artifact:
    """Exports a checkpoint to ONNX, Core ML or GGUF, and returns the artifact.

    Args:
        model: see `Model`; `open_checkpoint` opens one with another window or an adapter.
        format: the format of the artifact.
        output: the folder (for GGUF the file) to write; by default named after model and precision.
        force: whether an earlier artifact at `output` is replaced.
        check: whether the artifact runs once and its weights are compared;
            `artifact.manifest.check` holds the outcome.
        quality: `fast` rounds to nearest, `default` searches scales, `best` uses a calibration.
        calibration: a file of `rgexport calibrate`.
        plan: a plan of `quantize_model`, or its file.
        cluster: the address of a Dask scheduler, whose workers help with a calibration.
        progress: called with the stage, and the number of units done and expected.
        options: see `FormatOptions`.

    Raises:
        RequestError: an unsound checkpoint, a target that exists, or an option that does not fit.
    """
    with heard_by(progress):
        return export_checkpoint(
            partial(_opened, model),
            format,
            options,
            output=_path(output),
            force=force,
            check=check,
            quality=quality,
            calibration=_path(calibration),
            plan=_path(plan),
            cluster=cluster,
        )


def validate_artifact(
    artifact: str | Path | Artifact,
    model: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    text: str | Path | None = None,
    max_tokens: int | None = None,
    limits: Mapping[str, float] | None = None,
    bisect: bool = False,
    reproduce: bool = False,
    calibration: str | Path | None = None,
    min_quality: choices.GradeName | None = None,
    allow_foreign: bool = False,
    progress: Listener | None = None,
) -> "ValidationResult":
    """Compares an artifact with the reference; the result has `verdict`, `quality` and `checks`.

    Args:
        artifact: a folder or file of an export, or a hub id.
        model: the original, a folder, a `.pt` file or a hub id, to measure what compression cost.
        reference: a file of `rgexport reference`, instead of `model`.
        adapter: the folder of a LoRA adapter to merge into `model`.
        text: a UTF-8 file to compare on; by default a built-in text.
        max_tokens: the number of tokens to compare, at most.
        limits: name of a check → another limit, such as `{"original.kl": 0.05}`.
        bisect: whether layers are ranked by cost, and suspects named.
        reproduce: whether the original's weights are encoded again.
        calibration: the file that the export was made with, for `reproduce`.
        min_quality: the lowest grade at which `result.good_enough` is true.
        allow_foreign: whether ONNX graphs with ops that rgexport does not write may run.
        progress: called with the stage, and the number of units done and expected.

    Raises:
        RequestError: a damaged artifact, or an original, text or reference that does not fit.
    """
    from rgexport.validate import run
    from rgexport.validate.checks import GRADE_NAMES, parse_limits
    from rgexport.validate.opening import ValidationRequest
    from rgexport.validate.reference.reference_file import read_reference

    if isinstance(artifact, list | tuple):
        raise RequestError(f"artifact is a {type(artifact).__name__}; validate one at a time")
    if min_quality is not None:
        require_word("min_quality", min_quality, GRADE_NAMES)

    model_name = None
    if model is not None:
        model_name = str(model)
    captured_reference = None
    if reference is not None:
        captured_reference = read_reference(Path(reference))
    limits = limits or {}
    request = ValidationRequest(
        model=model_name,
        adapter=_path(adapter),
        text=_path(text),
        max_tokens=max_tokens,
        reference=captured_reference,
        limits=parse_limits(f"{name}={limit}" for name, limit in limits.items()),
        bisect=bisect,
        reproduce=reproduce,
        calibration=_path(calibration),
        min_quality=min_quality,
        allow_foreign=allow_foreign,
    )

    with heard_by(progress):
        return run.validate_artifact(Path(artifact), request)


class EvaluationSettings(TypedDict, total=False):
    """The settings of single suites, named as on the command line; others take the defaults."""

    texts: Sequence[str | Path]
    limit: int
    context: int
    stride: int
    trials: int
    farthest: int
    seed: int
    length: int
    state: str | Path
    tasks: Sequence[str]
    task_files: str | Path
    examples: int


def evaluate_models(
    models: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    suites: choices.SuiteName | Sequence[choices.SuiteName] = (),
    output: str | Path = "evaluation",
    threads: int | None = None,
    cluster: str | None = None,
    allow_foreign: bool = False,
    progress: Listener | None = None,
    **settings: Unpack[EvaluationSettings],
) -> "Evaluation":
    """Measures the abilities of models, and compares each model with the first one.

    Args:
        models: artifacts of any format, or checkpoints, which run in the float32 reference.
        suites: by default `text`, `memory` and `noise`.
        output: the folder of the results; an interrupted evaluation goes on from there.
        threads: the number of threads.
        cluster: the address of a Dask scheduler, whose workers share the work.
        allow_foreign: whether ONNX graphs with ops that rgexport does not write may run.
        progress: called with the stage, and the number of units done and expected.
        settings: see `EvaluationSettings`.

    Raises:
        RequestError: no such suite, or a model or text that cannot be evaluated.
    """
    from rgexport.evaluation.models import open_models
    from rgexport.evaluation.report import Evaluation, write_files
    from rgexport.evaluation.run import evaluate as run_suites
    from rgexport.evaluation.run import requested_suites
    from rgexport.runtimes.cluster import connected

    if isinstance(models, str | PathLike):
        models = [models]
    if isinstance(suites, str):
        suites = [suites]
    for name in suites:
        require_word("suite", name, get_args(choices.SuiteName))
    request = _evaluation_request(settings, Path(output))

    with heard_by(progress), connected(cluster) as workers:
        opened = open_models([fspath(model) for model in models], allow_foreign=allow_foreign)
        names = requested_suites(suites, request.tasks)
        figures = run_suites(opened, names, request, threads=threads, workers=workers)
    write_files(figures, request.folder)
    return Evaluation(figures, request.folder)


def _evaluation_request(settings: EvaluationSettings, folder: Path) -> "EvaluationRequest":
    """Returns the request of an evaluation into `folder`, with paths and tuples in its fields."""
    from rgexport.evaluation.pieces import EvaluationRequest

    fields: dict[str, Any] = dict(settings)
    for name in ("state", "task_files"):
        if name in fields:
            fields[name] = Path(fields[name])
    fields["texts"] = tuple(Path(text) for text in fields.get("texts", ()))
    fields["tasks"] = tuple(fields.get("tasks", ()))
    fields["folder"] = folder
    return EvaluationRequest(**fields)


def quantize_model(
    model: Model,
    *,
    bits: float | None = None,
    target_kl: float | None = None,
    target_size: str | float | None = None,
    format: choices.FormatName = "onnx",
    calibration: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = 16384,
    cluster: str | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Listener | None = None,
) -> "PlanReport":
    """Finds the best layout of every tensor for one target; `export_model` takes it as `plan`.

    Args:
        model: see `Model`.
        bits: the plan's limit in bits per weight; scales and zero points count.
        target_kl: the plan's limit in KL divergence, in nats per token.
        target_size: the artifact's limit, in bytes or as `1.5GB`.
        format: the format of the export.
        calibration: a file of `rgexport calibrate`; by default `./MODEL.calibration`, which is made
            if it is missing.
        text: the file to measure the plan on; by default the text that the calibration held out.
        tokens: the number of tokens to measure on, at most.
        cluster: the address of a Dask scheduler, whose workers help.
        output: the file to write; by default `./MODEL-FORMAT-TARGET.plan.json`.
        force: whether an earlier plan at `output` is replaced.
        progress: called with the stage, and the number of units done and expected.

    Raises:
        RequestError: not exactly one target, one out of reach, or a calibration of another model.
    """
    from rgexport.planning.plan_request import PlanOptions, make_plans
    from rgexport.runtimes.cluster import connected

    options = PlanOptions(
        calibration=_path(calibration),
        target_kl=target_kl,
        target_size=target_size,
        bits=bits,
        format=format,
        text=_path(text),
        tokens=tokens,
    )
    with heard_by(progress), connected(cluster) as workers:
        checkpoint = _opened(model)
        plans = make_plans(checkpoint, [options], _path(output), force=force, workers=workers)
        return plans[0]


def export_checkpoint(
    open_model: Callable[[], Checkpoint],
    kind: choices.FormatName,
    options: Mapping[str, object],
    *,
    output: Path | None,
    force: bool,
    check: bool,
    quality: choices.Quality | None,
    calibration: Path | None,
    plan: Path | None,
    cluster: str | None,
) -> Artifact:
    """Exports the checkpoint that `open_model` opens.

    Checks that need no checkpoint come first, so that a wrong request ends before a download. The
    other arguments are those of `export_model`.
    """
    form = format_of(kind)
    if output:
        form.check_target(output, force=force)
    algorithm = algorithm_word(quality, calibration, plan)

    checkpoint = open_model()
    with task("Loading the exporter"):
        exporter = exporter_of(kind)  # imports torch, after the checks that may fail
    exporter.require_options(kind, options)
    schemes = None
    if plan:
        schemes = load_plan(plan, checkpoint.config)
    format_options = exporter.make_options(**options, plan=schemes, algorithm=algorithm)

    target = output
    if not target:
        name = checkpoint.name
        if schemes:
            name += f"-{plan_bits(schemes, checkpoint.config):.3g}bit"
        target = exporter.default_target(name, format_options)
    write = partial(exporter.export, checkpoint, format_options, target, force=force)
    if check:
        from rgexport.validate.self_check import self_check

        write = partial(write, check=partial(self_check, checkpoint))

    if calibration or _needs_statistics(algorithm, schemes):
        from rgexport.planning.calibrate import known_statistics

        form.check_target(target, force=force)  # before a calibration, which takes minutes
        with known_statistics(checkpoint, calibration, cluster) as statistics:
            path = write(statistics=statistics)
            return open_artifact(path)
    if cluster is not None:
        raise RequestError("--cluster is for --quality best or --calibration; leave it out")
    path = write()
    return open_artifact(path)


def _needs_statistics(algorithm: str | None, plan: Plan | None) -> bool:
    """Returns whether an export with this algorithm, or with a plan's own ones, needs statistics.

    An `algorithm` replaces the algorithms of the plan.
    """
    if algorithm is not None:
        return algorithm == "gptq"
    if plan is None:
        return False
    return any(scheme.needs_statistics for scheme in plan.values())


def _opened(model: Model) -> Checkpoint:
    if isinstance(model, Checkpoint):
        return model
    return open_checkpoint(model)


def _path(path: str | PathLike[str] | None) -> Path | None:
    if path is None:
        return None
    return Path(path)
