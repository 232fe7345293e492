"""The grades: limits are inclusive, the worse number decides, and margins name other grades."""

import math

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.commands.proof import validate
from rgexport.validate.metrics import KL, Agreement
from rgexport.validate.quality import GRADE_NAMES, GRADES, Quality, grade_quality

ORDER = {name: index for index, name in enumerate(GRADE_NAMES)}


def graded(
    kl: float, top1: float, error: float = 0.0, positions: int = 10**9, interval: float = 0.0
) -> Quality:
    quantiles = dict.fromkeys(("median", "p95", "p99", "max"), kl)
    flips = 0 if math.isnan(top1) else round((1 - top1) * positions)
    divergence = KL(mean=kl, standard_error=error, worst_position=0, **quantiles)
    agreed = Agreement(top1=top1, top5=1.0, largest_flip_margin=0.0, flips=flips, near_ties=0)
    return grade_quality("original", divergence, agreed, positions, interval)


def test_the_command_offers_all_grades():
    (option,) = [one for one in validate.params if one.name == "min_quality"]
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == GRADE_NAMES


@pytest.mark.parametrize(
    ("kl", "top1", "grade", "decided_by"),
    [
        (0.0, 1.0, "lossless", "kl"),
        (2.4e-4, 0.99, "lossless", "kl"),  # q8_0
        (5e-4, 0.98, "lossless", "kl"),
        (7.2e-3, 0.94, "good", "kl"),  # q4_k_m
        (2e-2, 0.9, "fair", "kl"),
        (5.73e-2, 0.8307, "poor", "kl"),  # int4, rounded to nearest
        (1e-3, 0.83, "poor", "top1"),
        (math.nan, 1.0, "poor", "kl"),
        (0.0, math.nan, "poor", "top1"),
    ],
)
def test_grades_of_known_formats(kl, top1, grade, decided_by):
    found = graded(kl, top1)
    assert (found.grade, found.decided_by) == (grade, decided_by)


SHARE, MARGIN = st.floats(0, 1), st.floats(0, 0.1)


@given(SHARE, SHARE, MARGIN, st.integers(1, 10_000), MARGIN, SHARE)
def test_a_worse_number_gives_no_better_grade(kl, top1, error, positions, interval, more):
    found = graded(kl, top1, error, positions, interval)
    assert ORDER[found.best] <= ORDER[found.grade] <= ORDER[found.worst]
    assert found.certain is (found.best == found.worst)
    limits = GRADES[ORDER[found.grade]]
    assert kl <= limits.kl and top1 >= limits.top1
    for worse in (graded(kl + more, top1), graded(kl, top1 * (1 - more))):
        assert ORDER[worse.grade] >= ORDER[found.grade]
    assert all(found.reaches(name) == (ORDER[found.grade] <= ORDER[name]) for name in ORDER)


def test_margins_are_two_standard_errors():
    """KL's own, with the interval of a file; that of a share of positions."""
    found = graded(0.014, 0.95, error=4e-4, positions=1000, interval=3e-4)
    assert found.kl_margin == pytest.approx(1.1e-3)
    assert found.top1_margin == pytest.approx(2 * math.sqrt(0.95 * 0.05 / 1000), rel=0.02)
    assert (found.best, found.grade, found.worst) == ("good", "good", "fair")
    assert not found.certain
    few = graded(0.0, 1.0, positions=8)
    assert few.grade == "lossless" and few.worst != "lossless", "eight tokens show little"
