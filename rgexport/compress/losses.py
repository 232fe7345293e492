"""Predicts the cost of a layout: the KL of a model with one item stored in that layout.

For a linear that is ½ Σ_o g²_o · Δw_o H Δw_oᵀ over its outputs o: g² is the mean square of the
gradient of the negative log-likelihood there, H = Σ x xᵀ / N of its inputs, and Δw the error
of the algorithm. For a row of the head, g² is the Fisher information of its logit, and the cost of
the same row in the embedding is added. The cost of a plan is the sum over its items.

Rows are independent, so a sample of them represents all: a 2B takes minutes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from rgexport.compress.items import PlanItem
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import WeightSource
from rgexport.parallelism import parallel_jobs
from rgexport.quantize.calibration import Calibration
from rgexport.quantize.scheme import Uniform
from rgexport.quantize.statistics import Calibrated, StatisticsOf

_SAMPLE = 256
"""Rows of a matrix, or of a row group, that are quantized in every layout."""


class PredictedLosses:
    """Predicts the losses of items from a calibration."""

    def __init__(
        self,
        config: GriffinConfig,
        weights: WeightSource,
        calibration: Calibration,
        statistics: StatisticsOf | None = None,
    ):
        """Takes `statistics` if the caller has already computed them from the calibration."""
        self._config, self._weights, self._calibration = config, weights, calibration
        self._statistics = statistics or Calibrated(calibration, config)

    def of(self, item: PlanItem, layouts: Sequence[Uniform], sample: int = _SAMPLE) -> list[float]:
        """Returns the loss of an item in each layout, in nats per token.

        Raises:
            RequestError: a weight that a layout cannot hold, or a damaged calibration.
        """
        together = max(layout.rows_together for layout in layouts)
        losses = np.zeros(len(layouts))
        for tensor in item.tensors:
            rows = _evenly(item.shape[0], sample, together)
            ids = rows if item.rows is None else np.sort(item.rows[rows])
            weights = np.concatenate([self._weights[tensor].read(i, i + 1) for i in ids.tolist()])
            cost = self._cost(tensor, ids, item.rows)
            loss = partial(self._loss, tensor, ids, weights.astype(np.float32), cost)
            with ThreadPoolExecutor(parallel_jobs()) as pool:
                losses += list(pool.map(loss, layouts))
        return losses.tolist()

    def row_importance(self) -> np.ndarray:
        """Returns the cost of equal errors in each row of the embedding, float64 [vocab]."""
        known = self._calibration
        inputs = known.importance(EMBEDDING)
        product = 0 if inputs is None else known.row_sensitivity * inputs.mean(dtype=np.float64)
        return product + known.token_share * self._channels().mean(dtype=np.float64)

    def _channels(self) -> np.ndarray:
        return self._calibration.lookup_sensitivity * self._config.embedding_scale**2

    def _loss(
        self,
        tensor: str,
        ids: np.ndarray,
        rows: np.ndarray,
        cost: Callable[[np.ndarray], float],
        layout: Uniform,
    ) -> float:
        return cost(layout.round_trip(tensor, rows, self._statistics(tensor), ids) - rows)

    def _cost(
        self, tensor: str, ids: np.ndarray, among: np.ndarray | None
    ) -> Callable[[np.ndarray], float]:
        """Returns a function from errors [n, K] of the rows `ids` to the cost of errors in `among`.

        `among` None means all rows.
        """
        known, head = self._calibration, tensor == EMBEDDING
        hessians = known.hessian(tensor) or []
        outputs = known.row_sensitivity if head else known.output_sensitivity(tensor)
        if outputs is None:
            outputs = np.zeros(self._weights[tensor].shape[0], np.float32)
        product = _share(outputs, ids, among)
        if not head:
            return lambda errors: float(0.5 * (product * _through(errors, hessians)).sum())
        channels = self._channels()
        lookup = _share(known.token_share, ids, among)

        def cost(errors: np.ndarray) -> float:
            looked_up = np.square(errors, dtype=np.float64) @ channels
            return float(0.5 * (product * _through(errors, hessians) + lookup * looked_up).sum())

        return cost


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


def _evenly(rows: int, sample: int, together: int) -> np.ndarray:
    runs = rows // together
    chosen = min(runs, max(1, sample // together))
    firsts = (np.arange(chosen) * runs // chosen) * together
    return (firsts[:, None] + np.arange(together)).ravel()
