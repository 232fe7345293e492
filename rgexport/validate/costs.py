"""The KL that an artifact's weights cost, in all and by parts of the model.

The cost in all is compared with that of random rounding to the steps that the artifact's weights
show. An algorithm loses less than such errors do. Weights that lose much more are not made from
the model.
"""

from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest, StoredTensor
from rgexport.artifacts.storage import groups_of
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.numpy_reference import NumpyReference, Variants
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.validate import metrics
from rgexport.validate.checks import STANDARD_ERRORS
from rgexport.validate.reference_pass import Pass, watched_layers
from rgexport.validate.weights.steps import shown_steps

ROUNDED_TOKENS = 256
"""The first tokens of the text, which the rounded model takes."""
POSITIONS = 64
"""Positions among these tokens that are compared."""
_LEAST_KL = 1e-12
"""Divisor of ratios where rounding costs nothing."""
_SEED = 20240411
LAYER_TOKENS = 48
"""Most tokens: each of a 2B's 29 variants takes them."""
_LOGITS_BYTES = 256 << 20
"""Logits of all variants that exist at a time."""


@dataclass(frozen=True, kw_only=True)
class RoundingCost:
    """Mean KL, nats per token, of the artifact's weights to the original, if it is known.

    `kl_rounded` is that to themselves with random errors within half a step; `ratio` is `kl` in
    units of that, less two standard errors.
    """

    kl_rounded: float
    kl: float | None
    ratio: float | None


def rounding_cost(
    artifact: Artifact, dequantized: Pass, original: Pass | None, tokens: np.ndarray
) -> RoundingCost | None:
    """Runs the artifact's weights with random errors; None where no weight is quantized."""
    if not is_rounded(artifact.manifest):
        return None
    model, hidden = _run_rounded(artifact, tokens[None, :ROUNDED_TOKENS])
    positions = np.linspace(0, hidden.shape[1] - 1, POSITIONS).round().astype(int)
    positions = np.unique(positions)

    logits = dequantized.model.logits(dequantized.hidden[:, positions])[0]
    rounded_logits = model.logits(hidden[:, positions])[0]
    kl_rounded = _divergence(logits, rounded_logits)
    mean_rounded = max(float(kl_rounded.mean()), _LEAST_KL)
    if original is None:
        return RoundingCost(kl_rounded=mean_rounded, kl=None, ratio=None)

    original_logits = original.model.logits(original.hidden[:, positions])[0]
    kl = _divergence(original_logits, logits)
    mean = float(kl.mean())
    ratio = mean / mean_rounded
    # Delta method: the error of a ratio of means is that of the differences, in units of the base.
    ddof = 1 if len(kl) > 1 else 0
    deviation = float(np.std(kl - ratio * kl_rounded, ddof=ddof))
    standard_error = deviation / len(kl) ** 0.5
    least_ratio = ratio - STANDARD_ERRORS * standard_error / mean_rounded
    return RoundingCost(kl_rounded=mean_rounded, kl=mean, ratio=least_ratio)


def is_rounded(manifest: Manifest) -> bool:
    """Whether any weight of an artifact is quantized."""
    return any(stored.scheme.is_quantized for stored in manifest.tensors.values())


def _run_rounded(artifact: Artifact, tokens: np.ndarray) -> tuple[NumpyReference, np.ndarray]:
    """Runs the artifact's weights with random errors over tokens [1, T].

    Returns the model and its hidden states [1, T, width].
    """
    generator = np.random.default_rng(_SEED)
    rounded = {}
    for name, weight in artifact.weights.items():
        rounded[name] = _with_errors(name, weight, artifact.manifest.tensors[name], generator)
    with watched_layers("Rounding at random", rounded) as watched:
        model = NumpyReference(artifact.manifest.config, watched)
        hidden, _ = model.run(tokens)
    return model, hidden


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Returns the KL at each position, nats, of logits [positions, vocab]."""
    return np.asarray(metrics.compare_logits(reference, candidate)["kl"])


def _with_errors(
    name: str, weight: RowTensor, stored: StoredTensor, generator: np.random.Generator
) -> RowTensor:
    """Returns the weight with errors uniform within half a step, others whenever it is read."""
    if not stored.scheme.is_quantized:
        return weight

    def read(start: int, stop: int) -> np.ndarray:
        rows = weight.read(start, stop).astype(np.float32)
        for group in groups_of(stored):
            chosen = group.chosen(start, stop)
            group_rows = rows[chosen]
            if len(group_rows):
                steps = shown_steps(name, group_rows, group.stored.uniform).levels
                errors = generator.random(group_rows.shape, np.float32) - np.float32(0.5)
                rows[chosen] = group_rows + steps * errors
        return rows

    return RowTensor(weight.shape, np.dtype(np.float32), read)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The original with one part of the artifact's weights: its KL in nats, and top-1 agreement.

    The part is `layers.3`, `embed_tokens` (which is the head, too) or `final_norm`.
    """

    part: str
    kl: float
    standard_error: float
    top1: float


def layer_costs(
    config: GriffinConfig, original: WeightSource, dequantized: WeightSource, tokens: np.ndarray
) -> list[LayerCost]:
    """Measures every part of the model; `config` is the original's."""
    with watched_layers("Measuring what each layer costs", original) as watched:
        model = Variants(config, watched, dequantized)
        hidden = model.run_all(tokens[:LAYER_TOKENS])

    costs = []
    rows_of_parts = _compare_variants(model, hidden, config.vocab_size)
    for part, rows in zip(model.parts, rows_of_parts, strict=True):
        kl = metrics.kl_summary(rows)
        top1 = float(rows["top1"].mean())
        costs.append(LayerCost(part=part, kl=kl.mean, standard_error=kl.standard_error, top1=top1))
    return costs


def _compare_variants(model: Variants, hidden: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """Returns `metrics.ROWS` [T] of each part's variant against the original.

    `hidden` [1 + parts, T, width] are those of the original and of all variants.
    """
    step = max(1, _LOGITS_BYTES // (4 * vocab_size * len(hidden)))
    blocks: list[list[np.ndarray]] = [[] for _ in model.parts]
    for start in range(0, hidden.shape[1], step):
        original, *variants = model.all_logits(hidden[:, start : start + step])
        for block, logits in zip(blocks, variants, strict=True):
            block.append(metrics.compare_logits(original, logits))
    return [np.concatenate(block) for block in blocks]
