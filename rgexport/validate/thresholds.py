"""The tolerances, with their reasons.

The dequantized reference has exactly the artifact's weights, so the tolerances against it are those
of the arithmetic. Against the original, numbers are reported, and only a ruined model fails. Logits
are judged by relative errors, because the same relative error means another KL for a model with
larger logits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.quantize import scheme as schemes
from rgexport.validate.checks import STANDARD_ERRORS, Check
from rgexport.validate.metrics import KL, LogitError


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
        """The tolerance after so many tokens."""
        angle = PER_POSITION * position
        wider = {name: getattr(self, name) + angle for name in ("logits", "rms", "states")}
        return replace(self, **wider)


PER_POSITION = 2.0**-27
"""Growth of a tolerance with every token: the rounding of RoPE's angles.

The angle of the fastest pair is the position itself, in radians, in float32 off by up to 2⁻²⁵ of
itself. It is one of many that a score is the sum of: a quarter is allowed, 1e-3 at 131,072 tokens.
Measured: ggml, which multiplies the angle up pair by pair, is 1.2e-3 off there.
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
"""The most that an artifact may differ from itself, in units of its error against the reference.

Measured on ten random models of odd shapes in int8 and int4, without native kernels too: up to 2.5.
"""


def consistency(limit: Tolerance, position: int, logits: float, states: float) -> Tolerance:
    """The tolerance of an artifact against itself, after `position` tokens.

    `limit` is that against its dequantized reference; `logits` and `states` are the largest errors.
    """
    least, most = FLOAT32.at(position), limit.at(position)
    return replace(
        most,
        logits=min(most.logits, max(least.logits, ITSELF * logits)),
        states=min(most.states, max(least.states, ITSELF * states)),
    )


DEQUANTIZED: dict[tuple[str, bool], Tolerance] = {
    ("fp32", False): FLOAT32,
    ("fp16", False): FLOAT16,
    ("fp32", True): INT8,
    ("fp16", True): INT8,
}
"""(compute, activations in int8) → tolerance.

float32: sums of K terms in another order differ by about √K · 2⁻²⁴, some 1e-6 of the logits
after all layers. More comes from the RG-LRU: at a = 0.99999, one unit in the last place of
exp(2 log a) is 0.3 % of 1 - a², and no two libraries agree on it.

float16: some ten roundings a layer add up at random, √(10 · 38) · 2⁻¹¹ / √3 = 6e-3 for the deepest
model.

int8 activations (`accuracy_level` 4): a block of x has an rms error of max |x| / 440, 0.6 % of a
normal block of 128, with outliers up to √128 / 440 = 2.6 %. About four linears follow one another
in a layer: √(4 · 26) · 0.6 % = 6 % for a 2B and 12 % where there are outliers. A flipped rounding
makes a step differ from a prefill by as much. The logits cannot show smaller faults: the weight
table shows those of weights, and an artifact made with `--exact` those of the graph.
"""

ORIGINAL_RMS = dict(float32=0.0, float16=5e-2, int8=0.35, int4=1.1, int3=1.3, int2=1.3)
"""Coarsest storage → `relative_rms` against the original that only a broken export exceeds.

The tolerance of the arithmetic comes on top. Constant logits have 1, those of an unrelated model
1.4. Measured on random models with large logits: int8 up to 0.2, int4 up to 0.9. Whether the
weights are the right ones is checked in `weights.weight_limits`.
"""
MOST_COST = {"original": 2.0, "reference": 3.0}
"""KL of an artifact divided by the KL of rounding to nearest: to the original on the same
positions, and to a reference file, which has other texts."""


def tolerance(manifest: Manifest) -> Tolerance:
    limit: Tolerance = format_on("validate", manifest.kind).tolerance(manifest)
    return limit


def logit_checks(logits: LogitError, limit: Tolerance) -> Iterator[Check]:
    pairs = {"logits": (logits.relative_max, limit.logits), "rms": (logits.relative_rms, limit.rms)}
    for what, (value, most) in pairs.items():
        yield Check(name=f"dequantized.{what}", value=value, limit=most, reason=limit.reason)


def cost_checks(
    side: str, manifest: Manifest, logits: LogitError, kl: KL, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Checks an artifact against the `original` or a `reference`; KL only where `limits` has it."""
    yield original_rms(manifest, logits, side)
    if (name := f"{side}.kl") in limits:
        margin, reason = STANDARD_ERRORS * kl.standard_error, "mean KL to the original, nats"
        yield Check(name=name, value=kl.mean, margin=margin, limit=limits[name], reason=reason)


def original_rms(manifest: Manifest, logits: LogitError, side: str = "original") -> Check:
    """The check of an artifact's logits against the original's: is it ruined?"""
    storage = coarsest(manifest)
    return Check(
        name=f"{side}.rms",
        value=logits.relative_rms,
        margin=STANDARD_ERRORS * logits.rms_standard_error,
        limit=ORIGINAL_RMS[storage] + tolerance(manifest).rms,
        reason=f"{storage} weights cost less, unless the export is broken",
    )


def coarsest(manifest: Manifest) -> str:
    return schemes.coarsest(manifest.plan.values()).storage_class
