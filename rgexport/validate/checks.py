"""The two verdicts: checks of measured values, and how close answers are to the original's.

The checks say whether the artifact computes what its plan says. A correct artifact in four bits may
still answer otherwise than the original. Two numbers grade that: the mean KL to the original, which
sees every change of a probability, and the top-1 agreement, which readers see.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.validate.metrics import KL, Agreement

Outcome = Literal["PASS", "AMBIGUOUS", "FAIL"]

TENSOR_CHECKS = tuple(
    "reference.noise reference.row reference.shift reference.projection reference.output "
    "weights.max_steps weights.noise weights.shift weights.projection weights.output".split()
)
"""Kinds of checks that are made of single tensors; the tensor's name is in the check's name."""
NAMES = (
    *"dequantized.logits dequantized.rms dequantized.states position".split(),
    *"steps ragged restored reset start long batch portable".split(),
    *"original.rms original.kl reference.rms reference.kl reference.finite".split(),
    *TENSOR_CHECKS,
    *"cost reproduced sites structure identity".split(),
)
"""Names that a limit can be set for: a check, or all checks of a kind. KL is checked only where a
limit is set for it."""
STANDARD_ERRORS = 2
"""The margin of a mean, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured value, known to ± `margin`, and its limit (inclusive).

    `kind` is one of `NAMES`, by which users set the limit; empty where it is the name itself.
    """

    name: str
    value: float
    limit: float
    reason: str
    margin: float = 0.0
    kind: str = ""

    @property
    def outcome(self) -> Outcome:
        """AMBIGUOUS where the limit lies within the margin; FAIL for NaN."""
        if self.value + self.margin <= self.limit:
            return "PASS"
        return "AMBIGUOUS" if self.value - self.margin <= self.limit else "FAIL"

    @property
    def excess(self) -> float:
        """The value in units of its limit; infinite for NaN, and where the limit is 0."""
        excess = self.value / self.limit if self.limit else math.inf
        return math.inf if math.isnan(excess) else excess

    @property
    def passed(self) -> bool:
        return self.outcome == "PASS"


def verdict(checks: Iterable[Check]) -> Outcome:
    """The worst outcome; PASS without checks."""
    outcomes = {check.outcome for check in checks}
    return next((bad for bad in ("FAIL", "AMBIGUOUS") if bad in outcomes), "PASS")


def with_limits(checks: Iterable[Check], limits: Mapping[str, float]) -> Iterator[Check]:
    for check in checks:
        kind = check.kind or check.name
        if kind in limits:
            check = replace(check, limit=limits[kind], reason=f"asked for: {check.reason}")
        yield check


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Reads the values of `--limit NAME=VALUE`.

    Raises:
        RequestError: an unknown name, or a value that is not a number of 0 or more.
    """
    limits = {}
    for text in texts:
        key, _, number = text.partition("=")
        name = key.replace("twin.", "dequantized.")  # its former name
        if name not in NAMES:
            raise RequestError(
                f"--limit {text}: expected NAME=VALUE with one of {', '.join(NAMES)}"
            )
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = -1.0
        if not limits[name] >= 0:
            raise RequestError(f"--limit {text}: expected a number of 0 or more after {key}=")
    return limits


GRADE_NAMES: tuple[GradeName, ...] = get_args(GradeName)
"""The names, from the best to the worst."""
Against = Literal["original", "reference"]


@dataclass(frozen=True)
class Grade:
    """A grade: the most KL, nats per token, and the least top-1 agreement, both inclusive."""

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
5e-3, 4.5 bits 1e-2 to 6e-2, 3 bits 1e-1. The top-1 token changes at about 0.7 √KL of the positions;
the limits of agreement decide only where a text has more close calls than most.
"""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The grade of an artifact: the worse of its grades for KL and for agreement.

    `best` and `worst` are the grades at the ends of the margins, two standard errors on each side.
    `decided_by` is the number that has the grade; KL where both have.
    """

    grade: GradeName
    best: GradeName
    worst: GradeName
    meaning: str
    decided_by: Literal["kl", "top1"]
    against: Against
    positions: int
    kl: float
    kl_margin: float
    top1: float
    top1_margin: float

    def reaches(self, least: GradeName) -> bool:
        return GRADE_NAMES.index(self.grade) <= GRADE_NAMES.index(least)


def grade_quality(against: Against, kl: KL, agreement: Agreement, positions: int) -> Quality:
    top1 = agreement.top1
    kl_margin = STANDARD_ERRORS * kl.standard_error
    # One more success and failure than seen: a share of 1 of few tokens is not certain.
    smoothed = (top1 * positions + 1) / (positions + 2)
    top1_margin = STANDARD_ERRORS * (smoothed * (1 - smoothed) / positions) ** 0.5
    by_kl, by_top1 = _index(kl=kl.mean), _index(top1=top1)
    best = _index(kl=kl.mean - kl_margin, top1=top1 + top1_margin)
    worst = _index(kl=kl.mean + kl_margin, top1=top1 - top1_margin)
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
        top1=top1,
        top1_margin=top1_margin,
    )


def _index(*, kl: float = 0.0, top1: float = 1.0) -> int:
    """The index of the best grade that allows both numbers; of the last one for NaN."""
    allowed = (i for i, grade in enumerate(GRADES) if kl <= grade.kl and top1 >= grade.top1)
    return next(allowed, len(GRADES) - 1)
