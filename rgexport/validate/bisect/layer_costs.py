"""What each part of a model costs in KL, if it alone were stored as the artifact has it."""

from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.numpy_reference import Variants
from rgexport.griffin.tensor import WeightSource
from rgexport.validate import metrics
from rgexport.validate.reference_pass import watched_layers

TOKENS = 48
"""The most that are taken: a 2B has 29 variants, each of which runs over them."""
_LOGITS_BYTES = 256 << 20
"""Logits of all variants that exist at a time."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The original against itself with one part of the artifact's weights.

    Attributes:
        part: `layers.3`, `embed_tokens` (which is the head, too) or `final_norm`.
        kl: mean KL(original ‖ variant) in nats.
        standard_error: the mean's, positions taken as independent.
        top1: top-1 agreement, in [0, 1].
    """

    part: str
    kl: float
    standard_error: float
    top1: float


def layer_costs(
    config: GriffinConfig,
    original: WeightSource,
    dequantized: WeightSource,
    tokens: np.ndarray,
) -> list[LayerCost]:
    """Measures every part of the model, from the embedding to the last norm.

    Args:
        config: the original's.
        original: its weights.
        dequantized: the artifact's.
        tokens: [T], of which the first `TOKENS` are taken.
    """
    with watched_layers("Measuring what each layer costs", original) as watched:
        model = Variants(config, watched, dequantized)
        hidden = model.run_all(tokens[:TOKENS])
    row_bytes = 4 * config.vocab_size * len(hidden)
    step = max(1, _LOGITS_BYTES // row_bytes)
    rows = [
        _compare(model.all_logits(hidden[:, start : start + step]))
        for start in range(0, hidden.shape[1], step)
    ]
    return [
        _cost(part, found) for part, found in zip(model.parts, np.concatenate(rows, 1), strict=True)
    ]


def _compare(logits: np.ndarray) -> np.ndarray:
    """Logits [1 + parts, t, V] → rows [parts, t] of `metrics.ROWS` against the first."""
    unknown = np.full(logits.shape[1], -1)
    return np.stack([metrics.compare_logits(logits[0], other, unknown) for other in logits[1:]])


def _cost(part: str, rows: np.ndarray) -> LayerCost:
    kl = metrics.kl_summary(rows)
    top1 = float(rows["top1"].mean())
    return LayerCost(part=part, kl=kl.mean, standard_error=kl.standard_error, top1=top1)
