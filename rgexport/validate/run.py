"""`rgexport validate`: opens, runs, compares, judges and reports."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.files.targets import write_text
from rgexport.griffin.layout import float32_bytes
from rgexport.printing import print_result
from rgexport.progress import expect_stages, group, note, task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.machine import available_bytes, environment, release_freed_memory
from rgexport.runtimes.session import SessionInfo
from rgexport.units import amount
from rgexport.validate import continuations
from rgexport.validate.bisect.site_report import SiteReport, compare_sites
from rgexport.validate.bisect.suspects import find_suspects
from rgexport.validate.checks import TENSOR_CHECKS, tolerance, with_limits
from rgexport.validate.continuations import Continuation, ContinuedPrompt
from rgexport.validate.costs import (
    LayerCost,
    RoundingCost,
    is_rounded,
    layer_costs,
    rounding_cost,
)
from rgexport.validate.equivalences import Equivalence, compare_portable, longest_call
from rgexport.validate.measure import Measurement, measure, token_text
from rgexport.validate.opening import OpenedArtifact, ValidationRequest, open_all
from rgexport.validate.reference.against import AgainstFile, compare_with_file
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
from rgexport.validate.structure.compare import compare_structure
from rgexport.validate.text import Text
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import Reproduced, reproduce


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
    that was asked for; else 1. Raises the errors of `validate_artifact`.
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
        if json_file is not None:
            write_text(as_json(results), json_file)
        if html_file is not None:
            write_text(render_page(results), html_file)
    finally:
        # The report is printed last, since a reader such as `head` may leave after a few lines. It
        # is printed even if a file could not be written: the results took long.
        _print_report(results, prints_json)

    accepted = {"PASS"}
    if allow_ambiguous:
        accepted.add("AMBIGUOUS")
    all_accepted = all(result.verdict in accepted and result.good_enough for result in results)
    return 0 if all_accepted else 1


def _print_report(results: Sequence[ValidationResult], prints_json: bool) -> None:
    if prints_json:
        print_result(f"{as_json(results)}\n", end="")
    else:
        print_result(render(results), end="")


def validate_artifact(
    path: Path, request: ValidationRequest, passes: SharedPasses | None = None
) -> ValidationResult:
    """Compares an artifact with its dequantized reference, and with its original if that is known.

    The references run first, one layer at a time. Then the artifact's session opens, and when it
    is closed, the ops are compared one by one. `passes` are those of earlier artifacts' originals.

    Raises:
        RequestError: See `open_all`; or the engine is missing or cannot open the artifact.
    """
    passes = passes or SharedPasses()
    opened = open_all(path, request)
    expect_stages(_count_stages(opened, passes))

    dequantized = run_reference(
        "Running the dequantized reference",
        opened.manifest.config,
        opened.artifact.weights,
        opened.text.tokens,
    )
    original = None
    if opened.original is not None:
        original = passes.run_reference(opened.original.checkpoint, opened.text.tokens)

    result = _compare(opened, dequantized, original)
    if request.bisect:
        result = _with_suspects(result)
    return result


def _count_stages(opened: OpenedArtifact, passes: SharedPasses) -> int:
    """Returns the number of tasks that show progress."""
    request = opened.request
    original = opened.original
    stages = [
        True,  # the dequantized reference
        True,  # the artifact over the text
        True,  # the ops one by one
        True,  # the graph
        opened.has_native,
        opened.asks_original,
        request.reference is not None,
    ]
    if original is not None:
        stages.append(not passes.has(original.checkpoint, opened.text.tokens))
        stages.append(True)  # the weights
        stages.append(request.bisect)  # the cost of each layer
        stages.append(request.reproduce)
    if original is not None or request.reference is not None:
        stages.append(is_rounded(opened.manifest))
    return sum(stages)


def _with_suspects(result: ValidationResult) -> ValidationResult:
    """Adds the sites that the findings of a result point to."""
    failed = [c for c in result.checks if c.kind in TENSOR_CHECKS and not c.passed]
    differences = list(result.source.config_differences)
    if result.reference is not None:
        differences += result.reference.config_differences
    distinct = list(dict.fromkeys(differences))
    return replace(result, suspects=find_suspects(result.sites, failed, distinct))


def _compare(opened: OpenedArtifact, dequantized: Pass, original: Pass | None) -> ValidationResult:
    manifest = opened.manifest
    request = opened.request
    in_session = _use_session(opened, dequantized, original)
    measured = in_session.measured

    equivalences = measured.equivalences
    if opened.has_native:
        portable = _compare_portable(opened, measured, dequantized)
        if portable is not None:
            equivalences = equivalences | {"portable": portable}

    costs = _measure_costs(opened, dequantized, original)
    original_comparison = None
    if original is not None:
        original_comparison = measured.comparisons[1]
    result = ValidationResult(
        artifact=describe_artifact(opened.path, opened.artifact),
        source=describe_source(manifest.source.name, opened.original),
        text=_describe_text(opened.text, manifest.config.window),
        engine=in_session.info,
        dequantized=measured.comparisons[0],
        original=original_comparison,
        equivalences=equivalences,
        sites=_compare_sites(opened, measured),
        weights=costs.weights,
        cost=costs.rounding,
        reproduced=costs.reproduced,
        layers=costs.layers,
        suspects=None,
        reference=in_session.against_file,
        tolerance=tolerance(manifest),
        checks=[],
        environment=environment(),
        continuations=in_session.continuations,
        min_quality=request.min_quality,
        structure=compare_structure(opened.artifact, request.reference),
        identity=opened.identity,
    )
    checks = all_checks(result, manifest, measured.counted, request.limits)
    return replace(result, checks=list(with_limits(checks, request.limits)))


def _describe_text(text: Text, window: int) -> TextInfo:
    count = len(text.tokens)
    return TextInfo(text.name, count, count / window, text.bytes, text.truncated)


@dataclass(frozen=True, kw_only=True)
class _InSession:
    """Everything that takes the artifact's session."""

    info: SessionInfo
    measured: Measurement
    against_file: AgainstFile | None
    continuations: list[Continuation] | None


def _use_session(opened: OpenedArtifact, dequantized: Pass, original: Pass | None) -> _InSession:
    # The original continues prompts before the session opens, which takes much memory.
    prompts = _continued_prompts(opened)
    spell = None
    if opened.tokenizer:
        spell = token_text(opened.tokenizer)
    references = [dequantized]
    if original is not None:
        references.append(original)

    release_freed_memory()
    session = open_session(opened.artifact)
    measured = measure(
        session,
        opened.text.tokens,
        references,
        text_bytes=opened.text.bytes,
        noise=tolerance(opened.manifest).rms,
        spell=spell,
        longest=longest_call(opened.manifest.config),
    )

    against_file = None
    if opened.request.reference is not None:
        with group("Comparing with the reference file"):
            against_file = compare_with_file(session, opened.artifact, opened.request.reference)

    continued = None
    if spell is not None and prompts is not None:
        continued = list(continuations.compare(session, prompts, spell))
    return _InSession(
        info=session.info,
        measured=measured,
        against_file=against_file,
        continuations=continued,
    )


def _continued_prompts(opened: OpenedArtifact) -> list[ContinuedPrompt] | None:
    """Returns the prompts whose answers are compared; None if no reference continues any."""
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


def _compare_portable(
    opened: OpenedArtifact, measured: Measurement, reference: Pass
) -> Equivalence | None:
    """Runs the functions' bodies instead of native kernels; None if memory does not suffice."""
    release_freed_memory()
    needed = engine_of(opened.manifest.kind).portable_bytes(opened.manifest)
    available = available_bytes()
    if available is not None and needed > available:
        note(
            f"the bodies that other runtimes run were not run: it takes about {amount(needed)} of "
            f"memory, and {amount(available)} are free"
        )
        return None
    with task("Without native kernels"):
        session = open_session(opened.artifact, native=False)
        equivalence = compare_portable(session, opened.text.tokens, reference, measured.ending)
        session.close()
    return equivalence


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """Errors and costs of the stored weights; None where something that they need is missing."""

    rounding: RoundingCost | None = None
    weights: list[WeightError] | None = None
    reproduced: list[Reproduced] | None = None
    layers: list[LayerCost] | None = None


def _measure_costs(opened: OpenedArtifact, dequantized: Pass, original: Pass | None) -> _Costs:
    artifact = opened.artifact
    tokens = opened.text.tokens
    rounding = None
    if original is not None or opened.request.reference is not None:
        rounding = rounding_cost(artifact, dequantized, original, tokens)
    if opened.original is None or original is None:
        return _Costs(rounding=rounding)

    source = opened.original.checkpoint
    manifest = opened.manifest
    weights = weight_errors(
        source.weights, artifact.weights, manifest.tensors, manifest.weighted, original.inputs
    )
    reproduced = None
    if opened.statistics is not None:
        reproduced = reproduce(artifact, source.weights, opened.statistics)
    layers = None
    if opened.request.bisect:
        layers = layer_costs(source.config, source.weights, artifact.weights, tokens)
    return _Costs(rounding=rounding, weights=weights, reproduced=reproduced, layers=layers)


def _compare_sites(opened: OpenedArtifact, measured: Measurement) -> SiteReport | None:
    """Compares the ops one by one; None where the engine cannot show their values."""
    config = opened.manifest.config
    if opened.original is not None:
        config = opened.original.checkpoint.config
    state = measured.ending.chunk.state
    try:
        return compare_sites(opened.artifact, config, state, opened.text.tokens)
    except RequestError as error:
        note(f"the ops were not compared one by one: {error}")
        return None
