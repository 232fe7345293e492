"""What runs a kind of artifact: what a format has to say on this floor."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.griffin.layout import EMBEDDING
from rgexport.runtimes.observation import Observer
from rgexport.runtimes.session import Session


class Engine(ABC):
    """Opens artifacts of one kind; libraries are loaded when they are needed."""

    def require(self) -> None:
        """Looks whether the engine is there, before there is something for it to open.

        Raises:
            NotInstalled: it is not.
        """
        return  # most come with every install

    @abstractmethod
    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """See `open_session`."""

    def lean_session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """The same, where opening takes least memory."""
        return self.session(artifact, threads=threads)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        """See `open_observer`; most engines do not show what they compute on the way."""
        raise RequestError(f"what runs {artifact.manifest.kind} artifacts does not show its values")

    def memory_bytes(self, manifest: Manifest) -> int:
        """About what a lean session takes: all weights, and the embedding once more, as the head.

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
    """A session in the artifact's own engine; a lean one takes as little memory as it can.

    Raises:
        RequestError: the engine is missing or cannot open the model.
    """
    engine = engine_of(artifact.manifest.kind)
    return (engine.lean_session if lean else engine.session)(artifact, threads=threads)


def open_observer(artifact: Artifact, *, threads: int | None = None) -> Observer:
    """An observer in the artifact's own engine; it holds the model once more, beside a session.

    Raises:
        RequestError: the engine, or a package that looking into the model takes, is missing; or
            it cannot open the model.
    """
    return engine_of(artifact.manifest.kind).observer(artifact, threads=threads)
