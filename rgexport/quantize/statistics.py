"""Statistics of a matrix's inputs, by which algorithms weigh the errors of its weights.

For inputs x of a linear with weights W, the error of its outputs is tr(ΔW H ΔWᵀ), with
H = Σ x xᵀ / N.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Factors

_DAMPING = 0.01
"""Added to H's diagonal, in units of its mean."""
_SHRINKAGE = 0.3, 0.6
"""The least and the most that is taken from what is beside the diagonal."""


@dataclass(frozen=True)
class Hessian:
    """A diagonal block of H, made fit for inversion; its factors are computed when first asked for.

    Attributes:
        start: its first column.
        matrix: float32 [k, k], symmetric and positive.
    """

    start: int
    matrix: np.ndarray
    _factors: list[Factors] = field(default_factory=list, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def stop(self) -> int:
        """The column after its last one."""
        return self.start + len(self.matrix)

    @property
    def factors(self) -> Factors:
        """See `kernels.rounding`."""
        with self._lock:
            if not self._factors:
                self._factors.append(_factors_of(self.matrix))
            return self._factors[0]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a matrix's inputs.

    Attributes:
        importance: float32 [columns], the weight of each column's squared error, such as the mean
            square of its inputs.
        hessians: H's diagonal blocks, which together have all columns; none if only the
            importance is known.
    """

    importance: np.ndarray
    hessians: tuple[Hessian, ...] = ()


StatisticsOf = Callable[[str], Statistics | None]
"""Canonical name of a matrix → what is known of its inputs."""


def no_statistics(name: str) -> Statistics | None:
    """Knows nothing."""
    return None


def statistics_of(
    blocks: Sequence[np.ndarray], tokens: int, *, identity: float = 0.0
) -> Statistics:
    """Statistics from diagonal blocks of H.

    A few tokens tell little of how columns go together: H is shrunk towards its diagonal by
    k / (k + tokens). Without that GPTQ is worse than rounding to nearest.

    Args:
        blocks: float32 [k, k] each, symmetric, all finite.
        tokens: how many the sums are of.
        identity: of the mean of the diagonal, is added to it: what is known of uses beside this
            one, as of the head's rows, which are the embedding's.
    """
    mean = float(np.concatenate([np.diagonal(block) for block in blocks]).mean(dtype=np.float64))
    more = np.float32((_DAMPING + identity) * (mean or 1.0))
    matrices = [_shrunk(block, tokens, np.float32(mean), more) for block in blocks]
    starts = np.cumsum([0, *map(len, blocks)])
    hessians = tuple(Hessian(int(s), m) for s, m in zip(starts, matrices, strict=False))
    return Statistics(np.concatenate([np.diagonal(m) for m in matrices]), hessians)


def _shrunk(block: np.ndarray, tokens: int, mean: np.float32, more: np.float32) -> np.ndarray:
    k = len(block)
    share = np.float32(min(max(k / (k + tokens), _SHRINKAGE[0]), _SHRINKAGE[1]))
    diagonal = np.diagonal(block).astype(np.float32)
    matrix = block * (1 - share)
    # An input that never was there may be any other time.
    np.fill_diagonal(matrix, np.where(diagonal > 0, diagonal, mean) + more)
    return np.ascontiguousarray(matrix, np.float32)


def _factors_of(matrix: np.ndarray) -> Factors:
    found = library.factor(matrix.astype(np.float64))
    while found is None:  # sums in float32 can leave a matrix that is not quite positive
        matrix = matrix + np.diag(np.diagonal(matrix))
        found = library.factor(matrix.astype(np.float64))
    return found
