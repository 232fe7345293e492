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
from rgexport.validate.weights.tensor_errors import shown_steps

ROUNDED_TOKENS, POSITIONS = 256, 64
"""The first tokens of the text, which the rounded model takes, and how many are compared."""
_SEED = 20240411
LAYER_TOKENS = 48
"""Most tokens: each of a 2B's 29 variants takes them."""
_LOGITS_BYTES = 256 << 20  # logits of all variants that exist at a time


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
    tensors, generator = artifact.manifest.tensors, np.random.default_rng(_SEED)
    if not is_rounded(artifact.manifest):
        return None
    rounded = {
        name: _with_errors(name, weight, tensors[name], generator)
        for name, weight in artifact.weights.items()
    }
    with watched_layers("Rounding at random", rounded) as watched:
        model = NumpyReference(artifact.manifest.config, watched)
        hidden, _ = model.run(tokens[None, :ROUNDED_TOKENS])
    positions = np.unique(np.linspace(0, hidden.shape[1] - 1, POSITIONS).round().astype(int))
    logits = dequantized.model.logits(dequantized.hidden[:, positions])[0]
    kl_rounded = _divergence(logits, model.logits(hidden[:, positions])[0])
    base = max(float(kl_rounded.mean()), 1e-12)
    if original is None:
        return RoundingCost(kl_rounded=base, kl=None, ratio=None)
    kl = _divergence(original.model.logits(original.hidden[:, positions])[0], logits)
    mean, ratio = float(kl.mean()), float(kl.mean()) / base
    error = float(np.std(kl - ratio * kl_rounded, ddof=len(kl) > 1)) / len(kl) ** 0.5
    return RoundingCost(kl_rounded=base, kl=mean, ratio=ratio - STANDARD_ERRORS * error / base)


def is_rounded(manifest: Manifest) -> bool:
    return any(stored.scheme.is_quantized for stored in manifest.tensors.values())


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL at each position, nats, of logits [positions, vocab]."""
    return np.asarray(metrics.compare_logits(reference, candidate)["kl"])


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
                steps = shown_steps(name, some, group.stored.uniform).levels
                errors = generator.random(some.shape, np.float32) - np.float32(0.5)
                rows[chosen] = some + steps * errors
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
    step = max(1, _LOGITS_BYTES // (4 * config.vocab_size * len(hidden)))
    blocks: list[list[np.ndarray]] = [[] for _ in model.parts]
    for start in range(0, hidden.shape[1], step):
        first, *variants = model.all_logits(hidden[:, start : start + step])
        for block, logits in zip(blocks, variants, strict=True):
            block.append(metrics.compare_logits(first, logits))
    costs = []
    for part, block in zip(model.parts, blocks, strict=True):
        rows = np.concatenate(block)
        kl, top1 = metrics.kl_summary(rows), float(rows["top1"].mean())
        costs.append(LayerCost(part=part, kl=kl.mean, standard_error=kl.standard_error, top1=top1))
    return costs
