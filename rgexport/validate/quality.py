"""The second verdict: how close an artifact's answers are to the original's, in five grades.

The first verdict, of the checks, says whether the export is correct: whether the artifact computes
what its plan says. A correct artifact in four bits may still answer otherwise than the original.
How much so is said here, by two numbers: the mean KL to the original, which sees every change of a
probability, and the share of tokens with the same first choice, which is what a reader sees.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

from rgexport.choices import GradeName
from rgexport.validate.checks import STANDARD_ERRORS
from rgexport.validate.metrics import KL, Agreement


@dataclass(frozen=True)
class Grade:
    """The limits of a grade, both inclusive, and what it means to a person.

    Attributes:
        name: of the grade.
        kl: the mean KL to the original that it allows, nats per token.
        top1: the share of tokens with the same first choice that it demands.
        meaning: what to expect, as a sentence.
    """

    name: GradeName
    kl: float
    top1: float
    meaning: str


GRADES = (
    Grade("lossless", 5e-4, 0.98, "It answers as the original does, but for a rare near tie."),
    Grade("excellent", 3e-3, 0.95, "Hardly anyone would notice a difference to the original."),
    Grade("good", 1.5e-2, 0.90, "Some words differ from the original's, seldom for the worse."),
    Grade("fair", 4e-2, 0.85, "Answers often differ from the original's, and some are worse."),
    Grade("poor", float("inf"), 0.0, "The loss is easy to notice: expect weaker answers."),
)
"""From the best to the worst; the last one has no limits.

Trained checkpoints in known formats set the limits of KL: q8_0 has about 2e-4, q6_k 1e-3, q4_k_m
and the best 5 bits 5e-3 to 7e-3, 4.5 bits 1e-2 to 2e-2 if chosen well and 3e-2 to 6e-2 if rounded
to nearest, 3 bits 1e-1. First choices change where two tokens are nearly equal, at about 0.7 √KL
of the tokens: 1 % at 2e-4, 5 % at 5e-3, 17 % at 6e-2. The limits of agreement are a little wider
than that, so that they decide only where a text has more close calls than most.
"""
GRADE_NAMES: tuple[GradeName, ...] = get_args(GradeName)
"""The names, from the best to the worst."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The grade of an artifact, and what it follows from.

    Attributes:
        grade: the worse one of those of KL and of agreement.
        best, worst: the grades at the ends of the margins, two standard errors on each side.
        meaning: the grade's sentence.
        decided_by: which of the two numbers has that grade; KL where both have.
        against: what it was compared with, `original` or `reference` (a reference file).
        positions: tokens that were compared.
        kl: mean, nats per token.
        kl_margin: of the mean.
        top1: share of tokens with the same first choice.
        top1_margin: of the share.
    """

    grade: GradeName
    best: GradeName
    worst: GradeName
    meaning: str
    decided_by: Literal["kl", "top1"]
    against: Literal["original", "reference"]
    positions: int
    kl: float
    kl_margin: float
    top1: float
    top1_margin: float

    def reaches(self, least: GradeName) -> bool:
        """Whether the grade is `least` or a better one."""
        return GRADE_NAMES.index(self.grade) <= GRADE_NAMES.index(least)


def grade_quality(
    against: Literal["original", "reference"],
    kl: KL,
    agreement: Agreement,
    positions: int,
) -> Quality:
    """Grades what was measured over `positions`.

    Args:
        against: what the artifact was compared with.
        kl: to it.
        agreement: with it.
        positions: that were compared.
    """
    share = agreement.top1
    kl_margin = STANDARD_ERRORS * kl.standard_error
    # One more success and failure than seen: a share of 1 of few tokens is not certain.
    smoothed = (share * positions + 1) / (positions + 2)
    top1_margin = STANDARD_ERRORS * (smoothed * (1 - smoothed) / positions) ** 0.5
    by_kl, by_top1 = _index_by_kl(kl.mean), _index_by_top1(share)
    best = max(_index_by_kl(kl.mean - kl_margin), _index_by_top1(share + top1_margin))
    worst = max(_index_by_kl(kl.mean + kl_margin), _index_by_top1(share - top1_margin))
    grade = GRADES[max(by_kl, by_top1)]
    return Quality(
        grade=grade.name,
        best=GRADES[best].name,
        worst=GRADES[worst].name,
        meaning=grade.meaning,
        decided_by="top1" if by_top1 > by_kl else "kl",
        against=against,
        positions=positions,
        kl=kl.mean,
        kl_margin=kl_margin,
        top1=share,
        top1_margin=top1_margin,
    )


def _index_by_kl(kl: float) -> int:
    """Of the best grade that allows this KL; of the last one for NaN."""
    return len(list(takewhile(lambda grade: not kl <= grade.kl, GRADES[:-1])))


def _index_by_top1(share: float) -> int:
    return len(list(takewhile(lambda grade: not share >= grade.top1, GRADES[:-1])))
