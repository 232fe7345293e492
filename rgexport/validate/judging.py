"""Judges what was measured: which values are held against which limits."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rgexport.export.manifest import Manifest
from rgexport.runtimes.environment import environment
from rgexport.validate import states, thresholds
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.bisect.suspects import Suspect, find_suspects
from rgexport.validate.checks import STANDARD_ERRORS, Check, with_limits
from rgexport.validate.comparing import Compared
from rgexport.validate.equivalences import SAME, Equivalence
from rgexport.validate.measure import Comparison
from rgexport.validate.opening import Opened
from rgexport.validate.reference.against import file_checks
from rgexport.validate.result import Result, describe_artifact, describe_source, describe_text
from rgexport.validate.running import Ran
from rgexport.validate.states import Drift
from rgexport.validate.thresholds import Tolerance
from rgexport.validate.weights.weight_limits import KINDS, weight_checks


def judge(opened: Opened, ran: Ran, compared: Compared) -> Result:
    """All that was measured, with its checks and, if they were asked for, the suspects."""
    manifest, request = opened.manifest, opened.request
    twin, original = (*ran.measured.comparisons, None, None)[:2]
    result = Result(
        artifact=describe_artifact(opened.path, manifest),
        source=describe_source(manifest.source.name, opened.original),
        text=describe_text(opened.text, manifest.config.window),
        engine=ran.info,
        twin=twin,
        original=original,
        equivalences=ran.measured.equivalences,
        sites=compared.sites,
        weights=compared.weights,
        layers=compared.layers,
        suspects=None,
        reference=compared.against_file,
        speed=compared.speed,
        tolerance=thresholds.tolerance(manifest),
        checks=[],
        environment=environment(),
        continuations=ran.continuations,
    )
    checks = _checks(manifest, result, ran.measured.counted, request.limits)
    result = replace(result, checks=list(with_limits(checks, request.limits)))
    return replace(result, suspects=_suspects(result)) if request.bisect else result


def _suspects(result: Result) -> list[Suspect]:
    failed = [c for c in result.checks if c.kind in KINDS and not c.passed]
    differences = [*result.source.config_differences]
    if result.reference is not None:
        differences += result.reference.config_differences
    return find_suspects(result.sites, failed, list(dict.fromkeys(differences)))


def _checks(
    manifest: Manifest, result: Result, counted: bool, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Of a result that has none yet; `counted` says whether its session counted every token."""
    length = result.text.tokens
    if result.twin is not None:
        yield from twin_checks(manifest, result.twin, length)
    yield Check(name="position", value=float(not counted), limit=0, reason="every token counts")
    limit = thresholds.tolerance(manifest).at(length)
    for name, found in result.equivalences.items():
        yield from _same(name, found, limit)
    if result.sites is not None:
        yield from site_checks(result.sites)
    if result.original is not None:
        yield from original_checks(manifest, result.original, limits)
    if result.weights is not None:
        yield from weight_checks(result.weights)
    if result.reference is not None:
        yield from file_checks(result.reference, manifest, limits)


def twin_checks(manifest: Manifest, comparison: Comparison, length: int) -> Iterator[Check]:
    """Of an artifact against the reference with its own weights, over `length` tokens."""
    limit = thresholds.tolerance(manifest)
    at_end, why = limit.at(length), limit.reason
    logits = comparison.logits
    yield Check(name="twin.logits", value=logits.relative_max, limit=at_end.logits, reason=why)
    yield Check(name="twin.rms", value=logits.relative_rms, limit=at_end.rms, reason=why)
    yield _drift_check([*comparison.drift, Drift(position=length, states=comparison.states)], limit)


def _drift_check(drift: list[Drift], limit: Tolerance) -> Check:
    """Of the position that is nearest to its limit, or farthest beyond it."""

    def excess(found: Drift) -> float:
        value = states.worst(found.states) / limit.at(found.position).states
        return value if value == value else float("inf")

    worst = max(drift, key=excess)
    return Check(
        name="twin.states",
        value=states.worst(worst.states),
        limit=limit.at(worst.position).states,
        reason=f"after {worst.position} tokens; {limit.reason}",
    )


def _same(name: str, found: Equivalence, limit: Tolerance) -> Iterator[Check]:
    why = f"{SAME[name]}; {limit.reason}"
    yield Check(
        name=f"{name}.logits",
        value=found.logits.relative_max,
        limit=limit.logits,
        reason=why,
        kind=name,
    )
    if found.states:
        yield Check(
            name=f"{name}.states",
            value=states.worst(found.states),
            limit=limit.states,
            reason=why,
            kind=name,
        )


def site_checks(report: SiteReport) -> Iterator[Check]:
    """Of the op that is nearest to its limit, and of all beyond it, in units of that."""
    for error in report.beyond or report.worst(1):
        what = error.site if error.state is None else error.state
        call = "one token" if error.length == 1 else f"{error.length} tokens"
        yield Check(
            name=f"sites.{what}",
            value=error.excess,
            limit=1.0,
            reason=f"{error.op} of {call} from the artifact's own inputs, in units of its limit",
            kind="sites",
        )


def original_checks(
    manifest: Manifest, comparison: Comparison, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Of an artifact against the original; KL's only where a limit was asked for."""
    yield thresholds.original_rms(manifest, comparison.logits)
    if "original.kl" in limits:
        kl = comparison.kl
        yield Check(
            name="original.kl",
            value=kl.mean,
            margin=STANDARD_ERRORS * kl.standard_error,
            limit=limits["original.kl"],
            reason="mean KL to the original, nats",
        )
