"""Engines open sessions and observers: one engine for the artifacts of each format."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

OpenNarrow = Callable[[int, int | None], Session]
"""Opens a session with so many tokens of window, and so many threads."""

LENGTHS = (32, 1)
"""`Observer.lengths` of an engine that takes any number of tokens in one call."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One call of an engine on tokens [T] of one conversation.

    Attributes:
        values: site → result of its op, float32 [T, n], or [1, n] of the last token. Sites that
            the engine fuses away are missing.
        gates: the same for gates of the RG-LRU that the engine has only after the sigmoid.
        dtypes: site → the dtype that the value was computed in, where it is not float32.
        state: the canonical state of batch 1 after the tokens.
    """

    values: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    dtypes: dict[str, str]
    state: State


class Observer(Protocol):
    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens per call that take different code paths, the longest first."""
        ...

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        """Takes tokens [T], T in `lengths`, from a canonical state of batch 1, in one call."""
        ...


def observation_of(results: dict[str, np.ndarray], state: State) -> Observation:
    """Makes an observation of results [1, T, n] in the engine's dtype, which it empties."""
    dtypes = {site: a.dtype.name for site, a in results.items() if a.dtype != np.float32}
    values = {s: results.pop(s)[0].astype(np.float32, copy=False) for s in tuple(results)}
    return Observation(values=values, gates={}, dtypes=dtypes, state=state)


class Engine(ABC):
    def require(self) -> None:
        """Raises NotInstalled if the engine does not come with every install, and is missing."""
        return

    def require_trusted(self, artifact: Artifact) -> None:
        """Refuses an artifact that would run what rgexport does not write, or allocate too much."""
        return

    @abstractmethod
    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session: ...

    def lean_session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        return self.session(artifact, threads=threads)

    def narrowing(self, artifact: Artifact) -> OpenNarrow:
        """Returns a function that opens sessions with a smaller window."""
        raise RequestError(
            f"the window of {artifact.path} cannot be changed; expected an ONNX or GGUF artifact, "
            "or a checkpoint: export it again with --window"
        )

    def has_native(self, artifact: Artifact) -> bool:
        """Returns whether our kernels replace functions of the artifact on this machine."""
        return False

    def portable_session(self, artifact: Artifact) -> Session:
        """Opens a session without our kernels, which computes what other programs compute."""
        return self.session(artifact)

    def portable_observer(self, artifact: Artifact) -> Observer:
        return self.observer(artifact)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        """Opens an observer; by default, an engine shows no intermediate values."""
        raise RequestError(
            f"the engine of {artifact.manifest.kind} artifacts does not show its values"
        )

    def memory_bytes(self, manifest: Manifest) -> int:
        """Estimates a lean session's memory: all weights, and the embedding again, as the head."""
        return sum(self._tensor_bytes(manifest))

    def _tensor_bytes(self, manifest: Manifest) -> Iterator[int]:
        for name in (*manifest.tensors, EMBEDDING):
            yield sum(part.nbytes for part in manifest.tensors[name].parts.values())


def engine_of(kind: str) -> Engine:
    return cast(Engine, format_on("runtimes", kind))


def open_session(artifact: Artifact, *, threads: int | None = None, lean: bool = False) -> Session:
    """Opens a session in the engine of the artifact's format; a lean one takes the least memory.

    Raises RequestError if the engine is missing or cannot open the model.
    """
    engine = engine_of(artifact.manifest.kind)
    return (engine.lean_session if lean else engine.session)(artifact, threads=threads)


def open_narrow_session(artifact: Artifact, window: int, *, threads: int | None = None) -> Session:
    """Opens a session in which attention sees only `window` tokens before its own."""
    open_narrow = engine_of(artifact.manifest.kind).narrowing(artifact)
    widest = artifact.manifest.config.window
    if not 0 <= window <= widest:
        raise RequestError(
            f"the window is {window}; expected 0 to {widest}, that of {artifact.path}"
        )
    return open_narrow(window, threads)


def open_observer(artifact: Artifact, *, threads: int | None = None) -> Observer:
    """Opens an observer in the engine of the artifact's format; it loads the model again."""
    return engine_of(artifact.manifest.kind).observer(artifact, threads=threads)
