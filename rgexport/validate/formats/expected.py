"""What is expected of a format's artifacts: what a format has to say on this floor."""

from typing import cast

from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.validate.schedule import Schedule
from rgexport.validate.thresholds import TWIN, Tolerance

TOKENS, STEPS = 32, 4
"""All that a self-check takes, and how many of them one by one."""


class Expected:
    """A format whose engine computes in the dtype of its activations, with nothing special."""

    has_exact = False
    """Whether there is an `--exact`, and another way."""

    def tolerance(self, manifest: Manifest) -> Tolerance:
        """How far an artifact may be from its twin."""
        return TWIN[manifest.compute, manifest.rounds_activations]

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        """What a linear rounds its inputs to for the sake of this weight.

        A key of `bisect.site_limits.ROUNDED`.
        """
        return "float32"

    def attends_in_half(self, manifest: Manifest) -> bool:
        """Whether scores of attention, or keys and values, are float16."""
        return False

    def half_sums(self, manifest: Manifest) -> float:
        """What attention may be off because values are added up in float16."""
        return 0.0

    def schedule(self, manifest: Manifest) -> Schedule:
        """Which tokens a self-check has an artifact take: few, but by both of an engine's paths."""
        return Schedule(TOKENS - STEPS, TOKENS - STEPS, STEPS)


def expected_of(kind: str) -> Expected:
    """What is expected of a kind of artifact."""
    return cast(Expected, format_on("validate", kind))
