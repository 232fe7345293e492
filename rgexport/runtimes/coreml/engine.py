"""The engine for Core ML packages: Core ML on macOS, the interpreter elsewhere."""

import sys

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES
from rgexport.runtimes.coreml.observer import CoreMLObserver
from rgexport.runtimes.coreml.session import CoreMLSession
from rgexport.runtimes.engine import Engine, Observer
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
