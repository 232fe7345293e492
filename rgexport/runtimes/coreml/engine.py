"""The engine for Core ML packages: Core ML on macOS, the interpreter otherwise."""

import sys

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.coreml.manifest import CoreMLManifest, feature_name
from rgexport.artifacts.coreml.mil.package import open_package
from rgexport.artifacts.manifest import Manifest
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES
from rgexport.runtimes.coreml.session import CoreMLSession
from rgexport.runtimes.engine import Engine, Observation, Observer, SessionOptions, observation_of
from rgexport.runtimes.session import Session


class CoreMLEngine(Engine):
    def session(self, artifact: Artifact, options: SessionOptions) -> Session:
        return CoreMLSession(artifact, threads=options.threads)

    def observer(self, artifact: Artifact, options: SessionOptions) -> Observer:
        return CoreMLObserver(artifact, options.threads)

    def memory_bytes(self, manifest: Manifest) -> int:
        """Estimates the memory; the interpreter reads weights while it runs."""
        return super().memory_bytes(manifest) if sys.platform == "darwin" else CACHE_BYTES


FORMAT = CoreMLEngine()


class CoreMLObserver:
    """Observes `prefill` on a whole chunk, and `decode` on a single token."""

    def __init__(self, artifact: Artifact, threads: int | None):
        assert isinstance(artifact.manifest, CoreMLManifest)
        self.lengths = (artifact.manifest.coreml.prefill_length, 1)
        self._sites = {feature_name(site): site for site in sites(artifact.manifest.config)}
        runners = {
            plan.name: InterpreterRunner(open_package(artifact.file(plan.name)), tuple(self._sites))
            for plan in artifact.manifest.packages
        }
        self._session = CoreMLSession(artifact, threads=threads, runners=runners)

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        self._session.set_state(state)
        features = self._session.watch(tokens)
        values = {s: features.pop(name) for name, s in self._sites.items() if name in features}
        return observation_of(values, self._session.get_state())
