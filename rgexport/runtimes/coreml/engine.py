"""The engine for Core ML packages: Core ML on macOS, the interpreter otherwise."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest, feature_name
from rgexport.export.manifest import Manifest
from rgexport.export.mil.package import Package, open_package
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.runtimes.coreml.interpreter.interpreter import FeatureStates, InterpreterRunner
from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES
from rgexport.runtimes.coreml.session import CoreMLSession, combine
from rgexport.runtimes.engine import Engine, Observation, Observer, observation_of
from rgexport.runtimes.session import Session


class CoreMLEngine(Engine):
    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        return CoreMLSession(artifact, threads=threads)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        return CoreMLObserver(artifact, threads=threads)

    def memory_bytes(self, manifest: Manifest) -> int:
        """Estimates the memory; the interpreter reads weights while it runs."""
        return super().memory_bytes(manifest) if sys.platform == "darwin" else CACHE_BYTES


FORMAT = CoreMLEngine()


class CoreMLObserver:
    """Observes `prefill` on a whole chunk, and `decode` on a single token."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None):
        assert isinstance(artifact.manifest, CoreMLManifest)
        self.lengths = (artifact.manifest.coreml.prefill_length, 1)
        self._sites = {feature_name(site): site for site in sites(artifact.manifest.config)}
        self._recorders = {
            plan.name: _RecordingRunner(open_package(artifact.file(plan.name)), tuple(self._sites))
            for plan in artifact.manifest.packages
        }
        runner = combine(artifact.manifest, self._recorders)
        self._session = CoreMLSession(artifact, threads=threads, runner=runner)

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        self._session.set_state(state)
        self._session.prefill(tokens[None])
        features = {name: v for r in self._recorders.values() for name, v in r.take().items()}
        values = {s: features.pop(name) for name, s in self._sites.items() if name in features}
        return observation_of(values, self._session.get_state())


class _RecordingRunner(InterpreterRunner):
    def __init__(self, package: Package, extra_results: Sequence[str]):
        super().__init__(package, extra_results=extra_results)
        self._values: dict[str, np.ndarray] = {}

    def take(self) -> dict[str, np.ndarray]:
        values, self._values = self._values, {}
        return values

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: FeatureStates | None
    ) -> dict[str, np.ndarray]:
        outputs = super().predict(function, inputs, state)
        self._values |= outputs
        return outputs
