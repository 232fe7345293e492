"""The per-op check: compares every op of an artifact by itself with the reference's.

The reference takes the same tokens from the same state. Each of its ops is compared with the
artifact's value at that site, which is passed on. So no op inherits the errors before it. Suspects
are the sites that wrong ops, wrong weights and a wrong configuration point to.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import site_of, sites
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.engine import Observation, Observer, engine_of, open_observer
from rgexport.runtimes.machine import release_freed_memory
from rgexport.validate.bisect.site_limits import GAIN, scan_noise, site_limit, state_limit
from rgexport.validate.checks import Check
from rgexport.validate.equivalences import zeros_of
from rgexport.validate.reference_pass import watched_layers

_Key = tuple[str, str, str | None]  # a site, its op, and the state, if it is not the op's value
_STATES = dict(causal_conv1d=["conv1d"], rg_lru_scan=["rg_lru"], local_attention=["key", "value"])
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
        return int(self.before[POSITION][0])


def site_errors(
    model: NumpyReference, manifest: Manifest, calls: Sequence[ObservedCall]
) -> list[SiteError]:
    """Compares calls from canonical states of batch 1; all go through one layer after another."""
    window = model.config.window
    comparisons = [_CallComparison(call, manifest, window) for call in calls]
    turns: Counter[str] = Counter()  # a site's op computes for one call after the other

    def look(site: str, *seen: Any) -> np.ndarray | None:
        turns[site] += 1
        return comparisons[turns[site] - 1].look(site, *seen)

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
    caches = {n: array for n, array in state.items() if n.endswith((".key", ".value"))}
    for name, cache in caches.items():
        missing = max(0, window - cache.shape[1])
        caches[name] = np.pad(cache[:, -window:], ((0, 0), (missing, 0), (0, 0)))
    return state | caches


class _CallComparison:
    """Compares one call while the reference runs; keeps three sums for each channel of a site."""

    def __init__(self, call: ObservedCall, manifest: Manifest, window: int):
        self._call, self._manifest, self._observed = call, manifest, call.observed
        self._states = _fitted(call.observed.state, window)
        self._sums: dict[_Key, list[np.ndarray]] = {}
        self._noise: dict[str, np.ndarray] = {}

    def look(
        self, site: str, op: str, arguments: tuple[Any, ...], results: tuple[np.ndarray, ...]
    ) -> np.ndarray | None:
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
        key = site, op, None
        if site in self._observed.gates:
            gate = 1 / (1 + np.exp(-value.astype(np.float64)))
            self._add(key, gate, self._observed.gates[site])
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

    def _add(self, key: _Key, expected: np.ndarray, value: np.ndarray) -> None:
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
    first, *rest = site.split(".")
    return int(rest[0]) if first == "layers" else None


def _ratio(squares: np.ndarray, norms: np.ndarray) -> float:
    """√(Σ squares / Σ norms); √(Σ squares) where all norms are 0."""
    return float(np.sqrt(squares.sum() / (norms.sum() or 1)))


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """All errors in the order of computation; `unseen` are sites that the engine does not show."""

    errors: list[SiteError]
    first: SiteError | None
    unseen: list[str]

    @property
    def beyond(self) -> list[SiteError]:
        return [error for error in self.errors if not error.passed]

    def worst(self, count: int) -> list[SiteError]:
        return sorted(self.errors, key=lambda error: -error.excess)[:count]


def site_report(errors: Sequence[SiteError], unseen: Sequence[str] = ()) -> SiteReport:
    first = next((error for error in errors if not error.passed), None)
    return SiteReport(errors=list(errors), first=first, unseen=list(unseen))


def compare_sites(
    artifact: Artifact, config: GriffinConfig, state: State, tokens: np.ndarray
) -> SiteReport:
    """Compares all ops in each of the engine's programs, and without native kernels.

    `config` is the original's where it is known. The ops take the last of the tokens [T] from the
    artifact's canonical `state` of batch 1, and from position 0, which must ignore the state of the
    recurrence. Raises RequestError without a package that observing takes.
    """
    recurrent = {name: array for name, array in state.items() if name.endswith(".rg_lru")}
    starts = with_large_state(state), zeros_of(state) | recurrent
    calls = _observe(lambda: open_observer(artifact), starts, tokens)
    if engine_of(artifact.manifest.kind).has_native(artifact):
        portable = _observe(lambda: open_observer(artifact, native=False), starts, tokens)
        calls += [replace(call, portable=True) for call in portable]
    with watched_layers("Per-op check", artifact.weights) as weights:
        errors = site_errors(NumpyReference(config, weights), artifact.manifest, calls)
    seen = {site for call in calls for site in (*call.observed.values, *call.observed.gates)}
    return site_report(errors, [site for site in sites(config) if site not in seen])


def _observe(
    open_one: Callable[[], Observer], starts: Sequence[State], tokens: np.ndarray
) -> list[ObservedCall]:
    release_freed_memory()
    observer = open_one()
    texts = [np.resize(tokens, max(n, len(tokens)))[-n:] for n in observer.lengths]
    return [
        ObservedCall(text, state, observer.observe(text, state))
        for state in starts
        for text in texts
    ]


def with_large_state(state: State) -> State:
    """A state in which the oldest values of the caches are amplified, the older the more.

    One key of 2,048 moves attention by 0.05 % to 2 %, which float16 hides. Amplified, the oldest is
    15 % of the result, the next one two thirds of that. Sums stay below what float16 can hold.
    """
    amplified = {name: array.copy() for name, array in state.items() if name.endswith(".value")}
    for values in amplified.values():
        highest = min(values.shape[1] / 4, 2.0**12 / max(np.abs(values).max(), 1))
        gains = highest * (2 / 3) ** np.arange(values.shape[1])
        values *= np.maximum(gains, 1).astype(values.dtype)[:, None]
    return state | amplified


_ROPE = ("temporal_block.rope_q", "temporal_block.rope_k")
CONFIG_SITES: dict[str, tuple[str, ...]] = {
    "soft_cap": ("logits",),
    "embedding_scale": ("embed_tokens",),
    "window": ("temporal_block.attention",),
    "rope_dims": _ROPE,
    "rope_theta": _ROPE,
    "rms_eps": ("temporal_pre_norm", "channel_pre_norm", "final_norm"),
}
"""Field of the configuration → the sites that depend on it; models of other shapes are refused."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A site that evidence points to; `layer` is None where it is in none or in many."""

    layer: int | None
    site: str
    evidence: str


def find_suspects(
    report: SiteReport | None, failed: Sequence[Check], config_differences: Sequence[str]
) -> list[Suspect]:
    """Names sites with many findings, then those furthest beyond their limits.

    A finding is the first error of a layer, a failed check of weights, or a different
    configuration.
    """
    beyond = [] if report is None else report.beyond
    strengths: dict[str, dict[str, float]] = defaultdict(dict)
    seen: set[int | str] = set()
    for error in beyond:
        key = error.site if error.layer is None else error.layer
        if key not in seen:
            seen.add(key)
            strengths[error.site][site_evidence(error)] = error.excess
    for check in failed:
        tensor, _, measure = check.name.partition(".")[2].rpartition(".")
        text = f"{tensor} has {measure} {check.value:.3g}, limit {check.limit:.3g}"
        strengths[site_of(tensor)][text] = check.excess
    for difference in config_differences:
        for kind in CONFIG_SITES.get(difference.partition(":")[0], ()):
            named = [e.site for e in beyond if f".{e.site}".endswith(f".{kind}")]
            for site in named or [kind]:
                strengths[site][f"the configurations differ in {difference}"] = 1.0
    ranked = sorted(strengths.items(), key=lambda item: (-len(item[1]), -max(item[1].values())))
    return [
        Suspect(layer=layer_of(site), site=site, evidence="; ".join(evidence))
        for site, evidence in ranked
    ]


def site_evidence(error: SiteError) -> str:
    what = "" if error.state is None else f"the state {error.state} after it: "
    shares = {
        f"rms error {error.rms:.3g}": error.rms / error.limit_rms,
        f"median error {error.median:.3g}": error.median / error.limit_median,
        f"all values are off by {error.gain:+.2%}": abs(error.gain) / GAIN,
    }
    largest = max(shares, key=lambda measure: shares[measure])
    return f"{what}{largest}, {error.excess:.3g} times its limit ({error.call})"
