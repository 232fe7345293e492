"""The KL that each part of a model costs, if it alone is stored as in the artifact."""

from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.tensor import WeightSource
from rgexport.griffin.variants import Variants
from rgexport.validate import metrics
from rgexport.validate.reference_pass import watched_layers

TOKENS = 48
"""Most tokens: each of a 2B's 29 variants takes them."""
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

    `config` is the original's; at most `TOKENS` of the tokens [T] are taken.
    """
    with watched_layers("Measuring what each layer costs", original) as watched:
        model = Variants(config, watched, dequantized)
        hidden = model.run_all(tokens[:TOKENS])
    step = max(1, _LOGITS_BYTES // (4 * config.vocab_size * len(hidden)))
    blocks: list[list[np.ndarray]] = [[] for _ in model.parts]
    for start in range(0, hidden.shape[1], step):
        first, *variants = model.all_logits(hidden[:, start : start + step])
        unknown = np.full(len(first), -1)
        for rows, logits in zip(blocks, variants, strict=True):
            rows.append(metrics.compare_logits(first, logits, unknown))
    return [
        _cost(part, np.concatenate(rows)) for part, rows in zip(model.parts, blocks, strict=True)
    ]


def _cost(part: str, rows: np.ndarray) -> LayerCost:
    kl = metrics.kl_summary(rows)
    top1 = float(rows["top1"].mean())
    return LayerCost(part=part, kl=kl.mean, standard_error=kl.standard_error, top1=top1)
