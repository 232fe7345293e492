"""Sentences about a result that the terminal and the page share."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
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
_SEPARATE = ("identity", "structure")
"""Kinds of checks that `proof_sentences` does not count."""
_WEIGHT_CHECKS = (*TENSOR_CHECKS, "reproduced")
"""Kinds of checks that prove the weights."""
_COST_CHECKS = (
    "original.rms",
    "original.kl",
    "cost",
    "reference.rms",
    "reference.kl",
    "reference.finite",
)
"""Kinds of checks that limit the cost; all other kinds prove the arithmetic."""
MOST_NAMED = 12
"""Checks that are named below the verdict."""
UNITS = "± is a standard error; bits are those in matrices and head, with their scales."
"""Explains the columns of `tables.overview`."""


def mean_kl(kl: KL) -> str:
    """Returns a mean KL with its standard error."""
    return plus_minus(kl.mean, kl.standard_error)


def verdict_text(*results: ValidationResult) -> str:
    """Returns the worst verdict, and the limit of a PASS."""
    checks = chain.from_iterable(result.checks for result in results)
    worst = verdict(checks)
    if worst == "PASS" and any(result.verdict_scope == "text" for result in results):
        return ON_THE_TEXT
    return worst


def structure_text(r: ValidationResult) -> str:
    """Such as `as rgexport 0.1.0 writes it`."""
    structure = r.structure
    if structure.status == "as written":
        return structure.reason
    return f"{structure.status}: {structure.reason}"


def proof_sentences(r: ValidationResult) -> dict[str, str]:
    """Returns one sentence on the outcome of each part of the proof."""
    arithmetic = []
    weights = []
    cost = []
    for check in r.checks:
        kind = check.kind or check.name
        if kind in _SEPARATE:
            continue
        if kind in _WEIGHT_CHECKS:
            weights.append(check)
        elif kind in _COST_CHECKS:
            cost.append(check)
        else:
            arithmetic.append(check)
    return {
        "identity": summary(r.identity),
        "structure": structure_text(r),
        "arithmetic": _outcome_of(arithmetic),
        "weights": _outcome_of(weights),
        "cost": _outcome_of(cost),
    }


def _outcome_of(checks: Sequence[Check]) -> str:
    """Such as `12 checks passed, up to 64 % of a limit (steps.logits)`."""
    if not checks:
        return "not compared, since the original was not given"
    wrong = [check.name for check in checks if not check.passed]
    if wrong:
        return f"{len(wrong)} of {len(checks)} checks not passed: {first_names(wrong)}"
    nearest = max(checks, key=_share_of_limit)
    share = _share_of_limit(nearest)
    return f"{len(checks)} checks passed, up to {share:.0%} of a limit ({nearest.name})"


def _share_of_limit(check: Check) -> float:
    """Returns a passed check's value in units of its limit; 0 where the limit is 0."""
    return check.value / check.limit if check.limit else 0


def counted_checks(r: ValidationResult) -> str:
    """Such as `2 of 19 checks failed`."""
    counts = Counter(check.outcome for check in r.checks)
    if counts["FAIL"]:
        return f"{counts['FAIL']} of {len(r.checks)} checks failed"
    if counts["AMBIGUOUS"]:
        return f"{counts['AMBIGUOUS']} of {len(r.checks)} checks cannot be decided"
    if r.verdict_scope == "structure":
        return "export correct, every check passed"
    return "every check passed"


def counted_verdicts(results: Sequence[ValidationResult]) -> str:
    """Such as `3 artifacts: 1 FAIL, 2 PASS`."""
    counts = Counter(result.verdict for result in results)
    clauses = [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    return f"{len(results)} artifacts: {', '.join(clauses)}"


def closest_text(results: Sequence[ValidationResult]) -> str:
    """Names the artifact of the lowest KL, and says how sure that is; empty for fewer than two."""
    kls = []
    for result in results:
        cost = result.original or result.reference
        if result.verdict != "FAIL" and cost is not None:
            kls.append((cost.kl.mean, cost.kl.standard_error, result.artifact.path))
    kls.sort()
    if len(kls) < 2:
        return ""
    (lowest, error, closest), (second, second_error, runner_up) = kls[:2]
    doubt = "may be as close, within the margin of error"
    if second - lowest > STANDARD_ERRORS * math.hypot(error, second_error):
        doubt = "certainly has more KL"
    return f"Closest to the original: {closest}; the next, {runner_up}, {doubt}."


def doubt_text(q: Quality) -> str:
    """Such as ` (or fair, within the margin of error)`; empty if it is certain."""
    best = GRADE_NAMES.index(q.best)
    worst = GRADE_NAMES.index(q.worst)
    names = [name for name in GRADE_NAMES[best : worst + 1] if name != q.grade]
    if not names:
        return ""
    return f" (or {' or '.join(names)}, within the margin of error)"


def shortfall_text(r: ValidationResult) -> str:
    """Warns that the quality is below `--min-quality`; empty if it is not."""
    if r.good_enough:
        return ""
    return f"The quality is below {r.min_quality}, which was asked for."


def bits_text(r: ValidationResult) -> str:
    """Such as `5.39 bits per weight in matrices and head, 5.97 in all`."""
    matrices = r.artifact.matrix_bits_per_weight
    total = r.artifact.bits_per_weight
    return f"{matrices:.2f} bits per weight in matrices and head, {total:.2f} in all"


def answers_of(c: Continuation) -> tuple[Answer, Answer]:
    """Returns the reference's answer and the artifact's."""
    reference = _answer(c.shared, c.reference_next, c.reference)
    artifact = _answer(c.shared, c.artifact_next, c.artifact)
    return reference, artifact


def _answer(shared: str, differing: str, text: str) -> Answer:
    rest = text.removeprefix(shared).removeprefix(differing)
    return Answer(shared, differing, rest)


def not_passed(r: ValidationResult) -> list[Check]:
    """Returns the checks that failed, followed by the ambiguous ones."""
    checks = [check for check in r.checks if not check.passed]
    return sorted(checks, key=lambda check: check.outcome != "FAIL")


def check_text(check: Check) -> str:
    """Returns a check's value and limit as text."""
    return f"{value_text(check)}, limit {number(check.limit)}"


def value_text(check: Check) -> str:
    """Returns a check's value as text, with its margin if there is one."""
    if check.margin:
        return plus_minus(check.value, check.margin)
    return number(check.value)


def source_text(r: ValidationResult) -> str:
    """Names the original that the artifact was compared with."""
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    text = f"{r.source.path}"
    if not r.source.same_files:
        text += ", other files than the artifact was made from"
    return text
