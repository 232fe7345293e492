"""The Python API: each command's work as a function, with the same options and errors.

All functions raise RequestError where a command ends with exit code 2. They print progress to
stderr unless `progress` is given, which is then called with the stage, and how much of it is done.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from rgexport.choices import FloatPrecision, FormatName, GradeName, Profile, Quality, RecurrentState
from rgexport.errors import RequestError
from rgexport.exporters.artifact import Artifact
from rgexport.exporters.exporter import exporter_of
from rgexport.exporters.opening import open_artifact
from rgexport.exporters.request import algorithm_word
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.progress import Listener, heard_by
from rgexport.quantization.plan import load_plan
from rgexport.validation.checks import parse_limits
from rgexport.validation.reference.reference_file import read_reference
from rgexport.validation.result import ValidationResult
from rgexport.validation.run import ValidationRequest, validate_artifact
from rgexport.validation.self_check import self_check

Model = str | Path | Checkpoint
"""A folder, a `.pt` file, a hub id, a name such as `demo` or `2b`, or an opened checkpoint."""


class FormatOptions(TypedDict, total=False):
    """The options of single formats, named as on the command line; others take the defaults."""

    precision: str
    compute: FloatPrecision
    block_size: int
    symmetric: bool
    embedding_precision: str
    profile: Profile
    exact: bool
    genai_native: bool
    prefill_length: int
    all_logits: bool
    recurrent_state: RecurrentState
    split: int | str
    type: str
    pure: bool
    tensor_types: Sequence[str]
    imatrix: str | Path


def export(
    model: Model,
    *,
    format: FormatName = "onnx",
    output: str | Path | None = None,
    force: bool = False,
    check: bool = True,
    quality: Quality | None = None,
    calibration: str | Path | None = None,
    plan: str | Path | None = None,
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
        check: whether the artifact runs once and its weights are compared; the outcome is
            `artifact.manifest.check`.
        quality: `fast` rounds to nearest, `default` searches scales, `best` uses a calibration.
        calibration: a file of `rgexport calibrate`.
        plan: a file of `rgexport quantize`.
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


def validate(
    artifact: str | Path | Artifact,
    model: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    text: str | Path | None = None,
    max_tokens: int | None = None,
    limits: Mapping[str, float] | None = None,
    bisect: bool = False,
    bench: bool = False,
    reproduce: bool = False,
    calibration: str | Path | None = None,
    min_quality: GradeName | None = None,
    allow_foreign: bool = False,
    progress: Listener | None = None,
) -> ValidationResult:
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
        bench: whether tokens per second are measured.
        reproduce: whether the original's weights are encoded again.
        calibration: the file that the export was made with, for `reproduce`.
        min_quality: the lowest grade at which `result.good_enough` is true.
        allow_foreign: whether ONNX graphs with ops that rgexport does not write may run.
        progress: called with the stage, and the number of units done and expected.

    Raises:
        RequestError: a damaged artifact, or an original, text or reference that does not fit.
    """
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    request = ValidationRequest(
        model=None if model is None else str(model),
        adapter=_path(adapter),
        text=_path(text),
        max_tokens=max_tokens,
        reference=None if reference is None else read_reference(Path(reference)),
        limits=parse_limits(f"{name}={limit}" for name, limit in (limits or {}).items()),
        bisect=bisect,
        bench=bench,
        reproduce=reproduce,
        calibration=_path(calibration),
        min_quality=min_quality,
        allow_foreign=allow_foreign,
    )
    with heard_by(progress):
        return validate_artifact(path, request)


def export_checkpoint(
    open_model: Callable[[], Checkpoint],
    kind: FormatName,
    options: Mapping[str, object],
    *,
    output: Path | None,
    force: bool,
    check: bool,
    quality: Quality | None,
    calibration: Path | None,
    plan: Path | None,
    cluster: str | None,
) -> Artifact:
    """Exports the checkpoint that `open_model` opens, after the checks that need none.

    The other arguments are those of `export`.
    """
    exporter = exporter_of(kind)
    if output:
        exporter.check_target(output, force=force)  # before the model is downloaded
    algorithm = algorithm_word(quality, calibration, plan)
    exporter.require_options(kind, options)
    checkpoint = open_model()
    schemes = load_plan(plan, checkpoint.config) if plan else None
    chosen = exporter.make_options(**options, plan=schemes, algorithm=algorithm)
    target = output or exporter.default_target(checkpoint.name, chosen)
    write = partial(exporter.export, checkpoint, chosen, target, force=force)
    write = partial(write, check=partial(self_check, checkpoint) if check else None)
    if algorithm == "gptq" or calibration:
        from rgexport.compress.calibrate import known_statistics

        exporter.check_target(target, force=force)  # before a calibration, which takes minutes
        with known_statistics(checkpoint, calibration, cluster) as statistics:
            return open_artifact(write(statistics=statistics))
    if cluster is not None:
        raise RequestError("--cluster is for --quality best or --calibration; leave it out")
    return open_artifact(write())


def _opened(model: Model) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
