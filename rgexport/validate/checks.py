"""Checks of measured values, their limits, and the two verdicts that follow from them.

The checks say whether the artifact computes what its plan says, up to the rounding of its
arithmetic. Relative errors are limited, since the same one means another KL with larger logits. A
correct artifact in four bits may still answer otherwise than the original. Two numbers grade that:
the mean KL, which sees every change of a probability, and the top-1 agreement, which readers see.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rgexport.artifacts.manifest import Manifest
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.formats import format_on
from rgexport.quantize.schemes import registry as schemes
from rgexport.validate.metrics import KL, Agreement, LogitError

Outcome = Literal["PASS", "AMBIGUOUS", "FAIL"]

TENSOR_CHECKS = (
    "reference.noise",
    "reference.row",
    "reference.shift",
    "reference.projection",
    "reference.output",
    "weights.max_steps",
    "weights.noise",
    "weights.shift",
    "weights.projection",
    "weights.output",
)
"""Kinds of checks that are made of single tensors; the tensor's name is in the check's name."""
NAMES = (
    "dequantized.logits",
    "dequantized.rms",
    "dequantized.states",
    "position",
    "steps",
    "ragged",
    "restored",
    "reset",
    "start",
    "long",
    "batch",
    "portable",
    "original.rms",
    "original.kl",
    "reference.rms",
    "reference.kl",
    "reference.finite",
    *TENSOR_CHECKS,
    "cost",
    "reproduced",
    "sites",
    "structure",
    "identity",
)
"""Checks, or kinds of checks, that a limit can be set for; KL is checked only with one."""
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
        if not self.limit:
            return math.inf
        excess = self.value / self.limit
        return math.inf if math.isnan(excess) else excess

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit, margin included."""
        return self.outcome == "PASS"


def verdict(checks: Iterable[Check]) -> Outcome:
    """Returns the worst outcome; PASS without checks."""
    outcomes = {check.outcome for check in checks}
    if "FAIL" in outcomes:
        return "FAIL"
    if "AMBIGUOUS" in outcomes:
        return "AMBIGUOUS"
    return "PASS"


def with_limits(checks: Iterable[Check], limits: Mapping[str, float]) -> Iterator[Check]:
    """Replaces the limits of checks by those that the user set for their kinds."""
    for check in checks:
        kind = check.kind or check.name
        if kind in limits:
            check = replace(check, limit=limits[kind], reason=f"asked for: {check.reason}")
        yield check


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Reads `--limit NAME=VALUE`; raises RequestError for other names or values."""
    limits = {}
    for text in texts:
        key, _, number = text.partition("=")
        name = key.replace("twin.", "dequantized.")  # its former name
        if name not in NAMES:
            names = ", ".join(NAMES)
            raise RequestError(f"--limit {text}: expected NAME=VALUE with one of {names}")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not limit >= 0:
            raise RequestError(f"--limit {text}: expected a number of 0 or more after {key}=")
        limits[name] = limit
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
    """The worse of an artifact's grades for KL and for agreement, which `decided_by` names.

    `best` and `worst` are the grades at the ends of the margins, two standard errors on each side.
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
        """Whether the grade is as good as `least`, or better."""
        return GRADE_NAMES.index(self.grade) <= GRADE_NAMES.index(least)


def grade_quality(against: Against, kl: KL, agreement: Agreement, positions: int) -> Quality:
    """Grades an artifact by its mean KL, nats, and top-1 agreement over so many positions."""
    top1 = agreement.top1
    kl_margin = STANDARD_ERRORS * kl.standard_error
    # One more success and failure than seen: a share of 1 of few tokens is not certain.
    smoothed = (top1 * positions + 1) / (positions + 2)
    top1_margin = STANDARD_ERRORS * (smoothed * (1 - smoothed) / positions) ** 0.5

    by_kl = _grade_index(kl=kl.mean)
    by_top1 = _grade_index(top1=top1)
    decided_by: Literal["kl", "top1"] = "top1" if by_top1 > by_kl else "kl"
    best = _grade_index(kl=kl.mean - kl_margin, top1=top1 + top1_margin)
    worst = _grade_index(kl=kl.mean + kl_margin, top1=top1 - top1_margin)
    grade = GRADES[max(by_kl, by_top1)]
    return Quality(
        grade=grade.name,
        best=GRADES[best].name,
        worst=GRADES[worst].name,
        meaning=grade.meaning,
        decided_by=decided_by,
        against=against,
        positions=positions,
        kl=kl.mean,
        kl_margin=kl_margin,
        top1=top1,
        top1_margin=top1_margin,
    )


def grade_of_kl(kl: float) -> GradeName:
    """Returns the grade of a mean KL in nats, whatever the agreement is."""
    return GRADES[_grade_index(kl=kl)].name


def _grade_index(*, kl: float = 0.0, top1: float = 1.0) -> int:
    """Returns the index of the best grade that allows both numbers; of the last one for NaN."""
    for index, grade in enumerate(GRADES):
        if kl <= grade.kl and top1 >= grade.top1:
            return index
    return len(GRADES) - 1


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artifact may be from its dequantized reference.

    logits: max |Δlogit| / max |logit|; rms: `LogitError.relative_rms`; states: max |Δ| / max
    |state| of each state tensor. `logits` and `states` are of the worst of thousands of values, so
    they are twice as wide as `rms`. The per-op check finds smaller faults.
    """

    logits: float
    rms: float
    states: float
    reason: str

    def at(self, position: int) -> "Tolerance":
        """Returns the tolerance after so many tokens."""
        angle = PER_POSITION * position
        return replace(
            self, logits=self.logits + angle, rms=self.rms + angle, states=self.states + angle
        )


PER_POSITION = 2.0**-27
"""Growth of a tolerance with every token: the rounding of RoPE's angles.

The fastest pair's is off by up to 2⁻²⁵ of the position: a quarter is allowed, since a score is the
sum of many. Measured: ggml is off by 1.2e-3 at 131,072 tokens, where this is 1e-3.
"""


_WHY_FLOAT32 = (
    "float32 on both sides: the order of sums, and the last bit of exp under sqrt(1 - a²)"
)
_WHY_FLOAT16 = "activations are rounded to 11 bits between the operations"
_WHY_INT8 = "activations are rounded to int8 per block at every quantized linear"
FLOAT32 = Tolerance(logits=1e-3, rms=2e-4, states=1e-3, reason=_WHY_FLOAT32)
FLOAT16 = Tolerance(logits=4e-2, rms=2e-2, states=4e-2, reason=_WHY_FLOAT16)
INT8 = Tolerance(logits=0.6, rms=0.25, states=0.6, reason=_WHY_INT8)

ITSELF = 8
"""The most that an artifact may differ from itself, in units of its error against the reference;
measured on ten random models of odd shapes, without native kernels too: up to 2.5."""


def consistency(limit: Tolerance, position: int, logits: float, states: float) -> Tolerance:
    """Returns the tolerance of an artifact against itself, by its errors against its reference."""
    least, most = FLOAT32.at(position), limit.at(position)
    return replace(
        most,
        logits=min(most.logits, max(least.logits, ITSELF * logits)),
        states=min(most.states, max(least.states, ITSELF * states)),
    )


DEQUANTIZED = {"fp32": FLOAT32, "fp16": FLOAT16}
"""Dtype of the activations → tolerance, INT8 where they are rounded to int8.

float32: sums of K terms in another order differ by about √K · 2⁻²⁴, some 1e-6 of the logits after
all layers. More comes from the RG-LRU: at a = 0.99999, one unit in the last place of exp(2 log a)
is 0.3 % of 1 - a², and no two libraries agree on it. float16: some ten roundings a layer add up at
random, √(10 · 38) · 2⁻¹¹ / √3 = 6e-3 for the deepest model.

int8 activations (`accuracy_level` 4): a block of x has an rms error of max |x| / 440, 0.6 % of a
normal block of 128, with outliers up to √128 / 440 = 2.6 %. About four linears follow one another
in a layer: √(4 · 26) · 0.6 % = 6 % for a 2B and 12 % where there are outliers. A flipped rounding
makes a step differ from a prefill by as much. The logits cannot show smaller faults: the weight
table shows those of weights, and an artifact made with `--exact` those of the graph.
"""

ORIGINAL_RMS = {
    "float32": 0.0,
    "float16": 5e-2,
    "int8": 0.35,
    "int4": 1.1,
    "int3": 1.3,
    "int2": 1.3,
}
"""Coarsest storage → `relative_rms` against the original that only a broken export exceeds.

The tolerance of the arithmetic comes on top. Constant logits have 1, those of an unrelated model
1.4. Measured on random models with large logits: int8 up to 0.2, int4 up to 0.9. Whether the
weights are the right ones is checked in `weights.weight_limits`.
"""
MOST_COST = {"original": 2.0, "reference": 3.0}
"""KL of an artifact divided by the KL of rounding to nearest: to the original on the same
positions, and to a reference file, which has other texts."""


def tolerance(manifest: Manifest) -> Tolerance:
    """Returns the tolerance of an artifact against its dequantized reference."""
    limit: Tolerance = format_on("validate", manifest.kind).tolerance(manifest)
    return limit


def logit_checks(logits: LogitError, limit: Tolerance) -> Iterator[Check]:
    """Checks an artifact's logits against its dequantized reference's."""
    yield Check(
        name="dequantized.logits",
        value=logits.relative_max,
        limit=limit.logits,
        reason=limit.reason,
    )
    yield Check(
        name="dequantized.rms",
        value=logits.relative_rms,
        limit=limit.rms,
        reason=limit.reason,
    )


def cost_checks(
    side: str, manifest: Manifest, logits: LogitError, kl: KL, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Checks an artifact against the `original` or a `reference`; KL only where `limits` has it."""
    yield original_rms(manifest, logits, side)
    name = f"{side}.kl"
    if name in limits:
        yield Check(
            name=name,
            value=kl.mean,
            margin=STANDARD_ERRORS * kl.standard_error,
            limit=limits[name],
            reason="mean KL to the original, nats",
        )


def original_rms(manifest: Manifest, logits: LogitError, side: str = "original") -> Check:
    """Returns the check of an artifact's logits against the original's: it fails a ruined one."""
    storage = coarsest(manifest)
    return Check(
        name=f"{side}.rms",
        value=logits.relative_rms,
        margin=STANDARD_ERRORS * logits.rms_standard_error,
        limit=ORIGINAL_RMS[storage] + tolerance(manifest).rms,
        reason=f"{storage} weights cost less, unless the export is broken",
    )


def coarsest(manifest: Manifest) -> str:
    """Returns the storage class of the coarsest weights, a key of `ORIGINAL_RMS`."""
    return schemes.coarsest(manifest.plan.values()).storage_class
