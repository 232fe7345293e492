"""How far one op of an artifact may be from the reference's, given the same inputs.

The limits are near to one op's rounding. The median over the channels, which is limited beside the
rms over all values, shows a fault of every channel where few ill-conditioned ones make that large.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.manifest import Manifest
from rgexport.griffin.config import RG_LRU_C
from rgexport.griffin.layout import EMBEDDING
from rgexport.validate.formats.expected import expected_of


@dataclass(frozen=True)
class SiteLimit:
    """Limits of ‖Δ‖/‖reference‖: over all values, and the median over the channels."""

    rms: float
    median: float

    def plus(self, rms: float, median: float) -> "SiteLimit":
        """Returns wider limits."""
        return SiteLimit(self.rms + rms, self.median + median)


FLOAT32: dict[str, SiteLimit] = {
    "embedding": SiteLimit(1e-6, 1e-6),
    "add": SiteLimit(1e-6, 1e-6),
    "rms_norm": SiteLimit(3e-6, 3e-6),
    "gelu": SiteLimit(5e-5, 1e-2),
    "mul": SiteLimit(5e-5, 1e-2),
    "rg_lru_scan": SiteLimit(1e-5, 3e-6),
}
"""Op → its limit where both sides compute in float32."""
FLOAT32_SUMS = SiteLimit(5e-5, 5e-5)
"""All other ops.

A sum of K products in another order differs by some √K · 2⁻²⁴ of their norm, 5e-6 at K = 7680: ten
times that allows for sums that cancel to a tenth of their terms. A float16 in between costs 2.8e-4.
The squares in a norm cannot cancel, so it is off by 5e-7; an epsilon of 1e-5 for 1e-6 shows as
4.5e-6. GELU below -3 is 1 + tanh of nearly -1, whose last bits are lost: that may be most channels
of a sparse layer. The scan rounds by 3e-7, and `scan_noise` has what its decays add; gates in
float16 show as 1e-5.
"""

ROUNDED = {"float32": 0.0, "float16": 2e-3, "bfloat16": 1.5e-2, "int8": 0.1}
"""Dtype that an op rounds its values to → width that this adds to both limits.

float16: ten times the mean of half a unit, 2e-4, since intermediate values are rounded too.
bfloat16, at a linear's inputs: eight times as much. int8, there too: the rms error of a block is
max |x| / 440, at most √256 / 440 = 3.6 %, and the terms may cancel to a third.
"""

GAIN = 0.02
"""The most that all values of an op may be too large together; measured: up to 0.003."""

HALF = {
    "embedding": 0.0,
    "rms_norm": 0.0,
    "block_diagonal_linear": 0.0,
    "rg_lru_scan": 0.0,
    "soft_cap": 5e-4,
}
"""Op → width that float16 activations add to its limits; `ROUNDED` for all other ops.

These are float32 in every artifact. Only the soft cap takes logits that may have been rounded.
"""

HALF_ATTENTION = 1e-2
"""Added to attention's limits where its scores or its keys and queries are float16.

The scores are so in Core ML, keys and queries in GGUF. A weight is off by as much as its score,
30 · 2⁻¹¹ = 1.5 % if all its errors had one sign.
"""
ANGLE = 2.0**-23
"""Added per token of position: the rounding of a frequency and of an angle, in radians."""


def site_limit(manifest: Manifest, op: str, site: str, position: int) -> SiteLimit:
    """Returns the limit of an op of `griffin.ops`, by the manifest: a gate in float16 is a fault.

    `position` is that of the last token.
    """
    expected = expected_of(manifest.kind)
    rounding = 0.0
    if op == "linear":
        tensor = f"{site}.weight"
        if site == "lm_head":
            tensor = EMBEDDING
        rounding += ROUNDED[expected.rounds_inputs_to(manifest, tensor)]
    if manifest.compute == "fp16":
        rounding += HALF.get(op, ROUNDED["float16"])
    if op == "rope":
        rounding += position * ANGLE
    if op == "local_attention" and expected.attends_in_half(manifest):
        rounding += HALF_ATTENTION + expected.half_sums(manifest)
    return FLOAT32.get(op, FLOAT32_SUMS).plus(rounding, rounding)


def scan_noise(recurrence_gate: np.ndarray, a_param: np.ndarray) -> np.ndarray:
    """Returns the width that exp's last bit adds to the limit of each channel of the RG-LRU, [R].

    Two libraries' exp(2 log a) differ by a unit of 2⁻²⁴, and the root of 1 - a² by half as much of
    1 - a²: by 0.15 % at 1 - a = 1e-5. The gate [1, T, R] has pre-activations.
    """
    gate = recurrence_gate[0].astype(np.float64)
    param = a_param.astype(np.float64)
    log_square = 2 * RG_LRU_C / (1 + np.exp(-gate)) * np.logaddexp(0, param)
    square = np.exp(log_square)
    noise = 2.0**-25 / np.maximum(1 - square, 2.0**-24)
    return np.asarray(np.sqrt((noise**2).mean(0)))


def state_limit(manifest: Manifest, state: str) -> SiteLimit:
    """Returns the limit of a canonical state; all but the RG-LRU's are copies of ops' values."""
    if state.endswith(".rg_lru"):
        return FLOAT32["rg_lru_scan"]
    dtype = "float32"
    if manifest.compute == "fp16" or expected_of(manifest.kind).attends_in_half(manifest):
        dtype = "float16"
    rounding = ROUNDED[dtype]
    return FLOAT32_SUMS.plus(rounding, rounding)
