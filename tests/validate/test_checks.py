import math

import pytest

from rgexport.errors import RequestError
from rgexport.validate.checks import NAMES, Check, parse_limits, verdict, with_limits


def check(value: float, margin: float = 0.0, limit: float = 1.0, **fields: str) -> Check:
    return Check(**{"name": "n", "reason": "r", **fields}, value=value, margin=margin, limit=limit)


@pytest.mark.parametrize(
    ("value", "margin", "outcome"),
    [
        (1, 0, "PASS"),
        (1.001, 0, "FAIL"),
        (0.8, 0.2, "PASS"),
        (0.9, 0.2, "AMBIGUOUS"),
        (1.1, 0.2, "AMBIGUOUS"),
        (1.3, 0.2, "FAIL"),
        (math.nan, 0, "FAIL"),
        (math.inf, 0, "FAIL"),
        (0.5, math.nan, "FAIL"),
    ],
)
def test_the_outcome_of_a_check(value, margin, outcome):
    found = check(value, margin)
    assert found.outcome == outcome and found.passed is (outcome == "PASS")


def test_excess_is_in_units_of_the_limit():
    """And infinite where there is nothing to compare, so that it can be sorted by."""
    assert check(3, limit=2).excess == 1.5
    assert check(math.nan).excess == check(1, limit=0).excess == math.inf
    good, unsure, bad = check(0), check(1, 0.5), check(2)
    verdicts = [verdict(some) for some in ([], [good], [good, unsure], [unsure, bad, good])]
    assert verdicts == ["PASS", "PASS", "AMBIGUOUS", "FAIL"]


def test_limits_that_users_set():
    limits = parse_limits(["steps=3", "twin.rms=0", "steps=2e-1"])
    assert limits == {"steps": 0.2, "twin.rms": 0}
    assert parse_limits(f"{name}=1" for name in NAMES) == dict.fromkeys(NAMES, 1.0)
    one, two, three = with_limits(
        [check(0.5, name="steps.logits", kind="steps"), check(0.5, name="twin.rms"), check(0.5)],
        limits,
    )
    assert (one.limit, two.limit, three.limit) == (0.2, 0, 1)
    assert one.outcome == two.outcome == "FAIL" and three.outcome == "PASS"
    assert one.reason == "asked for: r" and three.reason == "r"


@pytest.mark.parametrize("text", ["twin=1", "twin.rms", "twin.rms=", "twin.rms=-1", "steps=nan"])
def test_limits_that_make_no_sense(text):
    with pytest.raises(RequestError, match="expected") as error:
        parse_limits([text])
    assert text in str(error.value) and ("twin" not in text or "twin.rms" in str(error.value))
