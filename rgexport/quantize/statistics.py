"""Statistics of a matrix's inputs, by which algorithms weigh the errors of its weights.

For inputs x of a linear with weights W, the error of its outputs is tr(ΔW H ΔWᵀ), with
H = Σ x xᵀ / N.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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

_DAMPING = 0.01
"""Added to H's diagonal, in units of its mean."""
_SHRINKAGE = 0.3, 0.6
"""The least and the most that is taken from what is beside the diagonal."""
_LOOKUPS = 1.0, 10.0, 100.0
"""Added as `_DAMPING` for kinds of the embedding's rows, by what they cost where they are looked
up, beside the head: there all columns count alike."""
_KEPT = 2
"""Inputs whose statistics are kept: tensors come one after another, on several threads."""


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the lock, for another process."""
        return Hessian, (self.start, self.matrix, self._factors)

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
    kinds: "RowKinds | None" = None

    def factor(self) -> None:
        """Computes all factors now."""
        for one in self.kinds.statistics if self.kinds else (self,):
            for hessian in one.hessians:
                hessian.factors  # noqa: B018


@dataclass(frozen=True)
class RowKinds:
    """Statistics of a matrix whose rows do not all weigh errors alike.

    Attributes:
        kind: of each row, uint8 [rows].
        statistics: of each kind.
    """

    kind: np.ndarray
    statistics: tuple[Statistics, ...]


class RemoteStatistics(ABC):
    """Statistics that another process has, which therefore does what needs them."""

    @abstractmethod
    def encode(
        self, name: str, rows: np.ndarray, scheme: "Uniform", ids: np.ndarray | None
    ) -> "Parts":
        """Returns what `scheme.encode` returns with the statistics."""


Known = Statistics | RemoteStatistics | None
StatisticsOf = Callable[[str], Known]
"""Canonical name of a matrix → what is known of its inputs."""


def no_statistics(name: str) -> None:
    """Knows nothing."""
    return None


class LastInputs(ABC):
    """Statistics, of which those of the last few inputs are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Known] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def _read(self, name: str) -> Known:
        """Those of a matrix."""

    def __call__(self, name: str) -> Known:
        """See `StatisticsOf`; None for what is no matrix."""
        key = input_site(name)
        if key is None:
            return None
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._read(name)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


class Calibrated(LastInputs):
    """Statistics by a calibration, kept with their factors."""

    def __init__(self, calibration: Calibration, config: GriffinConfig):
        super().__init__()
        self._calibration, self._scale = calibration, config.embedding_scale

    def _read(self, name: str) -> Statistics | None:
        blocks = self._calibration.hessian(name)
        if blocks is None:
            return None
        if name != EMBEDDING:
            return statistics_of(blocks, self._calibration.tokens)
        of_kinds = [
            statistics_of(blocks, self._calibration.tokens, identity=lookup) for lookup in _LOOKUPS
        ]
        diagonal = np.concatenate([np.diagonal(block) for block in blocks])
        return replace(of_kinds[0], kinds=RowKinds(self._kinds(diagonal), tuple(of_kinds)))

    def _kinds(self, diagonal: np.ndarray) -> np.ndarray:
        """Of the embedding's rows: what its lookups cost, beside what its logits cost, in tens."""
        known = self._calibration
        lookup = known.token_share * known.lookup_sensitivity.mean() * self._scale**2
        logits = known.row_fisher * diagonal.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            tens = np.log10(lookup / logits)
        return np.rint(np.nan_to_num(tens).clip(0, len(_LOOKUPS) - 1)).astype(np.uint8)


def statistics_of(
    blocks: Sequence[np.ndarray], tokens: int, *, identity: float = 0.0
) -> Statistics:
    """Statistics from diagonal blocks of H.

    A few tokens tell little of how columns go together: H is shrunk towards its diagonal by
    k / (k + tokens). Without that GPTQ is worse than rounding to nearest.

    Args:
        blocks: float32 [k, k] each, symmetric.
        tokens: how many the sums are of.
        identity: of the mean of the diagonal, is added to it, for uses beside this one.

    Raises:
        RequestError: a value is not finite.
    """
    if not all(np.isfinite(block).all() for block in blocks):
        raise RequestError(
            "the statistics have NaN or infinite values; make them again: rgexport calibrate"
        )
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
