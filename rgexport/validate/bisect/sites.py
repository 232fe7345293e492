"""The per-op check: compares every op of an artifact by itself with the reference's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import sites
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State
from rgexport.runtimes.engine import Observer, engine_of, open_observer
from rgexport.runtimes.machine import release_freed_memory
from rgexport.validate.bisect.site_errors import ObservedCall, SiteError, site_errors
from rgexport.validate.equivalences import zeros_of
from rgexport.validate.reference_pass import watched_layers

_MOST = 2.0**12
"""The largest amplified value of a cache; all of them add up to three times that at most."""
_FADING = 2 / 3
"""The gain of each of them beside that of the next older one."""


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The errors of all sites, call by call in the order of computation.

    `first` is the first one beyond its limit; `unseen` are sites that the engine does not show,
    because it computes them within others.
    """

    errors: list[SiteError]
    first: SiteError | None
    unseen: list[str]

    @property
    def beyond(self) -> list[SiteError]:
        return [error for error in self.errors if not error.passed]

    def worst(self, count: int) -> list[SiteError]:
        """The largest errors in units of their limits."""
        return sorted(self.errors, key=lambda error: -error.excess)[:count]


def site_report(errors: Sequence[SiteError], unseen: Sequence[str] = ()) -> SiteReport:
    first = next((error for error in errors if not error.passed), None)
    return SiteReport(errors=list(errors), first=first, unseen=list(unseen))


def compare_sites(
    artifact: Artifact, config: GriffinConfig, state: State, tokens: np.ndarray
) -> SiteReport:
    """Compares all ops in the artifact's own engine, in each of the engine's programs.

    Where native kernels ran, the same is done without them: other runtimes run the bodies.

    Args:
        artifact: it and its weights.
        config: the original's, or its own where no original is known.
        state: the artifact's canonical state of batch 1. The ops start from it, and from position
            0, which must ignore the state of the recurrence.
        tokens: [T]; the last ones are taken, and repeated if they are too few.

    Raises:
        RequestError: a package that observing takes is missing.
    """
    recurrent = {name: array for name, array in state.items() if name.endswith(".rg_lru")}
    starts = with_large_state(state), zeros_of(state) | recurrent
    engine = engine_of(artifact.manifest.kind)
    calls = _observe(lambda: open_observer(artifact), starts, tokens)
    if engine.has_native(artifact):
        portable = _observe(lambda: engine.portable_observer(artifact), starts, tokens)
        calls += [replace(call, portable=True) for call in portable]
    with watched_layers("Per-op check", artifact.weights) as weights:
        model = NumpyReference(config, weights)
        errors = site_errors(model, artifact.manifest, calls)
    seen = {site for call in calls for site in (*call.observed.values, *call.observed.gates)}
    return site_report(errors, [site for site in sites(config) if site not in seen])


def _observe(
    open_one: Callable[[], Observer], starts: Sequence[State], tokens: np.ndarray
) -> list[ObservedCall]:
    """Observes calls of each length from each start; closes the engine."""
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

    One key of 2,048 that is seen or not moves attention by 0.05 % to 2 %, which arithmetic in
    float16 hides. The oldest value becomes a quarter as large as the whole window's if all have one
    sign, so that its key is 15 % of the result. The next one gets two thirds of that, for the token
    that does not see the oldest any more, and so on. Sums stay below what float16 can hold.
    """
    amplified = {name: array.copy() for name, array in state.items() if name.endswith(".value")}
    for values in amplified.values():
        highest = min(values.shape[1] / 4, _MOST / max(np.abs(values).max(), 1))
        gains = highest * _FADING ** np.arange(values.shape[1])
        values *= np.maximum(gains, 1).astype(values.dtype)[:, None]
    return state | amplified
