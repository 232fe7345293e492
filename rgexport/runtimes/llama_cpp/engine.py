"""The engine of GGUF files."""

from rgexport.export.artifact import Artifact
from rgexport.runtimes.engine import Engine, Observer, OpenNarrow
from rgexport.runtimes.llama_cpp.library import bindings
from rgexport.runtimes.llama_cpp.observer import LlamaCppObserver
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.runtimes.session import Session

_LEAN_UBATCH = 64
"""Most tokens of one call, for which llama.cpp reserves scratch memory."""


class LlamaCppEngine(Engine):
    def require(self) -> None:
        bindings()

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        return LlamaCppSession(artifact, threads=threads)

    def lean_session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """Opens a session without `mmap`, with which memory would hold repacked weights twice."""
        return LlamaCppSession(artifact, threads=threads, mmap=False, ubatch=_LEAN_UBATCH)

    def narrowing(self, artifact: Artifact) -> OpenNarrow:
        return lambda window, threads: LlamaCppSession(artifact, threads=threads, window=window)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        return LlamaCppObserver(artifact, threads=threads)


FORMAT = LlamaCppEngine()
