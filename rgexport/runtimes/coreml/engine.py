"""The engine for Core ML packages: Core ML on macOS, the interpreter elsewhere."""

import sys

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.runtimes.engine import Engine, Observer
from rgexport.runtimes.session import Session


class CoreMLEngine(Engine):
    """Core ML on macOS, our interpreter elsewhere."""

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """See `Engine`."""
        from rgexport.runtimes.coreml.session import CoreMLSession

        return CoreMLSession(artifact, threads=threads)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        """See `Engine`."""
        from rgexport.runtimes.coreml.observer import CoreMLObserver

        return CoreMLObserver(artifact, threads=threads)

    def memory_bytes(self, manifest: Manifest) -> int:
        """See `Engine`; the interpreter reads weights while it runs."""
        from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES

        return super().memory_bytes(manifest) if sys.platform == "darwin" else CACHE_BYTES


FORMAT = CoreMLEngine()
