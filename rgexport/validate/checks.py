"""Checks, each of a measured value and its limit, and the verdict that follows from them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from rgexport.errors import RequestError

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
FORMER_NAMES = {f"twin.{what}": f"dequantized.{what}" for what in ("logits", "rms", "states")}
"""Former name of a check → its name."""

NO_LIMITS: Mapping[str, float] = MappingProxyType({})
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
    """Yields the checks with the limits that the user set."""
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
        name = FORMER_NAMES.get(key, key)
        if name not in NAMES:
            raise RequestError(
                f"--limit {text}: expected NAME=VALUE with one of {', '.join(NAMES)}"
            )
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise RequestError(f"--limit {text}: expected a number of 0 or more after {key}=")
        limits[name] = value
    return limits
