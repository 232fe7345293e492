"""Statistics of inputs x, which weigh errors of weights W by tr(ΔW H ΔWᵀ), with H = Σ x xᵀ / N."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site
from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Factors
from rgexport.quantize.calibration import Calibration

if TYPE_CHECKING:
    from rgexport.quantize.scheme_base import Parts, Uniform

BUILT_IN = Path(__file__).with_name("text.txt")
"""A text of many kinds, as sampled text has little of what the model rarely writes."""
_DAMPING = 0.01  # added to H's diagonal, in units of its mean
_SHRINKAGE = 0.3, 0.6  # least and largest reduction of off-diagonal values
_LOOKUPS = 1.0, 10.0, 100.0
"""Added as `_DAMPING` for kinds of the embedding's rows, by the cost of their lookups relative to
the head: in lookups all columns count alike."""
_CACHED = 2  # inputs with cached statistics: tensors come in their order, on several threads


@dataclass(frozen=True)
class Hessian:
    """A diagonal block of H from column `start` on, float32 [k, k], symmetric and positive."""

    start: int
    matrix: np.ndarray
    _factors: list[Factors] = field(default_factory=list, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles without the lock, for another process."""
        return Hessian, (self.start, self.matrix, self._factors)

    @property
    def stop(self) -> int:
        return self.start + len(self.matrix)

    @property
    def factors(self) -> Factors:
        with self._lock:
            if not self._factors:
                matrix = self.matrix
                while (factors := library.factor(matrix.astype(np.float64))) is None:
                    # Sums in float32 can leave a matrix that is not quite positive.
                    matrix = matrix + np.diag(np.diagonal(matrix))
                self._factors.append(factors)
            return self._factors[0]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a matrix's inputs.

    `importance`, float32 [columns], weighs each column's squared error, such as by the mean square
    of its inputs. `hessians` are H's diagonal blocks, which together have all columns, or none.
    `kinds` has statistics for each kind of rows, where rows weigh errors differently.
    """

    importance: np.ndarray
    hessians: tuple[Hessian, ...] = ()
    kinds: "RowKinds | None" = None

    def factor(self) -> None:
        for statistics in self.kinds.statistics if self.kinds else (self,):
            for hessian in statistics.hessians:
                hessian.factors  # noqa: B018


@dataclass(frozen=True)
class RowKinds:
    """The kind of each row, uint8 [rows], and the statistics of each kind."""

    kind: np.ndarray
    statistics: tuple[Statistics, ...]


@dataclass(frozen=True)
class RemoteStatistics:
    """Statistics in another process, which therefore runs the encoders that need them.

    `encode` has the arguments of `Uniform.encode`, and the scheme instead of the statistics.
    """

    encode: Callable[[str, np.ndarray, "Uniform", np.ndarray | None], "Parts"]


Known = Statistics | RemoteStatistics | None
StatisticsOf = Callable[[str], Known]
"""Canonical name of a matrix → statistics of its inputs, or None."""


def no_statistics(name: str) -> None:
    return None


class LastInputs(ABC):
    """A `StatisticsOf` that caches the statistics of the last few inputs."""

    def __init__(self) -> None:
        self._cache: OrderedDict[str, Known] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def _read(self, name: str) -> Known: ...

    def __call__(self, name: str) -> Known:
        key = input_site(name)
        if key is None:
            return None
        with self._lock:
            if key not in self._cache:
                self._cache[key] = self._read(name)
            self._cache.move_to_end(key)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
            return self._cache[key]


class Calibrated(LastInputs):
    def __init__(self, calibration: Calibration, config: GriffinConfig):
        super().__init__()
        self._calibration, self._scale = calibration, config.embedding_scale

    def _read(self, name: str) -> Statistics | None:
        blocks, tokens = self._calibration.hessian(name), self._calibration.tokens
        if blocks is None:
            return None
        if name != EMBEDDING:
            return statistics_of(blocks, tokens)
        kinds = tuple(statistics_of(blocks, tokens, identity=lookup) for lookup in _LOOKUPS)
        diagonal = np.concatenate([np.diagonal(block) for block in blocks])
        known = self._calibration
        # The power of ten of the cost of a row's lookups, relative to its logits.
        lookup = known.token_share * known.lookup_sensitivity.mean() * self._scale**2
        with np.errstate(divide="ignore", invalid="ignore"):
            tens = np.log10(lookup / (known.row_fisher * diagonal.mean()))
        kind = np.rint(np.nan_to_num(tens).clip(0, len(_LOOKUPS) - 1)).astype(np.uint8)
        return replace(kinds[0], kinds=RowKinds(kind, kinds))


def statistics_of(
    blocks: Sequence[np.ndarray], tokens: int, *, identity: float = 0.0
) -> Statistics:
    """Computes statistics over so many tokens from diagonal blocks of H, float32 [k, k] each.

    Correlations over few tokens are unreliable: H is shrunk towards its diagonal by k / (k +
    tokens). `identity` is added to the diagonal, in units of its mean, for uses beside this one.
    Raises RequestError for a value that is not finite.
    """
    if not all(np.isfinite(block).all() for block in blocks):
        raise RequestError(
            "the statistics have NaN or infinite values; make them again: rgexport calibrate"
        )
    mean = float(np.concatenate([np.diagonal(block) for block in blocks]).mean(dtype=np.float64))
    damping = np.float32((_DAMPING + identity) * (mean or 1.0))
    matrices = [_shrink(block, tokens, np.float32(mean), damping) for block in blocks]
    starts = np.cumsum([0, *map(len, blocks)])
    hessians = tuple(Hessian(int(s), m) for s, m in zip(starts, matrices, strict=False))
    return Statistics(np.concatenate([np.diagonal(m) for m in matrices]), hessians)


def _shrink(block: np.ndarray, tokens: int, mean: np.float32, damping: np.float32) -> np.ndarray:
    k = len(block)
    share = np.float32(min(max(k / (k + tokens), _SHRINKAGE[0]), _SHRINKAGE[1]))
    diagonal = np.diagonal(block).astype(np.float32)
    matrix = block * (1 - share)
    # An input that was always zero in this text may be anything in another.
    np.fill_diagonal(matrix, np.where(diagonal > 0, diagonal, mean) + damping)
    return np.ascontiguousarray(matrix, np.float32)
