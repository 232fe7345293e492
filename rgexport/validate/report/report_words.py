"""The words that a terminal and a page have in common."""

from collections import Counter

from rgexport.validate.checks import Check
from rgexport.validate.result import Result
from rgexport.validate.speed import Speed

LABELS = {"twin": "dequantized reference", "original": "original"}
"""What an artifact is compared with → what people read."""
MOST_NAMED = 12
"""Checks that did not pass which are named below the verdict."""


def counted_checks(r: Result) -> str:
    """Such as `2 of 19 checks failed`."""
    counts = Counter(check.outcome for check in r.checks)
    if counts["FAIL"]:
        return f"{counts['FAIL']} of {len(r.checks)} checks failed"
    if counts["AMBIGUOUS"]:
        return f"{counts['AMBIGUOUS']} of {len(r.checks)} checks cannot be decided"
    return "every check passed"


def twin_words(r: Result) -> str:
    """What it is, or why it is not there."""
    if r.twin is None:
        return "left out, it takes torch (pip install 'rgexport[export]')"
    return "the original's mathematics in float32, with the artifact's own weights"


def source_words(r: Result) -> str:
    """Where the original is, and whether it is the one."""
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    other = "" if r.source.same_files else ", other files than the artifact was made from"
    return f"{r.source.path}{other}"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Of a share in [0, 1]."""
    return f"{100 * value:.2f} %"


def not_passed(r: Result) -> list[Check]:
    """The checks that failed, and behind them those that are ambiguous."""
    found = [check for check in r.checks if not check.passed]
    return sorted(found, key=lambda check: check.outcome != "FAIL")


def check_words(check: Check) -> str:
    """Its value and its limit."""
    return f"{value_words(check)}, limit {number(check.limit)}"


def value_words(check: Check) -> str:
    """Its value and how sure that is."""
    margin = f" ± {check.margin:.1g}" if check.margin else ""
    return f"{number(check.value)}{margin}"


def speed_words(speed: Speed) -> str:
    """Tokens per second."""
    return (
        f"{rate(speed.decode)} tokens/s one by one, "
        f"{rate(speed.prefill)} of a prompt of {speed.prompt_tokens}"
    )


def rate(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else number(value)
