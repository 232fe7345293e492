"""The per-op check: compares every op of an artifact by itself with the reference's.

The reference takes the same tokens from the same state. Each of its ops is compared with the
artifact's value at that site, which is passed on. So no op inherits the errors before it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.artifacts.manifest import Manifest
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.engine import Observation
from rgexport.validate.bisect.site_limits import (
    GAIN,
    SiteLimit,
    scan_noise,
    site_limit,
    state_limit,
)
from rgexport.validate.metrics import is_cache

_SiteKey = tuple[str, str, str | None]
"""A site, its op, and a state's name where the value is not the op's own."""

_STATES_OF_OP = {
    "causal_conv1d": ["conv1d"],
    "rg_lru_scan": ["rg_lru"],
    "local_attention": ["key", "value"],
}
"""Op → the states of its layer that it returns after its value."""


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """The value of an op of `griffin.ops` in a call of `length` tokens, or a state that it leaves.

    `state` is the state's canonical name, `layer` is null outside of the layers. `rms` is ‖Δ‖ /
    ‖reference‖, of a state with all its tokens brought to one norm; `median` that of the channels,
    of the RG-LRU's only the half that forgets faster: the others show how exp was rounded. `gain`
    is 0.05 where all values are 5 % too large. `excess` is the largest of the three in units of its
    limit, infinite for non-finite values.
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
        text = f"{self.length} token"
        if self.length > 1:
            text += "s"
        if self.from_start:
            text += " from position 0"
        if self.portable:
            text += ", without native kernels"
        return text

    @property
    def passed(self) -> bool:
        """Whether all three errors are within their limits."""
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
    """Compares calls from canonical states of batch 1; all go through one layer after another."""
    window = model.config.window
    comparisons = [_CallComparison(call, manifest, window) for call in calls]
    turns: Counter[str] = Counter()  # a site's op computes for one call after the other

    def look(site: str, *seen: Any) -> np.ndarray | None:
        comparison = comparisons[turns[site]]
        turns[site] += 1
        return comparison.look(site, *seen)

    model.look = look
    inputs = [(call.tokens[None], _fitted(call.before, window)) for call in calls]
    passes = model.run_each(inputs)
    for call, (hidden, _), comparison in zip(calls, passes, comparisons, strict=True):
        _compare_head(model, call, hidden, comparison)

    errors: list[SiteError] = []
    for comparison in comparisons:
        errors += comparison.errors()
    return errors


def _compare_head(
    model: NumpyReference, call: ObservedCall, hidden: np.ndarray, comparison: "_CallComparison"
) -> None:
    """Compares the logits of a call, by the reference's final hidden states [1, T, width]."""
    # An artifact may have the head's values for the last tokens only.
    values = call.observed.values
    rows = max(len(values.get(site, ())) for site in ("lm_head", "logits"))
    if rows:
        model.look = comparison.look
        model.logits(hidden[:, -rows:])


def _fitted(state: State, window: int) -> State:
    """Cuts caches to the last `window` keys, or puts zeros before them."""
    fitted = dict(state)
    for name, cache in state.items():
        if is_cache(name):
            missing = max(0, window - cache.shape[1])
            fitted[name] = np.pad(cache[:, -window:], ((0, 0), (missing, 0), (0, 0)))
    return fitted


class _CallComparison:
    """Compares one call while the reference runs; keeps three sums for each channel of a site."""

    def __init__(self, call: ObservedCall, manifest: Manifest, window: int):
        self._call = call
        self._manifest = manifest
        self._observed = call.observed
        self._states = _fitted(call.observed.state, window)
        self._sums: dict[_SiteKey, list[np.ndarray]] = {}
        self._noise: dict[str, np.ndarray] = {}

    def look(
        self, site: str, op: str, arguments: tuple[Any, ...], results: tuple[np.ndarray, ...]
    ) -> np.ndarray | None:
        """Compares the results of an op; returns the artifact's value, which is passed on."""
        value, *states = results
        if op == "rg_lru_scan":
            _, _, recurrence_gate, a_param, *_ = arguments
            self._noise[site] = scan_noise(recurrence_gate, a_param)
        replacement = self._compare_value(site, op, value)
        for kind, state in zip(_STATES_OF_OP.get(op, ()), states, strict=True):
            name = f"layers.{layer_of(site)}.{kind}"
            norms = np.linalg.norm(state, axis=-1, keepdims=True)
            norms[norms == 0] = 1
            self._add((site, op, name), state / norms, self._states[name] / norms)
        return replacement

    def errors(self) -> list[SiteError]:
        """Returns the errors of all sites so far, in the order of computation."""
        return [self._error(*key, np.concatenate(sums, 1)) for key, sums in self._sums.items()]

    def _compare_value(self, site: str, op: str, value: np.ndarray) -> np.ndarray | None:
        key = (site, op, None)
        if site in self._observed.gates:
            gate = 1 / (1 + np.exp(-value.astype(np.float64)))
            self._add(key, gate, self._observed.gates[site])
        if site not in self._observed.values:
            return None

        # The head's values come in slabs, and may be those of the last tokens only.
        start = sum(sums.shape[1] for sums in self._sums.get(key, ()))
        stop = start + value.shape[2]
        observed = self._observed.values[site][:, start:stop]
        expected = value[0, -len(observed) :]
        self._add(key, expected, observed)

        # Values that are not finite count here but are not passed on: all that follows would fail.
        replacement = value.copy()
        replacement[0, -len(observed) :] = np.where(np.isfinite(observed), observed, expected)
        return replacement

    def _add(self, key: _SiteKey, expected: np.ndarray, observed: np.ndarray) -> None:
        """Keeps the sums over tokens of Δ², reference² and reference · Δ, [3, channels]."""
        expected = _as_rows(expected)
        observed = _as_rows(observed)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = observed - expected
            error_squares = (delta**2).sum(0)
            squares = (expected**2).sum(0)
            products = (expected * delta).sum(0)
        self._sums.setdefault(key, []).append(np.stack([error_squares, squares, products]))

    def _error(self, site: str, op: str, state: str | None, sums: np.ndarray) -> SiteError:
        """Returns the error of a site by its sums [3, channels]."""
        error_squares, squares, products = sums
        noise = self._noise.get(site, np.zeros(len(squares)))
        steady = ~(noise > np.median(noise))  # all channels where there is no noise, or a NaN
        limit = self._limit(site, op, state)
        noise_median = float(np.median(noise[steady]))
        limit = limit.plus(_root_ratio(noise**2 * squares, squares), noise_median)

        with np.errstate(invalid="ignore"):
            rms = _root_ratio(error_squares, squares)
            divisors = np.where(squares == 0, 1, squares)
            median = float(np.sqrt(np.median(error_squares[steady] / divisors[steady])))
        gain = float(products.sum() / (squares.sum() or 1))
        excess = float("inf")
        if np.isfinite(rms + median):
            gain_limit = min(limit.rms, GAIN)
            excess = max(rms / limit.rms, median / limit.median, abs(gain) / gain_limit)
        return SiteError(
            site=site,
            op=op,
            layer=layer_of(site),
            state=state,
            length=len(self._call.tokens),
            from_start=self._call.start == 0,
            portable=self._call.portable,
            rms=rms,
            median=median,
            limit_rms=limit.rms,
            limit_median=limit.median,
            gain=gain,
            excess=excess,
        )

    def _limit(self, site: str, op: str, state: str | None) -> SiteLimit:
        if state is not None:
            return state_limit(self._manifest, state)
        end = self._call.start + len(self._call.tokens)
        return site_limit(self._manifest, op, site, end)


def _as_rows(values: np.ndarray) -> np.ndarray:
    """Returns values [..., channels] as float64 rows."""
    return values.astype(np.float64).reshape(-1, values.shape[-1])


def layer_of(site: str) -> int | None:
    """Returns the index of a site's layer, None outside of the layers."""
    first, *rest = site.split(".")
    if first != "layers":
        return None
    return int(rest[0])


def _root_ratio(squares: np.ndarray, norms: np.ndarray) -> float:
    """Returns √(Σ squares / Σ norms); √(Σ squares) where all norms are 0."""
    return float(np.sqrt(squares.sum() / (norms.sum() or 1)))
