"""Numbers and sentences that the terminal and the page share."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rgexport.validate.checks import TENSOR_CHECKS, Check, verdict
from rgexport.validate.continuations import Continuation
from rgexport.validate.identity.items import first_names, summary
from rgexport.validate.metrics import KL
from rgexport.validate.quality import GRADE_NAMES, Quality
from rgexport.validate.result import Result


class Answer(NamedTuple):
    """The text of the tokens that both models share, of the first that differs, and the rest."""

    shared: str
    differing: str
    rest: str


LABELS = {"twin": "dequantized reference", "original": "original"}
"""Field of `Result` → what people read."""
ON_THE_TEXT = "PASS on the text that was run"
"""The verdict where nothing was failed, but the graph was not compared with the exporter's."""
_OF_THEIR_OWN = "identity", "structure"
"""Kinds of checks whose parts have sentences of their own."""
_PARTS = {
    **dict.fromkeys((*TENSOR_CHECKS, "reproduced"), "weights"),
    **dict.fromkeys(("original.rms", "original.kl", "cost"), "cost"),
    **dict.fromkeys(("reference.rms", "reference.kl", "reference.finite"), "cost"),
}
"""Kind of a check → its part; `arithmetic` for all others."""
MOST_NAMED = 12
"""Checks that are named below the verdict."""


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Of a share in [0, 1]."""
    return f"{100 * value:.2f} %"


def rate(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else number(value)


def plus_minus(value: float, error: float) -> str:
    """A value and its standard error or margin."""
    return f"{number(value)} ± {error:.1g}"


def mean_kl(kl: KL) -> str:
    """The mean and its standard error."""
    return plus_minus(kl.mean, kl.standard_error)


def verdict_words(*results: Result) -> str:
    """The worst verdict, and what a PASS is limited to."""
    worst = verdict(check for result in results for check in result.checks)
    limited = worst == "PASS" and any(result.verdict_scope == "text" for result in results)
    return ON_THE_TEXT if limited else worst


def structure_words(r: Result) -> str:
    """Whether the graph is the exporter's: `as rgexport 0.1.0 writes it`."""
    status, reason = r.structure.status, r.structure.reason
    return reason if status == "as written" else f"{status}: {reason}"


def part_words(r: Result) -> dict[str, str]:
    """Part of the proof → one sentence on how it ended."""
    parts: dict[str, list[Check]] = {"arithmetic": [], "weights": [], "cost": []}
    for check in r.checks:
        kind = check.kind or check.name
        if kind not in _OF_THEIR_OWN:
            parts[_PARTS.get(kind, "arithmetic")].append(check)
    return {
        "identity": summary(r.identity),
        "structure": structure_words(r),
        **{name: _outcome_of(checks) for name, checks in parts.items()},
    }


def _outcome_of(checks: Sequence[Check]) -> str:
    """Such as `12 checks passed, up to 64 % of a limit (steps.logits)`."""
    if not checks:
        return "not compared, since the original was not given"
    wrong = [check.name for check in checks if not check.passed]
    if wrong:
        return f"{len(wrong)} of {len(checks)} checks not passed: {first_names(wrong)}"
    nearest = max(checks, key=lambda check: check.value / check.limit if check.limit else 0)
    share = nearest.value / nearest.limit if nearest.limit else 0
    return f"{len(checks)} checks passed, up to {share:.0%} of a limit ({nearest.name})"


def counted_checks(r: Result) -> str:
    """Such as `2 of 19 checks failed`."""
    counts = Counter(check.outcome for check in r.checks)
    if counts["FAIL"]:
        return f"{counts['FAIL']} of {len(r.checks)} checks failed"
    if counts["AMBIGUOUS"]:
        return f"{counts['AMBIGUOUS']} of {len(r.checks)} checks cannot be decided"
    correct = "export correct, " if r.verdict_scope == "structure" else ""
    return f"{correct}every check passed"


def quality_words(q: Quality) -> str:
    """The figures of a grade: `the same first choice at 93.10 % of the tokens, KL 0.012`."""
    file = ", by the reference file" if q.against == "reference" else ""
    return f"the same first choice at {percent(q.top1)} of the tokens, KL {number(q.kl)}{file}"


def doubt_words(q: Quality) -> str:
    """Such as ` (or fair, within the margin of error)`; empty where the grade is certain."""
    possible = GRADE_NAMES[GRADE_NAMES.index(q.best) : GRADE_NAMES.index(q.worst) + 1]
    others = [name for name in possible if name != q.grade]
    return f" (or {' or '.join(others)}, within the margin of error)" if others else ""


def bits_words(r: Result) -> str:
    """Such as `5.39 bits per weight in matrices and head, 5.97 in all`."""
    a = r.artifact
    return (
        f"{a.matrix_bits_per_weight:.2f} bits per weight in matrices and head, "
        f"{a.bits_per_weight:.2f} in all"
    )


def answers_of(c: Continuation) -> tuple[Answer, Answer]:
    """The reference's and the artifact's text, in parts."""
    return (
        _answer(c.shared, c.reference_next, c.reference),
        _answer(c.shared, c.artifact_next, c.artifact),
    )


def _answer(shared: str, differing: str, text: str) -> Answer:
    return Answer(shared, differing, text.removeprefix(shared).removeprefix(differing))


def shortfall_words(r: Result) -> str:
    """That the quality is lower than was asked for; empty where it is not."""
    return "" if r.good_enough else f"The quality is below {r.min_quality}, which was asked for."


def counted_verdicts(results: Sequence[Result]) -> str:
    """Such as `1 of 3 fails, 2 are ambiguous`."""
    counts = Counter(result.verdict for result in results)
    if counts["PASS"] == len(results):
        return f"all {len(results)} pass"
    failed, unsure = counts["FAIL"], counts["AMBIGUOUS"]
    words = []
    if failed:
        words.append(f"{failed} of {len(results)} {'fails' if failed == 1 else 'fail'}")
    if unsure:
        of = "" if failed else f" of {len(results)}"
        words.append(f"{unsure}{of} {'is' if unsure == 1 else 'are'} ambiguous")
    return ", ".join(words)


def not_passed(r: Result) -> list[Check]:
    """The checks that failed, followed by the ambiguous ones."""
    found = [check for check in r.checks if not check.passed]
    return sorted(found, key=lambda check: check.outcome != "FAIL")


def check_words(check: Check) -> str:
    """Its value and its limit."""
    return f"{value_words(check)}, limit {number(check.limit)}"


def value_words(check: Check) -> str:
    """Its value and its margin."""
    return plus_minus(check.value, check.margin) if check.margin else number(check.value)


def source_words(r: Result) -> str:
    """Which original it was compared with."""
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    other = "" if r.source.same_files else ", other files than the artifact was made from"
    return f"{r.source.path}{other}"


def speed_words(r: Result) -> str:
    """Tokens per second; empty if they were not measured."""
    if r.speed is None:
        return ""
    return (
        f"{rate(r.speed.decode)} tokens/s one by one, "
        f"{rate(r.speed.prefill)} of a prompt of {r.speed.prompt_tokens}"
    )
