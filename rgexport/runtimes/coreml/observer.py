"""The values at the sites of a Core ML package, computed by the interpreter.

On macOS too, since Core ML shows only the outputs of a function.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest, feature_name
from rgexport.export.mil.package import Package, open_package
from rgexport.griffin.sites import sites
from rgexport.griffin.state import State
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner, States
from rgexport.runtimes.coreml.runner import joined
from rgexport.runtimes.coreml.session import CoreMLSession
from rgexport.runtimes.observation import Observation, observed


class CoreMLObserver:
    """Observes `prefill` on a whole chunk, and `decode` on a single token."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None):
        """Translates the programs; `threads` is only reported, as by the session.

        Raises:
            RequestError: an operation that rgexport does not emit.
        """
        assert isinstance(artifact.manifest, CoreMLManifest)
        self.lengths = (artifact.manifest.coreml.prefill_length, 1)
        self._sites = {feature_name(site): site for site in sites(artifact.manifest.config)}
        self._kept = {
            plan.name: _Kept(open_package(artifact.file(plan.name)), tuple(self._sites))
            for plan in artifact.manifest.packages
        }
        runner = joined(artifact.manifest, self._kept)
        self._session = CoreMLSession(artifact, threads=threads, runner=runner)

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        """Takes tokens [T] from a canonical state of batch 1, in one call of a function."""
        self._session.set_state(state)
        self._session.prefill(tokens[None])
        given = {name: v for kept in self._kept.values() for name, v in kept.take().items()}
        found = {site: given.pop(name) for name, site in self._sites.items() if name in given}
        return observed(found, self._session.get_state())


class _Kept(InterpreterRunner):
    """Keeps the values of the last calls until they are taken."""

    def __init__(self, package: Package, also: Sequence[str]):
        super().__init__(package, also=also)
        self._given: dict[str, np.ndarray] = {}

    def take(self) -> dict[str, np.ndarray]:
        """Returns the values by name, and forgets them."""
        given, self._given = self._given, {}
        return given

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: States | None
    ) -> dict[str, np.ndarray]:
        found = super().predict(function, inputs, state)
        self._given |= found
        return found
