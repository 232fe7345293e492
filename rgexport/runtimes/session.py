"""The interface that every engine implements, and the checks that all engines share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State

LOGITS_BYTES = 192 << 20
"""Logits of a block of positions, in two copies."""
MAX_BLOCK = 512
_MIN_BLOCK = 8


@dataclass(frozen=True)
class SessionInfo:
    """Facts about a session, for reports.

    Attributes:
        weight_bytes: weights that one decode step reads.
        state_bytes: state of one sequence.
        prefill_chunk: most tokens of a prefill for which the weights are read once.
        chunk_logits: whether a chunk returns the logits of all its tokens, instead of single steps.
        whole_chunks: whether tokens that do not fill a chunk are taken in single steps.
        exact_tokens: most tokens of a call, of all rows, that give the bits that each gives alone.
        kernels: `native` and an instruction set where our kernels run, otherwise `stock`.
    """

    engine: str
    engine_version: str
    threads: int
    activation_dtype: str
    weight_bytes: int
    state_bytes: int
    prefill_chunk: int
    chunk_logits: bool = True
    whole_chunks: bool = False
    exact_tokens: int = 1
    kernels: str = "stock"

    @property
    def title(self) -> str:
        return f"{self.engine} {self.engine_version}, {self.kernels} kernels"


class UnchangedFiles:
    """Detects changes of an artifact's files; `prefix` selects them by name.

    A session may have mapped them, and reading past the end of a file that was cut ends the
    process. So sessions check whenever a conversation begins.
    """

    def __init__(self, artifact: Artifact, prefix: str = ""):
        is_file = artifact.path.is_file()  # a GGUF file is its own folder
        self._stamps: dict[Path, tuple[int, int, int] | None] = {}
        for name, record in artifact.manifest.files.items():
            path = artifact.path if is_file else artifact.file(name)
            if name.startswith(prefix) and path.exists():  # the engine reports missing files
                self._stamps[path] = _stamp(path)
                if path.stat().st_size != record.size:
                    raise _changed(path)

    def require(self) -> None:
        for path, before in self._stamps.items():
            if _stamp(path) != before:
                raise _changed(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> RequestError:
    return RequestError(f"{path} changed while it was open; open the artifact again")


def checked_tokens(tokens: np.ndarray, batch: int, vocab_size: int) -> np.ndarray:
    """Returns token ids as int64 [batch, T]; refuses other shapes, and unknown ids."""
    tokens = np.asarray(tokens, np.int64)
    if tokens.ndim != 2 or len(tokens) != batch or not tokens.shape[1]:
        raise RequestError(f"tokens have shape {tokens.shape}; expected [{batch}, T], T ≥ 1")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        worst = tokens.max() if tokens.min() >= 0 else tokens.min()
        raise RequestError(f"token id {worst} is outside of the vocabulary of {vocab_size}")
    return tokens


def require_fitting(state: State, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a state with other names or shapes (without the batch axis) than `shapes`."""
    batch = np.shape(state.get(POSITION, ()))[:1]
    expected = {name: (*batch, *shape) for name, shape in ({**shapes, POSITION: ()}).items()}
    complaints = [
        f"{name} is {'missing' if name in expected else 'unknown'}"
        for name in expected.keys() ^ state.keys()
    ]
    complaints += [
        f"{name} has shape {np.shape(state[name])}; expected {expected[name]}"
        for name in expected.keys() & state.keys()
        if np.shape(state[name]) != expected[name]
    ]
    if complaints:
        raise RequestError(f"this state is of another model: {'; '.join(complaints[:5])}")


class Session(ABC):
    """A model in an engine, with the state of `batch` conversations.

    Neighbouring rows of the batch can be used without the others, so that conversations at
    different positions come and go. The rows of one call take the same number of tokens. Logits are
    float32.
    """

    vocab_size: int
    _opened_files: Sequence[UnchangedFiles] = ()
    _tried: tuple[range, np.ndarray] | None = None  # of the last `verify`, until `accept`

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self.info.title}, {len(self.position)} rows>"

    @property
    @abstractmethod
    def info(self) -> SessionInfo: ...

    @property
    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape without the batch axis of each canonical state but the position."""

    @property
    @abstractmethod
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""

    @abstractmethod
    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations.

        Raises RequestError if a file of the artifact has changed, or the engine cannot hold so
        many.
        """

    @abstractmethod
    def get_rows(self, rows: range) -> State:
        """Returns a copy of the canonical state of some rows."""

    @abstractmethod
    def close(self) -> None:
        """Frees the artifact's files and memory; the session cannot be used any more."""

    @abstractmethod
    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray: ...

    @abstractmethod
    def _set_rows(self, rows: range, state: State) -> None: ...

    def _verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _accept(self, rows: range, tokens: np.ndarray, counts: Sequence[int]) -> None:
        raise NotImplementedError

    def take(self, rows: range, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [R, T], T ≥ 1, of some rows, in chunks of the session's choice.

        Returns the last logits, [R, num_logits, vocab]. Raises RequestError for another shape, or
        an id outside of the vocabulary.
        """
        tokens = checked_tokens(tokens, len(rows), self.vocab_size)
        return self._take(rows, tokens, max(1, min(num_logits, tokens.shape[1])))

    def verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        """Takes tokens [R, T], T ≥ 1, of some rows on trial; `accept` must be the next call.

        Returns all logits [R, T, vocab], the bits of single steps. R · T is at most
        `info.exact_tokens`, which must be above 1. Raises as `take` does.
        """
        tokens = checked_tokens(tokens, len(rows), self.vocab_size)
        logits = self._verify(rows, tokens)
        self._tried = rows, tokens
        return logits

    def accept(self, counts: Sequence[int]) -> None:
        """Keeps so many of the first tokens of each row of the last `verify`: 0 to all of them.

        Raises ValueError if there are not so many, or `verify` was not the call before.
        """
        if self._tried is None:
            raise ValueError("no tokens are on trial: call verify first")
        rows, tokens = self._tried
        if len(counts) != len(rows) or not all(0 <= n <= tokens.shape[1] for n in counts):
            raise ValueError(f"{counts} tokens cannot be kept of {list(tokens.shape)} on trial")
        self._tried = None
        self._accept(rows, tokens, counts)

    def set_rows(self, rows: range, state: State) -> None:
        """Lets rows continue from a canonical state of as many, by any engine.

        Raises RequestError for another model's names or shapes; dtypes are converted.
        """
        require_fitting(state, self.state_shapes)
        self._set_rows(rows, state)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [B, T] of all rows like `take`; returns logits [B, num_logits, vocab]."""
        return self.take(self._all, tokens, num_logits)

    def prefill_at_once(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Prefills in one run, as other programs do, if the engine can; memory grows with T."""
        return self.prefill(tokens, num_logits)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token a row, [B]; returns its logits, [B, vocab]."""
        return self.take(self._all, np.reshape(tokens, (-1, 1)))[:, 0]

    def get_state(self) -> State:
        return self.get_rows(self._all)

    def set_state(self, state: State) -> None:
        """Continues from a canonical state, of any batch size; raises as `set_rows` does."""
        require_fitting(state, self.state_shapes)
        if len(state[POSITION]) != len(self._all):
            self.reset(len(state[POSITION]))
        self._set_rows(self._all, state)

    @property
    def _all(self) -> range:
        return range(len(self.position))

    def require_unchanged(self) -> None:
        """Raises RequestError if the artifact's files have changed. Any thread may call it."""
        for files in self._opened_files:
            files.require()


def block_size(session: Session) -> int:
    """Returns how many rows of logits fit into `LOGITS_BYTES`, in whole chunks if possible."""
    size = min(MAX_BLOCK, max(_MIN_BLOCK, LOGITS_BYTES // (2 * 4 * session.vocab_size)))
    chunk = session.info.prefill_chunk
    return size - size % chunk if session.info.whole_chunks and size > chunk else size


def whole_chunks(session: Session, positions: Iterable[int]) -> set[int]:
    """Returns the positions between chunks of fixed length; all, if chunks have any length."""
    whole = session.info.prefill_chunk if session.info.whole_chunks else 1
    return {position for position in positions if position % whole == 0}


def blocks(session: Session, edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields the first position and the end of each block; every edge ends a block."""
    size = block_size(session)
    for first, last in pairwise(sorted({0, *edges})):
        for start in range(first, last, size):
            yield start, min(start + size, last)
