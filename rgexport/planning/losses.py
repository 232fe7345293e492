"""The cost of a plan: the KL of a model with its weights, predicted by items, and measured.

For a linear in a layout, it is ½ Σ_o g²_o · Δw_o H Δw_oᵀ over its outputs o: g² is the mean square
of the gradient of the negative log-likelihood there, H = Σ x xᵀ / N of its inputs, and Δw the error
of the algorithm. For a row of the head, g² is the Fisher information of its logit, and the cost of
the same row in the embedding is added. The cost of a plan is the sum over its items. Rows are
independent, so a sample of them represents all: a 2B takes minutes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import zero_state
from rgexport.griffin.tensor import WeightSource, slab_bounds
from rgexport.parallelism import parallel_jobs
from rgexport.planning.plan_items import PlanItem
from rgexport.progress import task
from rgexport.quantize.algorithms.calibration_file import Calibration
from rgexport.quantize.algorithms.statistics import StatisticsOf, statistics_of
from rgexport.quantize.schemes.registry import Uniform

_SAMPLE = 256  # rows of a matrix, or of a row group, that are quantized in every layout
_SLAB_BYTES = 32 << 20  # most bytes of a slab of the embedding, and of its logits, in float32


class PredictedLosses:
    """Predicts the losses of items from a calibration, and the encoders' `statistics` of it."""

    def __init__(
        self,
        config: GriffinConfig,
        weights: WeightSource,
        calibration: Calibration,
        statistics: StatisticsOf,
    ):
        self._config, self._weights = config, weights
        self._calibration, self._statistics = calibration, statistics

    def of(self, item: PlanItem, layouts: Sequence[Uniform]) -> list[float]:
        """Returns the loss of an item in each layout, in nats per token."""
        losses = np.zeros(len(layouts))
        for tensor in item.tensors:
            losses += self._of_tensor(tensor, item, layouts)
        return losses.tolist()

    def _of_tensor(self, tensor: str, item: PlanItem, layouts: Sequence[Uniform]) -> list[float]:
        known, is_head = self._calibration, tensor == EMBEDDING
        together = max(layout.rows_together for layout in layouts)
        runs = item.shape[0] // together
        chosen = min(runs, max(1, _SAMPLE // together))
        firsts = (np.arange(chosen) * runs // chosen) * together
        rows = (firsts[:, None] + np.arange(together)).ravel()
        ids = rows if item.rows is None else np.sort(item.rows[rows])
        weights = np.concatenate([self._weights[tensor].read(i, i + 1) for i in ids.tolist()])
        weights = weights.astype(np.float32)
        outputs = known.row_sensitivity if is_head else known.output_sensitivity(tensor)
        if outputs is None:
            outputs = np.zeros(self._weights[tensor].shape[0], np.float32)
        blocks, product = known.hessian(tensor), _share(outputs, ids, item.rows)
        # What fits the calibration alone counts less, as for encoders.
        hessians = statistics_of(blocks, known.tokens).hessians if blocks else ()
        lookup = _share(known.token_share, ids, item.rows) if is_head else None
        statistics = self._statistics(tensor)

        def loss(layout: Uniform) -> float:
            errors = layout.round_trip(tensor, weights, statistics, ids) - weights
            costs = product * _through(errors, [hessian.matrix for hessian in hessians])
            if lookup is not None:
                costs += lookup * (np.square(errors, dtype=np.float64) @ self._channels())
            return float(0.5 * costs.sum())

        with ThreadPoolExecutor(parallel_jobs()) as pool:
            return list(pool.map(loss, layouts))

    def row_importance(self) -> np.ndarray:
        """Returns the cost of equal errors in each row of the embedding, float64 [vocab]."""
        known = self._calibration
        inputs = known.importance(EMBEDDING)
        product = 0 if inputs is None else known.row_sensitivity * inputs.mean(dtype=np.float64)
        return product + known.token_share * self._channels().mean(dtype=np.float64)

    def _channels(self) -> np.ndarray:
        return self._calibration.lookup_sensitivity * self._config.embedding_scale**2


def _share(values: np.ndarray, ids: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    sample = values[ids].astype(np.float64)
    total = (values if among is None else values[among]).sum(dtype=np.float64)
    return sample * (total / sample.sum()) if sample.sum() > 0 else sample


def _through(errors: np.ndarray, hessians: Sequence[np.ndarray]) -> np.ndarray:
    """Returns Δw H Δwᵀ of each row of errors [n, K], float64 [n]."""
    total, start = np.zeros(len(errors)), 0
    for block in hessians:
        part = errors[:, start : start + len(block)]
        total += np.einsum("nk,nk->n", part @ block, part, dtype=np.float64)
        start += len(block)
    return total


@dataclass(frozen=True)
class Divergence:
    """The mean KL of a text's tokens in nats; its standard error over sequences, NaN of one."""

    kl: float
    error: float
    tokens: int


class OriginalRun:
    """The original's hidden states on a text, from one run, for comparison with plans."""

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, sequences: Sequence[np.ndarray]
    ):
        self._config, self._weights = config, weights
        lengths = dict.fromkeys(map(len, sequences))
        self._texts = [
            np.stack([ids for ids in sequences if len(ids) == length]).astype(np.int64)
            for length in lengths
        ]
        self._hidden = self._run(weights)

    def divergence(self, weights: WeightSource) -> Divergence:
        values = self._divergences(self._run(weights), weights).numpy()
        mean = values.mean()
        lengths = [ids.shape[1] for ids in self._texts for _ in ids]
        sums = np.add.reduceat(values - mean, np.cumsum([0, *lengths[:-1]]))
        count = len(lengths)
        spread = np.sqrt(np.square(sums).sum() * count / (count - 1)) if count > 1 else np.nan
        return Divergence(float(mean), float(spread / len(values)), len(values))

    def _run(self, weights: WeightSource) -> Tensor:
        """Returns the head's input [tokens, width]; one layer's weights are in memory at a time."""
        model = Reference(self._config, weights)
        texts = [(ids, zero_state(self._config, len(ids))) for ids in self._texts]
        total = sum(ids.size for ids in self._texts) * self._config.num_layers
        with task("Running the layers", total, "steps") as advance:
            passes = model.run_each(
                texts, watch=lambda layer, index, stream: advance(self._texts[index].size)
            )
            return torch.cat([hidden.flatten(0, 1) for hidden, _ in passes])

    @torch.inference_mode()
    def _divergences(self, hidden: Tensor, weights: WeightSource) -> Tensor:
        """Returns the KL at each token, float64; computes logits in slabs of the vocabulary."""
        shape, tokens = self._weights[EMBEDDING].shape, len(hidden)
        log_p = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        log_q = log_p.clone()
        mean = torch.zeros(tokens, dtype=torch.float64)
        """The mean difference of logits, weighted by the original's probabilities so far."""
        for start, stop in slab_bounds(shape[0], 4 * max(shape[1], tokens), _SLAB_BYTES):
            original = self._logits(self._hidden, self._weights[EMBEDDING].read(start, stop))
            changed = self._logits(hidden, weights[EMBEDDING].read(start, stop))
            p = original.logsumexp(1).double()
            total = torch.logaddexp(log_p, p)
            slab_mean = (original.softmax(1) * (original - changed)).sum(1, dtype=torch.float64)
            mean = mean * (log_p - total).exp() + slab_mean * (p - total).exp()
            log_p, log_q = total, torch.logaddexp(log_q, changed.logsumexp(1).double())
        return (mean - log_p + log_q).clamp_min(0)

    def _logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        part = ops.linear(hidden, torch.from_numpy(rows.astype(np.float32)), None, "lm_head")
        return ops.soft_cap(part, self._config.soft_cap, "logits")
