"""Runs the per-op check over all of an engine's programs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import sites
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State
from rgexport.runtimes.engine import engine_of, open_observer
from rgexport.runtimes.machine import release_freed_memory
from rgexport.validate.bisect.sites import ObservedCall, SiteError, site_errors
from rgexport.validate.equivalences import zeros_of
from rgexport.validate.reference_pass import watched_layers


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """All errors in the order of computation; `unseen` are sites that the engine does not show."""

    errors: list[SiteError]
    first: SiteError | None
    unseen: list[str]

    @property
    def beyond(self) -> list[SiteError]:
        """The errors beyond their limits."""
        return [error for error in self.errors if not error.passed]

    def worst(self, count: int) -> list[SiteError]:
        """Returns the errors that are the largest in units of their limits."""
        return sorted(self.errors, key=lambda error: -error.excess)[:count]


def site_report(errors: Sequence[SiteError], unseen: Sequence[str] = ()) -> SiteReport:
    """Returns the report of some errors, in the order of computation."""
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
    starts = [with_large_state(state), zeros_of(state) | recurrent]
    calls = _observe(artifact, True, starts, tokens)
    if engine_of(artifact.manifest.kind).has_native(artifact):
        calls += _observe(artifact, False, starts, tokens)

    with watched_layers("Per-op check", artifact.weights) as weights:
        errors = site_errors(NumpyReference(config, weights), artifact.manifest, calls)

    seen: set[str] = set()
    for call in calls:
        seen |= call.observed.values.keys() | call.observed.gates.keys()
    return site_report(errors, [site for site in sites(config) if site not in seen])


def _observe(
    artifact: Artifact, native: bool, starts: Sequence[State], tokens: np.ndarray
) -> list[ObservedCall]:
    """Takes the last tokens in calls of all lengths that the engine has programs for."""
    release_freed_memory()
    observer = open_observer(artifact, native=native)
    calls = []
    for state in starts:
        for length in observer.lengths:
            repeated = np.resize(tokens, max(length, len(tokens)))
            text = repeated[-length:]
            observed = observer.observe(text, state)
            calls.append(ObservedCall(text, state, observed, portable=not native))
    return calls


def with_large_state(state: State) -> State:
    """Returns a state with amplified values in the caches, the older the more.

    One key of 2,048 moves attention by 0.05 % to 2 %, which float16 hides. Amplified, the oldest is
    15 % of the result, the next one two thirds of that. Sums stay below the largest float16.
    """
    amplified = {name: array.copy() for name, array in state.items() if name.endswith(".value")}
    for values in amplified.values():
        length = values.shape[1]
        largest_sum = 2.0**12 / max(np.abs(values).max(), 1)
        highest = min(length / 4, largest_sum)
        gains = highest * (2 / 3) ** np.arange(length)
        values *= np.maximum(gains, 1).astype(values.dtype)[:, None]
    return state | amplified
