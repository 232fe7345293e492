"""What an artifact's weights cost in KL, beside what its layout costs when it is filled simply.

An algorithm chooses levels so that less is lost than by rounding to nearest. So weights that lose
much more than the original's, rounded to nearest in the same layout, are not made from it.
"""

from dataclasses import dataclass, replace

import numpy as np

from rgexport.export.manifest import Manifest
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.quantize.scheme import Affine, Float, Ggml, Mixed, Palette, Scheme
from rgexport.quantize.statistics import no_statistics
from rgexport.quantize.stored_weights import quantized
from rgexport.validate import metrics
from rgexport.validate.checks import STANDARD_ERRORS
from rgexport.validate.reference_pass import Pass, watched_layers
from rgexport.validate.weights.steps import is_quantized

TOKENS = 256
"""The first tokens of the text, which the rounded model takes, …"""
POSITIONS = 64
"""… and how many of them are compared."""
_SIMPLE: dict[type, str] = {Affine: "rtn", Palette: "kmeans", Ggml: "ggml"}
"""Layout → the algorithm that fills it without data."""
_LEAST = 1e-12
"""KL, nats, that a cost is divided by at least."""


@dataclass(frozen=True, kw_only=True)
class RoundingCost:
    """Mean KL to the original over the same positions, nats per token.

    Attributes:
        kl: of the artifact's weights in exact arithmetic.
        kl_rounded: of the original's weights, rounded to nearest in the artifact's layout.
        ratio: the first in units of the second, less two standard errors.
    """

    kl: float
    kl_rounded: float
    ratio: float


def rounding_cost(
    manifest: Manifest,
    checkpoint: Checkpoint,
    original: Pass,
    dequantized: Pass,
    tokens: np.ndarray,
) -> RoundingCost | None:
    """Runs the original with its weights rounded to nearest; None where no weight is quantized.

    Args:
        manifest: the artifact's, whose plan has the layouts.
        checkpoint: the original.
        original: its pass over tokens [T].
        dequantized: the pass of the artifact's weights over the same tokens.
        tokens: [T], of which the first `TOKENS` are taken.

    Raises:
        RequestError: a layout of ggml, whose library is missing.
    """
    if not any(map(is_quantized, manifest.plan.values())):
        return None
    plan = {name: _simply_filled(scheme) for name, scheme in manifest.plan.items()}
    with watched_layers("Rounding to nearest, to compare", checkpoint.weights) as watched:
        model = NumpyReference(checkpoint.config, quantized(watched, plan, no_statistics))
        hidden, _ = model.run(tokens[None, :TOKENS])
        positions = np.linspace(0, hidden.shape[1] - 1, POSITIONS).round().astype(int)
        positions = np.unique(positions)
        expected = original.model.logits(original.hidden[:, positions])[0]
        unknown = np.full(len(positions), -1)
        kl, kl_rounded = (
            metrics.compare_logits(expected, logits[0], unknown)["kl"]
            for logits in (
                dequantized.model.logits(dequantized.hidden[:, positions]),
                model.logits(hidden[:, positions]),
            )
        )
    return _summary(kl, kl_rounded)


def _summary(kl: np.ndarray, kl_rounded: np.ndarray) -> RoundingCost:
    """From the KL at each position."""
    base = float(kl_rounded.mean()) or _LEAST
    ratio = float(kl.mean()) / base
    error = float((kl - ratio * kl_rounded).std(ddof=1)) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
    return RoundingCost(
        kl=float(kl.mean()),
        kl_rounded=float(kl_rounded.mean()),
        ratio=ratio - STANDARD_ERRORS * error / base,
    )


def _simply_filled(scheme: Scheme) -> Scheme:
    if not is_quantized(scheme):
        return Float("float32")
    if isinstance(scheme, Mixed):
        return scheme.each(lambda one: replace(one, algorithm=_SIMPLE[Affine]))
    assert not isinstance(scheme, Float)
    return replace(scheme, algorithm=_SIMPLE[type(scheme)])
