"""Statistics of a calibration file, computed for a matrix when its encoder asks for them."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import replace
from threading import Lock

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.quantize.algorithms.calibration_file import Calibration
from rgexport.quantize.algorithms.statistics import Known, RowKinds, Statistics, statistics_of

_LOOKUP_WEIGHTS = (1.0, 10.0, 100.0)
"""Additions to the diagonal of H for kinds of the embedding's rows, in units of its mean.

The kind of a row follows from the cost of its lookups relative to the head. In lookups all columns
count alike.
"""
_CACHED = 2
"""Inputs whose statistics are cached: tensors come in their order, on several threads."""


class LastInputs(ABC):
    """A `StatisticsOf` that caches the statistics of the last few inputs.

    Any thread may call it.
    """

    def __init__(self) -> None:
        self._cache: OrderedDict[str, Known] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def _read(self, name: str) -> Known: ...

    def __call__(self, name: str) -> Known:
        site = input_site(name)
        if site is None:
            return None
        with self._lock:
            if site not in self._cache:
                self._cache[site] = self._read(name)
            self._cache.move_to_end(site)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
            return self._cache[site]


class Calibrated(LastInputs):
    """The statistics of a calibration file that this process has opened."""

    def __init__(self, calibration: Calibration, config: GriffinConfig):
        super().__init__()
        self._calibration = calibration
        self._scale = config.embedding_scale

    def _read(self, name: str) -> Statistics | None:
        blocks = self._calibration.hessian(name)
        if blocks is None:
            return None
        tokens = self._calibration.tokens
        if name != EMBEDDING:
            return statistics_of(blocks, tokens)

        diagonal = np.concatenate([np.diagonal(block) for block in blocks])
        by_kind = tuple(
            statistics_of(blocks, tokens, identity=weight) for weight in _LOOKUP_WEIGHTS
        )
        kind = self._kind_of_rows(diagonal.mean())
        return replace(by_kind[0], kinds=RowKinds(kind, by_kind))

    def _kind_of_rows(self, mean_square: np.float32) -> np.ndarray:
        """Returns the kind of each row of the embedding, uint8 [vocab].

        It is the power of ten of the cost of a row's lookups relative to that of its logits, with
        the mean square of the head's inputs.
        """
        calibration = self._calibration
        sensitivity = calibration.lookup_sensitivity.mean()
        lookup_cost = calibration.token_share * sensitivity * self._scale**2
        with np.errstate(divide="ignore", invalid="ignore"):
            tens = np.log10(lookup_cost / (calibration.row_fisher * mean_square))
        last = len(_LOOKUP_WEIGHTS) - 1
        return np.rint(np.nan_to_num(tens).clip(0, last)).astype(np.uint8)
