"""Records the self-check that ends an export, for the artifact's manifest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rgexport.errors import printable

Status = Literal["verified", "unverified", "skipped"]


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """The outcome of a self-check, and its measurements if it came so far.

    Attributes:
        status: `verified` by numbers within their limits; `unverified` where one was beyond its
            limit, or the artifact could not be run; `skipped` where it was not tried.
        reason: why it was skipped, or the fault; else empty.
        tokens: number of tokens that the artifact took.
        positions: number of tokens whose logits were compared.
        kl: mean KL(original ‖ artifact) over these positions, in nats; None where it was not
            measured or is no number.
        kl_standard_error: of that mean, positions taken as independent.
        relative_max: max |Δlogit| / max |logit| against the dequantized reference.
        engine: name and version of the runtime.
    """

    status: Status
    reason: str = ""
    tokens: int = 0
    positions: int = 0
    kl: float | None = None
    kl_standard_error: float | None = None
    relative_max: float | None = None
    engine: str | None = None

    @property
    def sentence(self) -> str:
        """Outcome and measurements in one line of printable characters."""
        return printable(self._sentence())

    def _sentence(self) -> str:
        if self.status == "skipped":
            return f"Not checked: {self.reason}."
        verdict = self.status + (f", since {self.reason}" if self.reason else "")
        if not self.positions:
            return f"Checked: {verdict}."
        compared = f" ({self.positions} compared)" if self.positions < self.tokens else ""
        return (
            f"Checked on {self.tokens} tokens{compared} in {self.engine}: "
            f"KL to the original {self.nats}; largest difference to the dequantized reference "
            f"{self.share} of the largest logit: {verdict}."
        )

    @property
    def nats(self) -> str:
        if self.kl is None or self.kl_standard_error is None:
            return "not a number"
        return f"{self.kl:.3g} ± {self.kl_standard_error:.1g} nats"

    @property
    def share(self) -> str:
        """`relative_max` in percent."""
        return "not a number" if self.relative_max is None else f"{100 * self.relative_max:.2g} %"


def skipped(reason: str) -> CheckRecord:
    return CheckRecord(status="skipped", reason=reason)


NOT_ASKED_FOR = skipped("it was not asked for")

SelfCheck = Callable[[Path], CheckRecord]
"""Checks an artifact that is complete, but not yet renamed to its target."""
