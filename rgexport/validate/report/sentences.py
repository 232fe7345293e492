"""Sentences about a result that the terminal and the page share."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rgexport.reporting.numbers import number, plus_minus
from rgexport.validate.checks import (
    GRADE_NAMES,
    STANDARD_ERRORS,
    TENSOR_CHECKS,
    Check,
    Quality,
    verdict,
)
from rgexport.validate.continuations import Continuation
from rgexport.validate.identity import first_names, summary
from rgexport.validate.metrics import KL
from rgexport.validate.result import ValidationResult


class Answer(NamedTuple):
    """A text in three pieces: the tokens that both models share, the first other one, the rest."""

    shared: str
    differing: str
    rest: str


LABELS = {"twin": "dequantized reference", "original": "original"}
"""Field of `ValidationResult` → its name for people."""
ON_THE_TEXT = "PASS on the text that was run"
"""The verdict if all checks passed, but the graph was not compared with the exporter's."""
_SEPARATE = "identity", "structure"  # kinds of checks that `proof_sentences` does not count
_COSTS = "original.rms original.kl cost reference.rms reference.kl reference.finite".split()
_PARTS = dict.fromkeys((*TENSOR_CHECKS, "reproduced"), "weights") | dict.fromkeys(_COSTS, "cost")
"""Kind of a check → its part of the proof; `arithmetic` for all other kinds."""
MOST_NAMED = 12
"""Checks that are named below the verdict."""
UNITS = "± is a standard error; bits are those in matrices and head, with their scales."
"""Explains the columns of `tables.overview`."""


def mean_kl(kl: KL) -> str:
    return plus_minus(kl.mean, kl.standard_error)


def verdict_text(*results: ValidationResult) -> str:
    """The worst verdict, and the limit of a PASS."""
    worst = verdict(check for result in results for check in result.checks)
    limited = worst == "PASS" and any(result.verdict_scope == "text" for result in results)
    return ON_THE_TEXT if limited else worst


def structure_text(r: ValidationResult) -> str:
    """Such as `as rgexport 0.1.0 writes it`."""
    status, reason = r.structure.status, r.structure.reason
    return reason if status == "as written" else f"{status}: {reason}"


def proof_sentences(r: ValidationResult) -> dict[str, str]:
    """Part of the proof → one sentence on its outcome."""
    groups: dict[str, list[Check]] = {"arithmetic": [], "weights": [], "cost": []}
    for check in r.checks:
        kind = check.kind or check.name
        if kind not in _SEPARATE:
            groups[_PARTS.get(kind, "arithmetic")].append(check)
    return {
        "identity": summary(r.identity),
        "structure": structure_text(r),
        **{name: _outcome_of(checks) for name, checks in groups.items()},
    }


def _outcome_of(checks: Sequence[Check]) -> str:
    """Such as `12 checks passed, up to 64 % of a limit (steps.logits)`."""
    if not checks:
        return "not compared, since the original was not given"
    if wrong := [check.name for check in checks if not check.passed]:
        return f"{len(wrong)} of {len(checks)} checks not passed: {first_names(wrong)}"
    nearest = max(checks, key=lambda check: check.value / check.limit if check.limit else 0)
    share = nearest.value / nearest.limit if nearest.limit else 0
    return f"{len(checks)} checks passed, up to {share:.0%} of a limit ({nearest.name})"


def counted_checks(r: ValidationResult) -> str:
    """Such as `2 of 19 checks failed`."""
    counts = Counter(check.outcome for check in r.checks)
    if counts["FAIL"]:
        return f"{counts['FAIL']} of {len(r.checks)} checks failed"
    if counts["AMBIGUOUS"]:
        return f"{counts['AMBIGUOUS']} of {len(r.checks)} checks cannot be decided"
    correct = "export correct, " if r.verdict_scope == "structure" else ""
    return f"{correct}every check passed"


def counted_verdicts(results: Sequence[ValidationResult]) -> str:
    """Such as `3 artifacts: 1 FAIL, 2 PASS`."""
    counts = Counter(result.verdict for result in results)
    clauses = [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    return f"{len(results)} artifacts: {', '.join(clauses)}"


def closest_text(results: Sequence[ValidationResult]) -> str:
    """Names the artifact of the lowest KL, and says how sure that is; empty for fewer than two."""
    kls = sorted(
        (cost.kl.mean, cost.kl.standard_error, r.artifact.path)
        for r in results
        if r.verdict != "FAIL" and (cost := r.original or r.reference) is not None
    )
    if len(kls) < 2:
        return ""
    (lowest, error, closest), (second, second_error, runner_up) = kls[:2]
    certain = second - lowest > STANDARD_ERRORS * math.hypot(error, second_error)
    doubt = "certainly has more KL" if certain else "may be as close, within the margin of error"
    return f"Closest to the original: {closest}; the next, {runner_up}, {doubt}."


def doubt_text(q: Quality) -> str:
    """Such as ` (or fair, within the margin of error)`; empty if it is certain."""
    possible = GRADE_NAMES[GRADE_NAMES.index(q.best) : GRADE_NAMES.index(q.worst) + 1]
    names = [name for name in possible if name != q.grade]
    return f" (or {' or '.join(names)}, within the margin of error)" if names else ""


def shortfall_text(r: ValidationResult) -> str:
    """Warns that the quality is below `--min-quality`; empty if it is not."""
    return "" if r.good_enough else f"The quality is below {r.min_quality}, which was asked for."


def bits_text(r: ValidationResult) -> str:
    """Such as `5.39 bits per weight in matrices and head, 5.97 in all`."""
    matrices, total = r.artifact.matrix_bits_per_weight, r.artifact.bits_per_weight
    return f"{matrices:.2f} bits per weight in matrices and head, {total:.2f} in all"


def answers_of(c: Continuation) -> tuple[Answer, Answer]:
    """The reference's and the artifact's."""

    def answer(differing: str, text: str) -> Answer:
        return Answer(c.shared, differing, text.removeprefix(c.shared).removeprefix(differing))

    return answer(c.reference_next, c.reference), answer(c.artifact_next, c.artifact)


def not_passed(r: ValidationResult) -> list[Check]:
    """The checks that failed, followed by the ambiguous ones."""
    checks = [check for check in r.checks if not check.passed]
    return sorted(checks, key=lambda check: check.outcome != "FAIL")


def check_text(check: Check) -> str:
    return f"{value_text(check)}, limit {number(check.limit)}"


def value_text(check: Check) -> str:
    return plus_minus(check.value, check.margin) if check.margin else number(check.value)


def source_text(r: ValidationResult) -> str:
    """Names the original that the artifact was compared with."""
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    differing = "" if r.source.same_files else ", other files than the artifact was made from"
    return f"{r.source.path}{differing}"
