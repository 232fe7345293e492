"""Is this artifact right, and what did compression cost?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.opening import open_artifact
from rgexport.griffin.state import State
from rgexport.progress import detail, expect_stages, group, note, warn
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.environment import environment
from rgexport.runtimes.memory import give_back
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import thresholds
from rgexport.validate.bisect.layer_costs import LayerCost, layer_costs
from rgexport.validate.bisect.sites import SiteReport, look_at_sites
from rgexport.validate.bisect.suspects import Suspect, find_suspects
from rgexport.validate.checks import NO_LIMITS, with_limits
from rgexport.validate.continuations import Continuation, continuations
from rgexport.validate.demands import demands
from rgexport.validate.measure import Measurement, measure, with_continuations
from rgexport.validate.positions import speller
from rgexport.validate.reference.against import (
    AgainstFile,
    check_fits,
    compare_with_file,
    with_layers,
)
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.result import Result, SourceInfo, describe_artifact, describe_text
from rgexport.validate.source import Original, find_original
from rgexport.validate.speed import measure_speed
from rgexport.validate.teacher import MakeReference, Pass, SharedPasses, teach, torch_reference
from rgexport.validate.text import Text, choose_text
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import KINDS


def compare(
    path: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    reference: ReferenceFile | None = None,
    limits: Mapping[str, float] = NO_LIMITS,
    bisect: bool = False,
    bench: bool = False,
    passes: SharedPasses | None = None,
) -> Result:
    """Compares an artifact with its twin and, where it can be found, with its original.

    The references run first, one layer at a time; then the artifact's session opens, and when it
    is gone, its ops are looked at. Where there is no torch, a reference file will do.

    Args:
        path: the artifact.
        model: the original, a folder or hub id; by default the demo, if it was made from that.
        text: a UTF-8 file to compare on; by default the built-in text, or random token ids
            where the artifact has no tokenizer.
        max_tokens: how many tokens of it; see `choose_text`.
        device: where torch runs the references; `auto` is CUDA where there is one.
        reference: what an original said, to compare with too.
        limits: instead of those in `thresholds`, see `checks.NAMES`.
        bisect: whether to measure each layer's cost, and to tell what is suspect.
        bench: whether to measure the speed.
        passes: those of originals that ran before, for other artifacts.

    Raises:
        RequestError: no sound artifact, neither torch nor a reference file, an original or a
            reference that does not fit, or an unreadable text.
    """
    make = None
    if reference is None or find_spec("torch") is not None:
        make = torch_reference(device)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    if reference is not None:
        check_fits(reference, manifest)
    tokenizer = open_tokenizer(artifact) if manifest.has_tokenizer else None
    chosen = choose_text(
        tokenizer,
        vocab_size=manifest.config.vocab_size,
        window=manifest.config.window,
        file=text,
        limit=max_tokens,
    )
    original = None if make is None else find_original(manifest, model)
    _announce(artifact, original, chosen, reference)
    passes = passes or SharedPasses()
    ran = original is not None and passes.has(original.checkpoint, chosen.tokens)
    expect_stages(
        1  # the artifact over the text
        + (make is not None) * 2  # the dequantized reference, and the ops one by one
        + (original is not None) * (3 if bisect else 2)  # its pass, its weights, and each layer
        - ran
        + (reference is not None) * (2 if bisect else 1)
        + bench
    )

    taught = _teach(make, artifact, original, chosen.tokens, passes)
    table = None if original is None else _weight_errors(artifact, original)
    before: dict[int, State] | None = {} if bisect else None
    run = _run(artifact, chosen, tokenizer, taught, reference, before)
    measured = with_continuations(run.measured, taught)
    twin, cost = (*measured.comparisons, None, None)[:2]
    look = None if make is None else _look(artifact, original, measured, chosen, device)
    layers = None
    if bisect and original is not None:
        layers = _layers(artifact, original, chosen, device)
    result = Result(
        artifact=describe_artifact(path, manifest),
        source=_describe_source(manifest.source.name, original),
        text=describe_text(chosen, manifest.config.window),
        engine=run.info,
        twin=twin,
        original=cost,
        equivalences=measured.equivalences,
        sites=look,
        weights=table,
        layers=layers,
        suspects=None,
        reference=_held(artifact, reference, run.held, before),
        speed=measure_speed(artifact) if bench else None,
        tolerance=thresholds.tolerance(manifest),
        checks=[],
        environment=environment(),
        continuations=run.continuations,
    )
    checks = demands(manifest, result, counted=measured.counted, limits=limits)
    result = replace(result, checks=list(with_limits(checks, limits)))
    return replace(result, suspects=_suspects(result)) if bisect else result


@dataclass(frozen=True)
class _Run:
    """What an artifact's session showed before it was closed."""

    info: SessionInfo
    measured: Measurement
    held: AgainstFile | None
    continuations: list[Continuation] | None = None


def _teach(
    make: MakeReference | None,
    artifact: Artifact,
    original: Original | None,
    tokens: np.ndarray,
    passes: SharedPasses,
) -> list[Pass]:
    """The passes of the twin and, if there is one, of the original; none without torch."""
    if make is None:
        note(
            "torch is not installed, so the dequantized reference is left out: "
            "pip install 'rgexport[export]'"
        )
        return []
    config = artifact.manifest.config
    twin = teach("Running the dequantized reference", make, config, artifact.weights, tokens)
    return [twin] if original is None else [twin, passes.teach(make, original.checkpoint, tokens)]


def _weight_errors(artifact: Artifact, original: Original) -> list[WeightError]:
    manifest, weights = artifact.manifest, original.checkpoint.weights
    return weight_errors(weights, artifact.weights, manifest.tensors, weighted=manifest.weighted)


def _run(
    artifact: Artifact,
    text: Text,
    tokenizer: Tokenizer | None,
    taught: list[Pass],
    reference: ReferenceFile | None,
    before: dict[int, State] | None,
) -> _Run:
    """Opens a session, which is gone afterwards, and measures; for `before`, see `_held`."""
    manifest = artifact.manifest
    give_back()
    session = open_session(artifact)
    measured = measure(
        session,
        text.tokens,
        taught,
        text_bytes=text.bytes,
        noise=thresholds.tolerance(manifest).rms,
        spell=speller(tokenizer) if tokenizer else None,
    )
    held = None
    if reference is not None:
        with group("Comparing with the reference file"):
            held = compare_with_file(session, artifact, reference, before)
    written = None
    if reference is not None and tokenizer is not None:
        written = list(continuations(session, reference, speller(tokenizer)))
    return _Run(session.info, measured, held, written)


def _held(
    artifact: Artifact,
    reference: ReferenceFile | None,
    found: AgainstFile | None,
    before: dict[int, State] | None,
) -> AgainstFile | None:
    """What the reference file told, with its layers where the states before them were kept."""
    if reference is None or found is None or before is None:
        return found
    try:
        return with_layers(found, artifact, reference, before)
    except RequestError as error:
        note(f"the layers were not looked at one by one: {error}")
        return found


def _look(
    artifact: Artifact,
    original: Original | None,
    measured: Measurement,
    text: Text,
    device: str,
) -> SiteReport | None:
    """Looks at every op, from the state behind the text; None where the engine shows none."""
    config = artifact.manifest.config if original is None else original.checkpoint.config
    try:
        return look_at_sites(artifact, config, measured.state, text.tokens, device)
    except RequestError as error:
        note(f"the ops were not looked at one by one: {error}")
        return None


def _suspects(result: Result) -> list[Suspect]:
    failed = [c for c in result.checks if c.kind in KINDS and not c.passed]
    differences = [*result.source.config_differences]
    if result.reference is not None:
        differences += result.reference.config_differences
    return find_suspects(result.sites, failed, list(dict.fromkeys(differences)))


def _layers(artifact: Artifact, original: Original, text: Text, device: str) -> list[LayerCost]:
    source = original.checkpoint
    return layer_costs(source.config, source.weights, artifact.weights, text.tokens, device)


def _announce(
    artifact: Artifact, original: Original | None, text: Text, reference: ReferenceFile | None
) -> None:
    detail(f"Validating {artifact.path} on {len(text.tokens)} tokens ({text.name})")
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
