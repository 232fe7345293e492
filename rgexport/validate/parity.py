"""`rgexport validate`: is this artifact right, and what did compression cost?"""

from importlib.util import find_spec
from pathlib import Path

from rgexport.export.artifact import Artifact
from rgexport.progress import note, warn
from rgexport.runtimes.engines import open_session, open_tokenizer
from rgexport.runtimes.environment import environment
from rgexport.validate import thresholds
from rgexport.validate.against import check_fits, compare_with_file, file_checks
from rgexport.validate.file_report import render_file
from rgexport.validate.measure import measure
from rgexport.validate.reference_file import ReferenceFile
from rgexport.validate.reference_reader import read_reference
from rgexport.validate.report import render
from rgexport.validate.result import (
    FileResult,
    Result,
    SourceInfo,
    describe_artifact,
    describe_text,
    make_checks,
    require_writable,
    write_json,
)
from rgexport.validate.source import Original, find_original
from rgexport.validate.teacher import Pass, teach, torch_reference
from rgexport.validate.text import MAX_TOKENS, Text, choose_text
from rgexport.validate.weights import WeightError, weight_errors


def validate_artifact(
    artifact: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    tokens: int | None = None,
    json_file: Path | None = None,
    device: str = "auto",
    reference: Path | None = None,
) -> int:
    """Prints the report and writes it as JSON; returns 0 if the artifact passes, else 1.

    With a reference file, it is compared with that too; only with that where there is no torch.

    Raises:
        RequestError: see `compare` and `against.compare_with_file`; or `json_file` cannot be
            written.
    """
    if json_file is not None:
        require_writable(json_file)
    file = None if reference is None else read_reference(reference)
    result: Result | FileResult
    if file is not None and find_spec("torch") is None:
        result = compare_without_torch(artifact, file)
    else:
        result = compare(
            artifact, model=model, text=text, max_tokens=tokens, device=device, reference=file
        )
    print(render(result) if isinstance(result, Result) else render_file(result))
    if json_file is not None:
        write_json(result, json_file)
    return 0 if result.passed else 1


def compare(
    path: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    reference: ReferenceFile | None = None,
) -> Result:
    """Compares an artifact with its twin and, where it can be found, with its original.

    The references run first, one layer at a time; then the artifact's session opens.

    Args:
        path: the artifact.
        model: the original, a folder or hub id; by default the demo, if it was made from that.
        text: a UTF-8 file to compare on; by default the built-in text, or random token ids
            where the artifact has no tokenizer.
        max_tokens: how much of the text is used; by default up to `text.MAX_TOKENS`.
        device: where torch runs the references; `auto` is CUDA where there is one.
        reference: what an original said, to compare with too.

    Raises:
        RequestError: no sound artifact, no torch, an original or a reference that does not fit,
            or an unreadable text.
    """
    make = torch_reference(device)
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    if reference is not None:
        check_fits(reference, manifest)
    chosen = _choose_text(artifact, text, MAX_TOKENS if max_tokens is None else max_tokens)
    original = find_original(manifest, model)
    _announce(artifact, original, chosen, reference)

    weights = artifact.weights
    twin = teach("Running the twin", make, manifest.config, weights, chosen.tokens)
    taught: Pass | None = None
    table: list[WeightError] | None = None
    if original is not None:
        source = original.checkpoint
        taught = teach("Running the original", make, source.config, source.weights, chosen.tokens)
        table = weight_errors(source.weights, weights, manifest.tensors, weighted=manifest.weighted)
    session = open_session(artifact)
    measured = measure(session, chosen.tokens, twin, taught, chosen.bytes)
    held = None if reference is None else compare_with_file(session, manifest, reference)
    checks = [*make_checks(manifest, measured, table)]
    if held is not None:
        checks += file_checks(held, manifest)
    return Result(
        artifact=describe_artifact(path, manifest),
        source=_describe_source(manifest.source.name, original),
        text=describe_text(chosen, manifest.config.window),
        engine=session.info,
        twin=measured.twin,
        original=measured.original,
        steps=measured.steps,
        weights=table,
        tolerance=thresholds.tolerance(manifest),
        checks=checks,
        environment=environment(),
        reference=held,
    )


def compare_without_torch(path: Path, file: ReferenceFile) -> FileResult:
    """Compares an artifact with a reference file alone.

    Raises:
        RequestError: no sound artifact, or one that does not fit the reference.
    """
    note("torch is not installed, so the twin is left out: pip install 'rgexport[export]'")
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    check_fits(file, manifest)
    session = open_session(artifact)
    found = compare_with_file(session, manifest, file)
    return FileResult(
        artifact=describe_artifact(path, manifest),
        engine=session.info,
        reference=found,
        checks=list(file_checks(found, manifest)),
        environment=environment(),
    )


def _choose_text(artifact: Artifact, file: Path | None, max_tokens: int) -> Text:
    config = artifact.manifest.config
    return choose_text(
        open_tokenizer(artifact) if artifact.manifest.has_tokenizer else None,
        vocab_size=config.vocab_size,
        window=config.window,
        file=file,
        limit=max_tokens,
    )


def _announce(
    artifact: Artifact, original: Original | None, text: Text, reference: ReferenceFile | None
) -> None:
    note(f"Validating {artifact.path} on {len(text.tokens)} tokens ({text.name})")
    if original is None and reference is not None:
        return
    if original is None:
        warn(
            f"the original ({artifact.manifest.source.name}) was not given, so the cost of "
            "compression is not measured; pass it with -m"
        )
        return
    if not original.same_files:
        warn(f"{original.checkpoint.path} has other weight files than the artifact was made from")
    for difference in original.config_differences:
        warn(f"the configurations differ in {difference}")


def _describe_source(made_from: str, original: Original | None) -> SourceInfo:
    if original is None:
        return SourceInfo(made_from, found=False)
    return SourceInfo(
        made_from,
        found=True,
        path=str(original.checkpoint.path),
        same_files=original.same_files,
        config_differences=original.config_differences,
    )
