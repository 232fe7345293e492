"""Compares measured values with their limits."""

from collections.abc import Iterator, Mapping

from rgexport.export.manifest import Manifest
from rgexport.validate import thresholds
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.checks import STANDARD_ERRORS, Check
from rgexport.validate.equivalences import SAME
from rgexport.validate.identity.items import identity_checks
from rgexport.validate.measure import Comparison
from rgexport.validate.reference.against import file_checks
from rgexport.validate.result import Result
from rgexport.validate.states import Drift, worst
from rgexport.validate.thresholds import Tolerance
from rgexport.validate.weights.reproduced import reproduced_checks
from rgexport.validate.weights.weight_limits import weight_checks


def all_checks(
    result: Result, manifest: Manifest, counted: bool, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Yields all checks of a result, with their own limits.

    `counted` says whether the session counted every token; `limits` are those that the user set.
    """
    yield from _dequantized_checks(result.dequantized, result.tolerance, result.text.tokens)
    yield Check(
        name="position", value=float(not counted), limit=0, reason="the session counts every token"
    )
    yield from _equivalence_checks(result)
    if result.structure.in_verdict:
        wrong = float(result.structure.status == "differs")
        yield Check(name="structure", value=wrong, limit=0, reason=result.structure.reason)
    if result.sites is not None:
        yield from _site_checks(result.sites)
    if result.original is not None:
        logits, kl = result.original.logits, result.original.kl
        yield from thresholds.cost_checks("original", manifest, logits, kl, limits)
    if result.weights is not None:
        yield from weight_checks(result.weights)
    if result.reproduced is not None:
        yield from reproduced_checks(result.reproduced)
    yield from _rounding_checks(result)
    if result.reference is not None:
        asked_for = any(item.outcome == "asked for" for item in result.identity)
        for check in file_checks(result.reference, manifest, limits):
            # Logits with another window, which the export was asked for, are no fault.
            of_another = check.name == "reference.rms" and result.reference.config_differences
            if not (asked_for and of_another):
                yield check
    yield from identity_checks(result.identity)


def _dequantized_checks(comparison: Comparison, limit: Tolerance, length: int) -> Iterator[Check]:
    """Checks logits over `length` tokens, and the states that are nearest to their limit."""
    yield from thresholds.logit_checks(comparison.logits, limit.at(length))
    drift = [*comparison.drift, Drift(position=length, states=comparison.states)]
    states = [
        Check(
            name="dequantized.states",
            value=worst(at.states),
            limit=limit.at(at.position).states,
            reason=f"after {at.position} tokens; {limit.reason}",
        )
        for at in drift
    ]
    yield max(states, key=lambda check: check.excess)


def _equivalence_checks(result: Result) -> Iterator[Check]:
    """Checks each way of taking the tokens, as far as the artifact is off from its reference."""
    side = result.dequantized
    states = worst([*side.states, *(error for at in side.drift for error in at.states)])
    limit = thresholds.consistency(
        result.tolerance, result.text.tokens, side.logits.relative_max, states
    )
    for name, same in result.equivalences.items():
        values = [("logits", same.logits.relative_max, limit.logits)]
        if same.states:
            values.append(("states", worst(same.states), limit.states))
        why = f"{SAME[name]}; {limit.reason}"
        for what, value, most in values:
            yield Check(name=f"{name}.{what}", value=value, limit=most, reason=why, kind=name)


def _site_checks(report: SiteReport) -> Iterator[Check]:
    """Checks the op that is nearest to its limit, or all that are beyond it."""
    for error in report.beyond or report.worst(1):
        yield Check(
            name=f"sites.{error.state or error.site}",
            value=error.excess,
            limit=1.0,
            reason=f"{error.op} of {error.call} from the artifact's own inputs, in limits",
            kind="sites",
        )


def _rounding_checks(result: Result) -> Iterator[Check]:
    """Checks the KL to the original or to a reference file, divided by random rounding's KL."""
    cost, ratios = result.cost, {}
    if cost is None:
        return
    if cost.ratio is not None:
        ratios["original"] = cost.ratio
    if result.reference is not None:
        # The file has logits of other texts, and of the artifact's own arithmetic.
        kl = result.reference.kl
        least = kl.mean - STANDARD_ERRORS * kl.standard_error
        ratios["reference"] = least / (cost.kl_rounded + result.dequantized.kl.mean)
    for side, ratio in ratios.items():
        yield Check(
            name=f"cost.{side}",
            kind="cost",
            value=ratio,
            limit=thresholds.MOST_COST[side],
            reason="KL in units of what rounding costs at random, by the steps of the weights",
        )
