"""What is demanded of an artifact, and the verdict: one measured value against one limit each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from rgexport.errors import RequestError

Outcome = Literal["PASS", "AMBIGUOUS", "FAIL"]

NAMES = (
    "twin.logits",
    "twin.rms",
    "twin.states",
    "position",
    "steps",
    "ragged",
    "restored",
    "reset",
    "original.rms",
    "original.kl",
    "reference.rms",
    "reference.kl",
    "reference.finite",
    "reference.noise",
    "reference.row",
    "reference.shift",
    "reference.projection",
    "weights.max_steps",
    "weights.noise",
    "weights.shift",
    "weights.projection",
    "sites",
)
"""What a limit can be set for: a check, or all those whose names have it in front of a tensor's or
a site's. Those of KL are made only where a limit is asked for: see `thresholds.ORIGINAL_RMS`."""

NO_LIMITS: Mapping[str, float] = MappingProxyType({})
"""None that are asked for."""
STANDARD_ERRORS = 2
"""Standard errors between a mean and what it surely does not exceed."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured value, known to ± `margin`, and its limit (inclusive).

    `kind` is what a limit is asked for by, one of `NAMES`; as the name, where it is left empty.
    """

    name: str
    value: float
    limit: float
    reason: str
    margin: float = 0.0
    kind: str = ""

    @property
    def outcome(self) -> Outcome:
        """AMBIGUOUS where the limit lies within the margin; a NaN has failed."""
        if self.value + self.margin <= self.limit:
            return "PASS"
        return "AMBIGUOUS" if self.value - self.margin <= self.limit else "FAIL"

    @property
    def passed(self) -> bool:
        """Whether the value is surely within its limit; false also for NaN."""
        return self.outcome == "PASS"


def verdict(checks: Iterable[Check]) -> Outcome:
    """The worst outcome."""
    found = {check.outcome for check in checks}
    if "FAIL" in found:
        return "FAIL"
    return "AMBIGUOUS" if "AMBIGUOUS" in found else "PASS"


def with_limits(checks: Iterable[Check], limits: Mapping[str, float]) -> Iterator[Check]:
    """The checks, with the limits that were asked for."""
    for check in checks:
        kind = check.kind or check.name
        if kind in limits:
            check = replace(check, limit=limits[kind], reason=f"asked for: {check.reason}")
        yield check


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """What `--limit NAME=VALUE` asks for.

    Raises:
        RequestError: an unknown name, or a value that is no number of 0 or more.
    """
    found = {}
    for text in texts:
        name, _, word = text.partition("=")
        if name not in NAMES:
            raise RequestError(
                f"--limit {text}: expected NAME=VALUE with one of {', '.join(NAMES)}"
            )
        try:
            value = float(word)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise RequestError(f"--limit {text}: expected a number of 0 or more after {name}=")
        found[name] = value
    return found
