"""The engine of GGUF files."""

from rgexport.export.artifact import Artifact
from rgexport.runtimes.engine import Engine, Observer, OpenNarrow
from rgexport.runtimes.session import Session

_LEAN_UBATCH = 64
"""Most tokens of one call, for which llama.cpp reserves scratch memory."""


class LlamaCppEngine(Engine):
    """llama.cpp, which must be built; see `kernels.llama_cpp`."""

    def require(self) -> None:
        """See `Engine`."""
        from rgexport.runtimes.llama_cpp.library import bindings

        bindings()

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """See `Engine`."""
        from rgexport.runtimes.llama_cpp.session import LlamaCppSession

        return LlamaCppSession(artifact, threads=threads)

    def lean_session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """Without `mmap`, with which memory would hold repacked weights twice."""
        from rgexport.runtimes.llama_cpp.session import LlamaCppSession

        return LlamaCppSession(artifact, threads=threads, mmap=False, ubatch=_LEAN_UBATCH)

    def narrowing(self, artifact: Artifact) -> OpenNarrow:
        """See `Engine`: by an override of the metadata."""
        from rgexport.runtimes.llama_cpp.session import LlamaCppSession

        return lambda window, threads: LlamaCppSession(artifact, threads=threads, window=window)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        """See `Engine`."""
        from rgexport.runtimes.llama_cpp.observer import LlamaCppObserver

        return LlamaCppObserver(artifact, threads=threads)


FORMAT = LlamaCppEngine()
