"""What an artifact's manifest says of the self-check that ended its export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rgexport.errors import printable

Status = Literal["verified", "unverified", "skipped"]


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """The outcome of a self-check, and what it measured where it came so far.

    Attributes:
        status: `verified` by numbers within their limits; `unverified` where one was beyond its
            limit, or the artifact could not be run; `skipped` where it was not tried.
        reason: why it was skipped, or what was wrong; empty where nothing was.
        tokens: how many the artifact took.
        positions: of how many of them the logits were compared.
        kl: mean KL(original ‖ artifact) over these positions, in nats; None where it was not
            measured or is no number.
        kl_standard_error: of that mean, positions taken as independent.
        relative_max: max |Δlogit| / max |logit| against the dequantized reference,
            which has the artifact's weights.
        engine: what ran it, and which version.
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
        """All of it in one line of printable characters."""
        return printable(self._sentence())

    def _sentence(self) -> str:
        if self.status == "skipped":
            return f"Not checked: {self.reason}."
        verdict = self.status + (f", since {self.reason}" if self.reason else "")
        if not self.positions:
            return f"Checked: {verdict}."
        return f"{self.occasion}: {self.measured}: {verdict}."

    @property
    def occasion(self) -> str:
        """The tokens and the engine."""
        some = f" ({self.positions} compared)" if self.positions < self.tokens else ""
        return f"Checked on {self.tokens} tokens{some} in {self.engine}"

    @property
    def measured(self) -> str:
        """KL and the largest difference."""
        return (
            f"KL to the original {self.nats}; largest difference to the dequantized reference "
            f"{self.share} of the largest logit"
        )

    @property
    def nats(self) -> str:
        """The KL with its standard error."""
        if self.kl is None or self.kl_standard_error is None:
            return "not a number"
        return f"{self.kl:.3g} ± {self.kl_standard_error:.1g} nats"

    @property
    def share(self) -> str:
        """The largest difference to the dequantized reference, of the largest logit."""
        return "not a number" if self.relative_max is None else f"{100 * self.relative_max:.2g} %"


def skipped(reason: str) -> CheckRecord:
    """A check that was not made."""
    return CheckRecord(status="skipped", reason=reason)


NOT_ASKED_FOR = skipped("it was not asked for")

SelfCheck = Callable[[Path], CheckRecord]
"""Checks an artifact that is complete, but not yet renamed to its target."""
