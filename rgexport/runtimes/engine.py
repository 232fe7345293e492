"""Opening sessions and observers: each format has an engine that runs its artifacts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import cast

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.griffin.layout import EMBEDDING
from rgexport.runtimes.observation import Observer
from rgexport.runtimes.session import Session

Narrowing = Callable[[int, int | None], Session]
"""Opens a session with so many tokens of window, and so many threads."""


class Engine(ABC):
    """Opens artifacts of one kind; its library is loaded when it is needed."""

    def require(self) -> None:
        """Checks that the engine is installed, before there is an artifact to open.

        Raises:
            NotInstalled: it is not.
        """
        return  # most come with every install

    def require_trusted(self, artifact: Artifact) -> None:
        """Checks what an artifact would run, before there is a session; by default, nothing.

        Raises:
            RequestError: it would run what rgexport does not write, or allocate too much.
        """
        return

    @abstractmethod
    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """See `open_session`."""

    def lean_session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """As `session`, with the settings that take the least memory."""
        return self.session(artifact, threads=threads)

    def narrowing(self, artifact: Artifact) -> Narrowing:
        """What opens sessions with a smaller window; by default, there is nothing that can.

        Raises:
            RequestError: the engine takes the window that the artifact has.
        """
        raise RequestError(
            f"the window of {artifact.path} cannot be changed; expected an ONNX or GGUF artifact, "
            "or a checkpoint: export it again with --window"
        )

    def has_native(self, artifact: Artifact) -> bool:
        """Whether our kernels replace functions of the artifact here; by default, they do not."""
        return False

    def portable_session(self, artifact: Artifact) -> Session:
        """As `session`, without our kernels: it computes what other programs compute."""
        return self.session(artifact)

    def portable_observer(self, artifact: Artifact) -> Observer:
        """As `observer`, without our kernels."""
        return self.observer(artifact)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        """See `open_observer`; by default, an engine shows no intermediate values."""
        raise RequestError(
            f"the engine of {artifact.manifest.kind} artifacts does not show its values"
        )

    def memory_bytes(self, manifest: Manifest) -> int:
        """About what a lean session takes: all weights, and the embedding again, as the head.

        Measured: 0.98 to 1.03 times that for 150 million weights in ONNX Runtime, 0.85 to 1.1
        times in llama.cpp.
        """
        return sum(self._held(manifest))

    def _held(self, manifest: Manifest) -> Iterator[int]:
        for name in (*manifest.tensors, EMBEDDING):
            yield sum(part.nbytes for part in manifest.tensors[name].parts.values())


def engine_of(kind: str) -> Engine:
    """The engine of a kind of artifact."""
    return cast(Engine, format_on("runtimes", kind))


def open_session(artifact: Artifact, *, threads: int | None = None, lean: bool = False) -> Session:
    """A session in the engine of the artifact's format; a lean one takes the least memory.

    Raises:
        RequestError: the engine is missing or cannot open the model.
    """
    engine = engine_of(artifact.manifest.kind)
    return (engine.lean_session if lean else engine.session)(artifact, threads=threads)


def open_narrow_session(artifact: Artifact, window: int, *, threads: int | None = None) -> Session:
    """A session in which attention sees `window` tokens before its own, fewer than it could.

    Raises:
        RequestError: the engine is missing, cannot open the model, or cannot do that; or the
            artifact's window is smaller.
    """
    narrowing = engine_of(artifact.manifest.kind).narrowing(artifact)
    own = artifact.manifest.config.window
    if not 0 <= window <= own:
        raise RequestError(f"the window is {window}; expected 0 to {own}, that of {artifact.path}")
    return narrowing(window, threads)


def open_observer(artifact: Artifact, *, threads: int | None = None) -> Observer:
    """An observer in the engine of the artifact's format, with a model of its own in memory.

    Raises:
        RequestError: the engine or a package that observing needs is missing, or the engine cannot
            open the model.
    """
    return engine_of(artifact.manifest.kind).observer(artifact, threads=threads)
