"""What counts as equal: the tolerances, with their reasons, and the checks that apply them.

Two questions are kept apart. *Is the export right?* The artifact against its twin, the reference
that holds exactly the artifact's weights: only arithmetic may differ, so the tolerances are those
of the arithmetic. *What did compression cost?* The artifact against the original: the numbers
are reported, and only a ruin fails. Logits are judged by sizes without a unit, because the same
relative error means another KL for a model with larger logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rgexport.export.manifest import Manifest
from rgexport.quantize.scheme import Affine
from rgexport.validate.weights import WeightError


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artifact may be from its twin.

    logits: max |Δlogit| / max |logit|; rms: `LogitError.relative_rms`; states: max |Δ| /
    max |state| of each state tensor. `logits` and `states` also bound steps against prefill.
    """

    logits: float
    rms: float
    states: float
    reason: str


_FLOAT32 = Tolerance(
    logits=5e-4,
    rms=2e-4,
    states=5e-4,
    reason="float32 on both sides: the order of sums, and the last bit of exp under sqrt(1 - a²)",
)
_FLOAT16 = Tolerance(
    logits=2e-2,
    rms=2e-2,
    states=2e-2,
    reason="activations are rounded to 11 bits between the operations",
)
_INT8 = Tolerance(
    logits=0.3,
    rms=0.25,
    states=0.3,
    reason="activations are rounded to int8 per block at every quantized linear",
)

TWIN: dict[tuple[str, bool], Tolerance] = {
    ("fp32", False): _FLOAT32,
    ("fp16", False): _FLOAT16,
    ("fp32", True): _INT8,
    ("fp16", True): _INT8,
}
"""(compute, activations in int8) → tolerance.

float32: sums of K terms in another order differ by about √K · 2⁻²⁴, some 1e-6 of the logits
behind all layers. More comes from the RG-LRU: at a = 0.99999, one unit in the last place of
exp(2 log a) is 0.3 % of 1 - a², and no two libraries agree on it.

float16: half a unit is 2⁻¹¹ = 5e-4 of each activation; some ten roundings a layer add up at
random, √(10 · 38) · 5e-4 / √3 = 6e-3 for the deepest model.

int8 activations (`accuracy_level` 4): a block of x is rounded to steps of max |x| / 127, an rms
error of max |x| / 440. A normal block of 128 has max |x| = 2.8 rms, so each linear gets inputs
that are off by 0.6 %; with outliers more, up to √128 / 440 = 2.6 %. The errors are independent
and do not shrink on their way: about four linears follow one another in a layer, √(4 · 26) ·
0.6 % = 6 % for a 2B and 12 % where there are outliers. A flipped rounding makes a step differ
from a prefill by as much. So this mode cannot show faults smaller than that: the weight table
does for weights, and an artifact made with `--exact` for the graph.
"""

ORIGINAL_RMS = {"float32": 1e-2, "float16": 5e-2, "int8": 0.5, "int4": 1.3}
"""Coarsest storage → `relative_rms` against the original that only a broken export exceeds.

A candidate that knows nothing has 1, one that says something else 1.4.
"""

MAX_STEPS = 0.501
"""max |W−Ŵ| in steps of the scheme.

Rounding to nearest gives half a step, and 1e-5 more for the float32 arithmetic on 255 levels.
"""

PROJECTION = 0.004
"""|⟨W,Ŵ⟩/⟨W,W⟩ − 1|, clipping apart, beyond five deviations of its rounding noise."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of a measured value with its limit (inclusive)."""

    name: str
    value: float
    limit: float
    reason: str

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.value <= self.limit


def tolerance(manifest: Manifest) -> Tolerance:
    """The tolerance of an artifact against its twin."""
    quantized = any(isinstance(scheme, Affine) for scheme in manifest.plan.values())
    return TWIN[manifest.compute, quantized and not manifest.exact]


def coarsest(manifest: Manifest) -> str:
    """The key of `ORIGINAL_RMS` for the tensor that is stored in the fewest bits."""
    scheme = min(manifest.plan.values(), key=lambda scheme: scheme.bits_per_weight)
    return f"int{scheme.bits}" if isinstance(scheme, Affine) else scheme.dtype


def weight_checks(errors: Sequence[WeightError]) -> Iterator[Check]:
    """For each of the two weight checks: the tensor nearest to its limit, and all beyond it."""
    for make in (_steps_check, _projection_check):
        checks = sorted((make(error) for error in errors), key=_by_excess, reverse=True)
        yield from checks[:1]
        yield from (check for check in checks[1:] if not check.passed)


def _by_excess(check: Check) -> tuple[bool, float]:
    return not check.passed, check.value / check.limit


def _steps_check(error: WeightError) -> Check:
    return Check(
        name=f"weights.{error.name}.max_steps",
        value=error.max_steps,
        limit=MAX_STEPS,
        reason=f"{error.scheme}: rounded to nearest",
    )


def _projection_check(error: WeightError) -> Check:
    return Check(
        name=f"weights.{error.name}.projection",
        value=abs(error.projection - 1 - error.clipping),
        limit=PROJECTION + 5 * error.relative_error / error.values**0.5,
        reason="scales are neither too large nor too small",
    )
