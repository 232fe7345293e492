"""Local errors: each op of an artifact against the reference's, given the artifact's own inputs.

The reference takes the tokens that the artifact took, from the same state. Each of its ops is
compared with the artifact's value at that site, and the artifact's value is passed on. So no op
inherits the errors of the ops before it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.export.manifest import Manifest
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.engine import Observation
from rgexport.validate.bisect.site_limits import GAIN, scan_noise, site_limit, state_limit

Arguments = tuple[Any, ...]
_STATES = {
    "causal_conv1d": ("conv1d",),
    "rg_lru_scan": ("rg_lru",),
    "local_attention": ("key", "value"),
}
"""Op → the states of its layer that it returns after its value."""


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """The value of an op of `griffin.ops` in a call of `length` tokens, or a state that it leaves.

    Attributes:
        layer: the index of its layer; None for the embedding, the last norm and the head.
        state: the canonical name of the state that was compared; None for the op's value.
        from_start: whether the first token had position 0.
        portable: whether no native kernel ran.
        rms: ‖Δ‖ / ‖reference‖; of a state, with all tokens that it keeps brought to one norm.
        median: of the channels' own ‖Δ‖ / ‖reference‖, over the tokens; for the RG-LRU, of the half
            of the channels that forget faster, since the others show how exp was rounded.
        gain: ⟨reference, Δ⟩ / ⟨reference, reference⟩: 0.05 where all values are 5 % too large.
        excess: the largest of the three in units of its limit; infinite for non-finite values.
    """

    site: str
    op: str
    layer: int | None
    state: str | None
    length: int
    rms: float
    median: float
    limit_rms: float
    limit_median: float
    gain: float
    excess: float
    from_start: bool = False
    portable: bool = False

    @property
    def call(self) -> str:
        """Such as `7 tokens from position 0, without native kernels`."""
        tokens = f"{self.length} token{'s' if self.length > 1 else ''}"
        start = " from position 0" if self.from_start else ""
        return tokens + start + (", without native kernels" if self.portable else "")

    @property
    def passed(self) -> bool:
        return self.excess <= 1


@dataclass(frozen=True)
class ObservedCall:
    """Tokens [T] that an artifact took in one call, the state before, and its values at sites."""

    tokens: np.ndarray
    before: State
    observed: Observation
    portable: bool = False

    @property
    def start(self) -> int:
        """The position of the first token."""
        return int(self.before[POSITION][0])


def site_errors(
    model: NumpyReference, manifest: Manifest, calls: Sequence[ObservedCall]
) -> list[SiteError]:
    """Compares calls from canonical states of batch 1 with the reference, op by op.

    The model has the artifact's weights; all calls go through one layer before the next is read.
    Returns for each call the errors of all sites and states that the artifact shows, in the order
    of computation.
    """
    window = model.config.window
    comparisons = [_CallComparison(call, manifest, window) for call in calls]
    turns: Counter[str] = Counter()  # a site's op computes for one call after the other

    def look(
        site: str, op: str, arguments: Arguments, results: tuple[np.ndarray, ...]
    ) -> np.ndarray | None:
        turns[site] += 1
        return comparisons[turns[site] - 1].look(site, op, arguments, results)

    model.look = look
    passes = model.run_each([(call.tokens[None], _fitted(call.before, window)) for call in calls])
    for call, (hidden, _), comparison in zip(calls, passes, comparisons, strict=True):
        # An artifact may have the head's values for the last tokens only.
        if rows := max(len(call.observed.values.get(site, ())) for site in ("lm_head", "logits")):
            model.look = comparison.look
            model.logits(hidden[:, -rows:])
    return [error for comparison in comparisons for error in comparison.errors()]


def _fitted(state: State, window: int) -> State:
    """Cuts caches to the last `window` keys, or puts zeros before them."""

    def resized(cache: np.ndarray) -> np.ndarray:
        missing = max(0, window - cache.shape[1])
        return np.pad(cache[:, -window:], ((0, 0), (missing, 0), (0, 0)))

    return {
        name: resized(array) if name.endswith((".key", ".value")) else array
        for name, array in state.items()
    }


class _CallComparison:
    """Compares one call while the reference runs; keeps three sums for each channel of a site."""

    def __init__(self, call: ObservedCall, manifest: Manifest, window: int):
        self._call, self._manifest, self._observed = call, manifest, call.observed
        self._states = _fitted(call.observed.state, window)
        self._sums: dict[tuple[str, str, str | None], list[np.ndarray]] = {}
        self._noise: dict[str, np.ndarray] = {}

    def look(
        self, site: str, op: str, arguments: Arguments, results: tuple[np.ndarray, ...]
    ) -> np.ndarray | None:
        """Compares an op's results; returns the artifact's value for the following ops."""
        value, *states = results
        if op == "rg_lru_scan":
            _, _, recurrence_gate, a_param, *_ = arguments
            self._noise[site] = scan_noise(recurrence_gate, a_param)
        replacement = self._compare_value(site, op, value)
        for kind, state in zip(_STATES.get(op, ()), states, strict=True):
            name = f"layers.{layer_of(site)}.{kind}"
            norms = np.linalg.norm(state, axis=-1, keepdims=True)
            norms[norms == 0] = 1
            self._add((site, op, name), state / norms, self._states[name] / norms)
        return replacement

    def errors(self) -> list[SiteError]:
        return [self._error(*key, np.concatenate(sums, 1)) for key, sums in self._sums.items()]

    def _compare_value(self, site: str, op: str, value: np.ndarray) -> np.ndarray | None:
        """Compares the op's value [1, T, n]; returns its replacement."""
        key = site, op, None
        if site in self._observed.gates:
            self._add(key, _sigmoid(value), self._observed.gates[site])
        if site not in self._observed.values:
            return None
        # The head's values come in slabs, and may be those of the last tokens only.
        start = sum(sums.shape[1] for sums in self._sums.get(key, ()))
        values = self._observed.values[site][:, start : start + value.shape[2]]
        rows = value[0, -len(values) :]
        self._add(key, rows, values)
        replacement = value.copy()
        # Values that are not finite count here but are not passed on: all that follows would fail.
        replacement[0, -len(values) :] = np.where(np.isfinite(values), values, rows)
        return replacement

    def _add(
        self, key: tuple[str, str, str | None], expected: np.ndarray, value: np.ndarray
    ) -> None:
        ref, ours = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (expected, value))
        with np.errstate(invalid="ignore", over="ignore"):
            delta = ours - ref
            squares = np.stack([(delta**2).sum(0), (ref**2).sum(0), (ref * delta).sum(0)])
        self._sums.setdefault(key, []).append(squares)

    def _error(self, site: str, op: str, state: str | None, squares: np.ndarray) -> SiteError:
        delta, norm, along = squares
        call, noise = self._call, self._noise.get(site, np.zeros(len(norm)))
        steady = ~(noise > np.median(noise))  # all channels where there is no noise, or a NaN
        if state is None:
            limit = site_limit(self._manifest, op, site, call.start + len(call.tokens))
        else:
            limit = state_limit(self._manifest, state)
        limit = limit.plus(_ratio(noise**2 * norm, norm), float(np.median(noise[steady])))
        with np.errstate(invalid="ignore"):
            rms = _ratio(delta, norm)
            ratios = delta[steady] / np.where(norm == 0, 1, norm)[steady]
            median = float(np.sqrt(np.median(ratios)))
        gain = float(along.sum() / (norm.sum() or 1))
        excess = max(rms / limit.rms, median / limit.median, abs(gain) / min(limit.rms, GAIN))
        return SiteError(
            site=site,
            op=op,
            layer=layer_of(site),
            state=state,
            length=len(call.tokens),
            from_start=call.start == 0,
            portable=call.portable,
            rms=rms,
            median=median,
            limit_rms=limit.rms,
            limit_median=limit.median,
            gain=gain,
            excess=excess if np.isfinite(rms + median) else float("inf"),
        )


def layer_of(site: str) -> int | None:
    """The index of the layer that a site is in."""
    first, *rest = site.split(".")
    return int(rest[0]) if first == "layers" else None


def _ratio(squares: np.ndarray, norms: np.ndarray) -> float:
    """√(Σ squares / Σ norms); √(Σ squares) where all norms are 0."""
    return float(np.sqrt(squares.sum() / (norms.sum() or 1)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))
