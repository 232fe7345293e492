"""Statistics of inputs x, which weigh errors of weights W by tr(ΔW H ΔWᵀ), with H = Σ x xᵀ / N."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np

from rgexport.errors import RequestError
from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Factors

_DAMPING = 0.01
"""Added to H's diagonal, in units of its mean."""
_MIN_SHRINKAGE = 0.3
_MAX_SHRINKAGE = 0.6
"""Largest reduction of off-diagonal values."""


@dataclass(frozen=True)
class Hessian:
    """A diagonal block of H from column `start` on, float32 [k, k], symmetric and positive.

    Any thread may use it.
    """

    start: int
    matrix: np.ndarray
    _factors: list[Factors] = field(default_factory=list, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles without the lock, for another process."""
        return Hessian, (self.start, self.matrix, self._factors)

    @property
    def stop(self) -> int:
        """The column after the last one."""
        return self.start + len(self.matrix)

    @property
    def factors(self) -> Factors:
        """The factors of the matrix, computed when they are first needed."""
        with self._lock:
            if not self._factors:
                self._factors.append(_factor(self.matrix))
            return self._factors[0]


def _factor(matrix: np.ndarray) -> Factors:
    factors = library.factor(matrix.astype(np.float64))
    while factors is None:
        # Sums in float32 can leave a matrix that is not quite positive.
        matrix = matrix + np.diag(np.diagonal(matrix))
        factors = library.factor(matrix.astype(np.float64))
    return factors


@dataclass(frozen=True)
class Statistics:
    """Statistics of a matrix's inputs.

    Attributes:
        importance: float32 [columns], weighs each column's squared error, such as by the mean
            square of its inputs.
        hessians: H's diagonal blocks, which together have all columns, or none.
        kinds: statistics for each kind of rows, where rows weigh errors differently.
    """

    importance: np.ndarray
    hessians: tuple[Hessian, ...] = ()
    kinds: "RowKinds | None" = None

    def factor(self) -> None:
        """Computes the factors of all Hessians, so that they travel along in a pickle."""
        every: tuple[Statistics, ...] = (self,)
        if self.kinds is not None:
            every = self.kinds.statistics
        for statistics in every:
            for hessian in statistics.hessians:
                hessian.factors  # noqa: B018


@dataclass(frozen=True)
class RowKinds:
    """The kind of each row, uint8 [rows], and the statistics of each kind."""

    kind: np.ndarray
    statistics: tuple[Statistics, ...]


class RowEncoder(Protocol):
    """A storage scheme, to statistics in another process: an object that encodes rows there."""

    def encode(
        self,
        name: str,
        rows: np.ndarray,
        statistics: "Known" = None,
        ids: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the parts of rows [n, K], see `schemes.base.Uniform.encode`."""


@dataclass(frozen=True)
class RemoteStatistics:
    """Statistics in another process, which therefore runs the encoders that need them.

    `encode` has the arguments of `RowEncoder.encode`, and the scheme instead of the statistics.
    """

    encode: Callable[[str, np.ndarray, RowEncoder, np.ndarray | None], dict[str, np.ndarray]]


Known = Statistics | RemoteStatistics | None
StatisticsOf = Callable[[str], Known]
"""Canonical name of a matrix → statistics of its inputs, or None."""


def no_statistics(name: str) -> None:
    """Returns None, the `StatisticsOf` where there is no calibration."""
    return None


def statistics_of(
    blocks: Sequence[np.ndarray], tokens: int, *, identity: float = 0.0
) -> Statistics:
    """Computes statistics over so many tokens from diagonal blocks of H, float32 [k, k] each.

    Correlations over few tokens are unreliable: H is shrunk towards its diagonal by k / (k +
    tokens). `identity` is added to the diagonal, in units of its mean, for uses beside this one.
    Raises RequestError for a value that is not finite.
    """
    for block in blocks:
        if not np.isfinite(block).all():
            raise RequestError(
                "the statistics have NaN or infinite values; make them again: rgexport calibrate"
            )

    diagonal = np.concatenate([np.diagonal(block) for block in blocks])
    mean = float(diagonal.mean(dtype=np.float64))
    damping = np.float32((_DAMPING + identity) * (mean or 1.0))

    hessians = []
    start = 0
    for block in blocks:
        matrix = _shrink(block, tokens, np.float32(mean), damping)
        hessians.append(Hessian(start, matrix))
        start += len(block)
    importance = np.concatenate([np.diagonal(hessian.matrix) for hessian in hessians])
    return Statistics(importance, tuple(hessians))


def _shrink(block: np.ndarray, tokens: int, mean: np.float32, damping: np.float32) -> np.ndarray:
    """Returns a block with smaller off-diagonal values, and the damping on its diagonal."""
    k = len(block)
    share = min(max(k / (k + tokens), _MIN_SHRINKAGE), _MAX_SHRINKAGE)
    matrix = block * (1 - np.float32(share))

    diagonal = np.diagonal(block).astype(np.float32)
    # An input that was always zero in this text may be anything in another.
    positive = np.where(diagonal > 0, diagonal, mean)
    np.fill_diagonal(matrix, positive + damping)
    return np.ascontiguousarray(matrix, np.float32)
