"""Engines open sessions and observers: one engine for the artifacts of each format."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest, StoredTensor
from rgexport.errors import RequestError
from rgexport.formats import format_on
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.session import Session

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


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of a session or an observer; an engine ignores those that it does not have.

    Attributes:
        threads: the most threads; None for one a processor.
        lean: whether the session takes the least memory.
        native: whether our kernels may run; without them, it computes what other programs compute.
        window: tokens that attention sees before its own, where the engine `can_narrow`.
    """

    threads: int | None = None
    lean: bool = False
    native: bool = True
    window: int | None = None


class Engine(ABC):
    @property
    def can_narrow(self) -> bool:
        return False

    """Whether sessions can have a smaller window than their artifact."""

    def require(self) -> None:
        """Raises NotInstalled if the engine does not come with every install, and is missing."""
        return

    def require_trusted(self, artifact: Artifact) -> None:
        """Refuses an artifact that would run what rgexport does not write, or allocate too much."""
        return

    @abstractmethod
    def session(self, artifact: Artifact, options: SessionOptions) -> Session: ...

    def has_native(self, artifact: Artifact) -> bool:
        """Returns whether our kernels replace functions of the artifact on this machine."""
        return False

    def observer(self, artifact: Artifact, options: SessionOptions) -> Observer:
        """Opens an observer; by default, an engine shows no intermediate values."""
        raise RequestError(
            f"the engine of {artifact.manifest.kind} artifacts does not show its values"
        )

    def memory_bytes(self, manifest: Manifest) -> int:
        """Estimates a lean session's memory: all weights, and the embedding again, as the head."""
        names = (*manifest.tensors, EMBEDDING)
        return sum(self._held_bytes(manifest.tensors[name]) for name in names)

    def portable_bytes(self, manifest: Manifest) -> int:
        """Estimates the memory of a session without native kernels: 3.9 GB for a 2B in int4."""
        return 2 * self.memory_bytes(manifest)

    def _held_bytes(self, tensor: StoredTensor) -> int:
        return sum(part.nbytes for part in tensor.parts.values())


def engine_of(kind: str) -> Engine:
    return cast(Engine, format_on("runtimes", kind))


def require_narrowing(artifact: Artifact) -> None:
    if not engine_of(artifact.manifest.kind).can_narrow:
        raise RequestError(
            f"the window of {artifact.path} cannot be changed; expected an ONNX or GGUF artifact, "
            "or a checkpoint: export it again with --window"
        )


def open_session(artifact: Artifact, **options: Any) -> Session:
    """Opens a session in the engine of the artifact's format, with options of `SessionOptions`.

    Raises RequestError if the engine is missing or cannot open the model, or for a wrong window.
    """
    chosen, widest = SessionOptions(**options), artifact.manifest.config.window
    if chosen.window is not None:
        require_narrowing(artifact)
        if not 0 <= chosen.window <= widest:
            raise RequestError(
                f"the window is {chosen.window}; expected 0 to {widest}, that of {artifact.path}"
            )
    with task(f"Loading {artifact.manifest.name}", leaves_line=False):
        return engine_of(artifact.manifest.kind).session(artifact, chosen)


def open_observer(artifact: Artifact, **options: Any) -> Observer:
    """Opens an observer in the engine of the artifact's format; it loads the model again."""
    return engine_of(artifact.manifest.kind).observer(artifact, SessionOptions(**options))
