"""What an artifact's weights cost in KL, beside what rounding to their steps costs at random.

Nobody needs the original to know what rounding costs: the artifact's weights show their steps, and
a model is as sensitive to random errors around its artifact's weights as around its own. An
algorithm loses less than such errors do. Weights that lose much more are not made from the model.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest, StoredTensor
from rgexport.export.row_groups import groups_of
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.tensor import RowTensor
from rgexport.validate import metrics
from rgexport.validate.checks import STANDARD_ERRORS
from rgexport.validate.reference_pass import Pass, watched_layers
from rgexport.validate.weights.steps import shown_steps

TOKENS = 256
"""The first tokens of the text, which the rounded model takes, …"""
POSITIONS = 64
"""… and how many of them are compared."""
_SEED = 20240411
_LEAST = 1e-12
"""KL, nats, that a cost is divided by at least."""


@dataclass(frozen=True, kw_only=True)
class RoundingCost:
    """Mean KL over some positions, nats per token.

    Attributes:
        kl_rounded: of the artifact's weights to themselves with random errors within half a step.
        kl: of the artifact's weights in exact arithmetic to the original; None without one.
        ratio: `kl` in units of `kl_rounded`, less two standard errors.
    """

    kl_rounded: float
    kl: float | None
    ratio: float | None


def rounding_cost(
    artifact: Artifact, dequantized: Pass, original: Pass | None, tokens: np.ndarray
) -> RoundingCost | None:
    """Runs the artifact's weights with random errors; None where no weight is quantized.

    Args:
        artifact: whose weights show their steps.
        dequantized: the pass of its weights over tokens [T].
        original: the original's pass over them, where there is one.
        tokens: [T], of which the first `TOKENS` are taken.
    """
    tensors, generator = artifact.manifest.tensors, np.random.default_rng(_SEED)
    if not is_rounded(artifact.manifest):
        return None
    rounded = {
        name: _with_errors(name, weight, tensors[name], generator)
        for name, weight in artifact.weights.items()
    }
    with watched_layers("Rounding at random", rounded) as watched:
        model = NumpyReference(artifact.manifest.config, watched)
        hidden, _ = model.run(tokens[None, :TOKENS])
    positions = np.linspace(0, hidden.shape[1] - 1, POSITIONS).round().astype(int)
    positions = np.unique(positions)
    logits = _logits_at(dequantized, positions)
    kl_rounded = _divergence(logits, model.logits(hidden[:, positions])[0])
    base = max(float(kl_rounded.mean()), _LEAST)
    if original is None:
        return RoundingCost(kl_rounded=base, kl=None, ratio=None)
    kl = _divergence(_logits_at(original, positions), logits)
    ratio = float(kl.mean()) / base
    error = float(np.std(kl - ratio * kl_rounded, ddof=len(kl) > 1)) / len(kl) ** 0.5
    return RoundingCost(
        kl_rounded=base, kl=float(kl.mean()), ratio=ratio - STANDARD_ERRORS * error / base
    )


def is_rounded(manifest: Manifest) -> bool:
    """Whether an artifact has quantized weights."""
    return any(stored.scheme.is_quantized for stored in manifest.tensors.values())


def _logits_at(model_pass: Pass, positions: np.ndarray) -> np.ndarray:
    """Logits [positions, vocab] float32."""
    return model_pass.model.logits(model_pass.hidden[:, positions])[0]


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL at each position, nats, of logits [positions, vocab]."""
    unknown = np.full(len(reference), -1)
    return metrics.compare_logits(reference, candidate, unknown)["kl"].astype(np.float64)


def _with_errors(
    name: str, weight: RowTensor, stored: StoredTensor, generator: np.random.Generator
) -> RowTensor:
    """The weight with other errors, uniform within half a step, whenever it is read."""
    if not stored.scheme.is_quantized:
        return weight

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop).astype(np.float32)
        for group in groups_of(stored):
            chosen = group.chosen(start, stop)
            if len(some := rows[chosen]):
                steps = shown_steps(name, some, group.stored).levels
                errors = generator.random(some.shape, np.float32) - np.float32(0.5)
                rows[chosen] = some + steps * errors
        return rows

    return RowTensor(weight.shape, np.dtype(np.float32), read)
