"""`rgexport validate`: opens, runs, compares, judges and reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_new_files
from rgexport.files.targets import write_text
from rgexport.griffin.layout import float32_bytes
from rgexport.printing import print_result
from rgexport.progress import detail, expect_stages, group, note, task, warn
from rgexport.quantize.calibration import open_calibration
from rgexport.quantize.statistics import Calibrated, StatisticsOf, no_statistics
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.machine import available_bytes, environment, release_freed_memory
from rgexport.runtimes.session import SessionInfo
from rgexport.units import amount
from rgexport.validate import continuations
from rgexport.validate.bisect.sites import SiteReport, compare_sites, find_suspects
from rgexport.validate.checks import TENSOR_CHECKS, tolerance, with_limits
from rgexport.validate.costs import is_rounded, layer_costs, rounding_cost
from rgexport.validate.equivalences import Equivalence, compare_portable, longest_call
from rgexport.validate.identity import IdentityItem
from rgexport.validate.measure import Measurement, measure, token_text
from rgexport.validate.reference.against import AgainstFile, check_fits, compare_with_file
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.reference_pass import Pass, SharedPasses, run_reference
from rgexport.validate.report.page import render_page
from rgexport.validate.report.terminal import render
from rgexport.validate.result import (
    TextInfo,
    ValidationResult,
    all_checks,
    as_json,
    describe_artifact,
    describe_source,
    require_writable,
)
from rgexport.validate.source import OriginalModel, compare_identity, find_original
from rgexport.validate.structure.compare import compare_structure
from rgexport.validate.text import Text, choose_text
from rgexport.validate.weights.tensor_errors import weight_errors
from rgexport.validate.weights.weight_limits import reproduce


@dataclass(frozen=True, kw_only=True)
class ValidationRequest:
    """The options of `rgexport validate` for one artifact, as `api.validate` explains them."""

    model: str | None = None
    adapter: Path | None = None
    text: Path | None = None
    max_tokens: int | None = None
    reference: ReferenceFile | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    bisect: bool = False
    reproduce: bool = False
    calibration: Path | None = None
    min_quality: GradeName | None = None
    allow_foreign: bool = False


@dataclass(frozen=True, kw_only=True)
class OpenedArtifact:
    """An artifact and all that it is compared with; `statistics` are for `reproduce`."""

    path: Path
    request: ValidationRequest
    artifact: Artifact
    tokenizer: Tokenizer | None
    text: Text
    original: OriginalModel | None
    statistics: StatisticsOf | None
    identity: tuple[IdentityItem, ...]

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def has_native(self) -> bool:
        """Whether native kernels replace the functions that other runtimes run."""
        return engine_of(self.manifest.kind).has_native(self.artifact)

    @property
    def asks_original(self) -> bool:
        """Whether a small original continues prompts, as no reference file has any."""
        if self.tokenizer is None or self.original is None or self.request.reference is not None:
            return False
        return float32_bytes(self.original.checkpoint.config) <= continuations.SMALL_BYTES


def validate_artifacts(
    artifacts: Sequence[Path],
    request: ValidationRequest,
    *,
    json_file: Path | None = None,
    html_file: Path | None = None,
    prints_json: bool = False,
    allow_ambiguous: bool = False,
) -> int:
    """Validates artifacts, writes the report as JSON and HTML, and prints it, as text or as JSON.

    Returns 0 if all artifacts pass, or are AMBIGUOUS where that is allowed, and have the quality
    that was asked for; else 1. Raises what `validate_artifact` does.
    """
    for file in (json_file, html_file):
        if file is not None:
            require_writable(file)
    for path in artifacts[1:]:
        open_artifact(path)  # refuses a wrong one before the first one's work
    passes = SharedPasses()
    results = []
    for path in artifacts:
        if len(artifacts) > 1:
            note(f"{path}:")
        results.append(validate_artifact(path, request, passes))
    try:
        for file, content in ((json_file, as_json), (html_file, render_page)):
            if file is not None:
                write_text(content(results), file)
    finally:  # last, as a reader may leave after a few lines, like `head`; on a full disk, too
        print_result(f"{as_json(results)}\n" if prints_json else render(results), end="")
    enough = {"PASS", "AMBIGUOUS"} if allow_ambiguous else {"PASS"}
    return 0 if all(r.verdict in enough and r.good_enough for r in results) else 1


def validate_artifact(
    path: Path, request: ValidationRequest, passes: SharedPasses | None = None
) -> ValidationResult:
    """Compares an artifact with its dequantized reference, and with its original if that is known.

    The references run first, one layer at a time. Then the artifact's session opens, and when it
    is closed, the ops are compared one by one. `passes` are those of earlier artifacts' originals.

    Raises RequestError: see `open_all`; or the engine is missing or cannot open the artifact.
    """
    passes = passes or SharedPasses()
    opened = open_all(path, request)
    expect_stages(_stages(opened, passes))
    config, weights, tokens = opened.manifest.config, opened.artifact.weights, opened.text.tokens
    dequantized = run_reference("Running the dequantized reference", config, weights, tokens)
    original = None
    if opened.original is not None:
        original = passes.run_reference(opened.original.checkpoint, tokens)
    result = _compare(opened, dequantized, original)
    if not request.bisect:
        return result
    failed = [c for c in result.checks if c.kind in TENSOR_CHECKS and not c.passed]
    file, differences = result.reference, [*result.source.config_differences]
    differences += [] if file is None else file.config_differences
    suspects = find_suspects(result.sites, failed, list(dict.fromkeys(differences)))
    return replace(result, suspects=suspects)


def open_all(path: Path, request: ValidationRequest) -> OpenedArtifact:
    """Opens an artifact and everything that it is compared with, before anything runs.

    Raises RequestError: no sound artifact, an original or a reference that does not fit, an
    unreadable text, or a quality that is asked for without anything to grade it by.
    """
    if request.calibration is not None and not request.reproduce:
        raise RequestError("--calibration is for --reproduce; give both, or leave it out")
    artifact = open_artifact(path, allow_foreign=request.allow_foreign)
    manifest, config = artifact.manifest, artifact.manifest.config
    engine_of(manifest.kind).require_trusted(artifact)
    if request.reference is not None:
        check_fits(request.reference, manifest)
    tokenizer = open_tokenizer(artifact) if manifest.has_tokenizer else None
    options = request.text, request.max_tokens
    text = choose_text(tokenizer, config.vocab_size, config.window, *options)
    detail(f"Validating {artifact.path} on {len(text.tokens)} tokens ({text.name})")
    original, statistics = find_original(manifest, request.model, request.adapter), None
    if original is not None:
        statistics = _statistics(request, manifest, original) if request.reproduce else None
        if not original.same_files:
            folder = original.checkpoint.path
            warn(f"{folder} has other weight files than the artifact was made from")
        for difference in original.config_differences:
            warn(f"the configurations differ in {difference}")
    elif request.reproduce or request.reference is None:
        missing = f"the original ({manifest.source.name}) was not given"
        if request.reproduce:
            raise RequestError(f"--reproduce: {missing}; pass it with -m")
        if (least := request.min_quality) is not None:
            raise RequestError(f"--min-quality {least}: {missing}; pass it with -m, or --reference")
        warn(f"{missing}, so the cost of compression is not measured; pass it with -m")
    return OpenedArtifact(
        path=path,
        request=request,
        artifact=artifact,
        tokenizer=tokenizer,
        text=text,
        original=original,
        statistics=statistics,
        identity=compare_identity(artifact, tokenizer, original, request.reference),
    )


def _statistics(
    request: ValidationRequest, manifest: Manifest, original: OriginalModel
) -> StatisticsOf:
    if request.calibration is not None:
        calibration, checkpoint = open_calibration(request.calibration), original.checkpoint
        calibration.require_for(hash_new_files(checkpoint.weight_files.values()).values())
        return Calibrated(calibration, checkpoint.config)
    if manifest.weighted or any(scheme.needs_statistics for scheme in manifest.plan.values()):
        raise RequestError(
            "--reproduce: these levels were chosen by data; give the calibration that the export "
            "took with --calibration (an importance matrix cannot be given)"
        )
    return no_statistics


def _stages(opened: OpenedArtifact, passes: SharedPasses) -> int:
    request, original = opened.request, opened.original
    # The dequantized reference, the artifact over the text, the ops one by one, and the graph.
    count = 4 + opened.has_native
    if original is not None:
        count += 2 + request.bisect + request.reproduce  # its pass, its weights, each layer
        count -= passes.has(original.checkpoint, opened.text.tokens)
    if original is not None or request.reference is not None:
        count += is_rounded(opened.manifest)
    return count + opened.asks_original + (request.reference is not None)


def _compare(opened: OpenedArtifact, dequantized: Pass, original: Pass | None) -> ValidationResult:
    request, artifact, manifest = opened.request, opened.artifact, opened.manifest
    info, measured, against_file, answers = _use_session(opened, dequantized, original)
    equivalences = measured.equivalences
    if opened.has_native and (same := _portable(opened, measured, dequantized)):
        equivalences |= {"portable": same}
    text, count = opened.text, len(opened.text.tokens)
    tokens, cost, weights, reproduced, layers = text.tokens, None, None, None, None
    if original is not None or request.reference is not None:
        cost = rounding_cost(artifact, dequantized, original, tokens)
    if opened.original is not None and original is not None:
        source, stored = opened.original.checkpoint, artifact.weights
        mixtures, weighted = original.inputs, manifest.weighted
        weights = weight_errors(source.weights, stored, manifest.tensors, weighted, mixtures)
        if opened.statistics is not None:
            reproduced = reproduce(artifact, source.weights, opened.statistics)
        if request.bisect:
            layers = layer_costs(source.config, source.weights, stored, tokens)
    result = ValidationResult(
        artifact=describe_artifact(opened.path, opened.artifact),
        source=describe_source(manifest.source.name, opened.original),
        text=TextInfo(text.name, count, count / manifest.config.window, text.bytes, text.truncated),
        engine=info,
        dequantized=measured.comparisons[0],
        original=None if original is None else measured.comparisons[1],
        equivalences=equivalences,
        sites=_sites(opened, measured),
        weights=weights,
        cost=cost,
        reproduced=reproduced,
        layers=layers,
        suspects=None,
        reference=against_file,
        tolerance=tolerance(manifest),
        checks=[],
        environment=environment(),
        continuations=answers,
        min_quality=request.min_quality,
        structure=compare_structure(artifact, request.reference),
        identity=opened.identity,
    )
    checks = all_checks(result, manifest, measured.counted, request.limits)
    return replace(result, checks=list(with_limits(checks, request.limits)))


def _use_session(
    opened: OpenedArtifact, dequantized: Pass, original: Pass | None
) -> tuple[SessionInfo, Measurement, AgainstFile | None, list[continuations.Continuation] | None]:
    prompts = _continued_prompts(opened)
    spell = token_text(opened.tokenizer) if opened.tokenizer else None
    against_file = answers = None
    release_freed_memory()
    session = open_session(opened.artifact)
    measured = measure(
        session,
        opened.text.tokens,
        [dequantized] if original is None else [dequantized, original],
        text_bytes=opened.text.bytes,
        noise=tolerance(opened.manifest).rms,
        spell=spell,
        longest=longest_call(opened.manifest.config),
    )
    if (file := opened.request.reference) is not None:
        with group("Comparing with the reference file"):
            against_file = compare_with_file(session, opened.artifact, file)
    if spell is not None and prompts is not None:
        answers = list(continuations.compare(session, prompts, spell))
    return session.info, measured, against_file, answers


def _continued_prompts(opened: OpenedArtifact) -> list[continuations.ContinuedPrompt] | None:
    if opened.tokenizer is None:
        return None
    if opened.request.reference is not None:
        return continuations.read_prompts(opened.request.reference)
    if opened.original is None:
        return None
    checkpoint = opened.original.checkpoint
    if not opened.asks_original:
        size = amount(float32_bytes(checkpoint.config))
        note(
            f"answers are not compared: the original's weights take {size} in float32. "
            "`rgexport reference` makes a file that has its answers, for --reference"
        )
        return None
    return continuations.continue_prompts(checkpoint, opened.tokenizer)


def _portable(opened: OpenedArtifact, measured: Measurement, reference: Pass) -> Equivalence | None:
    release_freed_memory()
    engine = engine_of(opened.manifest.kind)
    needed, available = engine.portable_bytes(opened.manifest), available_bytes()
    if available is not None and needed > available:
        note(
            f"the bodies that other runtimes run were not run: it takes about {amount(needed)} of "
            f"memory, and {amount(available)} are free"
        )
        return None
    with task("Without native kernels"):
        session = open_session(opened.artifact, native=False)
        same = compare_portable(session, opened.text.tokens, reference, measured.ending)
        session.close()
    return same


def _sites(opened: OpenedArtifact, measured: Measurement) -> SiteReport | None:
    original, state = opened.original, measured.ending.chunk.state
    config = opened.manifest.config if original is None else original.checkpoint.config
    try:
        return compare_sites(opened.artifact, config, state, opened.text.tokens)
    except RequestError as error:
        note(f"the ops were not compared one by one: {error}")
        return None
