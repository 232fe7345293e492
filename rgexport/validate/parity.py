"""`rgexport validate`: is this artifact right, and what did compression cost?"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.progress import note, warn
from rgexport.runtimes.engines import open_session, open_tokenizer
from rgexport.runtimes.environment import environment
from rgexport.validate import thresholds
from rgexport.validate.against import check_fits, compare_with_file, file_checks
from rgexport.validate.file_report import render_file
from rgexport.validate.measure import measure
from rgexport.validate.page import write_html
from rgexport.validate.positions import speller
from rgexport.validate.reference_file import ReferenceFile
from rgexport.validate.reference_reader import read_reference
from rgexport.validate.report import render, render_several
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
from rgexport.validate.teacher import Pass, SharedPasses, teach, torch_reference
from rgexport.validate.text import MAX_TOKENS, Text, choose_text
from rgexport.validate.weights import WeightError, weight_errors


def validate_artifacts(
    artifacts: Sequence[Path],
    *,
    model: str | None = None,
    text: Path | None = None,
    tokens: int | None = None,
    json_file: Path | None = None,
    html_file: Path | None = None,
    device: str = "auto",
    reference: Path | None = None,
) -> int:
    """Writes the report as JSON and HTML and prints it; returns 0 if all artifacts pass, else 1.

    With a reference file, it is compared with that too; only with that where there is no torch.

    Raises:
        RequestError: see `compare` and `compare_without_torch`; or a file cannot be written.
    """
    for file in (json_file, html_file):
        if file is not None:
            require_writable(file)
    for path in artifacts[1:]:
        Artifact.open(path)  # what is wrong with a later one is told before the first one's work
    recorded = None if reference is None else read_reference(reference)
    if recorded is not None and find_spec("torch") is None:
        return _validate_without_torch(artifacts, recorded, json_file, html_file)
    passes = SharedPasses()
    results = [
        compare(
            path,
            model=model,
            text=text,
            max_tokens=tokens,
            device=device,
            reference=recorded,
            passes=passes,
        )
        for path in artifacts
    ]
    if json_file is not None:
        write_json(results, json_file)
    if html_file is not None:
        write_html(results, html_file)
    # Last: who reads it may leave after a few lines, as `head` does.
    print(render(results[0]) if len(results) == 1 else render_several(results))
    return 0 if all(result.passed for result in results) else 1


def _validate_without_torch(
    artifacts: Sequence[Path], file: ReferenceFile, json_file: Path | None, html_file: Path | None
) -> int:
    if html_file is not None:
        raise RequestError(
            f"the page {html_file} shows the twin, which takes torch: pip install "
            "'rgexport[export]', or leave out --html"
        )
    note("torch is not installed, so the twin is left out: pip install 'rgexport[export]'")
    results = [compare_without_torch(path, file) for path in artifacts]
    if json_file is not None:
        write_json(results, json_file)
    for result in results:
        print(render_file(result))
    return 0 if all(result.passed for result in results) else 1


def compare(
    path: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    reference: ReferenceFile | None = None,
    passes: SharedPasses | None = None,
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
        passes: those of originals that ran before, for other artifacts.

    Raises:
        RequestError: no sound artifact, no torch, an original or a reference that does not fit,
            or an unreadable text.
    """
    make = torch_reference(device)
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    if reference is not None:
        check_fits(reference, manifest)
    tokenizer = open_tokenizer(artifact) if manifest.has_tokenizer else None
    chosen = choose_text(
        tokenizer,
        vocab_size=manifest.config.vocab_size,
        window=manifest.config.window,
        file=text,
        limit=MAX_TOKENS if max_tokens is None else max_tokens,
    )
    original = find_original(manifest, model)
    _announce(artifact, original, chosen, reference)

    weights = artifact.weights
    twin = teach("Running the twin", make, manifest.config, weights, chosen.tokens)
    taught: Pass | None = None
    table: list[WeightError] | None = None
    if original is not None:
        source = original.checkpoint
        taught = (passes or SharedPasses()).teach(make, source, chosen.tokens)
        table = weight_errors(source.weights, weights, manifest.tensors, weighted=manifest.weighted)
    session = open_session(artifact)
    limit = thresholds.tolerance(manifest)
    measured = measure(
        session,
        chosen.tokens,
        twin,
        taught,
        chosen.bytes,
        noise=limit.rms,
        spell=speller(tokenizer) if tokenizer else None,
    )
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
        tolerance=limit,
        checks=checks,
        environment=environment(),
        reference=held,
    )


def compare_without_torch(path: Path, file: ReferenceFile) -> FileResult:
    """Compares an artifact with a reference file alone.

    Raises:
        RequestError: no sound artifact, or one that does not fit the reference.
    """
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
