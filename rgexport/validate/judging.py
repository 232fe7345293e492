"""Judges what was measured: compares values with their limits."""

from collections.abc import Iterator
from dataclasses import replace

from rgexport.validate import states, thresholds
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.bisect.suspects import Suspect, find_suspects
from rgexport.validate.checks import STANDARD_ERRORS, TENSOR_CHECKS, Check, with_limits
from rgexport.validate.equivalences import SAME, Equivalence
from rgexport.validate.identity.items import identity_checks
from rgexport.validate.measure import Comparison
from rgexport.validate.opening import Opened
from rgexport.validate.reference.against import file_checks
from rgexport.validate.result import Result
from rgexport.validate.rounding_cost import RoundingCost
from rgexport.validate.running import Ran
from rgexport.validate.states import Drift
from rgexport.validate.structure.compare import StructureReport
from rgexport.validate.thresholds import Tolerance
from rgexport.validate.weights.reproduced import reproduced_checks
from rgexport.validate.weights.weight_limits import weight_checks


def judge(opened: Opened, ran: Ran, result: Result) -> Result:
    """Adds the checks and, if they were asked for, the suspects."""
    request = opened.request
    checks = with_limits(_checks(opened, ran, result), request.limits)
    result = replace(result, checks=list(checks))
    return replace(result, suspects=_suspects(result)) if request.bisect else result


def _suspects(result: Result) -> list[Suspect]:
    failed = [c for c in result.checks if c.kind in TENSOR_CHECKS and not c.passed]
    differences = [*result.source.config_differences]
    if result.reference is not None:
        differences += result.reference.config_differences
    return find_suspects(result.sites, failed, list(dict.fromkeys(differences)))


def _checks(opened: Opened, ran: Ran, result: Result) -> Iterator[Check]:
    """All checks, with their own limits."""
    manifest, limits, length = opened.manifest, opened.request.limits, result.text.tokens
    limit, counted = result.tolerance, ran.measured.counted
    yield from _dequantized_checks(result.twin, limit, length)
    yield Check(
        name="position", value=float(not counted), limit=0, reason="the session counts every token"
    )
    drift = [error for one in result.twin.drift for error in one.states]
    errors = result.twin.logits.relative_max, states.worst([*drift, *result.twin.states])
    for name, found in result.equivalences.items():
        yield from _equivalence_checks(name, found, thresholds.consistency(limit, length, *errors))
    if result.structure.in_verdict:
        yield _structure_check(result.structure)
    if result.sites is not None:
        yield from _site_checks(result.sites)
    if result.original is not None:
        logits, kl = result.original.logits, result.original.kl
        yield from thresholds.cost_checks("original", manifest, logits, kl, limits)
    if result.weights is not None:
        yield from weight_checks(result.weights)
    if result.reproduced is not None:
        yield from reproduced_checks(result.reproduced)
    if result.cost is not None:
        yield from _rounding_checks(result, result.cost)
    if result.reference is not None:
        asked_for = any(item.outcome == "asked for" for item in result.identity)
        for check in file_checks(result.reference, manifest, limits):
            # Logits with another window, which the export was asked for, are no fault.
            of_another = check.name == "reference.rms" and result.reference.config_differences
            if not (asked_for and of_another):
                yield check
    yield from identity_checks(result.identity)


def _rounding_checks(result: Result, cost: RoundingCost) -> Iterator[Check]:
    """Of the KL to the original, or to a reference file's, beside that of random rounding."""
    ratios = {}
    if cost.ratio is not None:
        ratios["original"] = cost.ratio
    if result.reference is not None:
        # The file has logits of other texts, and of the artifact's own arithmetic.
        kl = result.reference.kl
        least = kl.mean - STANDARD_ERRORS * kl.standard_error
        ratios["reference"] = least / (cost.kl_rounded + result.twin.kl.mean)
    for side, ratio in ratios.items():
        yield Check(
            name=f"cost.{side}",
            kind="cost",
            value=ratio,
            limit=thresholds.MOST_COST[side],
            reason="KL in units of what rounding costs at random, by the steps of the weights",
        )


def _dequantized_checks(comparison: Comparison, limit: Tolerance, length: int) -> Iterator[Check]:
    """Of an artifact against its dequantized reference, over `length` tokens."""
    logits, at_end, why = comparison.logits, limit.at(length), limit.reason
    yield Check(name="twin.logits", value=logits.relative_max, limit=at_end.logits, reason=why)
    yield Check(name="twin.rms", value=logits.relative_rms, limit=at_end.rms, reason=why)
    drift = [*comparison.drift, Drift(position=length, states=comparison.states)]
    yield max((_drift_check(found, limit) for found in drift), key=lambda check: check.excess)


def _drift_check(found: Drift, limit: Tolerance) -> Check:
    return Check(
        name="twin.states",
        value=states.worst(found.states),
        limit=limit.at(found.position).states,
        reason=f"after {found.position} tokens; {limit.reason}",
    )


def _equivalence_checks(name: str, found: Equivalence, limit: Tolerance) -> Iterator[Check]:
    values = [("logits", found.logits.relative_max, limit.logits)]
    if found.states:
        values.append(("states", states.worst(found.states), limit.states))
    why = f"{SAME[name]}; {limit.reason}"
    for what, value, most in values:
        yield Check(name=f"{name}.{what}", value=value, limit=most, reason=why, kind=name)


def _structure_check(report: StructureReport) -> Check:
    wrong = float(report.status == "differs")
    return Check(name="structure", value=wrong, limit=0, reason=report.reason)


def _site_checks(report: SiteReport) -> Iterator[Check]:
    """Of the op that is nearest to its limit, or of all that are beyond it."""
    for error in report.beyond or report.worst(1):
        what = error.site if error.state is None else error.state
        yield Check(
            name=f"sites.{what}",
            value=error.excess,
            limit=1.0,
            reason=f"{error.op} of {error.call} from the artifact's own inputs, in limits",
            kind="sites",
        )
